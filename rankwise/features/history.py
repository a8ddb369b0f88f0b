"""One row per epoch of a network that predicts factors: written, printed, saved with checkpoints; and the best network.

    evaluation at the end of an epoch ──▶ row ──▶ history.json, a line, best_model where no earlier epoch is better
    checkpoint ◀── rows so far, and the running sums where it is saved within an epoch

On resume the rows are those of the checkpoint, so that none is lost and none doubled, whatever was written after it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import DataError
from rankwise.features.nets.files import save_factorizer
from rankwise.features.objective import TERMS, FactorObjective
from rankwise.files.atomic import read_json, read_object, write_json
from rankwise.files.processes import process_index
from rankwise.train.sharing import summed

HISTORY, STATE = "history.json", "history_state.json"
Row = dict[str, Any]


class EpochHistory(TrainerCallback):
    """Keeps `history.json` and the best network of a run.

    Args:
        objective: what is trained; its sums become the row's means.
        folder: of the run.
        rows: of the epochs before the first one here, where training goes on without a checkpoint.
        say: called with a line per epoch, in the first process.
    """

    def __init__(
        self, objective: FactorObjective, folder: Path, rows: Sequence[Row] = (), say: Callable[[str], None] = print
    ) -> None:
        self.objective, self.folder, self.say = objective, folder, say
        self.rows = list(rows)
        self.started, self.seconds = time.monotonic(), 0.0

    def restore(self, checkpoint: Path) -> None:
        """Take up what a checkpoint holds. DataError where it is not there."""
        file = checkpoint / STATE
        if not file.is_file():
            raise DataError(f"{file} is missing: without it the epochs before this checkpoint are not known")
        state: Mapping[str, Any] = read_object(file)
        self.rows, self.seconds = list(state["rows"]), state["seconds"]
        if process_index()[0] == 0:  # the sums are of all processes
            self.objective.restart(state["sums"], state["counted"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.monotonic() - self.seconds
        self.write(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        assert metrics is not None
        row = self.row(metrics, optimizer.param_groups[0]["lr"])
        best = not self.rows or order(row) < order(best_row(self.rows))
        self.rows.append(row)
        self.objective.restart()
        self.started = time.monotonic()
        self.write(state)
        if state.is_world_process_zero:
            if best:
                save_factorizer(self.objective.net, self.folder)
            last = row["epoch"] + round(args.num_train_epochs - (state.epoch or 0))
            self.say(in_words(row, last, self.objective.net.settings.rank))

    def row(self, metrics: Mapping[str, float], rate: float) -> Row:
        """The row of the epoch that has just been evaluated. Its rate is the one that it was trained with."""
        means = dict(zip(TERMS, self.means(), strict=True))
        net = self.objective.net
        refined = {"val_refined_mse": metrics["eval_refined_mse"]} if net.settings.refine else {}
        return {
            "epoch": self.rows[-1]["epoch"] + 1 if self.rows else 1,
            **{f"train_{name}": means[name] for name in self.objective.logged},
            "val_mse": metrics["eval_mse"],
            "val_rel_f": metrics["eval_relative_error"],
            "val_evr": metrics["eval_explained_energy"],
            **refined,
            "lr": float(rate),
            "time": round(time.monotonic() - self.started, 3),
            "effective_rank": net.settings.rank if net.rank_mask is None else int(net.rank_mask.sum()),
        }

    def means(self) -> list[float]:
        """Of the terms over the epoch's matrices, in all processes: the one time that they come to the host."""
        *sums, counted = self.totals()
        return [value / counted if counted else math.nan for value in sums]

    def totals(self) -> list[float]:
        """The sums of TERMS and the number of matrices, of all processes, on the host."""
        totals: list[float] = summed(torch.cat([self.objective.sums, self.objective.counted[None]])).tolist()
        return totals

    def write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            write_json(self.folder / HISTORY, self.rows)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        *sums, counted = self.totals()
        if state.is_world_process_zero:
            seconds = time.monotonic() - self.started
            content = {"rows": self.rows, "sums": sums, "counted": round(counted), "seconds": seconds}
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE, content)


def read_history(file: Path) -> list[Row]:
    """The rows of a `history.json`. DataError where they are not what a run writes."""
    rows = read_json(file)
    needed = {"epoch", "val_mse", "effective_rank"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise DataError(f"{file}: not a history of epochs, with {', '.join(sorted(needed))} of each; it may be deleted")
    return rows


def order(row: Row) -> tuple[int, float]:
    """What is better comes first: fewer channels that act, and among equals the lower error.

    While the allocator takes channels away the error rises; a network of an earlier, larger rank is not the result.
    """
    return row["effective_rank"], row["val_mse"]


def best_row(rows: Sequence[Row]) -> Row:
    """The first of the best epochs."""
    return min(rows, key=order)


def in_words(row: Row, last: int, rank: int) -> str:
    """rank: the network's, of which fewer channels may act."""
    acting = f", effective rank {row['effective_rank']}" if row["effective_rank"] < rank else ""
    return (
        f"epoch {row['epoch']}/{last}: train mse {row['train_mse']:.5g}, val mse {row['val_mse']:.5g}, relative error "
        f"{row['val_rel_f']:.4f}, explained energy {row['val_evr']:.4f}, lr {row['lr']:.3g}{acting}, "
        f"{row['time']:.1f} s"
    )
