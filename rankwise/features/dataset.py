"""The split into training, validation and test matrices, and the rows: normalised and checked to be measurable.

split = split_of(cache, seed=42)                 # 80/10/10 by picture: what is tested was never seen in training
SPLIT.write(run, split)
read_split(run, cache)                           # the same again, or a DataError
rows = FeatureRows(cache, split.train)           # a torch Dataset; `collate` makes batches
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankwise.errors import DataError
from rankwise.features.approximation import normalised
from rankwise.features.cache import FeatureCache
from rankwise.files.document import Document
from rankwise.files.processes import gathered, own_share
from rankwise.page.progress import progress

SPLIT = Document("split.json", "rankwise-feature-split/1", "a split of features", "rankwise features train")
PARTS = ("train", "val", "test")
LEAST_PICTURES = 3
SHOWN = 8
BATCH = 16  # matrices of a cache at a time


@dataclass(frozen=True)
class FeatureSplit:
    """Places in a cache, ascending; all matrices of one picture are in one part. cache: the cache's fingerprint."""

    cache: str
    seed: int
    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


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
    split = SPLIT.read_as(FeatureSplit, path)
    if split.cache != cache.fingerprint:
        raise DataError(
            f"{SPLIT.file(path)} divides another feature cache than {cache.path}: its test images may have trained "
            "there; give the cache that the network was trained on, or another one as --ood where the command has that"
        )
    parts = (split.train, split.val, split.test)
    if not all(parts) or sorted(sum(parts, ())) != list(range(len(cache))):
        raise DataError(
            f"{SPLIT.file(path)}: does not put each of the {len(cache)} matrices into one of {', '.join(PARTS)}"
        )
    return split


class FeatureRows(Dataset[dict[str, Any]]):
    """Some matrices of a cache: {"features": (T, D) float32, normalised per token; "sample_index": place in the cache}.

    indices: places in the cache, as a split gives them.
    """

    def __init__(self, cache: FeatureCache, indices: Sequence[int]) -> None:
        self.cache, self.indices = cache, tuple(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> dict[str, Any]:
        index = self.indices[row]
        return {"features": normalised(self.cache[index]), "sample_index": index}

    def sample_id(self, index: int) -> str:
        """The image of a `sample_index`, for messages."""
        return self.cache.ids[index]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """{"features": (B, T, D), "sample_index": (B,)}."""
    return {
        "features": torch.stack([row["features"] for row in rows]),
        "sample_index": torch.tensor([row["sample_index"] for row in rows]),
    }


def unmeasurable(matrix: Tensor) -> str:
    """Why no error can be measured on a normalised matrix (T, D); empty where it can."""
    if not torch.isfinite(matrix).all():
        return "has values that are not finite"
    return "" if matrix.any() else "is constant in every token, so that nothing is left of it once normalised"


def measurable(cache: FeatureCache, place: int) -> Tensor:
    """A normalised matrix (T, D) of a cache. DataError where it has NaN or infinity, or no energy."""
    matrix = normalised(cache[place])
    if reason := unmeasurable(matrix):
        raise refusal(cache.path, {cache.ids[place]: reason})
    return matrix


def check_measurable(cache: FeatureCache, places: Iterable[int] | None = None) -> None:
    """DataError naming every matrix of these places (all) that nothing can be measured on. The processes share them."""
    asked = list(range(len(cache)) if places is None else places)
    mine = own_share(asked, [1.0] * len(asked))
    bar = progress(sorted(mine), desc="features", unit="matrix")
    found = {place: reason for place in bar if (reason := unmeasurable(normalised(cache[place])))}
    bad = gathered(found)
    if bad:
        raise refusal(cache.path, {cache.ids[place]: bad[place] for place in sorted(bad)})


def refusal(path: Path, reasons: Mapping[str, str]) -> DataError:
    """The error that names matrices by their ids, with the reason of each."""
    listed = [f"{name} {reason}" for name, reason in reasons.items()]
    more = f"; and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    them = "it again, or without it" if len(listed) == 1 else "them again, or without them"
    return DataError(f"{path}: {'; '.join(listed[:SHOWN])}{more}; capture {them}")


def cached(cache: FeatureCache, places: Sequence[int], device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Normalised matrices (B, T, D) of a cache, on a device. DataError naming one that nothing can be measured on."""
    for start in range(0, len(places), BATCH):
        yield torch.stack([measurable(cache, place) for place in places[start : start + BATCH]]).to(device)
