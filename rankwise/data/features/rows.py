"""Feature matrices as rows for training: normalised, one at a time from the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from rankwise.core.approximation import normalised
from rankwise.data.features.cache import FeatureCache
from rankwise.errors import DataError
from rankwise.files.processes import gathered, own_share

SHOWN = 8


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
    bar = tqdm(sorted(mine), desc="features", unit="matrix", disable=None, leave=False)
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
