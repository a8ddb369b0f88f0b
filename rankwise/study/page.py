"""Presentation of study.json: sentences, tables and plots, once, for terminal, study.md and report.

study.json ── study_blocks ──▶ the terminal's last lines, study.md with its plots (write_study), the report's section
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rankwise.files.atomic import write_text
from rankwise.files.document import Document
from rankwise.page import canvas
from rankwise.page.blocks import Block, Finding, Folded, Page, Plot, Section, Table, Words, drawn, into, pictures
from rankwise.page.template import markdown
from rankwise.page.text import clip, number, plural

DOCUMENT = Document(
    "study.json",
    "rankwise-study/1",
    "a study",
    "rankwise study",
    ("verdicts", "assay", "arms", "differences", "tuning", "seeds", "data", "notes", "registration"),
)
Study = Mapping[str, Any]


def signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def format_interval(row: Mapping[str, Any], digits: int = 4) -> str:
    estimate, low, high = (signed(row[name], digits) for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def place(row: Mapping[str, Any], study: Study) -> str:
    """Budget and way of training, as far as the study has several of them."""
    schedulers = {each["scheduler"] for each in study["arms"]}
    parts = [row["budget"]] if row["budget"] else []
    return ", ".join(parts + ([row["scheduler"]] if len(schedulers) > 1 else [])) or "all weights"


def verdict_sentence(row: Mapping[str, Any], study: Study) -> str:
    """One contrast in words, with the difference in nats per token and its 95 % interval."""
    return f"{judged_sentence(row, study)}{prediction_sentence(row)}"


def prediction_sentence(row: Mapping[str, Any]) -> str:
    """What was predicted beforehand, and whether it came out so; nothing where nothing was."""
    if "prediction" not in row:
        return ""
    because = f" ({row['predicted_because']})" if row["predicted_because"] else ""
    outcome = {True: "it came out so", False: "it came out otherwise", None: "that is neither shown nor refuted"}
    return f" Predicted beforehand: {row['prediction']}{because}; {outcome[row['as_predicted']]}."


def judged_sentence(row: Mapping[str, Any], study: Study) -> str:
    first, second, where = row["first"], row["second"], place(row, study)
    if row["verdict"] == "diverged":
        return f"{where}: {first} and {second} cannot be compared: fewer than two seeds of both stayed finite."
    difference = f"{format_interval(row)} {study['metric'].replace('answer ', '')}"
    chance = f"p {row['p_difference']:.2g} after Holm"
    if row["verdict"] == "equivalent":
        return f"{where}: {first} and {second} are equivalent within {study['smallest_effect']:g}: {difference}."
    if row["verdict"] in ("better", "worse"):
        return f"{where}: {first} is {row['verdict']} than {second}: {difference}, {chance}."
    more = row["more_seeds"]
    needed = f"about {plural(more, 'more seed')}" if more else "more test items; more seeds alone would not decide it"
    return f"{where}: {first} vs {second} is undecided: {difference}, {chance}. It takes {needed}."


def assay_sentence(row: Mapping[str, Any], study: Study) -> str:
    """Whether the bad plan did harm; where not, no verdict about plans means anything on this task."""
    against = ", ".join(f"{format_interval(effect)} against {name}" for name, effect in row["against"].items())
    where, told = place(row, study), "".join(map(prediction_sentence, row.get("predictions", {}).values()))
    if row["works"]:
        return f"{where}: the task tells plans apart: {row['arm']} is worse ({against}).{told}"
    return f"{where}: this task cannot tell plans apart: {row['arm']} is not worse ({against}).{told}"


def deviation_sentence(row: Mapping[str, Any]) -> str:
    changed = "; ".join(f"{name} {before!r} → {after!r}" for name, (before, after) in row.get("changed", {}).items())
    what = f"test read again (first on {row['test_read_again']})" if "test_read_again" in row else changed
    known = f"{plural(row['runs_finished'], 'run')} finished, test {'was' if row['test_was_read'] else 'not'} read"
    return f"Deviation of {row['time']}: {what}. Why: {row['why']} ({known})."


def stopped(study: Study) -> str:
    seeds = study["seeds"]
    return f"{plural(seeds['reported'], 'seed')} reported, stopped by {seeds['stopped']}"


def runs_rate(seconds: Sequence[float]) -> int:
    """Runs per hour of one process."""
    return round(3600 * len(seconds) / max(1e-9, sum(seconds)))


def rate_words(value: float | None) -> str:
    return "–" if value is None else number(value)


def study_blocks(study: Study) -> list[Block]:
    """All blocks of one study, most important first: verdicts in words, then the arms, then what stands behind both."""
    question = [Words(study["question"])] if study.get("question") else []
    told = [*(verdict_sentence(row, study) for row in study["verdicts"])]
    told += [assay_sentence(row, study) for row in study["assay"]]
    return [
        *question,
        *(Words(sentence) for sentence in told),
        arms_table(study),
        *(Plot(name, caption, partial(draw, study)) for name, (draw, caption) in PLOTS.items()),
        differences_table(study),
        *(Words(deviation_sentence(row)) for row in study["registration"]["deviations"]),
        Words(standing(study)),
        *(Words(f"Note: {note}.") for note in study["notes"]),
        Folded("Learning rates", [tuning_table(study)]),
    ]


def standing(study: Study) -> str:
    """Registration, seeds and data in a few sentences."""
    registration, data = study["registration"], study["data"]
    removed = "; ".join(f"{count:,} rows of {what}" for what, count in data["removed"].items() if count)
    deviations = "" if registration["deviations"] else " It went as registered: no deviation."
    return (
        f"Registered {registration['time']}, SHA-256 {registration['sha256']}.{deviations} {stopped(study)}; "
        f"{plural(study['seeds']['tuning'], 'other seed')} for tuning. Trained on {data['train']['items']:,} rows, "
        f"tuned on {data['dev']['items']:,} items, reported on {data['test']['items']:,} items "
        f"of {data['test']['groups']:,} groups, read once.{f' Left out: {removed}.' if removed else ''}"
    )


def arms_table(study: Study) -> Table:
    """Arms by settings: mean loss with its interval."""
    places = list(dict.fromkeys(place(row, study) for row in study["arms"]))
    cells = {(row["arm"] + row["state"], row["label"], place(row, study)): row for row in study["arms"]}
    labels = list(dict.fromkeys((arm, label) for arm, label, _ in cells))
    rows = [[label, *(cell(cells.get((arm, label, where))) for where in places)] for arm, label in labels]
    shown = [where for where in places if any(cells.get((arm, label, where)) for arm, label in labels)]
    note = "Mean test loss in nats per token [95 % interval over seeds and items]; parameters; rate and scale as tuned."
    return Table(("arm", *shown), rows, note=note)


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["loss"] is None:
        return f"diverged in {row['diverged']} seeds"
    diverged = f"; {row['diverged']} diverged" if row["diverged"] else ""
    tuned = f"; {rate_words(row['learning_rate'])}, {row['scale']}" if row["learning_rate"] else ""
    return f"{row['loss']:.4f} [{row['low']:.4f}, {row['high']:.4f}]\n{row['parameters']:,}{tuned}{diverged}"


def differences_table(study: Study) -> Table:
    rows = [
        (
            f"{row['first']} − {row['second']}",
            place(row, study),
            format_interval(row),
            "primary" if row["primary"] else "",
        )
        for row in study["differences"]
    ]
    note = "Paired by seed and item; 95 % intervals without adjustment. Only primary contrasts have a verdict."
    return Table(("difference", "at", "nats per token", ""), rows, first_number=2, note=note)


def tuning_table(study: Study) -> Table:
    rows = [
        (
            row["label"],
            place(row, study),
            rate_words(row["learning_rate"]) + (" (edge)" if row["at_edge"] else ""),
            row["scale"],
            str(sum(len(curve) for curve in row["curves"].values())),
        )
        for row in study["tuning"]
    ]
    return Table(("arm", "at", "learning rate", "scale", "points tried"), rows, first_number=2)


def write_study(folder: Path, study: Mapping[str, Any]) -> dict[str, Path | str]:
    """Write them into the run folder; what was written, by name."""
    target = into(folder / "plots") if canvas.drawable("pictures of the study are") else None
    blocks = drawn(study_blocks({**study, "question": None}), target)
    title, subtitle = study["question"] or "Study", f"{study['kind']} compared at equal parameters"
    page = Page(title, subtitle, sections=[Section("Verdicts", blocks)])
    written: dict[str, Path | str] = {
        "study": DOCUMENT.write(folder, study),
        "page": write_text(folder / "study.md", markdown(page, folder)),
    }
    return written | pictures(blocks)


REFERENCES = ("full", "base")
SPREAD = 0.02
TOP = 3.0


def plot_study_scores(study: Study, path: Path | str) -> Path:
    """Test loss against parameters, one line per arm with its 95 % intervals; references as numbers in the title."""
    rows = [row for row in study["arms"] if row["loss"] is not None and row["budget"]]
    names = list(dict.fromkeys(series(row, study) for row in rows))
    figure, axis = canvas.new_figure(7.2, 4.2)
    for index, name in enumerate(names):
        found = sorted((row for row in rows if series(row, study) == name), key=lambda row: row["parameters"])
        shift = 1 + SPREAD * (index - (len(names) - 1) / 2)  # side by side, or intervals hide each other
        x, y = [row["parameters"] * shift for row in found], [row["loss"] for row in found]
        error = canvas.error_bars(y, [(row["low"], row["high"]) for row in found])
        axis.errorbar(
            x, y, yerr=error, label=clip(name, 48), capsize=2, linewidth=1, markersize=4, **canvas.style(index)
        )
    axis.set_xscale("log")
    ticks = sorted({row["parameters"] for row in rows if row["arm"] == rows[0]["arm"]})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    canvas.name_axes(axis, "trainable parameters", "test loss (nats per token)", references(study))
    canvas.legend_outside(figure, "right upper", [axis], size=7)
    return canvas.save(figure, path)


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
    places: dict[str, list[Mapping[str, Any]]] = {}
    for row in study["tuning"]:
        places.setdefault(place(row, study), []).append(row)
    columns = min(3, len(places))
    rows = math.ceil(len(places) / columns)
    figure, axes = canvas.panels(3.4 * columns + 1.6, 2.9 * rows, columns=columns, rows=rows)
    names = list(dict.fromkeys(row["label"] for row in study["tuning"]))
    for axis, (title, members) in zip(axes, places.items(), strict=False):
        for row in members:
            draw_rates(axis, row, canvas.style(names.index(row["label"])))
        top = ceiling([point for row in members for curve in row["curves"].values() for point in points(curve)])
        axis.set_xscale("log")
        axis.set_ylim(*top)
        canvas.log_ticks(axis.xaxis)
        canvas.name_axes(axis, "learning rate", "dev loss (nats per token)", title)
    for axis in axes[len(places) :]:
        axis.set_visible(False)
    canvas.legend_outside(figure, "right upper", axes, size=7)
    return canvas.save(figure, path)


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
    rows, delta = study["differences"], study["smallest_effect"]
    figure, axis = canvas.new_figure(7.2, 1.2 + 0.24 * len(rows))
    names = [clip(f"{row['first']} · {place(row, study)}", 66) for row in rows]
    draw_differences(axis, names, rows, [row["primary"] for row in rows], delta)
    better = "← better     " if study["lower_is_better"] else ""
    common = ", ".join(dict.fromkeys(row["second"] for row in rows))
    title = f"minus {common} · filled: primary · grey: ±{delta:g}"
    canvas.name_axes(axis, f"{better}nats per token (95 %)", "", title)
    return canvas.save(figure, path)


def draw_differences(
    axis: Any, names: Sequence[str], rows: Sequence[Mapping[str, Any]], filled: Sequence[bool], delta: float
) -> None:
    """Named differences with their intervals from the top down, over the band of ±δ; filled ones have a verdict."""
    axis.axvspan(-delta, delta, color=canvas.FAINT, zorder=0)
    axis.axvline(0, color=canvas.GREY, linewidth=0.8)
    for y, (row, full) in enumerate(zip(rows, filled, strict=True)):
        error = canvas.error_bars([row["estimate"]], [(row["low"], row["high"])])
        look = {"color": canvas.BLUE if full else canvas.GREY, "fillstyle": "full" if full else "none"}
        axis.errorbar(row["estimate"], y, xerr=error, marker="o", markersize=5, capsize=3, **look)
    canvas.name_rows(axis, names)


PLOTS = {
    "study_scores": (plot_study_scores, "Test loss of every arm against its parameters, 95 % intervals"),
    "study_differences": (plot_study_differences, "Paired differences with 95 % intervals; grey: below δ"),
    "study_rates": (plot_study_rates, "Dev loss against learning rate; the ring marks what was chosen"),
}


def read_study(path: Path) -> Study:
    return DOCUMENT.read(path)


STUDY = Finding(DOCUMENT.name, ("study",), read_study, study_blocks)
