"""A run of `rankwise features train`, put together: what it starts from, its identity, its Trainer.

config, cache ──▶ FactorJob (arguments, identity) ── Start ──▶ RankwiseTrainer + EpochHistory (+ ChannelAllocation)

A run starts afresh, from its newest complete checkpoint, or from its best network with a fresh optimizer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rankwise.core.rank_budget import RankBudget
from rankwise.errors import UsageError
from rankwise.features.cache import FeatureCache
from rankwise.features.dataset import SPLIT, FeatureRows, FeatureSplit, read_split, split_of
from rankwise.features.history import HISTORY, EpochHistory, RunLog, read_history
from rankwise.features.nets import build
from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.features.nets.row_column import AdaptiveLowRankProjAdaLoRA
from rankwise.features.objective import ROW, FactorObjective, ValidationMeans, with_rows
from rankwise.features.page import OF_ONE
from rankwise.features.rank_masks import TABLE, ChannelAllocation, saved_budget
from rankwise.features.trained import SETTINGS, WEIGHTS, load_factorizer
from rankwise.files.atomic import Aside, read_object
from rankwise.files.processes import announce, process_index
from rankwise.files.run_folder import CONFIG
from rankwise.options.features import FactorTrainConfig
from rankwise.train.arguments import build_arguments
from rankwise.train.checkpoints import (
    MANIFEST,
    SEAL,
    FirstStep,
    checkpoints,
    differences,
    identity_of,
    missing_state,
    newest_complete,
    step_of,
)
from rankwise.train.gradient_table import TRAINING_LOG
from rankwise.train.selection import Patience
from rankwise.train.trainer import RankwiseTrainer

TRAINER_STATE = "trainer_state.json"
RESULTS, PLOT = "test_results.json", "train_val_loss_comparison.png"
CHECKPOINTS = ("checkpoint-*",)
OF_A_RUN = (*CHECKPOINTS, WEIGHTS, SETTINGS, HISTORY, RESULTS, SPLIT.name, PLOT, TRAINING_LOG, TABLE, OF_ONE, CONFIG)
STEP_TABLES = (TRAINING_LOG, TABLE)
CLIP, FACTOR, PLATEAU = 5.0, 0.5, 3  # norm of gradients; the rate's factor after so many epochs without improvement
KEPT = 3  # the best, the newest and one before it, should the newest be damaged


@dataclass(frozen=True)
class Start:
    """The starting point of training.

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
        refuse_other_run(checkpoint, SEAL.read(checkpoint)["identity"], identity)
        split = read_split(folder, cache)
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
    refuse_other_run(folder / SETTINGS, asdict(net.settings), asdict(settings))
    rows = read_history(folder / HISTORY) if (folder / HISTORY).is_file() else []
    if not rows and config.epochs < 1:
        raise UsageError(f"--epochs 0: {folder} has neither a checkpoint nor a history of epochs; give at least 1")
    announce(
        f"note: no complete checkpoint in {folder}; going on from {WEIGHTS} with a fresh optimizer, learning rate and "
        "rank schedule"
    )
    split = read_split(folder, cache) if (folder / SPLIT.name).is_file() else split_of(cache, config.seed)
    return Start(net, split, steps_of(config, split), config.epochs, rows=rows)


def refuse_other_run(place: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UsageError with the differences between the run that was saved and this one."""
    if found := differences(saved, now):
        listed = "\n  ".join(found)
        raise UsageError(
            f"{place} belongs to another run; what differs:\n  {listed}\nChange these back, or train in another "
            "--results_dir (--epochs and --patience may change)"
        )


def refuse_earlier(folder: Path, overwrite: bool) -> None:
    """UsageError where a folder holds something of an earlier run that could be trained further."""
    found = holds_run(folder)
    if found and not overwrite and process_index()[0] == 0:
        raise UsageError(
            f"{folder} holds an earlier run ({found[0]}); continue it with --resume, delete it and start over "
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


@dataclass(frozen=True)
class FactorJob:
    """A network to be trained on a cache, as asked for."""

    config: FactorTrainConfig
    cache: FeatureCache
    settings: FactorizerSettings
    arguments: TrainingArguments

    @property
    def folder(self) -> Path:
        return Path(self.arguments.output_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """The run's identity: everything that determines its weights except the number of epochs."""
        config = self.config
        unused = {"use_rank_allocator": False}
        facts = {
            **asdict(self.settings),
            "features": self.cache.fingerprint,
            "lambda_B": config.lambda_B,
            "lambda_ortho": config.lambda_ortho,
            "activation_orth_regu_A": config.activation_orth_regu_A,
            **(asdict(config.allocator) if config.allocator.use_rank_allocator else unused),
        }
        found = identity_of(self.arguments, **facts)
        return {name: value for name, value in found.items() if name != "num_train_epochs"}


def arguments_of(config: FactorTrainConfig, folder: Path) -> TrainingArguments:
    given = {
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.lr,
        "weight_decay": config.weight_decay,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"mode": "min", "factor": FACTOR, "patience": PLATEAU},
        **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "epoch"),
        "metric_for_best_model": "mse",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "save_total_limit": KEPT,
        "label_names": [ROW],
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": config.num_workers,
        "bf16": config.bf16,
        "use_cpu": config.device == "cpu",
    }
    return build_arguments(folder, config.seed, given)


def allocation_of(job: FactorJob, start: Start) -> ChannelAllocation | None:
    """With the schedule that the run began with. UsageError, naming values that fit, where the run is too short."""
    asked = job.config.allocator
    if not asked.use_rank_allocator:
        return None
    assert isinstance(start.net, AdaptiveLowRankProjAdaLoRA)
    if start.checkpoint is not None:
        return ChannelAllocation(start.net, saved_budget(start.checkpoint), job.folder)
    budget = RankBudget(
        rank=job.settings.rank,
        keep_ratio=asked.allocator_keep_ratio,
        init_warmup=asked.allocator_init_warmup,
        final_warmup=asked.allocator_final_warmup,
        mask_interval=asked.allocator_mask_interval,
        total_steps=start.steps * start.epochs,
    )
    return ChannelAllocation(start.net, budget, job.folder)


def trainer_of(
    job: FactorJob, start: Start, allocation: ChannelAllocation | None, log: RunLog
) -> tuple[RankwiseTrainer, EpochHistory]:
    """Taken up from the checkpoint where there is one. The process's own random state is used on a fresh start."""
    job.arguments.num_train_epochs = start.epochs
    objective = FactorObjective(start.net, job.config)
    history = EpochHistory(objective, job.folder, start.rows, log.line)
    stateful: list[EpochHistory | ChannelAllocation] = [history] if allocation is None else [allocation, history]
    if start.checkpoint is not None:
        for one in stateful:
            one.restore(start.checkpoint)
    patience = [Patience(job.config.patience)] if job.config.patience else []
    trainer = RankwiseTrainer(
        model=objective,
        args=job.arguments,
        train_dataset=FeatureRows(job.cache, start.split.train),
        eval_dataset=FeatureRows(job.cache, start.split.val),
        data_collator=with_rows,
        compute_metrics=ValidationMeans(job.cache.ids),
        identity=job.identity,
        stateful=stateful,
        callbacks=[*patience, FirstStep(earlier_of(job.folder))],
    )
    return trainer, history
