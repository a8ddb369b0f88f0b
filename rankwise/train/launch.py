"""Launch `finetune` or `train`: resume point, replacement of an earlier run, and isolation of packed samples.

starting_point(config, job) ─▶ checkpoint or None ─ train_job(config, model, job, checkpoint) ─▶ the trainer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import TrainerCallback

from rankwise import __version__
from rankwise.data.dataset import Collator, PackedDataset, RenderedDataset, unpacked_difference
from rankwise.data.input_record import save_input
from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import Aside, about_to_write
from rankwise.files.processes import announce, process_index
from rankwise.files.run_folder import CONFIG, RunFolder
from rankwise.models.adapt import trainable_parameters
from rankwise.options.commands import FinetuneConfig, TrainConfig
from rankwise.options.field import flatten
from rankwise.train.adalora import ALLOCATED_TABLE
from rankwise.train.checkpoints import (
    MANIFEST,
    FirstStep,
    checkpoints,
    goes_on_from,
    refuse_earlier,
    resume_point,
)
from rankwise.train.gradient_table import PHASES_TABLE, TRAINING_LOG
from rankwise.train.gradients import GRADIENT_FILES
from rankwise.train.job import Job
from rankwise.train.trainer import RankwiseTrainer

Config = TypeVar("Config", FinetuneConfig, TrainConfig)
TABLES = (TRAINING_LOG, *GRADIENT_FILES, PHASES_TABLE, ALLOCATED_TABLE)
OF_A_PART = ("resume_from_checkpoint", "allow_partial_resume", "yes")
PACKING_EXACT, PACKING_ROUNDED = 1e-3, 0.1  # largest relative difference of logits in float32, and at 16 bits


def starting_point(config: FinetuneConfig | TrainConfig, job: Job) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run that mixes with no earlier one."""
    check_batches(job)
    index, processes = process_index()
    folder = Path(config.output_dir)
    if index == 0:
        earlier_run(config).put_back()
    asked, partial = config.resume_from_checkpoint, config.allow_partial_resume
    checkpoint = resume_point(asked, folder, job.identity, allow_partial=partial, processes=processes)
    if index == 0 and checkpoint is None:
        refuse_earlier(folder, bool(config.training.get("overwrite")))
        refuse_foreign(earlier_run(config))
    about_to_write()  # weights are loaded next: what is refused before them, a dry run has refused by now
    return checkpoint


def check_folder(config: FinetuneConfig | TrainConfig) -> None:
    """UsageError where a fresh run would mix with an earlier one in its folder; before anything is read."""
    folder = Path(config.output_dir)
    if process_index()[0] == 0 and goes_on_from(config.resume_from_checkpoint, folder) is None:
        refuse_earlier(folder, bool(config.training.get("overwrite")))
        refuse_foreign(earlier_run(config))


def finished_checkpoints(config: FinetuneConfig | TrainConfig) -> list[Path]:
    """Manifests of an earlier run's checkpoints, with which a fresh run does not mix."""
    earlier_run(config).put_back()  # where a process was killed
    found = [folder / MANIFEST for folder in checkpoints(Path(config.output_dir))]
    return [file for file in found if file.is_file()]


def going_on(config: Config, *, unchanged: bool) -> Config:
    """The config of a recipe's stage that finds an earlier run in its folder: the rest of the same run, or a run in its
    place."""
    if config.resume_from_checkpoint:
        return config
    if unchanged:
        return replace(config, resume_from_checkpoint="true")
    return replace(config, training=config.training | {"overwrite": True})


def earlier_run(config: FinetuneConfig | TrainConfig) -> Aside:
    """Files of an earlier run that a fresh one replaces in its folder. What trackers were told stays with them."""
    folder = Path(config.output_dir)
    return Aside(folder, (*(entry.name for entry in checkpoints(folder)), CONFIG, *TABLES))


def refuse_foreign(earlier: Aside) -> None:
    """UsageError where a fresh run would delete what bears a run's names and no run has left: no config beside it, and
    no manifest in it."""
    if (earlier.folder / CONFIG).is_file() or earlier.place.is_dir():
        return
    foreign = [entry.name for entry in earlier.there() if not (entry / MANIFEST).is_file()]
    if foreign:
        raise UsageError(
            f"{earlier.folder}: {', '.join(foreign[:3])} would be replaced, and without a {CONFIG} beside them they "
            "are no earlier run's; move them away, or choose another --output_dir"
        )


