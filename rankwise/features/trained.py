"""Trained factorizers and the features they were trained on, as `compare` and `downstream` find them again.

results/<arch>/best_model.* ── networks ──▶ Network(net, cache)        cache ── cached(places) ──▶ normalised (B, T, D)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankwise.errors import DataError
from rankwise.features.cache import INDEX, FeatureCache, open_cache
from rankwise.features.dataset import measurable
from rankwise.features.nets.base import Factorizer
from rankwise.features.nets.files import SETTINGS, load_factorizer
from rankwise.files.atomic import read_object
from rankwise.files.run_folder import CONFIG
from rankwise.options.features import canonical

BATCH = 16  # matrices of a cache at a time


@dataclass(frozen=True)
class Network:
    """A trained factorizer and the run folder that it comes from. cache: what it was trained on; None with the reason
    where that cannot be read any more."""

    folder: Path
    net: Factorizer
    cache: FeatureCache | None
    lost: str = ""

    @property
    def name(self) -> str:
        return self.net.settings.arch

    @property
    def rank(self) -> int:
        return self.net.settings.rank


def networks(results_dir: str, archs: Sequence[str]) -> list[Network]:
    """Those asked for, or all that have finished. DataError for one that is not there or damaged."""
    root = Path(results_dir).expanduser()
    folders = [root / canonical(arch) for arch in archs] or sorted(file.parent for file in root.glob(f"*/{SETTINGS}"))
    for folder in folders:
        if not (folder / SETTINGS).is_file():
            raise DataError(f"{folder}: no trained network ({SETTINGS}); train it with `rankwise features train`")
    return [Network(folder, load_factorizer(folder), *trained_on(folder)) for folder in folders]


def trained_on(folder: Path) -> tuple[FeatureCache | None, str]:
    """The cache of a run, and why there is none where there is none."""
    try:
        where = read_object(folder / CONFIG).get("features")
        if not isinstance(where, str):
            raise DataError(f"{folder / CONFIG} does not name the features that it was trained on")
        return open_cache(where), ""
    except DataError as error:
        return None, str(error)


def stretch_of(found: Sequence[Network]) -> int | None:
    """The square that pictures were stretched to when the networks' features were captured; None where they were not,
    or nothing says so."""
    for each in found:
        if each.cache is not None and (each.cache.path / INDEX).is_file():
            side: int | None = read_object(each.cache.path / INDEX)["settings"].get("stretched_to")
            return side
    return None


def is_of(each: Network, fingerprint: str) -> bool:
    """Whether a network's cache holds features of the model with this fingerprint."""
    return each.cache is not None and each.cache.model is not None and each.cache.model.fingerprint == fingerprint


def cached(cache: FeatureCache, places: Sequence[int]) -> Iterator[Tensor]:
    """Normalised matrices (B, T, D) of a cache. DataError naming one that nothing can be measured on."""
    for start in range(0, len(places), BATCH):
        yield torch.stack([measurable(cache, place) for place in places[start : start + BATCH]])
