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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.data.vision_inputs import IGNORED
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import Learnt
from rankwise.page.progress import progress
from rankwise.train.together.optimizer import Active, ArmSettings, Course, StackedAdamW, learning_rates
from rankwise.train.together.stacked import Stack, Together, running

Batch = Mapping[str, Tensor]
Collate = Callable[[Sequence[Mapping[str, Any]]], Batch]
WATCHED, MARGIN = 8, 0.01  # steps of each eighth that are compared with the base, and what its loss may be passed by
CPU_TOKENS, DEVICE_TOKENS = 2048, 16384  # in one forward pass; the first is measured


class TokenRows(Protocol):
    """A data set of {input_ids, labels, …}."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


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
    that train, before clipping. diverged: a loss or gradient was not finite (that step was not taken and none after
    it; losses and norms are nan from there on, and the pairs are those before it), or the arm has left.

    left: why, where an arm that was watched left before the end. validated: step → nats per token of the rows that
    validate. best: the step that the pairs are of, where the best one was kept. tokens: trained on, padding excluded.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    losses: list[float]
    norms: list[float]
    diverged: bool
    left: str = ""
    validated: Mapping[int, float] = field(default_factory=dict)
    best: int | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Validation:
    """Rows that validate, as batches, after which steps, and whether each arm ends with its best factors by them."""

    batches: Sequence[Batch]
    steps: Collection[int]
    keep_best: bool = False


def train_together(
    model: PreTrainedModel,
    arms: Sequence[Arm],
    rows: TokenRows,
    collate: Collate,
    settings: ArmSettings,
    *,
    at_once: int | None = None,
    watch: bool = False,
    validation: Validation | None = None,
    after_step: Callable[[int], object] = lambda step: None,
) -> list[TrainedArm]:
    """Train all arms; the model is only read, and afterwards as it was.

    Args:
        model: the plain base, a causal language model on the device where it shall compute.
        rows: a data set of {input_ids, labels, …}; each row is asked for once.
        collate: rows → {input_ids, attention_mask, labels}, padded to one length.
        at_once: arms in one forward pass; the others take their turn within the same step. Fewer need less memory.
            None: as many as the device works on well.
        watch: after each eighth of the steps, arms that diverge leave: those that are not finite, and those whose loss
            over the eighth's last steps is above the base's on the same rows.
        after_step: called with the number of steps done.

    Raises UsageError: orders that are too short or leave the data, factors that do not fit each other or the model,
    rows of more than text.
    """
    check(arms, len(rows), settings)
    training = Training(model, arms, rows, collate, settings, at_once)
    with running(model, training.stack) as together:
        for step in progress(range(settings.steps), desc="arms", unit="step", leave=True):
            training.step(together, step)
            if validation is not None and step + 1 in validation.steps:
                training.validate(together, step + 1, validation)
            if watch:
                training.dismiss(together, step + 1)
            after_step(step + 1)
            if not training.there:
                break
    return training.results()


class Training:
    """Arms on their way. `there`: numbers of those that have not left, in the order of the stack."""

    def __init__(
        self,
        model: PreTrainedModel,
        arms: Sequence[Arm],
        rows: TokenRows,
        collate: Collate,
        settings: ArmSettings,
        at_once: int | None,
    ) -> None:
        self.model, self.arms, self.settings = model, arms, settings
        self.there = list(range(len(arms)))
        self.stack = Stack.of([arm.start for arm in arms], [arm.scales for arm in arms], model.device)
        self.optimizer = optimizer_of(self.stack, arms, settings)
        self.supply = Supply(arms, cache(rows.__getitem__), collate, settings)  # rendering a row is slow
        self.at_once = at_once or fitting(self.supply.tokens_per_arm(), model.device)
        self.parts = self.stack.parts(self.at_once)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.left: dict[int, TrainedArm] = {}
        self.validated: list[dict[int, float]] = [{} for _ in arms]
        self.best: Tensor | None = None
        self.base: dict[int, tuple[float, int]] = {}

    def step(self, together: Together, step: int) -> None:
        course, results = self.optimizer.course, []
        for part, batch in zip(self.parts, self.supply.batches(self.there, step, self.at_once), strict=True):
            part.train(course.trains(step, part.first, len(part)))
            results.append(backward(together, part, batch))
        loss, gradients = (torch.cat(result) for result in zip(*results, strict=True))
        norm = self.optimizer.step(step, loss, gradients)
        self.losses.append(self.of_all(loss))
        self.norms.append(self.of_all(norm))

    def of_all(self, values: Tensor) -> Tensor:
        """A step's values of all arms, nan for those that have left or stopped."""
        values = values.where(self.optimizer.alive[:, 0], torch.nan)
        if len(self.there) == len(self.arms):
            return values
        return values.new_full((len(self.arms),), torch.nan).index_copy(0, self.places(), values)

    def places(self) -> Tensor:
        return torch.tensor(self.there, device=self.stack.values.device)

    @torch.no_grad()
    def validate(self, together: Together, step: int, validation: Validation) -> None:
        sums, tokens = stack_losses(together, self.stack, validation.batches)
        losses = (sums.sum(1) / tokens.sum()).tolist()
        better = []
        for number, loss in zip(self.there, losses, strict=True):
            better.append(loss < min(self.validated[number].values(), default=math.inf))
            self.validated[number][step] = loss
        if validation.keep_best:
            chosen = torch.tensor(better, device=self.stack.values.device)[:, None]
            before = self.stack.values if self.best is None else self.best
            self.best = torch.where(chosen, self.stack.values, before)

    def dismiss(self, together: Together, step: int) -> None:
        """Arms that diverge leave, the others go on as they were."""
        steps = compared(step, self.settings.steps)
        if not steps:
            return
        means = torch.stack(self.losses[steps.start :]).mean(0)[self.places()].tolist()
        alive = self.optimizer.alive[:, 0].tolist()
        reasons = list(map(why_left, means, self.base_means(together, steps), alive, [steps] * len(means)))
        if any(reasons):
            self.leave(reasons)

    def base_means(self, together: Together, steps: range) -> list[float]:
        """The base's mean loss on the rows of these steps, of every arm that is there."""
        taken = [[self.supply.taken(number, step) for step in steps] for number in self.there]
        new = sorted({row for arm in taken for rows in arm for row in rows} - self.base.keys())
        size = self.at_once * self.settings.batch_size
        for start in range(0, len(new), size):
            part = new[start : start + size]
            sums, tokens = together.base_losses(self.supply.collate([self.supply.row(row) for row in part]))
            self.base |= dict(zip(part, zip(sums.tolist(), tokens.tolist(), strict=True), strict=True))
        return [statistics.fmean(mean_loss([self.base[row] for row in rows]) for rows in arm) for arm in taken]

    def leave(self, reasons: Sequence[str]) -> None:
        """Those with a reason are told as they are; the stack, the optimizer and the batches go on without them."""
        losses, norms = torch.stack(self.losses), torch.stack(self.norms)
        for place, (number, reason) in enumerate(zip(self.there, reasons, strict=True)):
            if reason:
                self.left[number] = replace(self.result(place, losses, norms), diverged=True, left=reason)
        staying = [place for place, reason in enumerate(reasons) if not reason]
        self.there = [self.there[place] for place in staying]
        places = torch.tensor(staying, dtype=torch.long)
        if staying:
            on_device = places.to(self.stack.values.device)
            self.stack = self.stack.only(on_device)
            self.optimizer = self.optimizer.only(places, self.stack)
            self.best = None if self.best is None else self.best[on_device]
            self.parts = self.stack.parts(self.at_once)

    def result(self, place: int, losses: Tensor, norms: Tensor) -> TrainedArm:
        """What has become of an arm of the stack so far. losses, norms: (steps, arms)."""
        number, done = self.there[place], len(losses)
        rest = [math.nan] * (self.settings.steps - done)
        validated = self.validated[number]
        return TrainedArm(
            self.stack.pairs(place, self.arms[number].start, self.best),
            losses[:, number].tolist() + rest,
            norms[:, number].tolist() + rest,
            not bool(self.optimizer.alive[place]),
            validated=validated,
            best=None if self.best is None else min(validated, key=lambda step: (validated[step], step)),
            tokens=self.supply.tokens(number, done),
        )

    def results(self) -> list[TrainedArm]:
        """Of all arms, in their order; where nobody was watched, the only wait for the device."""
        losses, norms = torch.stack(self.losses).cpu(), torch.stack(self.norms).cpu()
        found = {number: self.result(place, losses, norms) for place, number in enumerate(self.there)} | self.left
        return [found[number] for number in range(len(self.arms))]


