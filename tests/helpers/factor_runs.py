"""Runs of `rankwise features train` on tiny caches, for its tests: nothing drawn, little waited for."""

from __future__ import annotations

import csv
import gc
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from rankwise.features import job as factor_job
from rankwise.features import train
from rankwise.features.cache import open_cache
from rankwise.features.history import RunLog
from rankwise.features.job import start_of
from rankwise.options.features import AllocatorSection, FactorTrainConfig
from rankwise.train.checkpoints import checkpoints

RANK, STEPS = 4, 4  # 32 training matrices, 8 at a time
ALLOCATOR = AllocatorSection(True, 5, 3, 2, 0.5)


def config_of(cache: Path, place: Path, **given: Any) -> FactorTrainConfig:
    """Everything below a folder; three epochs of rank 4."""
    base = {
        "features": str(cache),
        "epochs": 3,
        "lr": 1e-2,
        "rank": RANK,
        "results_dir": str(place / "results"),
        "log_dir": str(place / "log"),
        "device": "cpu",
    }
    return FactorTrainConfig(**{**base, **given})


def trained(config: FactorTrainConfig) -> Path:
    """The run folder. Neither the picture nor collecting a test session's garbage is waited for."""
    gc.freeze()
    try:
        with mock.patch.object(train, "plotted", return_value=False):
            return train.run(config)
    finally:
        gc.unfreeze()


def trainer_of(config: FactorTrainConfig) -> tuple[Any, Any]:
    """The Trainer of a config, not yet started, and its allocator."""
    torch.manual_seed(config.seed)
    features = open_cache(config.features)
    folder = Path(config.results_dir) / config.arch
    settings = train.settings_of(config, features)
    train.check(config)
    job = factor_job.FactorJob(config, features, settings, factor_job.arguments_of(config, folder))
    start = start_of(config, folder, features, settings, job.identity)
    allocation = factor_job.allocation_of(job, start)
    return factor_job.trainer_of(job, start, allocation, RunLog(None))[0], allocation


def history(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "history.json").read_text())
    return rows


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "time"} for row in history(folder)]


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "test_results.json").read_text())
    return found


def final_weights(folder: Path) -> dict[str, Tensor]:
    """Of the newest checkpoint: where training ended, not what was best."""
    return load_file(checkpoints(folder)[0] / "model.safetensors")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def table(file: Path) -> list[dict[str, int]]:
    return [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file.read_text().splitlines())]
