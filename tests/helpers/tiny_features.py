"""Tiny feature caches for the tests of `rankwise features`: matrices of falling spectrum, some directions shared."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rankwise.features.cache import FeatureCache
from rankwise.features.cache_writer import CacheRecipe, Matrices, write_cache

TOKENS, CHANNELS = 12, 24


def tiny_matrices(count: int, seed: int = 0) -> Tensor:
    """(count, T, D): four shared directions, and noise of a tenth of their size."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.linalg.qr(torch.randn(CHANNELS, 4, generator=generator)).Q.mT
    strength = torch.tensor([3.0, 2.0, 1.0, 0.5])
    loadings = torch.randn(count, TOKENS, 4, generator=generator) * strength
    return loadings @ shared + 0.1 * torch.randn(count, TOKENS, CHANNELS, generator=generator)


def tiny_cache(folder: Path, matrices: Tensor | None = None, seed: int = 0) -> FeatureCache:
    """A cache of these matrices, or of 40; every picture is a group of its own, called img-000 and so on."""
    features = tiny_matrices(40, seed) if matrices is None else matrices
    ids = tuple(f"img-{number:03d}" for number in range(len(features)))
    recipe = CacheRecipe(shards=1, dtype="float32", model=None, pictures=f"tiny {seed}", settings={}, source="tests")
    return write_cache(folder, recipe, [Matrices(features, ids, ids, (3, 4))])
