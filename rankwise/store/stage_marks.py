"""What a run folder knows of its recipe's stages: `.stages/done.json`, one entry per stage, in order.

    {"train": {"started": mark}}                                       begun, not finished: to be resumed
    {"train": {"done": mark, "seconds": 81.2, "peak_memory": …}}       finished, and what it took (monitor.Usage)

A mark is a hash of all that a stage depends on; stages/run.py makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.store.files import read_object, write_json

STATE, MARKS = ".stages", "done.json"


def read_marks(run: Path) -> dict[str, dict[str, Any]]:
    """Empty where no stage has begun. DataError, naming the file, where it is broken."""
    file = run / STATE / MARKS
    content = read_object(file) if file.is_file() else {}
    if not all(isinstance(entry, dict) for entry in content.values()):
        raise DataError(f"{file}: expected an object per stage; delete the file, and every stage runs again")
    return content


def write_mark(run: Path, stage: str, entry: Mapping[str, Any]) -> None:
    """Replace one stage's entry; the other stages' stay."""
    write_json(run / STATE / MARKS, read_marks(run) | {stage: dict(entry)})
