"""The pictures of a comparison of factorizations, from comparison.json's content.

plot_rank_sweep(comparison, folder / "rank_sweep.png")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rankwise.errors import DataError
from rankwise.features.measures import GRAM, SVD
from rankwise.features.words import Comparison, cost_of, row_of
from rankwise.page.canvas import (
    BLUE,
    GREY,
    INK,
    YELLOW,
    legend,
    log_ticks,
    name_axes,
    new_figure,
    plain,
    save,
    style,
    whole_ticks,
)
from rankwise.page.text import clip

BINS = 30
LINEAR_BELOW = 1.0  # per cent of excess error: from there on the axis is logarithmic


def plot_error_histogram(comparison: Comparison, path: Path | str) -> Path:
    """How the relative errors of the matrices are spread, a strip per method and a column per image source."""
    return histograms(comparison, "relative_error", "relative error", path)


def plot_cosine_histogram(comparison: Comparison, path: Path | str) -> Path:
    """The same of the mean cosine between a token and its approximation."""
    return histograms(comparison, "cosine", "cosine between token and approximation", path)


def histograms(comparison: Comparison, measure: str, title: str, path: Path | str) -> Path:
    """Strips on common bins, the median marked. The Gram factors are the SVD's and have no strip."""
    sources = comparison["sources"]
    names = [name for name in sources[0]["values"] if name != GRAM]
    edges = bins([value for source in sources for name in names for value in source["values"][name][measure]])
    figure, axes = new_figure(1.9 + 3.4 * len(sources), 0.8 + 0.55 * len(names), len(sources), len(names))
    grid = np.reshape(np.array(axes, dtype=object), (len(names), len(sources)))
    for column, source in enumerate(sources):
        for row, name in enumerate(names):
            strip(grid[row, column], source["values"][name][measure], edges, own=name in comparison["networks"])
            grid[row, column].tick_params(labelbottom=row == len(names) - 1)
            if column == 0:
                beside(grid[row, column], clip(name, 30))
        name_axes(grid[-1, column], title, "")
        heading = grid[0, column].set_title(
            f"{source['name']} ({source['images']:,})", fontsize=9, color=INK, loc="left"
        )
        heading.set_parse_math(False)
    return save(figure, path)


def strip(axis: Any, values: Sequence[float], edges: Sequence[float], own: bool) -> None:
    axis.hist(values, bins=edges, color=BLUE if own else GREY)
    axis.plot([median(values)], [0], marker="D", markersize=6, color=YELLOW, markeredgecolor=INK, clip_on=False)
    axis.set_ylim(bottom=0)
    axis.set_xlim(edges[0], edges[-1])
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


def beside(axis: Any, name: str) -> None:
    """The name of a strip, left of it."""
    text = axis.text(-0.02, 0.4, name, transform=axis.transAxes, ha="right", va="center", fontsize=8, color=INK)
    text.set_parse_math(False)


def bins(values: Sequence[float]) -> list[float]:
    """Equal bins over all values, a little wider than they are."""
    low, high = min(values), max(values)
    room = 0.02 * (high - low) or 1e-3
    return [float(edge) for edge in np.linspace(low - room, high + room, BINS + 1)]


def plot_rank_sweep(comparison: Comparison, path: Path | str) -> Path:
    """Mean relative error against rank; below the ranks, the share of a matrix's numbers that the factors take."""
    sweep, tokens, channels = comparison["sweep"], comparison["tokens"], comparison["channels"]
    figure, axis = new_figure(7.2, 4.0)
    curves = {name: found for name, found in sweep["relative_error"].items() if name != GRAM}
    for index, (name, errors) in enumerate(curves.items()):
        found = [(rank, error) for rank, error in zip(sweep["ranks"], errors, strict=True) if error is not None]
        x, y = [rank for rank, _ in found], [error for _, error in found]
        text = f"{name}, leading channels" if name in comparison["networks"] else name
        axis.plot(x, y, label=clip(text, 40), linewidth=1.3, markersize=4, **style(index))
    axis.set_xscale("log", base=2)
    share = [rank * (tokens + channels) / (tokens * channels) for rank in sweep["ranks"]]
    ticks = [f"{rank}\n{100 * part:.0f} %" for rank, part in zip(sweep["ranks"], share, strict=True)]
    axis.set_xticks(sweep["ranks"], ticks)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    name_axes(axis, "rank, and numbers stored against the whole matrix", "mean relative error")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, path)


