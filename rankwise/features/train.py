"""rankwise features train: a network that predicts a feature matrix's factors, trained, kept at its best, and tested.

rankwise features train --arch ResMLP --features feature_cache_real --rank 128 --epochs 20
rankwise features train --arch ResMLP --features feature_cache_real --rank 128 --epochs 100 --resume
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from rankwise.errors import Interrupted, UsageError
from rankwise.features.cache import FeatureCache, open_cache
from rankwise.features.dataset import SPLIT, FeatureSplit, cached, check_measurable
from rankwise.features.history import HISTORY, LOG, Row, RunLog, best_row, plot_factor_training
from rankwise.features.job import (
    PLOT,
    RESULTS,
    FactorJob,
    Start,
    allocation_of,
    arguments_of,
    earlier_of,
    epochs_done,
    holds_run,
    refuse_earlier,
    room_made,
    start_of,
    trainer_of,
)
from rankwise.features.measures import OF_REFINED, Closeness, excess_error, measure, network, optimum
from rankwise.features.nets.base import FactorizerSettings
from rankwise.features.objective import refuse_not_finite
from rankwise.features.rank_masks import TABLE
from rankwise.features.trained import SETTINGS, WEIGHTS, load_factorizer
from rankwise.files.atomic import write_json
from rankwise.files.processes import announce, process_index
from rankwise.files.run_folder import Record, RunFolder, held
from rankwise.options.features import FactorTrainConfig, canonical
from rankwise.page.canvas import drawable
from rankwise.page.text import command_line, duration, percent
from rankwise.pipeline.idle import refuse_idle
from rankwise.train.checkpoints import MANIFEST
from rankwise.train.gradient_table import TRAINING_LOG
from rankwise.train.trainer import RankwiseTrainer

OF_PRODUCT = ("mse", "relative_error", "explained_energy", "cosine")
EXACT = 1e-6  # relative error of the optimum below which "how far above it" means nothing


def run(config: FactorTrainConfig) -> Path:
    """Run the command. Returns the run folder."""
    check(config)
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
        job = FactorJob(config, cache, settings, arguments_of(config, folder.path))
        start = start_of(config, folder.path, cache, settings, job.identity)
        allocation = allocation_of(job, start)
        log = RunLog.begun(Path(config.log_dir), config)
        trainer, history = trainer_of(job, start, allocation, log)
        began = time.monotonic()
        with room_made(start, folder.path):
            if process_index()[0] == 0:
                folder.save_config(config)
                SPLIT.write(folder, start.split)
            train(trainer, start, log)
        if process_index()[0] == 0:
            finish(job, start.split, history.rows, record, log, time.monotonic() - began)
    return folder.path


def check(config: FactorTrainConfig) -> None:
    """Refuse invalid combinations of options before anything is read."""
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


def folder_of(config: FactorTrainConfig) -> Path:
    return Path(config.results_dir) / canonical(config.arch)


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


def finish(
    job: FactorJob, split: FeatureSplit, rows: Sequence[Row], record: Record, log: RunLog, seconds: float
) -> None:
    """Test the best network, enter the run in its manifest, and print the results and the next command."""
    folder, best = job.folder, best_row(rows)
    results = tested(job, split.test) | {"best_epoch": best["epoch"]}
    write_json(folder / RESULTS, results)
    drawn = plotted(rows, folder, best["epoch"])
    names = [WEIGHTS, SETTINGS, HISTORY, RESULTS, SPLIT.name, TRAINING_LOG, TABLE, *([PLOT] if drawn else [])]
    record.outputs |= {name: folder / name for name in names if (folder / name).is_file()}
    record.facts |= {
        "arch": results["arch"],
        "epochs": rows[-1]["epoch"],
        "best_epoch": best["epoch"],
        "parameters": results["parameters"],
        "training_seconds": round(seconds, 2),
    }
    summary = {"epochs": rows[-1]["epoch"], "best": best, "test": results, "seconds": round(seconds, 2)}
    log.summary(summary | {"run_folder": str(folder), "features": job.config.features})
    for line in last_words(folder, rows, results, seconds):
        log.line(line)
    if log.folder is not None:
        print(f"log in {log.folder / LOG}")
    print(f"next: {next_command(job.config)}")


def next_command(config: FactorTrainConfig) -> str:
    return command_line("features", "compare", results_dir=config.results_dir)


def tested(job: FactorJob, places: tuple[int, ...]) -> dict[str, Any]:
    """Means over the test matrices: of the best network's product of rank r, and apart of the refined output.

    `excess_error` is against the truncated SVD of the rank that was asked for, as `features compare` has it, and
    `excess_error_at_effective_rank` against that of the channels left; null where that SVD is exact.
    """
    device = job.arguments.device
    net = load_factorizer(job.folder).to(device)
    batches = partial(cached, job.cache, places, device)
    best = optimum(batches)
    product, *refined = measure([network(net)], batches, best)
    refuse_not_finite(product.values["mse"][:, None].numpy(), [job.cache.ids[place] for place in places], "test")
    effective, at_rank = net.current_effective_rank(), best[:, net.settings.rank - 1]
    return {
        "arch": net.settings.arch,
        "rank": net.settings.rank,
        "effective_rank": effective,
        "features": job.cache.fingerprint,
        "images": len(places),
        "parameters": sum(one.numel() for one in net.parameters()),
        **means_of(product, OF_PRODUCT),
        "excess_error": excess_over(product, at_rank),
        "excess_error_at_effective_rank": excess_over(product, best[:, effective - 1]),
        "svd_relative_error": float(at_rank.mean()),
        "refined": means_of(refined[0], OF_REFINED) if refined else None,
    }


def excess_over(row: Closeness, best: Tensor) -> float | None:
    """Mean of how far the relative errors (n,) lie above the optimum's."""
    if float(best.min()) <= EXACT:
        return None
    return float(excess_error(row.values["relative_error"], best).mean())


