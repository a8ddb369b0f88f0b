"""Records of a run: a log per start, a row per epoch, the curves, and the best network.

    evaluation at the end of an epoch ──▶ row ──▶ history.json, a line, best_model where no earlier epoch is better
    checkpoint ◀── rows so far, and the running sums where it is saved within an epoch

On resume the rows are those of the checkpoint, so that none is lost and none doubled, whatever was written after it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import DataError, UsageError
from rankwise.features.objective import TERMS, FactorObjective
from rankwise.features.trained import save_factorizer
from rankwise.files.atomic import about_to_write, read_json, read_object, write_json
from rankwise.files.processes import announce, process_index
from rankwise.options.field import flatten
from rankwise.page import canvas
from rankwise.page.blocks import Block, Finding, Plot, Words
from rankwise.page.text import has_numbers, plural
from rankwise.train.rows import summed

HISTORY, STATE = "history.json", "history_state.json"
CURVES = "train_val_loss_comparison"
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
            "effective_rank": net.current_effective_rank(),
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


def order(row: Mapping[str, Any]) -> tuple[int, float]:
    """Sort key, best first: fewer channels that act, and among equals the lower error.

    While the allocator takes channels away the error rises; a network of an earlier, larger rank is not the result.
    """
    return row["effective_rank"], row["val_mse"]


def best_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
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


OPTIONS, LOG, SUMMARY = "config.json", "training.log", "final_summary.json"


@dataclass(frozen=True)
class RunLog:
    """A folder per start of the command. Only the first process writes.

    folder: None in the others.
    """

    folder: Path | None

    @classmethod
    def begun(cls, log_dir: Path, config: Any) -> RunLog:
        if process_index()[0] != 0:
            return cls(None)
        about_to_write()
        folder = new_folder(log_dir)
        write_json(folder / OPTIONS, flatten(config))
        return cls(folder)

    def line(self, text: str) -> None:
        """Printed, and written with the time."""
        announce(text)
        self.note(text)

    def note(self, text: str) -> None:
        if self.folder is not None:
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def summary(self, content: dict[str, Any]) -> None:
        if self.folder is not None:
            write_json(self.folder / SUMMARY, content)


def new_folder(log_dir: Path) -> Path:
    """`logs_20261121_181200`; a second one of the same second gets a number."""
    name = f"logs_{datetime.now():%Y%m%d_%H%M%S}"
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        folder = log_dir / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"--log_dir {log_dir}: cannot be created ({error.strerror}); choose another") from error
        return folder
    raise AssertionError("a thousand runs in one second")


@dataclass(frozen=True)
class Epochs:
    """The rows of a `history.json` and whose they are."""

    name: str
    rows: Sequence[Mapping[str, Any]]


def read_epochs(path: Path) -> Epochs | None:
    """None for another program's history, which looks different."""
    rows, needed = read_json(path), ("epoch", "train_mse", "val_mse", "lr", "effective_rank")
    ours = isinstance(rows, list) and rows and all(has_numbers(row, needed) for row in rows)
    return Epochs(path.parent.name, rows) if ours else None


def epochs_blocks(found: Epochs) -> list[Block]:
    """ResMLP: 20 epochs; kept with validation MSE 0.412 at epoch 17, where the relative error is 0.642; the curves."""
    rows, kept = found.rows, best_row(found.rows)
    told = f"{found.name}: {plural(len(rows), 'epoch')}; "
    told += f"kept with validation MSE {kept['val_mse']:.4g} at epoch {kept['epoch']}"
    if kept.get("val_rel_f") is not None:
        told += f", where the relative error is {kept['val_rel_f']:.4f}"
    ranks = [row["effective_rank"] for row in rows]
    told += f"; effective rank {ranks[0]} → {ranks[-1]}." if ranks[0] != ranks[-1] else "."
    caption = "Training and validation error by epoch; learning rate below"
    draw = partial(plot_factor_training, rows, best_epoch=kept["epoch"])
    return [Words(told), Plot(CURVES, caption, draw)]


EPOCHS = Finding(HISTORY, ("features train",), read_epochs, epochs_blocks)


def plot_factor_training(rows: Sequence[Mapping[str, Any]], path: Path | str, best_epoch: int | None = None) -> Path:
    """MSE in training and validation by epoch; below it the learning rate, and the effective rank where it changed.

    Args:
        rows: of `history.json`.
        path: file to write.
        best_epoch: the epoch whose network was kept; marked.

    Raises:
        DataError: there is no epoch.
    """
    if not rows:
        raise DataError("the history holds no epoch")
    epochs = [row["epoch"] for row in rows]
    figure, (above, below) = canvas.panels(7.2, 4.6, rows=2)
    canvas.draw_line(above, epochs, [row["train_mse"] for row in rows], "training", canvas.BLUE, "-")
    canvas.draw_line(above, epochs, [row["val_mse"] for row in rows], "validation", canvas.INK, "--")
    for row in rows:
        if row["epoch"] == best_epoch:
            label = f"kept: {row['val_mse']:.4g} at epoch {best_epoch}"
            above.plot(
                [best_epoch], [row["val_mse"]], color=canvas.INK, linestyle="", marker="D", markersize=7, label=label
            )
    above.set_yscale("log")
    canvas.log_ticks(above.yaxis)
    canvas.name_axes(above, "", "MSE of A·B")
    canvas.legend(above, loc="upper right")
    canvas.draw_line(below, epochs, [row["lr"] for row in rows], "learning rate", canvas.GREY, "-")
    below.set_yscale("log")
    canvas.log_ticks(below.yaxis)
    canvas.name_axes(below, "epoch", "learning rate")
    draw_ranks(below, epochs, [row["effective_rank"] for row in rows])
    for axis in (above, below):
        canvas.whole_ticks(axis.xaxis)
    return canvas.save(figure, path)


def draw_ranks(axis: Any, epochs: Sequence[int], ranks: Sequence[int]) -> None:
    """On an axis of its own at the right; nothing where the rank never changed."""
    if len(set(ranks)) == 1:
        return
    other = axis.twinx()
    canvas.plain(other)
    other.grid(False)
    other.spines[["left", "top"]].set_visible(False)
    other.spines["right"].set(visible=True, color=canvas.GREY)
    canvas.draw_line(other, epochs, ranks, "effective rank", canvas.YELLOW, "-.")
    other.set_ylim(0, max(ranks) * 1.05)
    other.set_ylabel("effective rank", fontsize=9, color=canvas.INK)
    axis.spines[["right", "top"]].set_visible(False)
    lines = [*axis.get_lines(), *other.get_lines()]
    other.legend(lines, [line.get_label() for line in lines], fontsize=8, framealpha=0.85, edgecolor="none")
