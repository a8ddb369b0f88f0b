"""The pictures of a study: scores against parameters, the tuning curves, the differences. From study.json's content.

plot_study_scores(study, plots / "study_scores.png")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rankwise.page.canvas import BLUE, FAINT, GREY, log_ticks, name_axes, new_figure, save, style
from rankwise.page.text import clip
from rankwise.study.words import Study, place

REFERENCES = ("full", "base")
SPREAD = 0.02
TOP = 3.0


def plot_study_scores(study: Study, path: Path | str) -> Path:
    """Test loss against parameters, one line per arm with its 95 % intervals; references as numbers in the title."""
    rows = [row for row in study["arms"] if row["loss"] is not None and row["budget"]]
    names = list(dict.fromkeys(series(row, study) for row in rows))
    figure, axis = new_figure(7.2, 4.2)
    for index, name in enumerate(names):
        found = sorted((row for row in rows if series(row, study) == name), key=lambda row: row["parameters"])
        shift = 1 + SPREAD * (index - (len(names) - 1) / 2)  # side by side, or intervals hide each other
        x, y = [row["parameters"] * shift for row in found], [row["loss"] for row in found]
        error = [[row["loss"] - row["low"] for row in found], [row["high"] - row["loss"] for row in found]]
        axis.errorbar(x, y, yerr=error, label=clip(name, 48), capsize=2, linewidth=1, markersize=4, **style(index))
    axis.set_xscale("log")
    ticks = sorted({row["parameters"] for row in rows if row["arm"] == rows[0]["arm"]})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    name_axes(axis, "trainable parameters", "test loss (nats per token)", references(study))
    if names:
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return save(figure, path)


def series(row: Mapping[str, Any], study: Study) -> str:
    """The arm, with its scheduler where there are several."""
    several = len({each["scheduler"] for each in study["arms"]}) > 1
    return f"{row['label']}, {row['scheduler']}" if several else str(row["label"])


def references(study: Study) -> str:
    """base 3.102 · full 1.874"""
    rows = [row for row in study["arms"] if row["arm"] in REFERENCES and row["loss"] is not None]
    return " · ".join(f"{series(row, study)} {row['loss']:.3f}" for row in rows)


def plot_study_rates(study: Study, path: Path | str) -> Path:
    """Dev loss against learning rate, one panel per budget and way of training, the chosen point of each arm ringed."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in study["tuning"]:
        panels.setdefault(place(row, study), []).append(row)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(3.4 * columns + 1.6, 2.9 * rows, columns=columns, rows=rows)
    flat = [axes] if len(panels) == 1 else list(axes.flat)
    names = list(dict.fromkeys(row["label"] for row in study["tuning"]))
    for axis, (title, members) in zip(flat, panels.items(), strict=False):
        for row in members:
            draw_rates(axis, row, style(names.index(row["label"])))
        top = ceiling([point for row in members for curve in row["curves"].values() for point in points(curve)])
        axis.set_xscale("log")
        axis.set_ylim(*top)
        log_ticks(axis.xaxis)
        name_axes(axis, "learning rate", "dev loss (nats per token)", title)
    for axis in flat[len(panels) :]:
        axis.set_visible(False)
    handles = {label: handle for axis in flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7, frameon=False)
    return save(figure, path)


def draw_rates(axis: Any, row: Mapping[str, Any], look: Mapping[str, Any]) -> None:
    """Every scale's curve of one arm, the chosen one strong."""
    for scale, curve in row["curves"].items():
        found, chosen = points(curve), scale == row["scale"]
        label = clip(row["label"], 48) if chosen else None
        x, y = [rate for rate, _ in found], [loss for _, loss in found]
        axis.plot(x, y, label=label, linewidth=1, markersize=3, alpha=1 if chosen else 0.4, **look)
        best = [point for point in found if chosen and point[0] == row["learning_rate"]]
        for rate, loss in best:
            axis.plot([rate], [loss], marker="o", markersize=9, fillstyle="none", color=look["color"])


def points(curve: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(rate, mean loss) where every seed stayed finite."""
    return [(point["learning_rate"], fmean(point["losses"])) for point in curve if None not in point["losses"]]


def ceiling(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Limits that show where curves turn; what is far above them runs out of the picture."""
    losses = [loss for _, loss in found] or [0.0, 1.0]
    least, middle = min(losses), median(losses)
    reach = max(middle - least, 1e-3)
    return least - 0.15 * reach, least + TOP * reach


def plot_study_differences(study: Study, path: Path | str) -> Path:
    """Every arm minus the common one with its 95 % interval; within the grey band of ±δ nothing is of interest."""
    rows = study["differences"]
    figure, axis = new_figure(7.2, 1.2 + 0.24 * len(rows))
    delta = study["smallest_effect"]
    axis.axvspan(-delta, delta, color=FAINT, zorder=0)
    axis.axvline(0, color=GREY, linewidth=0.8)
    for y, row in enumerate(rows):
        error = [[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]]
        filled = "full" if row["primary"] else "none"
        colour = BLUE if row["primary"] else GREY
        axis.errorbar(
            row["estimate"], y, xerr=error, color=colour, marker="o", fillstyle=filled, markersize=5, capsize=3
        )
    names = [clip(f"{row['first']} · {place(row, study)}", 66) for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    better = "← better     " if study["lower_is_better"] else ""
    common = ", ".join(dict.fromkeys(row["second"] for row in rows))
    title = f"minus {common} · filled: primary · grey: ±{delta:g}"
    name_axes(axis, f"{better}nats per token (95 %)", "", title)
    return save(figure, path)


PLOTS = {
    "study_scores": (plot_study_scores, "Test loss of every arm against its parameters, 95 % intervals"),
    "study_differences": (plot_study_differences, "Paired differences with 95 % intervals; grey: below δ"),
    "study_rates": (plot_study_rates, "Dev loss against learning rate; the ring marks what was chosen"),
}
