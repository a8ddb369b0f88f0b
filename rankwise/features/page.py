"""comparison.json of factorizations as it is shown: verdicts, tables, small print and plots, on a page and a terminal.

{"format": "rankwise-factors/1", "rank", "tokens", "channels", "networks", "timing", "storage",
 "sources": [{"name", "matrices", "images", "rows": [{"method", "relative_error": {"mean", "low", "high"}, …}],
              "paired": […], "ids": […], "values": {label: {"relative_error": […], "cosine": […]}}}],
 "cost": [{"method", "flops", "seconds", "parameters", "stored"}],
 "sweep": {"ranks": […], "relative_error": {method: […]}}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rankwise.features.measures import GRAM, PCA, SVD
from rankwise.files.document import Document
from rankwise.page import canvas
from rankwise.page.blocks import Block, Finding, Plot, Table, Words
from rankwise.page.text import amount, clip, percent, plural

COMPARISON = Document(
    "comparison.json",
    "rankwise-factors/1",
    "a comparison of factorizations",
    "rankwise features compare",
    ("rank", "tokens", "channels", "networks", "timing", "storage", "sources", "cost", "sweep"),
)
Comparison = Mapping[str, Any]
CLOSE = ("method", "relative error", "excess error, %", "energy", "cosine", "angle")
COST = ("method", "time", "speed", "MFLOP", "parameters", "stored")
OF_ONE = "svd_nn_comparison.json"
BINS = 30
LINEAR_BELOW = 1.0  # per cent of excess error: from there on the axis is logarithmic
KEYS = ("mean", "low", "high")


def label(row: Mapping[str, Any]) -> str:
    return f"{row['method']}, refined" if row["refined"] else str(row["method"])


def source_title(source: Mapping[str, Any]) -> str:
    where = f" of {clip(source['source'], 60)}" if source.get("source") else ""
    tiles = f" ({plural(source['matrices'], 'tile')})" if source["matrices"] != source["images"] else ""
    return f"{source['name']}: {plural(source['images'], 'image')}{tiles}{where}"


def row_of(source: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    """The row of a method's rank-r product."""
    return next(row for row in source["rows"] if row["method"] == method and not row["refined"])


def cost_of(comparison: Comparison, method: str) -> Mapping[str, Any]:
    return next(row for row in comparison["cost"] if row["method"] == method)


def span(estimate: Mapping[str, Any], digits: int = 4, scale: float = 1.0, signed: bool = False) -> str:
    """0.1234 [0.1200, 0.1270]"""

    def shown(key: str) -> str:
        rounded = round(scale * estimate[key], digits) + 0.0  # no −0.00
        return f"{rounded:{'+' if signed else ''}.{digits}f}"

    return shown("mean") if estimate["low"] is None else f"{shown('mean')} [{shown('low')}, {shown('high')}]"


def verdict(comparison: Comparison, source: Mapping[str, Any], name: str) -> str:
    """How far from the optimum, against the shared PCA, and against the time of the exact factors."""
    row = row_of(source, name)
    excess = row["excess_error"]
    said = f"{name}: relative error {row['relative_error']['mean']:.4f}, "
    said += f"{percent(excess['mean'])} above the optimum" if excess else "where the SVD of this rank is exact"
    if excess and excess["low"] is not None:
        said += f" (95 %: {percent(excess['low'])} to {percent(excess['high'])})"
    for pair in source["paired"]:
        if pair["network"] == name and pair["against"] == PCA:
            said += f"; {against_pca(pair)}"
    return f"{said}. {speed(comparison, name)}"


def against_pca(pair: Mapping[str, Any]) -> str:
    low, high = pair["low"], pair["high"]
    if low is None or low <= 0 <= high:
        word = "not told apart from"
    else:
        word = "closer than" if high < 0 else "farther than"
    return f"{word} the shared PCA basis ({span(pair, signed=True)}, paired)"


def speed(comparison: Comparison, name: str) -> str:
    """0.4× the time of the exact Gram factors: faster than exact."""
    own, exact = cost_of(comparison, name)["seconds"], cost_of(comparison, GRAM)["seconds"]
    ratio = own / exact
    word = "faster" if ratio < 1 else "slower"
    shown = f"{1 / ratio:.2g}× faster than" if ratio < 1 else f"{ratio:.2g}× the time of"
    return f"{shown} the exact Gram factors: {word} than exact."