def plot_error_time(comparison: Comparison, path: Path | str) -> Path:
    """Excess error against time per matrix: left is faster, down is closer; dotted: the exact factors.

    Where the SVD is exact there is no excess, and the relative error takes its place.
    """
    source = comparison["sources"][0]
    measure = "excess_error" if row_of(source, SVD)["excess_error"] else "relative_error"
    shown = {"excess_error": "excess error over the SVD, %", "relative_error": "relative error, %"}[measure]
    figure, axis = new_figure(7.2, 4.0)
    axis.axvline(1e3 * cost_of(comparison, GRAM)["seconds"], color=GREY, linestyle=(0, (1, 2)), linewidth=1.1)
    times = []
    for index, cost in enumerate(comparison["cost"]):
        look = {**style(index), "linestyle": "", "markersize": 8}
        excess = row_of(source, cost["method"])[measure]
        y, low, high = (100 * max(0.0, excess[key] if excess[key] is not None else excess["mean"]) for key in KEYS)
        times.append(1e3 * cost["seconds"])
        error = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axis.errorbar(times[-1], y, yerr=error, color=look["color"], capsize=4, linestyle="")
        axis.plot([times[-1]], [y], label=clip(cost["method"], 40), zorder=3, **look)
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 2, max(times) * 2)
    log_ticks(axis.xaxis)
    per_cent_ticks(axis)
    name_axes(axis, f"milliseconds per matrix ({comparison['timing']['device']})", shown)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, path)


KEYS = ("mean", "low", "high")


def per_cent_ticks(axis: Any) -> None:
    """Linear up to 1 %, logarithmic above, so that the exact methods' 0 is on the axis."""
    top = max(axis.get_ylim()[1], 2.0)
    axis.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.5)
    decades = range(math.ceil(math.log10(top)) + 1)
    ticks = [0.0, *(float(step * 10**power) for power in decades for step in (1, 2, 5))]
    limit = next((tick for tick in ticks if tick >= 1.1 * top), 1.2 * top)
    shown = [tick for tick in ticks if tick <= limit]
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()
    axis.set_ylim(-0.15, limit)


PLOTS: Mapping[str, tuple[Any, str]] = {
    "error_time": (
        plot_error_time,
        "Excess error over the optimum against time per matrix; dotted: exact Gram factors",
    ),
    "rank_sweep": (plot_rank_sweep, f"Mean relative error against rank; nothing is below the {SVD}"),
    "error_histogram": (plot_error_histogram, "Relative error of the single matrices, median marked"),
    "cosine_histogram": (plot_cosine_histogram, "Cosine between tokens and their approximation, median marked"),
}


DOTS = 12  # epochs up to which every point is marked


def plot_factor_training(rows: Sequence[Mapping[str, Any]], path: Path | str, best_epoch: int | None = None) -> Path:
    """MSE in training and validation by epoch; below it the learning rate, and the effective rank where it changed.

    Args:
        rows: of `history.json`.
        path: file to write.
        best_epoch: the epoch whose network was kept; marked.

    Raises:
        DataError: there is no epoch.
    """
    if not rows:
        raise DataError("the history holds no epoch")
    epochs = [row["epoch"] for row in rows]
    figure, axes = new_figure(7.2, 4.6, rows=2)
    above, below = axes.flat
    draw(above, epochs, [row["train_mse"] for row in rows], "training", BLUE, "-")
    draw(above, epochs, [row["val_mse"] for row in rows], "validation", INK, "--")
    for row in rows:
        if row["epoch"] == best_epoch:
            label = f"kept: {row['val_mse']:.4g} at epoch {best_epoch}"
            above.plot([best_epoch], [row["val_mse"]], color=INK, linestyle="", marker="D", markersize=7, label=label)
    above.set_yscale("log")
    log_ticks(above.yaxis)
    name_axes(above, "", "MSE of A·B")
    legend(above, loc="upper right")
    draw(below, epochs, [row["lr"] for row in rows], "learning rate", GREY, "-")
    below.set_yscale("log")
    log_ticks(below.yaxis)
    name_axes(below, "epoch", "learning rate")
    draw_ranks(below, epochs, [row["effective_rank"] for row in rows])
    for axis in (above, below):
        whole_ticks(axis.xaxis)
    return save(figure, path)


def draw(axis: Any, epochs: Sequence[int], values: Sequence[float], name: str, colour: str, style: str) -> None:
    dots = "o" if len(epochs) <= DOTS else None
    axis.plot(epochs, values, color=colour, linestyle=style, linewidth=1.5, marker=dots, markersize=3, label=name)


def draw_ranks(axis: Any, epochs: Sequence[int], ranks: Sequence[int]) -> None:
    """On an axis of its own at the right; nothing where the rank never changed."""
    if len(set(ranks)) == 1:
        return
    other = axis.twinx()
    plain(other)
    other.grid(False)
    other.spines[["left", "top"]].set_visible(False)
    other.spines["right"].set(visible=True, color=GREY)
    draw(other, epochs, ranks, "effective rank", YELLOW, "-.")
    other.set_ylim(0, max(ranks) * 1.05)
    other.set_ylabel("effective rank", fontsize=9, color=INK)
    axis.spines[["right", "top"]].set_visible(False)
    lines = [*axis.get_lines(), *other.get_lines()]
    other.legend(lines, [line.get_label() for line in lines], fontsize=8, framealpha=0.85, edgecolor="none")
