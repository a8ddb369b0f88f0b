"""Feature matrices as rows for training: normalised, one at a time from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankwise.core.approximation import normalised
from rankwise.data.features.cache import FeatureCache


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
