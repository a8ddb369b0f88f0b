"""rankwise features train: a network that predicts a feature matrix's factors, trained, kept at its best, and tested.

rankwise features train --arch ResMLP --features feature_cache_real --rank 128 --epochs 20
rankwise features train --arch ResMLP --features feature_cache_real --rank 128 --epochs 100 --resume
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import set_seed

from rankwise.errors import Interrupted, UsageError
from rankwise.features.cache import FeatureCache, open_cache
from rankwise.features.dataset import SPLIT, check_measurable
from rankwise.features.job import (
    FactorJob,
    RunLog,
    Start,
    allocation_of,
    arguments_of,
    epochs_done,
    holds_run,
    refuse_earlier,
    room_made,
    start_of,
    trainer_of,
)
from rankwise.features.nets.base import FactorizerSettings
from rankwise.features.objective import TermWeights
from rankwise.features.outcome import finish
from rankwise.files.atomic import write_json
from rankwise.files.processes import announce, process_index
from rankwise.files.run_folder import RunFolder, held
from rankwise.options.features import FactorTrainConfig, canonical
from rankwise.pipeline.idle import refuse_idle
from rankwise.train.trainer import RankwiseTrainer


def run(config: FactorTrainConfig) -> Path:
    """The whole command; returns the run folder."""
    weights = check(config)
    folder = RunFolder(folder_of(config))
    cache = open_cache(config.features)
    settings = settings_of(config, cache)
    check_measurable(cache)
    for note in cache.notes():
        announce(note)
    if process_index()[0] == 0 and not config.resume:
        refuse_earlier(folder.path, config.overwrite)
    with held(folder, "features train", {"features": config.features}) as record:
        set_seed(config.seed)
        job = FactorJob(config, cache, settings, weights, arguments_of(config, folder.path))
        start = start_of(config, folder.path, cache, settings, job.identity)
        allocation = allocation_of(job, start)
        log = RunLog.begun(Path(config.log_dir).expanduser(), config)
        trainer, history = trainer_of(job, start, allocation, log)
        began = time.monotonic()
        with room_made(start, folder.path):
            if process_index()[0] == 0:
                folder.save_config(config)
                write_json(folder / SPLIT, start.split.record())
            train(trainer, start, log)
        if process_index()[0] == 0:
            finish(job, start.split, history.rows, record, log, time.monotonic() - began)
    return folder.path


def check(config: FactorTrainConfig) -> TermWeights:
    """Combinations that cannot work, before anything is read."""
    canonical(config.arch)
    if config.epochs == 0 and not config.resume:
        raise UsageError("--epochs is 0; without --resume give a number of at least 1")
    if config.resume and config.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite deletes it; leave one of them out")
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device is auto, cpu or cuda, got {config.device}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to torch here")
    refuse_idle(config)
    return TermWeights(config.lambda_B, config.lambda_ortho, config.activation_orth_regu_A)


def folder_of(config: FactorTrainConfig) -> Path:
    """The run folder. A `~` that no shell has expanded (in a file, behind `=`) is expanded here as everywhere."""
    return Path(config.results_dir).expanduser() / canonical(config.arch)


def settings_of(config: FactorTrainConfig, cache: FeatureCache) -> FactorizerSettings:
    return FactorizerSettings(
        canonical(config.arch), cache.tokens, cache.channels, config.rank, config.dropout, config.refine
    )


def train(trainer: RankwiseTrainer, start: Start, log: RunLog) -> None:
    """Raises Interrupted, with how to go on, where a signal came."""
    arguments = trainer.args
    begin = f"from {start.checkpoint}" if start.checkpoint else "afresh" if start.fresh else "from the best network"
    log.note(f"training {begin} to epoch {start.last}, {start.steps} optimizer steps each, on {arguments.device}")
    try:
        trainer.train(start.checkpoint)
    except Interrupted as error:
        done = trainer.state.global_step
        text = (
            f"interrupted; the checkpoint is complete ({arguments.output_dir}, step {done}). To go on, run the same "
            f"command with --resume --epochs {start.epochs - done // start.steps}"
        )
        log.note(text)
        raise Interrupted(text, error.exit_code - 128) from None


def going_on(config: FactorTrainConfig, *, unchanged: bool) -> FactorTrainConfig:
    """The config of a recipe's stage that finds an earlier run in its folder: what is left of the same run, or a run
    in its place."""
    folder = folder_of(config)
    if config.resume or not holds_run(folder):
        return config
    done = epochs_done(folder) if unchanged else None
    if done is None:
        return replace(config, overwrite=True)
    return replace(config, resume=True, epochs=max(0, config.epochs - done))


def describe(config: FactorTrainConfig) -> list[str]:
    check(config)
    arch, folder = canonical(config.arch), folder_of(config)
    lines = [f"train {arch} for {config.epochs} epochs on {config.features}: factors of rank {config.rank}"]
    if config.resume:
        lines = [f"train {arch} in {folder} for {config.epochs} epochs more, from its last complete checkpoint"]
    if config.allocator.use_rank_allocator:
        lines.append(f"lower the rank to {config.allocator.allocator_keep_ratio:.0%} of its channels on the way")
    patience = f"stop after {config.patience} epochs without a better validation MSE, " if config.patience else ""
    lines.append(f"{patience}keep the best network, test it")
    return [*lines, f"write network, history, test results and checkpoints to {folder}, a log to {config.log_dir}"]
