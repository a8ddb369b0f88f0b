"""Many small training runs at once: N adapters on one frozen base, equal to N runs one after the other.

    arms = [Arm(start, scales, learning_rate=2e-4, order=order(seed)) for seed in range(8)]
    trained = train_together(model, arms, rows, collator, ArmSettings(steps=200, batch_size=8, lr_scheduler="cosine"))
    sums, tokens = losses_together(model, [arm.pairs for arm in trained], [arm.scales for arm in arms], batches)

Arms share the base, the number of steps and the batch size; ranks, scales, rates, data order and phases are each
arm's own. A small model spends its time on starting many small operations; together they are one large operation
each (`stacked`). What comes out is what the Trainer would have made of each arm
alone, without any dropout, up to rounding. The base computes in its own precision, or as a `torch.autocast` around
the call says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rankwise.core.factors import truncate
from rankwise.core.site import Site
from rankwise.data.vision_inputs import IGNORED
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import Learnt
from rankwise.ranks.spectra import site_generator
from rankwise.train.together.stacked import (
    Active,
    ArmSettings,
    Course,
    Stack,
    StackedAdamW,
    Together,
    rate_factors,
    running,
)

Batch = Mapping[str, Tensor]
Collate = Callable[[Sequence[Mapping[str, Any]]], Batch]
CPU_TOKENS, DEVICE_TOKENS = 2048, 16384  # in one forward pass; the first is measured


@dataclass(frozen=True)
class Arm:
    """One training run among those trained together.

    start: site path → A (r, n) and B (m, r), float32. scales: site path → s of s·B·A. order: positions of rows in the
    data, `batch_size` of them per step. active: paths of the sites that train in the step that starts when so many
    steps are done; None: all, always.
    """

    start: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]
    learning_rate: float
    order: Sequence[int]
    active: Active | None = None


@dataclass(frozen=True)
class TrainedArm:
    """Result of an arm.

    pairs: site path → A, B, on the CPU. losses: nats per token at every step. norms: of the gradient of the sites
    that train, before clipping. diverged: a loss or gradient was not finite. That step was not taken and none after
    it; losses and norms are nan from there on, and the pairs are those before it.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    losses: list[float]
    norms: list[float]
    diverged: bool


def train_together(
    model: PreTrainedModel,
    arms: Sequence[Arm],
    rows: Sequence[Mapping[str, Any]],
    collate: Collate,
    settings: ArmSettings,
    *,
    at_once: int | None = None,
) -> list[TrainedArm]:
    """Train all arms; the model is only read, and afterwards as it was.

    Args:
        model: the plain base, a causal language model on the device where it shall compute.
        rows: a data set of {input_ids, labels, …}; each row is asked for once.
        collate: rows → {input_ids, attention_mask, labels}, padded to one length.
        at_once: arms in one forward pass; the others take their turn within the same step. Fewer need less memory.
            None: as many as the device works on well.

    Raises UsageError: orders that are too short or leave the data, factors that do not fit each other or the model.
    """
    check(arms, len(rows), settings)
    stack = Stack.of([arm.start for arm in arms], [arm.scales for arm in arms], model.device)
    optimizer = optimizer_of(stack, arms, settings)
    supply = Supply(arms, cache(rows.__getitem__), collate, settings.batch_size)  # rendering a row is slow
    parts = stack.parts(at_once or fitting(supply.tokens_per_arm(), model.device))
    losses, norms = [], []
    with running(model, stack) as together:
        for step in tqdm(range(settings.steps), desc="arms", unit="step", disable=None):
            results = []
            for part, batch in zip(parts, supply.batches(step, len(parts[0])), strict=True):
                part.train(optimizer.course.trains(step, part.first, len(part)))
                results.append(backward(together, part, batch))
            loss, gradients = (torch.cat(result) for result in zip(*results, strict=True))
            norm = optimizer.step(step, loss, gradients)
            losses.append(loss.where(optimizer.alive[:, 0], torch.nan))
            norms.append(norm.where(optimizer.alive[:, 0], torch.nan))
    return collect(stack, arms, torch.stack(losses), torch.stack(norms), optimizer.alive)


