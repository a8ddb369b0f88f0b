"""The training log, written as the Trainer logs; the table that it is, and the others, are in `gradient_table`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.train.gradient_table import LOG_COLUMNS, TRAINING_LOG, StepTable


class TrainingLog(TrainerCallback):
    """Writes what the Trainer logs to `training_log.csv`. `seconds` counts training time over all resumed parts.

    more: names of further columns.
    """

    def __init__(self, output_dir: Path, more: Sequence[str] = ()) -> None:
        self.table = StepTable(output_dir / TRAINING_LOG, (*LOG_COLUMNS, *more))
        self._started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.table.cut(state.global_step)
            rows = list(self.table.read())
            self._started = time.monotonic() - (float(rows[-1]["seconds"] or 0) if rows else 0.0)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        columns = [name for name in self.table.columns if logs and name in logs and name != "epoch"]
        values = {name: f"{float(logs[name]):.8g}" for name in columns}  # what float32 holds
        if state.is_world_process_zero and values:
            seconds = round(time.monotonic() - self._started, 2)
            epoch = f"{state.epoch or 0.0:.8g}"
            self.table.append({"step": state.global_step, "epoch": epoch, "seconds": seconds} | values)
