"""From traces of a few steps to the memory, time and price of a whole run, for any batch size.

two batch sizes ── Profile ──▶ peak(batch)       what is held after each operation grows by the same for every row
two widths      ── Work    ──▶ seconds(batch)    a·width + b·width²: the square is attention's
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainingArguments

from rankwise.train.estimate.gpus import FLOAT32, GIB, Card
from rankwise.train.estimate.trace import Trace
from rankwise.train.rows import LengthGrouped

# Bytes of a quantized weight: NF4 with a scale of 8 bits for 64, and a float32 for 256 of those; int8, a row's scale.
QUANTIZED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
GPU_ALLOWANCE, CPU_ALLOWANCE = GIB, 0.4 * GIB
# Share of a data sheet's rates that eager PyTorch reaches in training, and of those that were measured on the spot.
SHEET_UTILISATION, MEASURED_UTILISATION = 0.6, 0.9
HOST_SECONDS = 8e-6  # that Python and the dispatcher take for one operation
ADAMW_BYTES = 7 * FLOAT32  # per trained parameter and update: weight, gradient, two moments read, all but one written


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not depend on the batch. allowance: the CUDA context, libraries' workspaces and what the allocator
    cannot use; on a CPU the process itself."""

    weights: float
    trained: float
    gradients: float
    optimizer: float
    allowance: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.gradients + self.optimizer + self.allowance


@dataclass(frozen=True)
class Needs:
    """Peak bytes of a step by purpose. activations: everything else that is alive then."""

    fixed: Fixed
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.fixed.total + self.activations + self.logits


@dataclass(frozen=True)
class Profile:
    """Memory held besides the weights after each operation of a step: start + rows · each, (operations,)."""

    fixed: Fixed
    start: Tensor
    each: Tensor
    logits_start: Tensor
    logits_each: Tensor

    @classmethod
    def of(cls, fixed: Fixed, two: Trace, three: Trace) -> Profile:
        """From traces of two and of three rows of one width; where they differ in their operations, from the peaks."""
        if two.operations != three.operations:
            two, three = at_peak(two), at_peak(three)
        each, logits_each = three.held - two.held, three.logits - two.logits
        return cls(fixed, two.held - 2 * each, each, two.logits - 2 * logits_each, logits_each)

    def needs(self, batch: int) -> Needs:
        """The peak. Gradients are held in full from the end of the step on, so they are counted whole."""
        held = self.start + batch * self.each
        at = int(held.argmax())
        logits = float(self.logits_start[at] + batch * self.logits_each[at])
        return Needs(self.fixed, max(0.0, float(held[at]) - self.fixed.gradients - logits), logits)

    def largest(self, memory: float, most: int) -> int:
        """The largest batch up to `most` whose peak fits; 0 where not even one row does."""
        return bisect_right(range(1, most + 1), memory, key=lambda batch: self.needs(batch).total)


def at_peak(trace: Trace) -> Trace:
    at = int(trace.held.argmax())
    return Trace(trace.held[at : at + 1], trace.logits[at : at + 1], trace.flops, trace.moved)


@dataclass(frozen=True)
class Curve:
    """linear·width + square·width²"""

    linear: float
    square: float

    @classmethod
    def through(cls, wide: tuple[int, float], narrow: tuple[int, float]) -> Curve:
        (width, high), (less, low) = wide, narrow
        if less == width:
            return cls(high / width, 0.0)
        square = max(0.0, (high / width - low / less) / (width - less))
        return cls(high / width - square * width, square)

    def scaled(self, factor: float) -> Curve:
        return Curve(self.linear * factor, self.square * factor)

    def at(self, width: float) -> float:
        return self.linear * width + self.square * width**2