def eighths(steps: int) -> list[int]:
    """The steps after which each eighth of a run is done."""
    return [-(-steps * part // 8) for part in range(1, 9)]


def compared(step: int, steps: int) -> range:
    """Steps (from 0) whose mean loss decides whether a run diverges, once so many of all are done: the last ones of an
    eighth; none where no eighth ends."""
    ends = [0, *eighths(steps)]
    if step not in ends[1:]:
        return range(0)
    count = min(WATCHED, step - max(end for end in ends if end < step))
    return range(step - count, step)


def why_left(mean: float, of_base: float, alive: bool, steps: range) -> str:
    """Why a run leaves after these steps, by its mean loss in them and the base's on the same rows; empty where it
    stays."""
    if not alive:
        return f"a loss or gradient was not finite by step {steps.stop}"
    if mean <= of_base * (1 + MARGIN):
        return ""
    return f"mean loss {mean:.4g} over steps {steps.start + 1} to {steps.stop}, the base's there is {of_base:.4g}"


def mean_loss(rows: Sequence[tuple[float, int]]) -> float:
    """Nats per token of a batch, from summed losses and tokens."""
    return math.fsum(loss for loss, _ in rows) / max(1, sum(tokens for _, tokens in rows))


def check(arms: Sequence[Arm], count: int, settings: ArmSettings) -> None:
    if not any(arm.start for arm in arms):
        raise UsageError("no arm adapts any site: there is nothing to train")
    for number, arm in enumerate(arms):
        needed = settings.rows
        if len(arm.order) < needed:
            raise UsageError(
                f"arm {number}: {settings.steps} steps of {settings.batch_size} rows need an order of {needed} rows, "
                f"and it has {len(arm.order)}"
            )
        if min(arm.order) < 0 or max(arm.order) >= count:
            raise UsageError(f"arm {number}: its order has row numbers outside the {count} rows of the data")


def optimizer_of(stack: Stack, arms: Sequence[Arm], settings: ArmSettings) -> StackedAdamW:
    rates = torch.stack([learning_rates(settings, arm.learning_rate) for arm in arms], dim=1)
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
    settings: ArmSettings

    def taken(self, arm: int, step: int) -> Sequence[int]:
        """Positions of the rows of an arm's step."""
        return self.arms[arm].order[self.settings.taken(step)]

    def batches(self, there: Sequence[int], step: int, size: int) -> Iterator[Batch]:
        """Those of one step, for so many of these arms each: the rows of the first arm, then of the next, …"""
        for first in range(0, len(there), size):
            group = there[first : first + size]
            yield self.collate([self.row(position) for arm in group for position in self.taken(arm, step)])

    def tokens_per_arm(self) -> int:
        """In the first step, padding included."""
        sizes = [batch["input_ids"].numel() for batch in self.batches(range(len(self.arms)), 0, 1)]
        return sum(sizes) // len(sizes)

    def tokens(self, arm: int, steps: int) -> int:
        """That an arm has seen in so many steps, padding excluded."""
        return sum(len(self.row(position)["input_ids"]) for step in range(steps) for position in self.taken(arm, step))


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
    with running(model, stack) as together:
        return stack_losses(together, stack, batches)


def stack_losses(together: Together, stack: Stack, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """The same, of a stack that runs."""
    sums, counts = [], []
    for batch in progress(batches, desc="loss", unit="batch"):
        parts = stack.parts(fitting(batch["input_ids"].numel(), stack.values.device))
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