def check(arms: Sequence[Arm], count: int, settings: ArmSettings) -> None:
    if not any(arm.start for arm in arms):
        raise UsageError("no arm adapts any site: there is nothing to train")
    for number, arm in enumerate(arms):
        needed = settings.steps * settings.batch_size
        if len(arm.order) < needed:
            raise UsageError(
                f"arm {number}: {settings.steps} steps of {settings.batch_size} rows need an order of {needed} rows, "
                f"and it has {len(arm.order)}"
            )
        if min(arm.order) < 0 or max(arm.order) >= count:
            raise UsageError(f"arm {number}: its order has row numbers outside the {count} rows of the data")


def optimizer_of(stack: Stack, arms: Sequence[Arm], settings: ArmSettings) -> StackedAdamW:
    factors = rate_factors(settings.lr_scheduler, settings.warmup_steps, settings.steps)
    rates = factors[:, None] * torch.tensor([arm.learning_rate for arm in arms], dtype=torch.float64)
    paths, reset = [site.path for site in stack.sites], settings.phase_state == "reset"
    course = Course.of([arm.active for arm in arms], paths, settings.steps, reset=reset)
    return StackedAdamW(stack, course, rates, settings)


def fitting(tokens_per_arm: int, device: torch.device) -> int:
    """Arms for one forward pass: enough that starting operations costs little, not so many that a CPU's caches or a
    GPU's memory overflow."""
    return max(1, round((CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS) / tokens_per_arm))


@dataclass(frozen=True)
class Supply:
    """The batches of all arms, from their orders."""

    arms: Sequence[Arm]
    row: Callable[[int], Mapping[str, Any]]
    collate: Collate
    batch_size: int

    def batches(self, step: int, size: int) -> Iterator[Batch]:
        """Those of one step, for so many arms each: the rows of the first arm, then of the next, …"""
        taken = slice(step * self.batch_size, (step + 1) * self.batch_size)
        for first in range(0, len(self.arms), size):
            group = self.arms[first : first + size]
            yield self.collate([self.row(position) for arm in group for position in arm.order[taken]])

    def tokens_per_arm(self) -> int:
        """In the first step, padding included."""
        sizes = [batch["input_ids"].numel() for batch in self.batches(0, 1)]
        return sum(sizes) // len(sizes)


