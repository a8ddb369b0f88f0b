"""Plots of training and evaluation: loss curves, scores before and after, gain kept.

plot_loss(csv.DictReader(open("training_log.csv")), plots / "training_loss.png")
plot_scores({"base": EvaluationResult.load(a), "adapter": EvaluationResult.load(b)}, plots / "scores.png")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.evaluate.predictions import READ_FIRST, EvaluationResult
from rankwise.page import canvas
from rankwise.page.blocks import Block
from rankwise.page.svg import Curves, Line, Point
from rankwise.page.text import clip, metric_name, score

NATS = "loss (nats per token)"
SHADES = (canvas.GREY, canvas.BLUE, canvas.YELLOW, "#4a566c", "#b0a473", "#222222")
HATCHES = ("", "", "///", "...", "\\\\\\", "xxx")
MOST_PANELS = 4
MOST_NAMES, MOST_PHASES = 5, 12


def plot_loss(rows: Iterable[Mapping[str, Any]], path: Path | str, phases: Sequence[tuple[float, str]] = ()) -> Path:
    """Training and validation loss by optimizer step, the minimum of each marked; DataError where there is no loss.

    rows: of `training_log.csv`: `step`, `loss`, `eval_loss`; a blank cell is a value that was not logged. phases:
    (place, name) of every phase, as `gradient_summary.boundaries` has them; marked as well.
    """
    rows = list(rows)
    training, validation = points(rows, "loss"), points(rows, "eval_loss")
    if not training and not validation:
        raise DataError("the training log holds no loss: its columns are step, loss, eval_loss")
    figure, axis = canvas.new_figure(7.2, 3.4)
    draw_curve(axis, training, "training", canvas.BLUE, "-", "v")
    draw_curve(axis, validation, "validation", canvas.INK, "--", "D")
    draw_phases(axis, phases)
    canvas.name_axes(axis, "optimizer step", NATS)
    canvas.legend(axis, loc="upper right")
    return canvas.save(figure, path)


def loss_blocks(rows: Sequence[Mapping[str, Any]], phases: Sequence[tuple[float, str]] = ()) -> list[Block]:
    """The curves of a training log that has any, its phases shaded."""
    curves = [("training", points(rows, "loss")), ("validation", points(rows, "eval_loss"))]
    lines = [line_of(name, curve, look) for look, (name, curve) in enumerate(curves) if curve]
    caption = "Training and validation loss, minima marked"
    return [Curves("training_loss", caption, lines, "optimizer step", NATS, phases)] if lines else []


def line_of(name: str, curve: list[Point], look: int) -> Line:
    step, least = min(curve, key=lambda point: point[1])
    return Line(f"{name}, least {least:.3f} at step {step:,.0f}", curve, look, marked=(step, least))


def points(rows: Sequence[Mapping[str, Any]], column: str) -> list[Point]:
    """(step, value) of the rows that have both, finite."""
    found = []
    for row in rows:
        step, value = row.get("step"), row.get(column)
        if step in (None, "") or value in (None, ""):
            continue
        try:
            point = (float(step), float(value))
        except ValueError:
            raise DataError(f"training log, step {step!r}: {column} {value!r} is not a number") from None
        found += [point] if math.isfinite(point[1]) else []
    return found


def draw_curve(axis: Any, curve: list[Point], name: str, colour: str, style: str, marker: str) -> None:
    if not curve:
        return
    steps, values = zip(*curve, strict=True)
    canvas.draw_line(axis, steps, values, "_", colour, style)
    step, least = min(curve, key=lambda point: point[1])
    label = f"{name}, least {least:.3f} at step {step:.0f}"
    axis.plot([step], [least], color=colour, linestyle=style, marker=marker, markersize=8, label=label)


def draw_phases(axis: Any, phases: Sequence[tuple[float, str]], named: bool = True) -> None:
    """A line where each phase begins (x, name), its name above. Where they are many, names or lines would hide the
    curves, and are left out."""
    left = axis.get_xlim()[0]
    for x, _ in phases[1:] if len(phases) <= MOST_PHASES else ():
        axis.axvline(x, color=canvas.INK, linestyle=(0, (1, 2)), linewidth=1.1)
    for x, name in phases if named and len(phases) <= MOST_NAMES else ():
        label = f" {clip(name, 22)}"
        text = axis.text(
            max(x, left), 1.01, label, fontsize=7.5, color=canvas.INK, transform=axis.get_xaxis_transform()
        )
        text.set_parse_math(False)


def plot_scores(results: Mapping[str, EvaluationResult], path: Path | str) -> Path:
    """One panel per metric, one bar per result (label → evaluation), 95 % intervals. DataError: no metric is shared."""
    names = leading_metrics(results.values())[:MOST_PANELS]
    if not names:
        raise DataError("these results share no metric to draw")
    figure, axes = canvas.panels(2.1 * max(2, len(names)), 2.9, columns=len(names))
    for axis, name in zip(axes, names, strict=True):
        draw_metric(axis, name, results)
    canvas.legend_outside(figure, "lower center", axes[:1], columns=min(3, len(results)))
    return canvas.save(figure, path)


def shared_metrics(results: Iterable[EvaluationResult]) -> list[str]:
    """Metrics that every result has: those that people read first, then the rest in the first result's order."""
    everything = list(results)
    names = list(dict.fromkeys(name for one in everything for name in one.metrics))
    names = [name for name in names if all(name in one.metrics for one in everything)]
    return sorted(names, key=lambda name: READ_FIRST.index(name) if name in READ_FIRST else len(READ_FIRST))


def leading_metrics(results: Iterable[EvaluationResult]) -> list[str]:
    """Of the shared ones those that people read first; all where there is none of them (not one class's precision)."""
    shared = shared_metrics(results)
    return [name for name in shared if name in READ_FIRST] or shared


def draw_metric(axis: Any, name: str, results: Mapping[str, EvaluationResult]) -> None:
    tallest = 0.0
    for i, (label, result) in enumerate(results.items()):
        value = result.metrics[name]
        low, high = result.intervals.get(name, (value, value))
        shade, hatch = SHADES[i % len(SHADES)], HATCHES[i % len(HATCHES)]
        axis.bar(i, value, color=shade, hatch=hatch, edgecolor="white", linewidth=0, width=0.7, label=clip(label, 40))
        if high > low:
            axis.errorbar(
                i, value, yerr=canvas.error_bars([value], [(low, high)]), color=canvas.INK, capsize=4, linewidth=1.2
            )
        axis.annotate(score(value), (i, max(value, high)), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        tallest = max(tallest, value, high)
    axis.set_xticks([])
    axis.set_xlim(-0.7, max(1, len(results) - 1) + 0.7)
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), (tallest or 1.0) * 1.15)
    axis.grid(False, axis="x")
    canvas.name_axes(axis, "", "", metric_name(name))
