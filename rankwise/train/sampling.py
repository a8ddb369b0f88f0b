"""Order of samples: rows of like length together, from the seed and the epoch alone, so that resume is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(Sampler[int]):
    """Positions in random order, sorted by length within blocks of 50 batches; the longest batch comes first.

    The Trainer's own sampler tokenises every sample to learn its length, and draws from torch's global generator,
    whose state a resumed epoch does not have.

    Args:
        lengths: tokens of each sample.
        batch_size: samples of one optimizer step (accumulation included).
        seed: with the epoch, all that the order depends on.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
