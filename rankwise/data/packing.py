"""Several samples in one row: no padding to speak of, and no sample sees another.

RenderedDataset ── pack ──▶ PackedDataset ── Collator ──▶ {input_ids, labels, position_ids}, no attention mask

transformers' masks part a row where its position ids start again at 0, in every attention implementation, as long as
no cache is used (the Trainer uses none). That is a property of the model's code, so `unpacked_difference` measures it
on the model at hand before anyone relies on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from rankwise.data.collate import Collator
from rankwise.data.rendered import RenderedDataset
from rankwise.data.sight import IGNORED


def pack(lengths: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """Positions of samples, binned so that no bin holds more than `limit` tokens.

    Longest first, each into the emptiest bin that has room for it (worst fit decreasing): near the least number of
    bins, in n log n, and bins alike in length.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (−free tokens, bin): the emptiest on top
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        if room and -room[0][0] >= lengths[position]:
            free, number = heapq.heappop(room)
            bins[number].append(position)
        else:
            free, number = -limit, len(bins)
            bins.append([position])
        heapq.heappush(room, (free + lengths[position], number))
    return [tuple(sorted(one)) for one in bins]


class PackedDataset(Dataset[dict[str, Any]]):
    """Bins of a RenderedDataset's samples; each item is one row of up to `limit` tokens."""

    def __init__(self, rows: RenderedDataset, limit: int) -> None:
        self.rows = rows
        self.bins = pack(rows.lengths, limit)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sum(self.rows.lengths[position] for position in one) for one in self.bins)

    def sample_id(self, index: int) -> str:
        """Name of a sample: `sample_index` holds positions of samples, not of bins."""
        return self.rows.sample_id(index)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = [self.rows[position] for position in self.bins[index]]
        return {
            "input_ids": [token for sample in samples for token in sample["input_ids"]],
            # The first token of a sample would be predicted from the sample before it.
            "labels": [label for sample in samples for label in (IGNORED, *sample["labels"][1:])],
            "position_ids": [place for sample in samples for place in range(len(sample["input_ids"]))],
            "sample_index": list(self.bins[index]),
        }


@torch.no_grad()
def unpacked_difference(model: nn.Module, packed: PackedDataset, collate: Collator) -> float:
    """Largest difference between the logits of samples packed into one row and of each alone, relative to the
    largest logit: about 1e-6 in float32 where the model keeps them apart, near 1 where it mixes them."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    together = packed[max(range(len(packed)), key=lambda index: len(packed.bins[index]))]
    batch = {name: value.to(device) for name, value in collate([together]).items() if name != "sample_index"}
    whole, start, worst = model(**batch, use_cache=False).logits[0].float(), 0, 0.0
    for position in together["sample_index"]:
        ids = torch.tensor([packed.rows[position]["input_ids"]], device=device)
        alone = model(input_ids=ids).logits[0].float()
        part = whole[start : start + len(alone)]
        worst = max(worst, float((part - alone).abs().max() / alone.abs().max()))
        start += len(alone)
    model.train(training)
    return worst