def means_of(row: Closeness, names: Sequence[str]) -> dict[str, float]:
    return {name: float(row.values[name].mean()) for name in names}


def plotted(rows: Sequence[Row], folder: Path, best_epoch: int) -> bool:
    """Draw the curves; without matplotlib a note says why they are missing."""
    if not drawable(f"{PLOT} is"):
        return False
    plot_factor_training(rows, folder / PLOT, best_epoch)
    return True


def last_words(folder: Path, rows: Sequence[Row], results: dict[str, Any], seconds: float) -> list[str]:
    best, excess = best_row(rows), results["excess_error"]
    trained = f"features train: {results['arch']} at epoch {rows[-1]['epoch']} after {duration(seconds)}"
    against = "which is exact" if excess is None else f"{percent(excess)} above it"
    acts = "" if best["effective_rank"] == results["rank"] else f" ({best['effective_rank']} channels act)"
    return [
        f"{trained}; best epoch {best['epoch']}, validation MSE {best['val_mse']:.5g}, rank {results['rank']}{acts}",
        f"test: {results['images']} images, relative error {results['relative_error']:.4f}, explained energy "
        f"{results['explained_energy']:.4f}; truncated SVD of rank {results['rank']}: "
        f"{results['svd_relative_error']:.4f}, {against}",
        f"network in {folder / WEIGHTS}, history in {folder / HISTORY}, results in {folder / RESULTS}",
    ]


def earlier(config: FactorTrainConfig) -> list[Path]:
    """What an earlier run has left in the folder that could be trained further."""
    folder = folder_of(config)
    earlier_of(folder).put_back()  # where a process was killed
    files = [file for name in holds_run(folder) for file in (folder / name, folder / name / MANIFEST)]
    return [file for file in files if file.is_file()]


def going_on(config: FactorTrainConfig, *, unchanged: bool) -> FactorTrainConfig:
    """The config of a recipe's stage that finds an earlier run in its folder: what is left of the same run, or a run
    in its place."""
    if config.resume:
        return config
    done = epochs_done(folder_of(config)) if unchanged else None
    if done is None:
        return replace(config, overwrite=True)
    return replace(config, resume=True, epochs=max(0, config.epochs - done))


def describe(config: FactorTrainConfig) -> list[str]:
    arch, folder = canonical(config.arch), folder_of(config)
    lines = [f"train {arch} for {config.epochs} epochs on {config.features}: factors of rank {config.rank}"]
    if config.resume:
        lines = [f"train {arch} in {folder} for {config.epochs} epochs more, from its last complete checkpoint"]
    if config.allocator.use_rank_allocator:
        lines.append(f"lower the rank to {config.allocator.allocator_keep_ratio:.0%} of its channels on the way")
    patience = f"stop after {config.patience} epochs without a better validation MSE, " if config.patience else ""
    return [*lines, f"{patience}keep the best network, test it", f"write network, history and checkpoints to {folder}"]