def backward(together: Together, part: Stack, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses per token (N,) of the arms of a part, and the gradient of each by its own factors (N, P).

    A token's loss counts 1 / (tokens of its arm). Nothing is summed over arms on the way, so an arm that is not
    finite leaves the others as they are.
    """
    arms, device = len(part), part.values.device
    learnt = Learnt.of(batch["labels"])
    arm = learnt.rows // (batch["labels"].shape[0] // arms)
    weights = (1 / torch.bincount(arm, minlength=arms).float())[arm]
    learnt, arm, weights = learnt.to(device), arm.to(device, non_blocking=True), weights.to(device, non_blocking=True)
    token_losses = together.token_losses(part, batch, learnt)
    losses = torch.zeros(arms, device=device).index_add(0, arm, token_losses.detach() * weights)
    return losses, part.gradients(token_losses, weights)


def collect(stack: Stack, arms: Sequence[Arm], losses: Tensor, norms: Tensor, alive: Tensor) -> list[TrainedArm]:
    """The only wait for the device: everything comes to the host at the end."""
    by_arm = zip(arms, losses.T.tolist(), norms.T.tolist(), alive[:, 0].tolist(), strict=True)
    return [
        TrainedArm(stack.pairs(number, arm.start), arm_losses, arm_norms, not lived)
        for number, (arm, arm_losses, arm_norms, lived) in enumerate(by_arm)
    ]


@torch.inference_mode()
def losses_together(
    model: PreTrainedModel,
    pairs: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    scales: Sequence[Mapping[str, float]],
    batches: Iterable[Batch],
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats (arms, items) float64 and learnt tokens (items,) of every sample.

    What `answer_losses` says of each adapter, for all adapters at once; no pairs at all ({}) are the
    base. batches: as `training_batches` makes them.
    """
    stack = Stack.of(pairs, scales, model.device)
    sums, counts = [], []
    with running(model, stack) as together:
        for batch in tqdm(batches, desc="loss", unit="batch", disable=None, leave=False):
            parts = stack.parts(fitting(batch["input_ids"].numel(), model.device))
            sums.append(torch.cat([row_losses(together, part, batch) for part in parts]))
            counts.append((batch["labels"][:, 1:] != IGNORED).sum(1).cpu())
    return torch.cat(sums, dim=1), torch.cat(counts)


def row_losses(together: Together, part: Stack, batch: Batch) -> Tensor:
    """Summed losses (N, items) of every row under every arm of a part."""
    items = batch["labels"].shape[0]
    repeated = {name: value.repeat(len(part), 1) for name, value in batch.items() if value.dim() == 2}
    learnt = Learnt.of(repeated["labels"]).to(part.values.device)
    losses = together.token_losses(part, repeated, learnt).double()
    total = torch.zeros(len(part) * items, dtype=torch.float64, device=losses.device)
    return total.index_add(0, learnt.rows, losses).view(-1, items).cpu()


SCALE = 2.0
Pairs = dict[str, tuple[Tensor, Tensor]]
Ranks = Mapping[Site, int]


def random_start(ranks: Ranks, seed: int, largest: int) -> Pairs:
    """LoRA's start: A uniform within ±1/√n as PEFT draws it, B zero; path → A (r, n), B (m, r).

    A site's A depends on the seed and its path alone: arms of unequal rank share their leading rows.
    """
    pairs = {}
    for site, rank in ranks.items():
        if rank:
            rows, (m, n) = max(largest, rank), site.shape
            drawn = torch.rand(rows, n, generator=site_generator(site, seed))
            pairs[site.path] = (((2 * drawn - 1) / math.sqrt(n))[:rank].clone(), torch.zeros(m, rank))
    return pairs


def warm_start(ranks: Ranks, deltas: Mapping[Site, Tensor], scales: Mapping[str, float], seed: int) -> Pairs:
    """The probe's delta cut to the ranks: base + adapter is base + truncated delta."""
    return {
        site.path: truncate(deltas[site], rank, site_generator(site, seed)).lora(scales[site.path])
        for site, rank in ranks.items()
        if rank
    }


def directed_start(ranks: Ranks, directions: Mapping[str, Tensor]) -> Pairs:
    """A from given directions (r, n) of each site's inputs, B zero."""
    return {
        site.path: (directions[site.path][:rank].float().clone(), torch.zeros(site.shape[0], rank))
        for site, rank in ranks.items()
        if rank
    }


def scales_of(ranks: Ranks, rule: str, reference: Ranks) -> dict[str, float]:
    """Path → factor of B·A.

    constant: 2 everywhere (alpha = 2r). alpha: one alpha over r. rslora: one alpha over √r. The one alpha is that which
    gives 2 at the median rank of `reference`, the uniform arm of the same budget (`train` takes 2·largest rank for
    rsLoRA): arms are to differ in how the scale follows the rank, not in its size, which a tuned rate takes up.
    """
    typical = statistics.median([rank for rank in reference.values() if rank] or [1])
    power = {"constant": 0.0, "alpha": 1.0, "rslora": 0.5}[rule]
    return {site.path: SCALE * (typical / rank) ** power for site, rank in ranks.items() if rank}


def row_order(rows: int, count: int, seed: int) -> list[int]:
    """Positions of `count` rows: permutation after permutation. A longer order starts with the shorter one."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:count]
