"""Plots of spectra, plans and the gain kept; the report's blocks of the last.

plot_decay(spectrum, planned_site, threshold=0.9, path=plots / "q_proj.png", null_edge=edge)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError, need
from rankwise.files.atomic import read_object
from rankwise.page import canvas
from rankwise.page.blocks import Block, Finding, Plot, Table
from rankwise.page.grid import LEAST_SPAN
from rankwise.page.text import clip, has_numbers, percent

Cells = dict[tuple[str, int | None], float]
CELL, MOST_WIDTH, LEAST_WIDTH_FOR_TEXT = 0.5, 11.0, 0.27  # inches
MANY_POINTS = 40
DECAY_MARGINS = {"left": 0.075, "right": 0.99, "top": 0.88, "bottom": 0.16, "wspace": 0.2}


def plot_decay(
    spectrum: Spectrum, site: PlannedSite, threshold: float, path: Path | str, null_edge: float | None = None
) -> Path:
    """Singular values (log scale) and cumulative energy of one site, with the chosen rank in both.

    Args:
        spectrum: of the site's delta; a truncated one is drawn as far as it goes, and says so.
        site: the site with its rank.
        threshold: energy share of the rank rule, drawn as a line.
        path: file to write; the suffix chooses the format.
        null_edge: largest singular value of the same entries permuted, where it was measured.
    """
    figure, (decay, energy) = canvas.panels(8.4, 3.2, columns=2, margins=DECAY_MARGINS)
    if spectrum.is_zero or not len(spectrum):
        for axis in (decay, energy):
            axis.text(0.5, 0.5, "the delta is zero", ha="center", va="center", transform=axis.transAxes)
    else:
        draw_values(decay, spectrum, site.rank, null_edge)
        draw_energy(energy, spectrum, site.rank, threshold)
    shape = f"{site.site.shape[0]}×{site.site.shape[1]}"
    known = "" if spectrum.complete else f", first {len(spectrum)} of {min(spectrum.shape)} values"
    canvas.name_axes(decay, f"index ({shape}{known})", "singular value")
    canvas.name_axes(energy, "rank k", "energy kept, E(k)")
    canvas.name_figure(figure, clip(site.site.path, 90))
    return canvas.save(figure, path, dpi=110)


def draw_values(axis: Any, spectrum: Spectrum, rank: int, null_edge: float | None) -> None:
    positive = spectrum.values[spectrum.values > 0]
    marker = "o" if len(positive) <= MANY_POINTS else None
    index = range(1, len(positive) + 1)
    axis.plot(index, positive.tolist(), color=canvas.BLUE, linewidth=1.6, marker=marker, markersize=3)
    axis.set_yscale("log")
    if null_edge:
        label = "largest of permuted entries"
        axis.axhline(null_edge, color=canvas.GREY, linestyle=":", linewidth=1.4, label=label)
    draw_rank(axis, rank)
    canvas.legend(axis, loc="upper right")


def draw_energy(axis: Any, spectrum: Spectrum, rank: int, threshold: float) -> None:
    """E(k) from 0, the band that the sketch's certificate leaves open, threshold and rank."""
    kept = torch.cat([torch.zeros(1, dtype=torch.float64), spectrum.cumulative()])
    index = torch.arange(len(kept), dtype=torch.float64)
    axis.plot(index.tolist(), kept.tolist(), color=canvas.BLUE, linewidth=1.6)
    if spectrum.residual > 0:
        most = torch.cat([torch.zeros(1, dtype=torch.float64), spectrum.upper()])
        axis.fill_between(
            index.tolist(),
            kept.tolist(),
            most.tolist(),
            color=canvas.BLUE,
            alpha=0.15,
            linewidth=0,
            label="certified bound",
        )
    axis.axhline(threshold, color=canvas.GREY, linestyle="-.", linewidth=1.2, label=f"threshold {threshold:g}")
    axis.set_ylim(0, 1.03)
    draw_rank(axis, rank)
    canvas.legend(axis, loc="lower right")


def draw_rank(axis: Any, rank: int) -> None:
    axis.axvline(rank, color=canvas.INK, linestyle="--", linewidth=1.2, label=f"rank {rank}")


