"""The pictures of gradient norms: groups over time, A against B, and with `gradient_layers` all of a run folder.

plot_gradients(Path("runs/first"))      # → runs/first/plots/gradient_norms.png, layer_heatmap.png, …
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.page.canvas import (
    BLUE,
    GREY,
    INK,
    YELLOW,
    drawable,
    legend,
    log_ticks,
    name_axes,
    new_figure,
    save,
    whole_ticks,
)
from rankwise.show.curves import draw_phases
from rankwise.show.gradient_layers import (
    TITLES,
    Rows,
    plot_gradient_evolution,
    plot_layer_comparison,
    plot_layer_heatmap,
)
from rankwise.show.gradient_series import (
    NAN,
    Boundary,
    GradientTables,
    Series,
    by_kind,
    positive,
    read_tables,
    series,
)
from rankwise.show.gradient_summary import write_summary

Style = str | tuple[int, tuple[int, ...]]  # as matplotlib has line styles
LINES: dict[str, tuple[str, str, Style]] = {
    "total_norm": ("all", INK, ":"),
    "attention_norm": ("attention", BLUE, "-"),
    "mlp_norm": ("MLP", YELLOW, "--"),
    "embed_norm": ("embeddings", GREY, "-."),
    "lm_head_norm": ("output head", "#4a566c", (0, (5, 1, 1, 1))),
}


def plot_gradient_norms(groups: Rows, path: Path | str, phases: Sequence[Boundary] | None = None) -> Path:
    """Norms of the groups over the steps, logarithmic above linear; changes of phase are marked.

    Args:
        groups: rows of `gradient_analysis.group_norms.csv`.
        path: file to write.
        phases: as `gradient_series.boundaries` has them; None: read off the rows.

    Raises:
        DataError: no row holds a norm.
    """
    table = series(groups)
    found = table.filled()
    names = [name for name in LINES if name in found and not is_only_group(name, found)]
    if not names:
        raise DataError("the table of gradient norms holds no norm of a group")
    figure, axes = new_figure(7.2, 5.4, rows=2)
    for axis, scale in zip(axes.flat, ("log", "linear"), strict=True):
        for name in names:
            label, colour, style = LINES[name]
            draw_smoothed(axis, table, positive(found[name]), label, colour, style)
        axis.set_yscale(scale)
        frame_steps(axis, table.steps)
        name_axes(axis, "optimizer step" if scale == "linear" else "", f"gradient norm ({scale})")
    log_ticks(axes[0, 0].yaxis)
    axes[1, 0].set_ylim(bottom=0)
    for axis in axes.flat:
        draw_phases(axis, table.boundaries() if phases is None else phases, named=axis is axes[0, 0])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return save(figure, path)


def is_only_group(name: str, found: Mapping[str, Sequence[float]]) -> bool:
    """Whether this is the total of a single group, which would hide that group's line."""
    return name == "total_norm" and sum(group in found for group in LINES) == 2


def draw_smoothed(axis: Any, table: Series, values: Sequence[float], label: str, colour: str, style: Style) -> None:
    """The values faint, their moving average over them."""
    axis.plot(table.steps, values, color=colour, linewidth=0.6, alpha=0.35)
    draw_line(axis, table.steps, table.smoothed(values), label, colour, style)


def draw_line(axis: Any, steps: Sequence[int], values: Sequence[float], label: str, colour: str, style: Style) -> None:
    """A line, with dots where the steps are few: a single step is nothing but its dot."""
    dots = {"marker": "o", "markersize": 3} if len(steps) <= 12 else {}
    axis.plot(steps, values, color=colour, linestyle=style, linewidth=1.7, label=label, **dots)


def frame_steps(axis: Any, steps: Sequence[int]) -> None:
    """The whole run, whatever trains in this panel, with whole numbers at the ticks."""
    margin = max(0.5, 0.02 * (steps[-1] - steps[0]))
    axis.set_xlim(steps[0] - margin, steps[-1] + margin)
    whole_ticks(axis.xaxis, 7)


def draw_factors(table: Series, path: Path | str, phases: Sequence[Boundary] | None = None) -> Path:
    """Gradient norms of the LoRA factors A and B apart, and the size of the delta that they make. DataError: no site
    has the factors A and B."""
    found = table.filled()
    kinds = factor_kinds(table)
    if not kinds:
        raise DataError("the table of gradient norms holds no LoRA site")
    nothing = [NAN] * len(table.steps)
    figure, axes = new_figure(3.2 * (len(kinds) + 1), 3.2, columns=len(kinds) + 1)
    *panels, last = axes.flat
    for axis, kind in zip(panels, kinds, strict=True):
        for part, ink, dashes in (("b", BLUE, "-"), ("a", YELLOW, "--")):
            values = positive(found.get(f"{kind}_norm_{part}", nothing))
            draw_smoothed(axis, table, values, part.upper(), ink, dashes)
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
        name_axes(axis, "optimizer step", "gradient norm", f"{TITLES[kind]}: A and B")
        label, colour, style = LINES[f"{kind}_norm"]
        draw_line(last, table.steps, found.get(f"{kind}_delta_norm", nothing), label, colour, style)
    name_axes(last, "optimizer step", "‖scale · BA‖ of the sites that train", "Size of the delta")
    last.set_ylim(bottom=0)
    for axis in axes.flat:
        legend(axis, loc="best")
        frame_steps(axis, table.steps)
        draw_phases(axis, table.boundaries() if phases is None else phases, named=False)
    return save(figure, path)


def factor_kinds(table: Series) -> list[str]:
    found = table.filled()
    return [kind for kind in TITLES if f"{kind}_norm_b" in found]


def gradient_pictures(tables: GradientTables) -> list[tuple[str, str, Callable[[Path], Path]]]:
    """(name, caption, what draws it into a file) of every picture that the tables have numbers for."""
    found: list[tuple[str, str, Callable[[Path], Path]]] = []
    if series(tables.groups).filled():
        draw = partial(plot_gradient_norms, tables.groups, phases=tables.boundaries())
        found.append(("gradient_norms", "Gradient norms before clipping, moving average of 5 steps", draw))
    if by_kind(series(tables.layers)):
        heatmap = partial(plot_layer_heatmap, tables.layers, phases=tables.boundaries())
        found += [
            ("layer_heatmap", "Gradient norms, layers over steps; white: the layer did not train", heatmap),
            ("layer_comparison", "Mean gradient norm of each layer", partial(plot_layer_comparison, tables.layers)),
            ("gradient_evolution", "Layers at a few moments", partial(plot_gradient_evolution, tables.layers)),
        ]
    if factor_kinds(tables.factors):
        caption = "Gradient norms of the LoRA factors A and B, and the size of the delta"
        found.append(("lora_factors", caption, partial(draw_factors, tables.factors, phases=tables.boundaries())))
    return found


def plot_gradients(run_folder: Path, *, pictures: bool = True) -> list[Path]:
    """Write the summary of a run folder's tables of gradient norms, and draw everything that they hold into `plots/`.

    Returns the files written; none where nothing was measured. Without matplotlib a note stands for the pictures.
    """
    tables = read_tables(run_folder)
    if tables is None or not tables.groups:
        return []
    drawn = gradient_pictures(tables) if pictures and drawable("pictures of gradient norms are") else []
    return [
        *write_summary(tables, run_folder),
        *(draw(run_folder / "plots" / f"{name}.png") for name, _, draw in drawn),
    ]
