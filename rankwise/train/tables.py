"""CSV tables with one row per event of training, written as it happens and cut back on resume."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.store.files import atomic_write

TRAINING_LOG = "training_log.csv"
COLUMNS = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "seconds")


@dataclass(frozen=True)
class StepTable:
    """A CSV file whose first column is the optimizer step. Blank means not measured at that step."""

    path: Path
    columns: Sequence[str]

    def read(self) -> Iterator[dict[str, str]]:
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)

    def rows(self) -> list[dict[str, str]]:
        return list(self.read())

    def cut(self, step: int) -> None:
        """Drop what lies after a step, so that a resumed run continues the table it had at its checkpoint."""
        whole = (row for row in self.read() if None not in row.values())  # a power cut may leave half a row
        kept = (row for row in whole if row["step"].isdigit() and int(row["step"]) <= step)
        with atomic_write(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def append(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="", extrasaction="ignore").writerow(row)

    def extend(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows of cells that are in the order of the columns, in one piece; None is blank."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())


class TrainingLog(TrainerCallback):
    """Writes what the Trainer logs to `training_log.csv`. `seconds` counts training time over all resumed parts.

    more: names of further columns.
    """

    def __init__(self, output_dir: Path, more: Sequence[str] = ()) -> None:
        self.table = StepTable(output_dir / TRAINING_LOG, (*COLUMNS, *more))
        self._started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.table.cut(state.global_step)
            rows = self.table.rows()
            self._started = time.monotonic() - (float(rows[-1]["seconds"] or 0) if rows else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        values = {name: number(logs[name]) for name in self.table.columns if logs and name in logs and name != "epoch"}
        if state.is_world_process_zero and values:
            seconds = round(time.monotonic() - self._started, 2)
            epoch = number(state.epoch or 0.0)
            self.table.append({"step": state.global_step, "epoch": epoch, "seconds": seconds} | values)


def number(value: float) -> str:
    """Eight significant digits: what float32 holds."""
    return f"{float(value):.8g}"