def plot_ranks_heatmap(plan: RankPlan, path: Path | str) -> Path:
    """Ranks, projection types × layers, on a logarithmic colour scale; cells without a site stay blank."""
    cells = gather(plan.sites, lambda row: float(row.rank))
    colors = need("matplotlib.colors", extra="plots")
    positive = [value for value in cells.values() if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    norm = colors.LogNorm(low, max(high, LEAST_SPAN * low))
    return draw_heatmap(cells, norm, "Rank of each site", "rank", lambda value: f"{value:.0f}", path)


def plot_energy_heatmap(plan: RankPlan, path: Path | str) -> Path:
    """Share of each delta's energy that its rank keeps; cells without a site or an answer stay blank."""
    cells = gather(plan.sites, lambda row: row.energy_retained)
    norm = need("matplotlib.colors", extra="plots").Normalize(0.0, 1.0)
    return draw_heatmap(cells, norm, "Energy kept at each site", "share of ‖Δ‖²", short_share, path)


def short_share(share: float) -> str:
    """Two digits that fit a cell: .07, .93, 1.0"""
    return "1.0" if share >= 0.995 else f"{share:.2f}"[1:]


def gather(rows: Sequence[PlannedSite], value: Callable[[PlannedSite], float | None]) -> Cells:
    """(row name, layer) → value. Sites that share a cell (experts, cross-attention) give their median."""
    return {place: median(map(value, members)) for place, members in by_cell(rows).items()}


def by_cell(rows: Sequence[PlannedSite]) -> dict[tuple[str, int | None], list[PlannedSite]]:
    """(row name, layer) → its sites; where the model has several towers, the name says which."""
    towers = {row.site.tower for row in rows}
    found: dict[tuple[str, int | None], list[PlannedSite]] = {}
    for row in rows:
        name = row.site.projection if len(towers) == 1 else f"{row.site.tower} · {row.site.projection}"
        found.setdefault((name, row.site.layer), []).append(row)
    return found


def median(values: Iterable[float | None]) -> float:
    """Of those that are known; NaN where none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else float("nan")


def by_layer(layer: int | None) -> tuple[bool, int]:
    """Order of the layers; what lies in none comes last."""
    return layer is None, layer or 0


def draw_heatmap(
    cells: Cells, norm: Any, title: str, unit: str, text: Callable[[float], str], path: Path | str
) -> Path:
    names = list(dict.fromkeys(name for name, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=by_layer)
    width = min(MOST_WIDTH, 2.6 + CELL * max(4, len(layers)))
    figure, axis = canvas.new_figure(width, 1.25 + 0.34 * max(2, len(names)))
    nothing = float("nan")
    grid = [[cells.get((name, layer), nothing) for layer in layers] for name in names]
    masked = np.ma.masked_invalid([[v if v > 0 else nothing for v in row] for row in grid])
    image = axis.imshow(masked, cmap=canvas.colormap(), norm=norm, aspect="auto", interpolation="nearest")
    if (width - 2.6) / max(1, len(layers)) >= LEAST_WIDTH_FOR_TEXT:
        texts = [[text(value) if value == value else "" for value in row] for row in grid]
        canvas.write_cells(axis, image, texts, size=7.5)
    frame_heatmap(axis, names, layers)
    bar = canvas.colour_bar(figure, image, axis, unit, pad=0.015, aspect=14)
    bar.ax.yaxis.set_major_formatter(need("matplotlib.ticker", extra="plots").FormatStrFormatter("%g"))
    bar.ax.minorticks_off()
    bar.set_ticks(ticks_between(norm.vmin, norm.vmax))
    canvas.name_axes(axis, "layer", "", title)
    return canvas.save(figure, path)


def frame_heatmap(axis: Any, names: Sequence[str], layers: Sequence[int | None]) -> None:
    """Ticks that do not crowd, and white lines between cells while these are large enough."""
    step = -(-len(layers) // 32)
    shown = range(0, len(layers), step)
    axis.set_xticks(list(shown), ["none" if layers[i] is None else str(layers[i]) for i in shown])
    axis.set_yticks(range(len(names)), [clip(name, 30) for name in names])
    canvas.bare(axis)
    if len(layers) <= 64:
        axis.set_xticks([i - 0.5 for i in range(1, len(layers))], minor=True)
        axis.set_yticks([i - 0.5 for i in range(1, len(names))], minor=True)
        axis.grid(True, which="minor", color="white", linewidth=1.2)
        axis.tick_params(which="minor", length=0)


def ticks_between(low: float, high: float) -> list[float]:
    """Powers of two inside a rank scale and its ends; quarters of a share."""
    if high <= 1.0:
        return [0, 0.25, 0.5, 0.75, 1.0]
    powers = [2.0**i for i in range(16) if low * 1.3 < 2**i < high / 1.3]
    return [low, *powers, high]


def plot_gain(gain: Mapping[str, Any], path: Path | str) -> Path:
    """Share of the loss gain that the plan keeps, against uniform rank and shuffles of its own ranks.

    Args:
        gain: content of `gain.json`: `arms`, each with `name`, `kept`, `low`, `high` (95 % interval).
        path: file to write.
    """
    arms = gain["arms"]
    shuffles = [arm for arm in arms if is_shuffle(arm)]
    others = [arm for arm in arms if not is_shuffle(arm)]
    figure, axis = canvas.new_figure(7.2, 0.9 + 0.36 * (len(others) + bool(shuffles)))
    for y, arm in enumerate(others):
        marker, colour = ("D", canvas.BLUE) if arm["name"] == "plan" else ("o", canvas.GREY)
        error = canvas.error_bars([arm["kept"]], [(arm["low"], arm["high"])])
        axis.errorbar(arm["kept"], y, xerr=error, color=colour, marker=marker, markersize=7, capsize=4, linestyle="")
    for arm in shuffles:
        axis.plot([arm["kept"]], [len(others)], color=canvas.INK, marker="|", markersize=13, linestyle="")
    names = [arm["name"] for arm in others] + ([f"{len(shuffles)} shuffles"] if shuffles else [])
    canvas.name_rows(axis, names)
    canvas.name_axes(axis, "share of the loss gain kept (95 % interval)", "")
    return canvas.save(figure, path)


def is_shuffle(arm: Mapping[str, Any]) -> bool:
    return str(arm["name"]).startswith("shuffled")


# --- in the report ---------------------------------------------------------------------------------------------------


def gain_blocks(gain: Mapping[str, Any]) -> list[Block]:
    """Share of the loss gain that each arm keeps (content of `gain.json`), shuffles summed up in one row."""
    rows = [
        (arm["name"], percent(arm["kept"]), f"{percent(arm['low'])} to {percent(arm['high'])}")
        for arm in gain["arms"]
        if not is_shuffle(arm)
    ]
    shuffles = [arm["kept"] for arm in gain["arms"] if is_shuffle(arm)]
    if shuffles:
        spread = f"{percent(min(shuffles))} to {percent(max(shuffles))}"
        rows.append((f"{len(shuffles)} shuffles, mean and range", percent(sum(shuffles) / len(shuffles)), spread))
    note = "Share of the preliminary fine-tune's loss improvement that survives truncation to the plan's parameters."
    if choice := gain.get("choice"):
        note += f" Plan: --metric {choice['best']}, on items that did not choose it; {choice['purpose']}."
    if gain.get("defined") is False:
        note = "The fine-tune's own gain is not clearly above zero, so these shares mean nothing. " + note
    caption = "Share of the loss gain kept: the plan against uniform rank and shuffles of its own ranks"
    plots = [] if gain.get("defined") is False else [Plot("gain", caption, partial(plot_gain, gain))]
    return [*plots, Table(("gain kept", "share", "95 % interval"), rows, note=note)]


def read_gain(path: Path) -> Mapping[str, Any]:
    content = read_object(path)
    arms = content.get("arms")
    if not isinstance(arms, list) or not all(has_numbers(arm, ("kept", "low", "high"), "name") for arm in arms):
        raise DataError(f"{path}: expected `arms`, a list of objects with name, kept, low and high")
    return content


GAIN = Finding("gain.json", ("ranks",), read_gain, gain_blocks)