def effective(row: Mapping[str, Any]) -> str:
    """AdaLoRA: 32 of its 128 ranks act; …"""
    extra = row["excess_at_effective_rank"]
    return (
        f"{row['method']}: {row['effective_rank']} of its {row['rank']} ranks act; against the optimum of rank "
        f"{row['effective_rank']} its excess error is {percent(extra['mean'])}."
    )


def timing_words(comparison: Comparison) -> str:
    timing = comparison["timing"]
    cpu = f", {plural(timing['threads'], 'thread')}" if timing["threads"] else ""
    return (
        f"Times: {timing['device']}{cpu}, batches of {timing['batch_size']}, all methods in turn after a warm-up, the "
        f"fastest of {plural(timing['repeats'], 'pass').replace('passs', 'passes')}. Operations: matrix products as "
        "counted by torch; eigendecomposition, SVD and QR by their textbook counts."
    )


def storage_words(comparison: Comparison) -> str:
    storage, rank = comparison["storage"], comparison["rank"]
    ratio = storage["matrix"] / storage["factors"]
    said = f"Storage at rank {rank}: {storage['factors']:,} numbers for factors, {storage['matrix']:,} for a matrix"
    fewer = f"{ratio:.2g}× fewer" if ratio > 1 else f"{1 / ratio:.2g}× more"
    return f"{said} ({fewer}); factors take no more up to rank {storage['break_even_rank']}."


def optimum_words(comparison: Comparison) -> str:
    return (
        f"No product of rank {comparison['rank']} is closer to a matrix than its {SVD}, so its error is the floor; "
        "excess error is the distance above it on the same matrix."
    )


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """Everything about one comparison, in the order of its weight."""
    sources, names = comparison["sources"], comparison["networks"]
    return [
        *(Words(verdict(comparison, sources[0], name)) for name in names),
        *(closeness_table(source) for source in sources),
        *(Words(effective(row)) for row in sources[0]["rows"] if row.get("excess_at_effective_rank")),
        cost_table(comparison),
        *(Plot(name, caption, partial(plot, comparison)) for name, (plot, caption) in PLOTS.items()),
        *(Words(text) for text in (optimum_words(comparison), storage_words(comparison))),
    ]


def closeness_table(source: Mapping[str, Any]) -> Table:
    rows = [closeness_cells(row) for row in source["rows"]]
    note = f"{source_title(source)}. 95 % intervals over images; angle: mean principal angle to the SVD's row space."
    return Table(CLOSE, rows, note=note)


def closeness_cells(row: Mapping[str, Any]) -> list[str]:
    """A refined output has neither an excess nor an angle: its rank is open."""
    excess, angle = row.get("excess_error"), row.get("principal_angle")
    return [
        label(row),
        span(row["relative_error"]),
        span(excess, 2, 100) if excess else "",
        f"{row['explained_energy']['mean']:.4f}",
        f"{row['cosine']['mean']:.4f}",
        f"{math.degrees(angle['mean']):.1f}°" if angle else "",
    ]


def cost_table(comparison: Comparison) -> Table:
    exact = cost_of(comparison, GRAM)["seconds"]
    rows = [cost_cells(row, exact) for row in comparison["cost"]]
    return Table(COST, rows, note=f"Per matrix; speed: against the exact Gram factors. {timing_words(comparison)}")