@dataclass(frozen=True)
class Work:
    """Compute and memory traffic of a step: `flops` and `moved` of a row by its width, bytes that any batch moves."""

    flops: Curve
    moved: Curve
    moved_anyway: float
    operations: int

    @classmethod
    def of(cls, two: Trace, three: Trace, width: int, narrow: Trace, narrow_width: int) -> Work:
        """From two and three rows of `width`, and two of `narrow_width`."""
        each = three.moved - two.moved
        anyway = max(0.0, two.moved - 2 * each)
        return cls(
            Curve.through((width, two.flops / 2), (narrow_width, narrow.flops / 2)),
            Curve.through((width, each), (narrow_width, max(0.0, narrow.moved - anyway) / 2)),
            anyway,
            two.operations,
        )

    def like(self, two: Trace, three: Trace, width: int) -> Work:
        """Of another way to run, traced at one width: its sums, split between length and its square as here."""
        flops, each = two.flops / 2, three.moved - two.moved
        return Work(
            self.flops.scaled(flops / self.flops.at(width)),
            self.moved.scaled(each / self.moved.at(width)),
            max(0.0, two.moved - 2 * each),
            two.operations,
        )

    def seconds(self, batch: int, width: float, speed: Speed) -> float:
        """Of forward and backward. A GPU works while the host prepares what follows; a CPU does one after the other."""
        moved = self.moved_anyway + batch * self.moved.at(width)
        device = batch * self.flops.at(width) / speed.flops + moved / speed.bandwidth
        host = self.operations * HOST_SECONDS
        return device + host if speed.on_cpu else max(device, host)


@dataclass(frozen=True)
class Speed:
    """Achieved rates: FLOP/s of matrix products and bytes per second of everything else."""

    flops: float
    bandwidth: float
    on_cpu: bool = False

    @classmethod
    def of(cls, card: Card, autocast: torch.dtype | None, utilisation: float | None = None) -> Speed:
        share = utilisation or (MEASURED_UTILISATION if card.measured else SHEET_UTILISATION)
        return cls(card.flops(autocast) * share, card.bandwidth * share, card.cpu)


@dataclass(frozen=True)
class Length:
    """Length of a run: optimizer steps, and forward and backward passes."""

    updates: int
    passes: float


def run_length(rows: int, batch: int, arguments: TrainingArguments) -> Length:
    """As the Trainer counts, for one process of `arguments.world_size`."""
    per_epoch = rows / (batch * arguments.world_size)
    batches = max(1, math.floor(per_epoch) if arguments.dataloader_drop_last else math.ceil(per_epoch))
    accumulated = arguments.gradient_accumulation_steps
    if arguments.max_steps > 0:
        return Length(arguments.max_steps, min(float(accumulated), batches) * arguments.max_steps)
    updates = math.ceil(arguments.num_train_epochs * max(1, math.ceil(batches / accumulated)))
    return Length(updates, arguments.num_train_epochs * batches)


def widths(lengths: Sequence[int], batch: int, arguments: TrainingArguments, multiple_of: int) -> list[int]:
    """Widths of an epoch's batches, padding included, in an order like training's."""
    if arguments.train_sampling_strategy == "group_by_length":
        order = list(LengthGrouped(lengths, batch * arguments.gradient_accumulation_steps, arguments.seed))
    else:
        order = random.Random(arguments.seed).sample(range(len(lengths)), len(lengths))
    batches = (order[start : start + batch] for start in range(0, len(order), batch))
    longest = (max(lengths[index] for index in part) for part in batches)
    return [-(-length // multiple_of) * multiple_of for length in longest]


def run_seconds(
    work: Work, speed: Speed, length: Length, batch: int, epoch: Sequence[int], rows: int, trained: int
) -> float:
    """Seconds of training alone: no loading, no validation, no checkpoint.

    epoch: widths of the batches of one epoch, of which the last may hold fewer rows.
    """
    each = [work.seconds(batch, width, speed) for width in epoch]
    short = rows - batch * (len(epoch) - 1)
    each[-1] = work.seconds(min(batch, short), epoch[-1], speed)
    return length.passes * sum(each) / len(each) + length.updates * ADAMW_BYTES * trained / speed.bandwidth
