"""The order of the rows, and their distribution over processes: every row counts exactly once.

    batches of the sampler ── Filled ──▶ as many full batches for every process ── Silenceable ──▶ rows
    [3 1] [0 2] [4]                      [3 1] [0 2] [4 ~3] [~1 ~0]               ~3: row 3 with nothing to learn

accelerate repeats rows until every process has a full batch, and each repeated one is learnt and scored twice. A
process that simply stopped earlier would leave the others waiting in a collective call: hence rows that run and weigh
nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from rankwise.data.vision_inputs import IGNORED
from rankwise.errors import UsageError

INDEX = "sample_index"


def summed(values: Tensor) -> Tensor:
    """Over all processes; every one of them must ask."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class Silenceable(Dataset[dict[str, Any]]):
    """The rows of a data set, and under ~i row i with nothing to learn: labels −100 throughout, its index as ~index."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.lengths = getattr(rows, "lengths", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place] if place >= 0 else silence(self.rows[~place])


def silenceable(rows: Any) -> Any:
    """UsageError for rows of a caller's own whose labels only the collator makes."""
    if not {"labels", INDEX} & rows[0].keys():
        raise UsageError("in several processes rows must hold their labels: some are filled up with −100 throughout")
    return Silenceable(rows)


def silence(row: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if "labels" in row:
        changed["labels"] = [IGNORED] * len(row["labels"])
    if INDEX in row:
        changed[INDEX] = [~each for each in row[INDEX]] if isinstance(row[INDEX], list) else ~row[INDEX]
    return {**row, **changed}


class Filled(BatchSampler):
    """The batches of another sampler, the last ones filled up with rows of the first ones, silenced.

    Args:
        batches: a sampler of batches of one size, of which the last may be smaller.
        at_once: the number of batches becomes a multiple of it: one for each process.
    """

    def __init__(self, batches: BatchSampler, at_once: int) -> None:
        self.batches, self.at_once = batches, at_once
        self.batch_size, self.drop_last, self.sampler = batches.batch_size, False, batches.sampler

    def __len__(self) -> int:
        return -(-len(self.batches) // self.at_once) * self.at_once

    def __iter__(self) -> Iterator[list[int]]:
        first: list[int] = []
        filling = itertools.cycle(first)
        for batch in self.batches:
            first += batch if len(first) < self.batch_size * self.at_once else []
            yield batch + self.fill(filling, self.batch_size - len(batch))
        given = len(self.batches)
        for _ in range(len(self) - given):
            yield self.fill(filling, self.batch_size)

    @staticmethod
    def fill(rows: Iterator[int], count: int) -> list[int]:
        return [~row for row in itertools.islice(rows, count)]


def share_evenly(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader that accelerate has prepared, whose processes get every row once and fill up with silenced ones.

    Its data set must be `Silenceable`. One process, and a sampler that shares the rows out itself, are left alone.
    """
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard) or shard.num_processes == 1 or shard.drop_last:
        return loader
    if not isinstance(shard.batch_sampler, Filled):  # a loader that is kept comes back filled
        shard.batch_sampler = Filled(shard.batch_sampler, 1 if shard.split_batches else shard.num_processes)
        shard.sampler = shard.batch_sampler.sampler  # or accelerate tells the number of a resumed epoch to no one
    return loader


class Seeded(Sampler[int]):
    """An order that depends on seed and epoch alone, so that a resumed run sees the same rows."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + self.epoch)


class LengthGrouped(Seeded):
    """Positions in random order, sorted by length within blocks of 50 batches; the longest batch comes first.

    The Trainer's own sampler tokenises every sample to learn its length, and draws from torch's global generator,
    whose state a resumed epoch does not have.

    Args:
        lengths: tokens of each sample.
        batch_size: samples of one optimizer step (accumulation included).
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(seed)
        self.lengths, self.batch_size = list(lengths), batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=self.generator()))
