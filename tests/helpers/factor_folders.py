"""Tiny feature caches and run folders of untrained networks, for the tests of compare, show and the report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankwise.features.cache import FeatureCache
from rankwise.features.cache_writer import CacheRecipe, Matrices, write_cache
from rankwise.features.dataset import SPLIT, split_of
from rankwise.features.nets import build
from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.features.trained import save_factorizer
from rankwise.files.atomic import write_json

TOKENS, CHANNELS, RANK = 16, 24, 4


def matrices(count: int, tokens: int = TOKENS, channels: int = CHANNELS, seed: int = 0) -> Tensor:
    """Matrices that share some of their directions, on a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(channels, channels, generator=torch.Generator().manual_seed(7))
    falling = torch.arange(1, channels + 1).float() ** -0.7
    return (torch.randn(count, tokens, channels, generator=generator) * falling) @ common


def make_cache(
    folder: Path,
    features: Tensor,
    grid: tuple[int, int] | None = (4, 4),
    groups: Sequence[str] | None = None,
    name: str = "photo",
) -> FeatureCache:
    ids = tuple(f"{name}_{index:03d}.png" for index in range(len(features)))
    pictures = tuple(groups or (hashlib.sha256(one.encode()).hexdigest() for one in ids))
    recipe = CacheRecipe(
        shards=1, dtype="float32", model=None, pictures=name, settings={}, source=f"{name}s drawn here"
    )
    return write_cache(folder, recipe, [Matrices(features, ids, pictures, grid)])


def make_run(
    results: Path, cache: FeatureCache, arch: str, rank: int = RANK, seed: int = 42, *, refine: bool = False
) -> Factorizer:
    """What `features train` leaves of a network, but for the training."""
    torch.manual_seed(3)
    net = build(FactorizerSettings(arch, cache.tokens, cache.channels, rank, refine=refine))
    folder = results / net.settings.arch
    folder.mkdir(parents=True)
    save_factorizer(net, folder)
    SPLIT.write(folder, split_of(cache, seed))
    write_json(folder / "resolved_config.json", {"arch": arch, "features": str(cache.path), "rank": rank})
    return net


def history(epochs: int = 3) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1.0 / epoch,
            "train_mse": 0.9 / epoch,
            "train_b": 0.1,
            "train_ortho": 0.1,
            "val_mse": 1.1 / epoch,
            "val_rel_f": 0.9 / epoch,
            "val_evr": 0.5,
            "lr": 1e-4,
            "time": 0.1,
            "effective_rank": RANK,
        }
        for epoch in range(1, epochs + 1)
    ]
