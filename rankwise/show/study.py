"""The files of a finished study: study.json, study.md, and the plots where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.files.atomic import write_json, write_text
from rankwise.page.blocks import Page, Picture, Section
from rankwise.page.canvas import drawable
from rankwise.page.template import render
from rankwise.show.study_blocks import study_blocks
from rankwise.show.study_plots import PLOTS

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
