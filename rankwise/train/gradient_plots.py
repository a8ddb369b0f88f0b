"""Plots of gradient norms: groups over time, A against B, and with `gradient_layers` all of a run folder.

plot_gradients(Path("runs/first"))      # → runs/first/plots/gradient_norms.png, layer_heatmap.png, …
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.errors import DataError, need
from rankwise.page import canvas
from rankwise.page.blocks import Block, Folded, Plot, drawn, into, pictures
from rankwise.page.svg import Curves, Line
from rankwise.train.expert_record import Routing
from rankwise.train.gradient_summary import (
    NAMES,
    NAN,
    Boundary,
    GradientTables,
    Layers,
    Series,
    by_kind,
    expert_blocks,
    gradient_summary,
    mean,
    positive,
    read_tables,
    series,
    summary_blocks,
    write_summary,
)
from rankwise.train.loss_plots import draw_phases

TITLES = {"attention": "Attention", "mlp": "MLP"}
MOST_CELLS = 400  # columns of a heatmap: more than that and pixels would drop some
MOST_TICKS = 24
MOMENTS = 7
WIDTH = 1.7  # of a line
MARKERS = "os^Dv<>"
GROUPS_OVER_TIME, MOVING = "gradient_norms", "Gradient norms before clipping, moving average of 5 steps"
LIGHTEST = 0.88  # of the colour map: the last tenth is too pale for lines on white

Rows = Iterable[Mapping[str, Any]] | Series


def plot_layer_heatmap(layers: Rows, path: Path | str, phases: Sequence[tuple[float, str]] = ()) -> Path:
    """Norms over steps × layers, attention and MLP on one logarithmic colour scale; blank (white) did not train.

    layers: rows of `gradient_analysis.layer_norms.csv`. phases: as `Series.boundaries` has them.
    """
    table, kinds = kinds_of(layers)
    height = max(1.4, min(3.0, 0.13 * max(len(one.names) for one in kinds.values()) + 0.5))
    figure, axes = canvas.panels(7.2, 0.6 + (height + 0.3) * len(kinds), rows=len(kinds))
    binned = {kind: binned_columns(table.steps, one.curves) for kind, one in kinds.items()}
    values = [v for _, grid in binned.values() for row in grid for v in row if v > 0]
    norm = need("matplotlib.colors", extra="plots").LogNorm(min(values, default=1.0), max(values, default=10.0))
    masked = np.ma.masked_invalid
    for axis, (kind, one) in zip(axes, kinds.items(), strict=True):
        edges, grid = binned[kind]
        rows = [i - 0.5 for i in range(len(one.names) + 1)]
        image = axis.pcolormesh(edges, rows, masked([positive(row) for row in grid]), cmap=canvas.colormap(), norm=norm)
        axis.grid(False)
        canvas.whole_ticks(axis.xaxis)
        tick_layers(axis.set_yticks, one.names)
        draw_phases(axis, phases, named=axis is axes[0])
        canvas.name_axes(axis, "optimizer step" if axis is axes[-1] else "", f"{TITLES[kind]}: layer")
    canvas.log_ticks(canvas.colour_bar(figure, image, axes, "gradient norm", pad=0.015, aspect=30).ax.yaxis)
    return canvas.save(figure, path)


def kinds_of(layers: Rows) -> tuple[Series, dict[str, Layers]]:
    table = series(layers)
    kinds = by_kind(table)
    if not kinds:
        raise DataError("the table of gradient norms holds no norm of a layer")
    return table, kinds


def binned_columns(steps: Sequence[int], curves: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Edges between neighbouring (groups of) steps, and the mean of each layer in each group."""
    size = max(1, -(-len(steps) // MOST_CELLS))
    groups = [range(i, min(i + size, len(steps))) for i in range(0, len(steps), size)]
    middle = [(steps[group[-1]] + steps[nxt[0]]) / 2 for group, nxt in pairwise(groups)]
    gap = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    return [steps[0] - gap, *middle, steps[-1] + gap], [
        [mean(curve[i] for i in group) for group in groups] for curve in curves
    ]


def tick_layers(ticks: Any, names: Sequence[str], most: int = MOST_TICKS) -> None:
    """Names of layers, as many as there is room for."""
    shown = range(0, len(names), -(-len(names) // most))
    ticks(list(shown), [names[i] for i in shown])


def plot_layer_comparison(layers: Rows, path: Path | str) -> Path:
    """Mean norm of each layer over the steps at which it trained, attention beside MLP."""
    _, kinds = kinds_of(layers)
    names = max((one.names for one in kinds.values()), key=len)
    figure, axis = canvas.new_figure(min(11.0, max(5.0, 1.6 + 0.3 * len(names))), 3.2)
    width = 0.8 / len(kinds)
    looks = {"attention": (canvas.BLUE, ""), "mlp": (canvas.YELLOW, "////")}
    for place, (kind, one) in enumerate(kinds.items()):
        colour, hatch = looks[kind]
        heights = [mean(curve) for curve in one.curves]
        middle = [i + (place - (len(kinds) - 1) / 2) * width for i in range(len(heights))]
        kept = [(x, height) for x, height in zip(middle, heights, strict=True) if math.isfinite(height)]
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axis.bar(*zip(*kept, strict=True), width=width, label=NAMES[kind], **look)
    axis.grid(False, axis="x")
    axis.set_xlim(-0.6, len(names) - 0.4)
    tick_layers(axis.set_xticks, names)
    canvas.name_axes(axis, "layer", "mean gradient norm")
    axis.margins(y=0.18)
    canvas.legend(axis, loc="upper right", ncols=2)
    return canvas.save(figure, path)


def plot_gradient_evolution(layers: Rows, path: Path | str, moments: int = MOMENTS) -> Path:
    """Norm over the layers at a few moments of training, evenly spaced, each averaged over the steps around it."""
    table, kinds = kinds_of(layers)
    count = min(moments, len(table.steps))
    chosen = sorted({round(i * (len(table.steps) - 1) / max(1, count - 1)) for i in range(count)})
    figure, axes = canvas.panels(7.2, 3.4, columns=len(kinds))
    shades = canvas.colormap()
    for axis, (kind, one) in zip(axes, kinds.items(), strict=True):
        curves = [positive(curve) for curve in one.curves]
        for place, moment in enumerate(chosen):
            colour = shades(LIGHTEST * place / max(1, len(chosen) - 1))
            values = [table.smoothed_at(curve, moment) for curve in curves]
            look = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "markersize": 3.5, "linewidth": 1.3}
            axis.plot(range(len(values)), values, label=f"step {table.steps[moment]:,}", **look)
        axis.set_yscale("log")
        canvas.log_ticks(axis.yaxis)
        tick_layers(axis.set_xticks, one.names, MOST_TICKS // len(kinds))
        canvas.name_axes(axis, "layer", "gradient norm" if axis is axes[0] else "", TITLES[kind])
    canvas.legend_outside(figure, "lower center", axes[:1], columns=4)
    return canvas.save(figure, path)


Style = str | tuple[int, tuple[int, ...]]  # as matplotlib has line styles
LINES: dict[str, tuple[str, str, Style]] = {
    "total_norm": ("all", canvas.INK, ":"),
    "attention_norm": ("attention", canvas.BLUE, "-"),
    "mlp_norm": ("MLP", canvas.YELLOW, "--"),
    "embed_norm": ("embeddings", canvas.GREY, "-."),
    "lm_head_norm": ("output head", "#4a566c", (0, (5, 1, 1, 1))),
}


def plot_gradient_norms(groups: Rows, path: Path | str, phases: Sequence[Boundary] | None = None) -> Path:
    """Norms of the groups over the steps, logarithmic above linear; changes of phase are marked.

    groups: rows of `gradient_analysis.group_norms.csv`. phases: as `gradient_summary.boundaries` has them; None: read
    off the rows. DataError: no row holds a norm.
    """
    table = series(groups)
    found = table.filled()
    names = [name for name in LINES if name in found and not is_only_group(name, found)]
    if not names:
        raise DataError("the table of gradient norms holds no norm of a group")
    figure, (above, below) = canvas.panels(7.2, 5.4, rows=2)
    for axis, scale in ((above, "log"), (below, "linear")):
        for name in names:
            label, colour, style = LINES[name]
            draw_smoothed(axis, table, positive(found[name]), label, colour, style)
        axis.set_yscale(scale)
        frame_steps(axis, table.steps)
        canvas.name_axes(axis, "optimizer step" if scale == "linear" else "", f"gradient norm ({scale})")
    canvas.log_ticks(above.yaxis)
    below.set_ylim(bottom=0)
    for axis in (above, below):
        draw_phases(axis, table.boundaries() if phases is None else phases, named=axis is above)
    canvas.legend_outside(figure, "lower center", [above], columns=len(names))
    return canvas.save(figure, path)


def is_only_group(name: str, found: Mapping[str, Sequence[float]]) -> bool:
    """Whether this is the total of a single group, which would hide that group's line."""
    return name == "total_norm" and sum(group in found for group in LINES) == 2


def draw_smoothed(axis: Any, table: Series, values: Sequence[float], label: str, colour: str, style: Style) -> None:
    """The values faint, their moving average over them."""
    axis.plot(table.steps, values, color=colour, linewidth=0.6, alpha=0.35)
    canvas.draw_line(axis, table.steps, table.smoothed(values), label, colour, style, WIDTH)


def frame_steps(axis: Any, steps: Sequence[int]) -> None:
    """The whole run, whatever trains in this panel, with whole numbers at the ticks."""
    margin = max(0.5, 0.02 * (steps[-1] - steps[0]))
    axis.set_xlim(steps[0] - margin, steps[-1] + margin)
    canvas.whole_ticks(axis.xaxis, 7)


def draw_factors(table: Series, path: Path | str, phases: Sequence[Boundary] | None = None) -> Path:
    """Gradient norms of the LoRA factors A and B apart, and the size of the delta that they make. DataError: no site
    has the factors A and B."""
    found = table.filled()
    kinds = factor_kinds(table)
    if not kinds:
        raise DataError("the table of gradient norms holds no LoRA site")
    nothing = [NAN] * len(table.steps)
    figure, axes = canvas.panels(3.2 * (len(kinds) + 1), 3.2, columns=len(kinds) + 1)
    *of_kinds, last = axes
    for axis, kind in zip(of_kinds, kinds, strict=True):
        for part, ink, dashes in (("b", canvas.BLUE, "-"), ("a", canvas.YELLOW, "--")):
            values = positive(found.get(f"{kind}_norm_{part}", nothing))
            draw_smoothed(axis, table, values, part.upper(), ink, dashes)
        axis.set_yscale("log")
        canvas.log_ticks(axis.yaxis)
        canvas.name_axes(axis, "optimizer step", "gradient norm", f"{TITLES[kind]}: A and B")
        label, colour, style = LINES[f"{kind}_norm"]
        canvas.draw_line(last, table.steps, found.get(f"{kind}_delta_norm", nothing), label, colour, style, WIDTH)
    canvas.name_axes(last, "optimizer step", "‖scale · BA‖ of the sites that train", "Size of the delta")
    last.set_ylim(bottom=0)
    for axis in axes:
        canvas.legend(axis, loc="best")
        frame_steps(axis, table.steps)
        draw_phases(axis, table.boundaries() if phases is None else phases, named=False)
    return canvas.save(figure, path)


def factor_kinds(table: Series) -> list[str]:
    found = table.filled()
    return [kind for kind in TITLES if f"{kind}_norm_b" in found]


def gradient_plots(tables: GradientTables) -> list[Plot]:
    """Every plot that the tables have numbers for."""
    found: list[Plot] = []
    if tables.group_curves.filled():
        draw = partial(plot_gradient_norms, tables.group_curves, phases=tables.boundaries())
        found.append(Plot(GROUPS_OVER_TIME, MOVING, draw))
    if by_kind(tables.layers):
        heatmap = partial(plot_layer_heatmap, tables.layers, phases=tables.boundaries())
        found += [
            Plot("layer_heatmap", "Gradient norms, layers over steps; white: the layer did not train", heatmap),
            Plot(
                "layer_comparison",
                "Mean gradient norm of each layer",
                partial(plot_layer_comparison, tables.layers),
            ),
            Plot("gradient_evolution", "Layers at a few moments", partial(plot_gradient_evolution, tables.layers)),
        ]
    if tables.experts.routings:
        caption = f"Experts with a gradient: share of {tables.experts.steps:,} measured steps; white: none at any"
        found.append(Plot("expert_routing", caption, partial(plot_routing, tables.experts.routings)))
    if factor_kinds(tables.factors):
        caption = "Gradient norms of the LoRA factors A and B, and the size of the delta"
        found.append(Plot("lora_factors", caption, partial(draw_factors, tables.factors, phases=tables.boundaries())))
    return found


def plot_routing(routings: Sequence[Routing], path: Path | str) -> Path:
    """Layers × experts: the share of the steps at which an expert had a gradient; blank (white) where it never had."""
    count, most = len(routings), max(len(one.seen) for one in routings)
    figure, (axis,) = canvas.panels(7.2, max(1.7, min(6.0, 0.16 * count + 1.1)))
    grid = [positive(one.seen) + [NAN] * (most - len(one.seen)) for one in routings]
    masked = np.ma.masked_invalid
    edges = ([i - 0.5 for i in range(size + 1)] for size in (most, count))
    image = axis.pcolormesh(*edges, masked(grid), cmap=canvas.colormap(), vmin=0, vmax=1, edgecolors="white", lw=0.3)
    axis.grid(False)
    canvas.whole_ticks(axis.xaxis)
    tick_layers(axis.set_yticks, [str(one.layer) if one.layer is not None else one.module for one in routings])
    canvas.name_axes(axis, "expert", "layer")
    canvas.colour_bar(figure, image, [axis], "share of steps", pad=0.015, aspect=30)
    return canvas.save(figure, path)


def gradient_blocks(tables: GradientTables) -> list[Block]:
    """The summary in numbers and words, the groups over time, the layers; other plots are folded."""
    plots = [one for one in gradient_plots(tables) if one.name != GROUPS_OVER_TIME]
    title = f"Layers, moments, {'experts ' if tables.experts.steps else ''}and LoRA factors"
    folded = [Folded(title, plots[1:])] if plots[1:] else []
    words = [*summary_blocks(gradient_summary(tables.groups, tables.layers)), *expert_blocks(tables.experts)]
    return [*words, *group_curves(tables), *plots[:1], *folded]


def group_curves(tables: GradientTables) -> list[Block]:
    """The same as `plot_gradient_norms` draws, on a logarithmic scale."""
    table = tables.group_curves
    found = table.filled()
    names = [name for name in LINES if name in found and not is_only_group(name, found)]
    lines = []
    for look, name in enumerate(LINES):
        if name in names:
            behind, smoothed = found[name], table.smoothed(found[name])
            lines.append(Line("", list(zip(map(float, table.steps), behind, strict=True)), look, faint=True))
            lines.append(Line(LINES[name][0], list(zip(map(float, table.steps), smoothed, strict=True)), look))
    return (
        [Curves(GROUPS_OVER_TIME, MOVING, lines, "optimizer step", "gradient norm", tables.boundaries(), True)]
        if lines
        else []
    )


def plot_gradients(run_folder: Path, *, plots: bool = True) -> list[Path]:
    """Write the summary of a run folder's tables of gradient norms, and draw everything that they hold into `plots/`.

    Returns the files written; none where nothing was measured. Without matplotlib a note stands for the plots.
    """
    tables = read_tables(run_folder)
    if tables is None or not tables.groups:
        return []
    written = write_summary(tables, run_folder)
    if plots and canvas.drawable("pictures of gradient norms are"):
        written += pictures(drawn(gradient_plots(tables), into(run_folder / "plots"))).values()
    return written
