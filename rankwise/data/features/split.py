"""Which matrices train, validate and test: 80/10/10 by picture, so that what is tested was never seen in training.

split = split_of(cache, seed=42)
write_json(run / SPLIT, split.record())
read_split(run / SPLIT, cache)                   # the same again, or a DataError
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.features.cache import FeatureCache
from rankwise.errors import DataError
from rankwise.files.atomic import read_document

SPLIT, FORMAT = "split.json", "rankwise-feature-split/1"
PARTS = ("train", "val", "test")
LEAST_PICTURES = 3


@dataclass(frozen=True)
class FeatureSplit:
    """Places in a cache, ascending; all matrices of one picture are in one part. cache: the cache's fingerprint."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    cache: str
    seed: int

    def record(self) -> dict[str, Any]:
        """Content of `split.json`."""
        parts = {name: list(getattr(self, name)) for name in PARTS}
        return {"format": FORMAT, "cache": self.cache, "seed": self.seed, **parts}


def split_of(cache: FeatureCache, seed: int) -> FeatureSplit:
    """A tenth of the pictures validates, a tenth tests (each at least one picture), the others train.

    DataError for fewer than three different pictures.
    """
    pictures = sorted(set(cache.groups))
    if len(pictures) < LEAST_PICTURES:
        raise DataError(
            f"{cache.path}: {len(cache)} matrices of {len(pictures)} different pictures; a split into training, "
            f"validation and test needs {LEAST_PICTURES}: capture more images"
        )
    random.Random(seed).shuffle(pictures)
    tenth = max(1, round(len(pictures) / 10))
    part = dict.fromkeys(pictures, "train") | dict.fromkeys(pictures[:tenth], "test")
    part |= dict.fromkeys(pictures[tenth : 2 * tenth], "val")
    places = {name: tuple(i for i, group in enumerate(cache.groups) if part[group] == name) for name in PARTS}
    return FeatureSplit(**places, cache=cache.fingerprint, seed=seed)


def read_split(path: Path | str, cache: FeatureCache) -> FeatureSplit:
    """The split that a run has saved. DataError where it is damaged, or was made of another cache."""
    content = read_document(path, FORMAT, "a split of features")
    if content.get("cache") != cache.fingerprint:
        raise DataError(
            f"{path} divides another feature cache than {cache.path}: its test images may have trained there; give the "
            "cache that the network was trained on, or another one as --ood where the command has that"
        )
    parts, seed = {name: content.get(name) or [] for name in PARTS}, content.get("seed")
    places = [place for part in parts.values() if isinstance(part, list) for place in part]
    numbers = all(type(place) is int for place in places)
    if not all(parts.values()) or not numbers or sorted(places) != list(range(len(cache))):
        raise DataError(f"{path}: does not put each of the {len(cache)} matrices into one of {', '.join(PARTS)}")
    if type(seed) is not int:
        raise DataError(f"{path}: its seed is missing or no whole number: the file is not as it was written")
    return FeatureSplit(**{name: tuple(part) for name, part in parts.items()}, cache=cache.fingerprint, seed=seed)
