"""Time and memory of a pipeline's stages: a table in the terminal when it ends, and in its report.

stage        time    memory  GPU memory  GPU use
train     2 h 05 min  9.1 GiB   29.7 GiB     94 %
merge        1 min 02 s …                             done before
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.files.run_folder import read_marks
from rankwise.page.blocks import Table
from rankwise.page.text import duration, is_number, memory

HEADER = ("stage", "time", "memory", "GPU memory", "GPU use", "")
BEFORE, UNFINISHED, UNREACHED, UNASKED = "done before", "not finished", "not reached", "not asked for"
NOTE = (
    "Peak memory of the process and its children, without the pages of mapped files. GPU memory is the most that one "
    "GPU held, whoever held it; GPU use is the mean share of time in which it computed. A resumed stage counts from "
    "its last start. Every sample is in logs/monitor.csv."
)


def cells(time: StageTime) -> list[str]:
    took = "" if time.seconds is None else duration(time.seconds)
    sizes = [in_words(time.usage.get(name), memory) for name in ("peak_memory", "peak_gpu_memory")]
    return [time.name, took, *sizes, in_words(time.usage.get("gpu_utilisation"), share), time.note]


def in_words(value: Any, words: Callable[[float], str]) -> str:
    return words(value) if is_number(value) else ""


def share(percent: float) -> str:
    return f"{percent:.0f} %"


def read_times(run: Path) -> tuple[StageTime, ...]:
    """The finished stages of a run folder, in order; the stage that writes the report is not finished yet."""
    entries = read_marks(run)
    finished = [(name, entry) for name, entry in entries.items() if is_number(entry.get("seconds"))]
    return tuple(StageTime(name, entry["seconds"], entry) for name, entry in finished)


def total(times: Sequence[StageTime]) -> list[str]:
    seconds = sum(time.seconds for time in times if time.note != BEFORE and time.seconds is not None)
    before = sum(time.seconds for time in times if time.note == BEFORE and time.seconds is not None)
    return ["total", duration(seconds), "", "", "", f"and {duration(before)} before" if before else ""]


def time_table(times: Sequence[StageTime]) -> Table:
    """Table of times, without empty columns."""
    header, *rows = columns([HEADER, *map(cells, times), total(times)])
    return Table(header, rows, note=NOTE, totals=1)


def columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows without the columns that are empty below the header."""
    kept = [place for place in range(len(rows[0])) if place < 2 or any(row[place] for row in rows[1:])]
    return [[row[place] for place in kept] for row in rows]


@dataclass(frozen=True)
class StageTime:
    """How long a recipe's stage took (None: it did not finish), and what it used, as files.monitor.Usage names it."""

    name: str
    seconds: float | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def ran(self) -> bool:
        return self.seconds is not None and not self.note
