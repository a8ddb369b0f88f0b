"""Gradient norms of the layers in pictures: a map over the steps, bars, a few moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, need
from rankwise.page.canvas import (
    BLUE,
    INK,
    YELLOW,
    colormap,
    legend,
    log_ticks,
    name_axes,
    new_figure,
    save,
    whole_ticks,
)
from rankwise.show.curves import draw_phases
from rankwise.show.gradient_series import Layers, Series, by_kind, mean, positive, series

TITLES = {"attention": "Attention", "mlp": "MLP"}
LABELS = {"attention": "attention", "mlp": "MLP"}
MOST_CELLS = 400  # columns of a heatmap: more than that and pixels would drop some
MOST_TICKS = 24
MOMENTS = 7
MARKERS = "os^Dv<>"
LIGHTEST = 0.88  # of the colour map: the last tenth is too pale for lines on white

Rows = Iterable[Mapping[str, Any]]


def plot_layer_heatmap(layers: Rows, path: Path | str, phases: Sequence[tuple[float, str]] = ()) -> Path:
    """Norms over steps × layers, attention and MLP on one logarithmic colour scale; blank (white) did not train.

    Args:
        layers: rows of `gradient_analysis.layer_norms.csv`.
        path: file to write.
        phases: (place, name) of every phase, as `Series.boundaries` has them.
    """
    table, kinds = kinds_of(layers)
    height = max(1.4, min(3.0, 0.13 * max(len(one.names) for one in kinds.values()) + 0.5))
    figure, axes = new_figure(7.2, 0.6 + (height + 0.3) * len(kinds), rows=len(kinds))
    panels = list(axes.flat) if len(kinds) > 1 else [axes]
    binned = {kind: binned_columns(table.steps, one.curves) for kind, one in kinds.items()}
    values = [v for _, grid in binned.values() for row in grid for v in row if v > 0]
    norm = need("matplotlib.colors", extra="plots").LogNorm(min(values, default=1.0), max(values, default=10.0))
    masked = need("numpy.ma", extra="plots").masked_invalid
    for axis, (kind, one) in zip(panels, kinds.items(), strict=True):
        edges, grid = binned[kind]
        rows = [i - 0.5 for i in range(len(one.names) + 1)]
        image = axis.pcolormesh(edges, rows, masked([positive(row) for row in grid]), cmap=colormap(), norm=norm)
        axis.grid(False)
        whole_ticks(axis.xaxis)
        tick_layers(axis.set_yticks, one.names)
        draw_phases(axis, phases, named=axis is panels[0])
        name_axes(axis, "optimizer step" if axis is panels[-1] else "", f"{TITLES[kind]}: layer")
    bar = figure.colorbar(image, ax=panels, pad=0.015, aspect=30)
    bar.set_label("gradient norm", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7)
    log_ticks(bar.ax.yaxis)
    return save(figure, path)


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
    """Mean norm of each layer over the steps at which it trained, attention beside MLP.

    Args as `plot_layer_heatmap`.
    """
    _, kinds = kinds_of(layers)
    names = max((one.names for one in kinds.values()), key=len)
    figure, axis = new_figure(min(11.0, max(5.0, 1.6 + 0.3 * len(names))), 3.2)
    width = 0.8 / len(kinds)
    looks = {"attention": (BLUE, ""), "mlp": (YELLOW, "////")}
    for place, (kind, one) in enumerate(kinds.items()):
        colour, hatch = looks[kind]
        heights = [mean(curve) for curve in one.curves]
        middle = [i + (place - (len(kinds) - 1) / 2) * width for i in range(len(heights))]
        kept = [(x, height) for x, height in zip(middle, heights, strict=True) if math.isfinite(height)]
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axis.bar(*zip(*kept, strict=True), width=width, label=LABELS[kind], **look)
    axis.grid(False, axis="x")
    axis.set_xlim(-0.6, len(names) - 0.4)
    tick_layers(axis.set_xticks, names)
    name_axes(axis, "layer", "mean gradient norm")
    axis.margins(y=0.18)
    legend(axis, loc="upper right", ncols=2)
    return save(figure, path)


def plot_gradient_evolution(layers: Rows, path: Path | str, moments: int = MOMENTS) -> Path:
    """Norm over the layers at a few moments of training, evenly spaced, each averaged over the steps around it.

    Args as `plot_layer_heatmap`, and `moments`: how many lines at most.
    """
    table, kinds = kinds_of(layers)
    count = min(moments, len(table.steps))
    chosen = sorted({round(i * (len(table.steps) - 1) / max(1, count - 1)) for i in range(count)})
    figure, axes = new_figure(7.2, 3.4, columns=len(kinds))
    panels = list(axes.flat) if len(kinds) > 1 else [axes]
    shades = colormap()
    for axis, (kind, one) in zip(panels, kinds.items(), strict=True):
        smoothed = [table.smoothed(positive(curve)) for curve in one.curves]
        for place, moment in enumerate(chosen):
            colour = shades(LIGHTEST * place / max(1, len(chosen) - 1))
            values = [curve[moment] for curve in smoothed]
            marker = MARKERS[place % len(MARKERS)]
            label = f"step {table.steps[moment]:,}"
            axis.plot(
                range(len(values)), values, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=label
            )
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
        tick_layers(axis.set_xticks, one.names, MOST_TICKS // len(kinds))
        name_axes(axis, "layer", "gradient norm" if axis is panels[0] else "", TITLES[kind])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return save(figure, path)
