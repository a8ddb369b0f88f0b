"""A learning rate per tower: the optimizer's groups, split by tower before a scheduler looks at them.

    [A, B of all towers] ── split_by_tower(…, {"vision": 1e-5}) ──▶ [all other towers: 2e-4] [vision: 1e-5]

Weight decay and LoRA+ have made groups of their own by then; each of them is split, and keeps its ratio to the common
rate. The scheduler multiplies all rates by one factor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

RATE_COLUMN = "learning_rate_{}"


def split_by_tower(optimizer: Optimizer, towers: Mapping[int, str], rates: Mapping[str, float], common: float) -> None:
    """Give the parameters of these towers groups of their own, at the rate of their tower.

    Args:
        optimizer: not stepped yet.
        towers: id of a parameter → tower.
        rates: tower → peak learning rate.
        common: the peak learning rate that the groups were made with.
    """
    groups = [part for group in optimizer.param_groups for part in parts(group, towers, rates, common)]
    optimizer.param_groups[:] = groups


def parts(
    group: Mapping[str, Any], towers: Mapping[int, str], rates: Mapping[str, float], common: float
) -> list[dict[str, Any]]:
    """The group without these towers, though it be empty (the log reads the common rate there), and one for each."""
    rest = [parameter for parameter in group["params"] if towers[id(parameter)] not in rates]
    found = [{**group, "params": rest}]
    for tower, rate in rates.items():
        own = [parameter for parameter in group["params"] if towers[id(parameter)] == tower]
        scaled = rate if group["lr"] == common else rate * group["lr"] / common
        if own:
            found.append({**group, "params": own, "lr": scaled, "tower": tower})
    return found


def full_at_common_rate(optimizer: Optimizer, full: Collection[int], common: float) -> None:
    """LoRA+ raises the rate of B, and of every vector: those of modules trained in full go back to the common rate.

    full: ids of their parameters.
    """
    groups = []
    for group in optimizer.param_groups:
        whole = [parameter for parameter in group["params"] if id(parameter) in full]
        others = [parameter for parameter in group["params"] if id(parameter) not in full]
        groups.append({**group, "params": others})
        if whole:
            groups.append({**group, "params": whole, "lr": common})
    optimizer.param_groups[:] = groups


class RateWatch(TrainerCallback):
    """Remembers the rates of the last step: by the time it is logged, the scheduler has moved on."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        self.rates = logged_rates(optimizer)


def logged_rates(optimizer: Optimizer) -> dict[str, float]:
    """`learning_rate_vision` … of the towers that have groups of their own, as they are now (with LoRA+: of A)."""
    found: dict[str, float] = {}
    for group in optimizer.param_groups:
        if "tower" in group:
            found.setdefault(RATE_COLUMN.format(group["tower"]), float(group["lr"]))
    return found


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
