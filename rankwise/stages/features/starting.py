"""Where `rankwise features train` begins: afresh, at a run's last complete checkpoint, or at its best network.

--resume ──▶ newest complete checkpoint? ──▶ its epochs are done; --epochs more
             none, but best_model?       ──▶ its weights, a fresh optimizer
             neither                     ──▶ UsageError
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankwise.data.features.cache import FeatureCache
from rankwise.data.features.split import SPLIT, FeatureSplit, read_split, split_of
from rankwise.errors import UsageError
from rankwise.files.atomic import Aside, read_object
from rankwise.files.processes import announce, process_index
from rankwise.files.run_folder import CONFIG
from rankwise.nets.factorize.architectures import build
from rankwise.nets.factorize.factorizer import Factorizer, FactorizerSettings
from rankwise.nets.factorize.files import SETTINGS, WEIGHTS, load_factorizer
from rankwise.options.features import FactorTrainConfig
from rankwise.show.factor_files import OF_ONE
from rankwise.train.checkpoints import MANIFEST, checkpoints, step_of
from rankwise.train.epoch_history import HISTORY, read_history
from rankwise.train.gradient_table import TRAINING_LOG
from rankwise.train.rank_allocation import TABLE
from rankwise.train.resume import differences, missing_state, newest_complete

TRAINER_STATE = "trainer_state.json"
RESULTS, PLOT = "test_results.json", "train_val_loss_comparison.png"
CHECKPOINTS = ("checkpoint-*",)
OF_A_RUN = (*CHECKPOINTS, WEIGHTS, SETTINGS, HISTORY, RESULTS, SPLIT, PLOT, TRAINING_LOG, TABLE, OF_ONE, CONFIG)
STEP_TABLES = (TRAINING_LOG, TABLE)


@dataclass(frozen=True)
class Start:
    """What training starts from.

    checkpoint: to resume from. rows: history of the epochs before, where a best network goes on without a checkpoint.
    steps: optimizer steps an epoch. epochs: to train in all, as the Trainer counts them.
    """

    net: Factorizer
    split: FeatureSplit
    steps: int
    epochs: int
    checkpoint: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    fresh: bool = False

    @property
    def last(self) -> int:
        """The number of the last epoch, as the history counts."""
        return (self.rows[-1]["epoch"] if self.rows else 0) + self.epochs


def start_of(
    config: FactorTrainConfig,
    folder: Path,
    cache: FeatureCache,
    settings: FactorizerSettings,
    identity: Mapping[str, Any],
) -> Start:
    """identity: of this run, compared with the checkpoint's.

    Raises UsageError where there is nothing to resume, where it is another run, and where an earlier one is in the way.
    """
    if process_index()[0] == 0:
        earlier_of(folder).put_back()
    if not config.resume:
        refuse_earlier(folder, config.overwrite)
        split = split_of(cache, config.seed)
        return Start(build(settings), split, steps_of(config, split), config.epochs, fresh=True)
    checkpoint = newest_complete(folder)
    if checkpoint is not None:
        require_state(checkpoint)
        refuse_other_run(checkpoint, read_object(checkpoint / MANIFEST)["identity"], identity)
        split = read_split(folder / SPLIT, cache)
        steps = steps_of(config, split)
        return Start(build(settings), split, steps, step_of(checkpoint) // steps + config.epochs, checkpoint)
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"--resume: {folder} has neither a complete checkpoint nor {WEIGHTS}; leave --resume out")
    return from_best(config, folder, cache, settings)


def steps_of(config: FactorTrainConfig, split: FeatureSplit) -> int:
    """Optimizer steps an epoch: each process takes every n-th batch, and the last ones are filled up."""
    return math.ceil(math.ceil(len(split.train) / config.batch_size) / process_index()[1])


def require_state(checkpoint: Path) -> None:
    lacks = missing_state(checkpoint, process_index()[1])
    if lacks:
        raise UsageError(
            f"{checkpoint} lacks {', '.join(lacks)}, so training cannot go on exactly as before; delete that folder to "
            f"go on from the checkpoint before it, or delete all of them to go on from {WEIGHTS}, optimizer afresh"
        )


def from_best(config: FactorTrainConfig, folder: Path, cache: FeatureCache, settings: FactorizerSettings) -> Start:
    """The best network with a fresh optimizer. The history goes on; tables by step begin anew, the old ones aside."""
    net = load_factorizer(folder)
    found = differences(asdict(net.settings), asdict(settings))
    if found:
        raise UsageError(other_run(folder / SETTINGS, found))
    rows = read_history(folder / HISTORY) if (folder / HISTORY).is_file() else []
    if not rows and config.epochs < 1:
        raise UsageError(f"--epochs 0: {folder} has neither a checkpoint nor a history of epochs; give at least 1")
    announce(
        f"note: no complete checkpoint in {folder}; going on from {WEIGHTS} with a fresh optimizer, learning rate and "
        "rank schedule"
    )
    split = read_split(folder / SPLIT, cache) if (folder / SPLIT).is_file() else split_of(cache, config.seed)
    return Start(net, split, steps_of(config, split), config.epochs, rows=rows)


def refuse_other_run(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UsageError with the differences between the run that was saved and this one."""
    found = differences(saved, now)
    if found:
        raise UsageError(other_run(checkpoint, found))


def other_run(place: Path, found: list[str]) -> str:
    listed = "\n  ".join(found)
    return (
        f"{place} belongs to another run; what differs:\n  {listed}\nChange these back, or train in another "
        "--results_dir (--epochs and --patience may change)"
    )


def refuse_earlier(folder: Path, overwrite: bool) -> None:
    """UsageError where a folder holds something of an earlier run that could be trained further."""
    found = holds_run(folder)
    if found and not overwrite and process_index()[0] == 0:
        raise UsageError(
            f"{folder} holds an earlier run ({found[0]}); train it further with --resume, delete it and start over "
            "with --overwrite, or choose another --results_dir"
        )


def holds_run(folder: Path) -> list[str]:
    """What a folder holds of an earlier run that could be trained further."""
    found = [one.name for one in checkpoints(folder) if (one / MANIFEST).is_file()]
    return found + ([WEIGHTS] if (folder / WEIGHTS).is_file() else [])


def epochs_done(folder: Path) -> int | None:
    """Whole epochs behind the newest complete checkpoint; None without one."""
    checkpoint = newest_complete(folder)
    return None if checkpoint is None else math.floor(read_object(checkpoint / TRAINER_STATE)["epoch"])


def earlier_of(folder: Path) -> Aside:
    """What a fresh run replaces of an earlier one in its folder."""
    return Aside(folder, OF_A_RUN)


@contextmanager
def room_made(start: Start, folder: Path) -> Iterator[None]:
    """The folder as this run's. What a fresh one replaces lies aside until its first step, and is put back where it
    takes none; a best network's tables by step get another name."""
    if start.checkpoint is not None or process_index()[0] != 0:
        yield
        return
    earlier = earlier_of(folder) if start.fresh else Aside(folder, CHECKPOINTS)
    with earlier.until_dropped():
        for entry in earlier.take():
            announce(f"note: {entry}, left by an earlier run, is deleted at the first step")
        for table in () if start.fresh else STEP_TABLES:
            if (folder / table).is_file():
                name = f"{Path(table).stem}.until_epoch_{len(start.rows)}.csv"
                os.replace(folder / table, folder / name)
        yield
