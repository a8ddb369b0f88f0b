"""What `rankwise features train` trains, put together: the Trainer, and all that hangs on it.

config, cache ──▶ FactorJob (arguments, identity) ── Start ──▶ RankwiseTrainer + EpochHistory (+ ChannelAllocation)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rankwise.core.rank_budget import RankBudget
from rankwise.data.features.cache import FeatureCache
from rankwise.data.features.rows import FeatureRows
from rankwise.nets.factorize.adaptive import AdaptiveLowRankProjAdaLoRA
from rankwise.nets.factorize.factorizer import FactorizerSettings
from rankwise.options.features import FactorTrainConfig
from rankwise.stages.features.run_log import RunLog
from rankwise.stages.features.starting import Start, earlier_of
from rankwise.train.arguments import build_arguments
from rankwise.train.epoch_history import EpochHistory
from rankwise.train.factorizing import ROW, FactorObjective, TermWeights, ValidationMeans, with_rows
from rankwise.train.rank_allocation import ChannelAllocation, saved_budget
from rankwise.train.resume import FirstStep, identity_of
from rankwise.train.stopping import Patience
from rankwise.train.trainer import RankwiseTrainer

CLIP, FACTOR, PLATEAU = 5.0, 0.5, 3  # norm of gradients; the rate's factor after so many epochs without improvement
KEPT = 3  # the best, the newest and one before it, should the newest be damaged


@dataclass(frozen=True)
class FactorJob:
    """A network to be trained on a cache, as asked for."""

    config: FactorTrainConfig
    cache: FeatureCache
    settings: FactorizerSettings
    weights: TermWeights
    arguments: TrainingArguments

    @property
    def folder(self) -> Path:
        return Path(self.arguments.output_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run this run: everything that decides its weights but for the number of epochs."""
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
    objective = FactorObjective(start.net, job.weights)
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