def cost_cells(row: Mapping[str, Any], exact: float) -> list[str]:
    return [
        row["method"],
        milliseconds(row["seconds"]),
        f"{exact / row['seconds']:.2f}×",
        f"{row['flops'] / 1e6:,.3g}" if row["flops"] < 1e9 else f"{row['flops'] / 1e6:,.0f}",
        amount(row["parameters"]) if row["parameters"] else "",
        f"{row['stored']:,}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} µs"


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
    figure, axes = canvas.panels(1.9 + 3.4 * len(sources), 0.8 + 0.55 * len(names), len(sources), len(names))
    grid = np.reshape(np.array(axes, dtype=object), (len(names), len(sources)))
    for column, source in enumerate(sources):
        for row, name in enumerate(names):
            strip(grid[row, column], source["values"][name][measure], edges, own=name in comparison["networks"])
            grid[row, column].tick_params(labelbottom=row == len(names) - 1)
            if column == 0:
                beside(grid[row, column], clip(name, 30))
        canvas.name_axes(grid[-1, column], title, "")
        heading = grid[0, column].set_title(
            f"{source['name']} ({source['images']:,})", fontsize=9, color=canvas.INK, loc="left"
        )
        heading.set_parse_math(False)
    return canvas.save(figure, path)


def strip(axis: Any, values: Sequence[float], edges: Sequence[float], own: bool) -> None:
    axis.hist(values, bins=edges, color=canvas.BLUE if own else canvas.GREY)
    axis.plot(
        [median(values)], [0], marker="D", markersize=6, color=canvas.YELLOW, markeredgecolor=canvas.INK, clip_on=False
    )
    axis.set_ylim(bottom=0)
    axis.set_xlim(edges[0], edges[-1])
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


def beside(axis: Any, name: str) -> None:
    """The name of a strip, left of it."""
    text = axis.text(-0.02, 0.4, name, transform=axis.transAxes, ha="right", va="center", fontsize=8, color=canvas.INK)
    text.set_parse_math(False)


def bins(values: Sequence[float]) -> list[float]:
    """Equal bins over all values, a little wider than they are."""
    low, high = min(values), max(values)
    room = 0.02 * (high - low) or 1e-3
    return [float(edge) for edge in np.linspace(low - room, high + room, BINS + 1)]


def plot_rank_sweep(comparison: Comparison, path: Path | str) -> Path:
    """Mean relative error against rank; below the ranks, the share of a matrix's numbers that the factors take."""
    sweep, tokens, channels = comparison["sweep"], comparison["tokens"], comparison["channels"]
    figure, axis = canvas.new_figure(7.2, 4.0)
    curves = {name: found for name, found in sweep["relative_error"].items() if name != GRAM}
    for index, (name, errors) in enumerate(curves.items()):
        found = [(rank, error) for rank, error in zip(sweep["ranks"], errors, strict=True) if error is not None]
        x, y = [rank for rank, _ in found], [error for _, error in found]
        text = f"{name}, leading channels" if name in comparison["networks"] else name
        axis.plot(x, y, label=clip(text, 40), linewidth=1.3, markersize=4, **canvas.style(index))
    axis.set_xscale("log", base=2)
    share = [rank * (tokens + channels) / (tokens * channels) for rank in sweep["ranks"]]
    ticks = [f"{rank}\n{100 * part:.0f} %" for rank, part in zip(sweep["ranks"], share, strict=True)]
    axis.set_xticks(sweep["ranks"], ticks)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    canvas.name_axes(axis, "rank, and numbers stored against the whole matrix", "mean relative error")
    canvas.legend_outside(figure, "right upper", [axis])
    return canvas.save(figure, path)


def plot_error_time(comparison: Comparison, path: Path | str) -> Path:
    """Excess error against time per matrix: left is faster, down is closer; dotted: the exact factors.

    Where the SVD is exact there is no excess, and the relative error takes its place.
    """
    source = comparison["sources"][0]
    measure = "excess_error" if row_of(source, SVD)["excess_error"] else "relative_error"
    shown = {"excess_error": "excess error over the SVD, %", "relative_error": "relative error, %"}[measure]
    figure, axis = canvas.new_figure(7.2, 4.0)
    axis.axvline(1e3 * cost_of(comparison, GRAM)["seconds"], color=canvas.GREY, linestyle=(0, (1, 2)), linewidth=1.1)
    times = []
    for index, cost in enumerate(comparison["cost"]):
        look = {**canvas.style(index), "linestyle": "", "markersize": 8}
        excess = row_of(source, cost["method"])[measure]
        y, low, high = (100 * max(0.0, excess[key] if excess[key] is not None else excess["mean"]) for key in KEYS)
        times.append(1e3 * cost["seconds"])
        axis.errorbar(
            times[-1], y, yerr=canvas.error_bars([y], [(low, high)]), color=look["color"], capsize=4, linestyle=""
        )
        axis.plot([times[-1]], [y], label=clip(cost["method"], 40), zorder=3, **look)
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 2, max(times) * 2)
    canvas.log_ticks(axis.xaxis)
    per_cent_ticks(axis)
    canvas.name_axes(axis, f"milliseconds per matrix ({comparison['timing']['device']})", shown)
    canvas.legend_outside(figure, "right upper", [axis])
    return canvas.save(figure, path)


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


def read_comparison(path: Path) -> Comparison | None:
    """None: `rankwise compare` calls its own file so too."""
    return COMPARISON.read_own(path)


FACTORS = Finding(COMPARISON.name, ("features compare",), read_comparison, comparison_blocks)