def train_job(
    config: FinetuneConfig | TrainConfig,
    model: nn.Module,
    job: Job,
    checkpoint: Path | None,
    *,
    beside: Callable[[Path], object] = lambda folder: None,
    callbacks: Sequence[TrainerCallback] = (),
    **extras: Any,
) -> RankwiseTrainer:
    """Train a model on the job's rows, packed ones once it is sure that the model keeps them apart.

    Returns the trainer, which holds the trained model. beside: writes what else a checkpoint's folder must hold.
    extras: the trainer's `loraplus_lr_ratio`, `tower_rates`, `phases`, `gradients`, `accuracy`, `sampler`.
    """
    if isinstance(job.rows, PackedDataset):
        check_packing(model, job.rows, job.collator)
    trainer = RankwiseTrainer(
        model=model,
        args=job.arguments,
        train_dataset=job.rows,
        eval_dataset=job.validation,
        data_collator=job.collator,
        identity=job.identity,
        facts=tracked_facts(config, job, model),
        callbacks=[*callbacks, FirstStep(earlier_run(config))],
        **extras,
    )
    with claim_folder(config, job, checkpoint):
        beside(Path(config.output_dir))
        trainer.train(checkpoint)
    return trainer


def tracked_facts(config: FinetuneConfig | TrainConfig, job: Job, model: nn.Module) -> dict[str, Any]:
    """The command's options, and what it trains on what, for the trackers: alike in all parts of a resumed run."""
    options = replace(config, training={})  # a tracker has those from the Trainer
    ranks = list(job.facts.get("ranks", {}).values())
    spread = {"rank_min": min(ranks), "rank_mean": fmean(ranks), "rank_max": max(ranks)} if ranks else {}
    trainable, total = trainable_parameters(model)
    return {
        **{name: value for name, value in flatten(options).items() if name not in OF_A_PART},
        **({"sites": len(ranks), **spread} if ranks else {}),
        "schedule": (job.facts.get("schedule") or [None])[0],
        "samples": job.facts.get("samples"),
        "trained_parameters": trainable,
        "parameters": total,
        "version": __version__,
    }


@contextmanager
def claim_folder(config: FinetuneConfig | TrainConfig, job: Job, checkpoint: Path | None) -> Iterator[None]:
    """The folder as this run's: its config and how its prompts are made. What a fresh run replaces lies aside until the
    first step is taken, and is put back where none is."""
    if process_index()[0] != 0:
        yield
        return
    folder, earlier = RunFolder(config.output_dir), earlier_run(config)
    with earlier.until_dropped():
        for entry in earlier.take() if checkpoint is None else ():
            if entry.is_dir():
                announce(f"note: {entry}, left by an earlier run, is deleted at the first step")
        folder.save_config(config)
        save_input(job.renderer, job.record, folder.path)
        yield


def check_batches(job: Job) -> None:
    """UsageError where rows of one batch would have different numbers of images, and the model's rows must not."""
    if job.renderer.sight is None or not job.renderer.sight.crossed:
        return
    of_training = ("per_device_train_batch_size", job.rows, job.arguments.per_device_train_batch_size)
    of_validation = ("per_device_eval_batch_size", job.validation, job.arguments.per_device_eval_batch_size)
    for flag, rows, size in (of_training, of_validation):
        if size > 1 and isinstance(rows, RenderedDataset) and len({len(each.images) for each in rows.examples}) > 1:
            name = type(job.renderer.sight.processor).__name__
            raise UsageError(
                f"{name}: rows with different numbers of images would change each other in a batch of {size}; pass "
                f"--{flag} 1 (--gradient_accumulation_steps makes up for it)"
            )


def check_packing(model: nn.Module, rows: PackedDataset, collator: Collator) -> None:
    """VerificationError where this model attends across the samples of a packed row."""
    exact = next(model.parameters()).dtype == torch.float32
    difference = unpacked_difference(model, rows, collator)
    if not difference <= (PACKING_EXACT if exact else PACKING_ROUNDED):
        raise VerificationError(
            f"--packing: {type(model).__name__} does not keep samples of one row apart: logits differ by "
            f"{difference:.1%} from those of each sample alone; leave --packing out (--group_by_length saves padding)"
        )
