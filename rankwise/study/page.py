"""A study on a report page: verdicts in words first, then the table of arms, then what stands behind both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.files.atomic import write_json, write_text
from rankwise.page.blocks import Block, Folded, Page, Picture, Section, Table, Words
from rankwise.page.canvas import drawable
from rankwise.page.template import render
from rankwise.page.text import plural, printable
from rankwise.study.plots import PLOTS
from rankwise.study.words import (
    Study,
    assay_sentence,
    deviation_sentence,
    place,
    rate_words,
    shown_interval,
    stopped,
    verdict_sentence,
)


def study_blocks(study: Study, pictures: Sequence[Picture]) -> list[Block]:
    """Everything about one study, in the order of its weight."""
    question = [Words(printable(study["question"]))] if study.get("question") else []
    told = [*(verdict_sentence(row, study) for row in study["verdicts"])]
    told += [assay_sentence(row, study) for row in study["assay"]]
    return [
        *question,
        *(Words(printable(sentence)) for sentence in told),
        arms_table(study),
        *pictures,
        differences_table(study),
        *(Words(printable(deviation_sentence(row))) for row in study["registration"]["deviations"]),
        Words(printable(standing(study))),
        *(Words(f"Note: {printable(note)}.") for note in study["notes"]),
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
    rows = [
        [printable(label, 80), *(cell(cells.get((arm, label, where))) for where in places)] for arm, label in labels
    ]
    shown = [where for where in places if any(cells.get((arm, label, where)) for arm, label in labels)]
    note = "Mean test loss in nats per token [95 % interval over seeds and items]; parameters; rate and scale as tuned."
    return Table(("arm", *(printable(where, 60) for where in shown)), rows, note=note)


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
            printable(f"{row['first']} − {row['second']}", 120),
            printable(place(row, study), 60),
            shown_interval(row),
            "primary" if row["primary"] else "",
        )
        for row in study["differences"]
    ]
    note = "Paired by seed and item; 95 % intervals without adjustment. Only primary contrasts have a verdict."
    return Table(("difference", "at", "nats per token", ""), rows, first_number=2, note=note)


def tuning_table(study: Study) -> Table:
    rows = [
        (
            printable(row["label"], 80),
            printable(place(row, study), 60),
            rate_words(row["learning_rate"]) + (" (edge)" if row["at_edge"] else ""),
            printable(row["scale"], 20),
            str(sum(len(curve) for curve in row["curves"].values())),
        )
        for row in study["tuning"]
    ]
    return Table(("arm", "at", "learning rate", "scale", "points tried"), rows, first_number=2)


FILE = "study.json"


def write_study(folder: Path, study: Mapping[str, Any]) -> dict[str, Path | str]:
    """Write them into the run folder; what was written, by name."""
    pictures = []
    if drawable("pictures of the study are"):
        pictures = [
            Picture(draw(study, folder / "plots" / f"{name}.png"), caption) for name, (draw, caption) in PLOTS.items()
        ]
    page = Page(
        title=study["question"] or "Study",
        subtitle=f"{study['kind']} compared at equal parameters",
        headline=[],
        lead=[],
        sections=[Section("Verdicts", study_blocks({**study, "question": None}, pictures))],
        appendix=[],
    )
    written: dict[str, Path | str] = {
        "study": write_json(folder / FILE, study),
        "page": write_text(folder / "study.md", render(page, "report.md.j2", folder)),
    }
    return written | {picture.path.stem: picture.path for picture in pictures}
