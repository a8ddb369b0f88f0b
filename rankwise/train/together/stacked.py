"""The low-rank factors of several arms as one stack, the frozen model that runs them, and AdamW over all of them.

    stack = Stack.of([arm.start for arm in arms], [arm.scales for arm in arms], device)
    with running(model, stack) as together:                        # hooks; afterwards the model is as it was
        losses = together.token_losses(stack, batch, Learnt.of(batch["labels"]))
    norms = StackedAdamW(stack, course, rates, settings).step(number, losses, gradients)

    input (N·b, T, n) ─┬─ frozen linear layer ───────────────┬─ + ─→ (N·b, T, m)
                       └─ as (N, b·T, n) ─ bmm Aᵀ ─ bmm Bᵀ ──┘

All numbers of an arm lie in one row of one matrix, so that an optimizer step or a norm is a few operations whatever the
number of sites. Sites of unequal rank are padded with zeros: with a zero row of A and its zero column of B both
gradients are exactly zero, so AdamW leaves them at zero. torch's AdamW has one rate per tensor, and a tensor per site
and arm would bring back the many small operations that stacking removes; per element this is its formula (Loshchilov &
Hutter 2019, bias correction by the site's own count).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from rankwise.core.site import nearest
from rankwise.errors import UsageError, VerificationError
from rankwise.evaluate.likelihood import BESIDE, Learnt, batch_losses, token_losses
from rankwise.models.sites import linear_shape
from rankwise.options.sections import PHASE_STATES

Pairs = Mapping[str, tuple[Tensor, Tensor]]
PASSED_ON = {"input_ids", "attention_mask", *BESIDE}


@dataclass(frozen=True)
class StackedSite:
    """One site of all arms: A (N, R, n) and B (N, m, R), views of the stack's matrix; R is the widest rank.

    scale: the factor of B·A, one number, or (N, 1, 1) where arms differ. columns: what the site takes of a row.
    """

    path: str
    a: Tensor
    b: Tensor
    scale: Tensor | float
    columns: slice

    def added(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """outputs + scale·B·A·inputs, each arm's rows with its own factors; in the outputs' precision."""
        arms = self.a.shape[0]
        low = torch.bmm(inputs.reshape(arms, -1, inputs.shape[-1]).to(self.a.dtype), self.a.mT)
        low, factor = (low * self.scale, 1.0) if isinstance(self.scale, Tensor) else (low, self.scale)
        grouped = outputs.reshape(arms, -1, outputs.shape[-1])
        if low.dtype == grouped.dtype:
            return torch.baddbmm(grouped, low, self.b.mT, alpha=factor).view_as(outputs)
        return (grouped + factor * torch.bmm(low, self.b.mT)).to(outputs.dtype).view_as(outputs)


@dataclass(frozen=True)
class Stack:
    """The factors of N arms: `values` (N, P) float32, and the sites as views of it.

    first: where its arms begin, in a stack that is a part of another.
    """

    values: Tensor
    sites: tuple[StackedSite, ...]
    first: int = 0

    @classmethod
    def of(cls, starts: Sequence[Pairs], scales: Sequence[Mapping[str, float]], device: torch.device) -> Stack:
        """A stack filled with these pairs. A site that an arm lacks has rank 0 there.

        Raises UsageError: factors that do not fit each other or another arm's, a site without a scale.
        """
        shapes = stacked_shapes(starts)
        check_scales(starts, scales)
        width = sum(rank * (m + n) for rank, m, n in shapes.values())
        values = torch.zeros(len(starts), width, device=device)
        sites, end = [], 0
        for path, (rank, m, n) in shapes.items():
            columns = slice(end, end := end + rank * (m + n))
            a = leaf(values, columns.start, (rank, n))
            b = leaf(values, columns.stop - m * rank, (m, rank))
            scale = shared_scale([given.get(path) for given in scales], device)
            sites.append(StackedSite(path, a, b, scale, columns))
        stack = cls(values, tuple(sites))
        stack.fill(starts)
        return stack

    def __len__(self) -> int:
        """Arms."""
        return len(self.values)

    @torch.no_grad()
    def fill(self, starts: Sequence[Pairs]) -> None:
        for site in self.sites:
            for arm, start in enumerate(starts):
                if site.path in start:
                    a, b = start[site.path]
                    site.a[arm, : a.shape[0]] = a.to(site.a)
                    site.b[arm, :, : b.shape[1]] = b.to(site.b)

    def parts(self, size: int) -> list[Stack]:
        """The same numbers as stacks of so many arms each, the last one of what is left."""
        starts = range(0, len(self.values), size)
        return [self.part(slice(start, start + size)) for start in starts]

    def part(self, arms: slice) -> Stack:
        """A run of its arms: views of the same numbers."""
        return self.over(self.values[arms], arms, arms.start)

    def only(self, arms: Tensor) -> Stack:
        """A stack of its own of some of the arms: copies of their numbers."""
        return self.over(self.values[arms], arms)

    def over(self, values: Tensor, arms: slice | Tensor, first: int = 0) -> Stack:
        """The sites as views of these rows, which hold the numbers of these arms."""
        sites = []
        for site in self.sites:
            (_, rank, n), (_, m, _), start = site.a.shape, site.b.shape, site.columns.start
            a, b = leaf(values, start, (rank, n)), leaf(values, start + rank * n, (m, rank))
            scale = site.scale[arms] if isinstance(site.scale, Tensor) else site.scale
            sites.append(StackedSite(site.path, a, b, scale, site.columns))
        return Stack(values, tuple(sites), first)

    def train(self, trains: Sequence[bool]) -> None:
        """Which sites get a gradient, or one word for all; without one, backward does less."""
        for number, site in enumerate(self.sites):
            wanted = trains[number if len(trains) > 1 else 0]
            site.a.requires_grad_(wanted)
            site.b.requires_grad_(wanted)

    def gradients(self, losses: Tensor, weights: Tensor) -> Tensor:
        """Those of Σ weights·losses, as one matrix (N, P); zero where a site does not train."""
        factors = [factor for site in self.sites for factor in (site.a, site.b)]
        training = [factor for factor in factors if factor.requires_grad]
        found = iter(torch.autograd.grad(losses, training, weights) if training else ())
        still = self.values.new_zeros(())
        parts = [next(found) if factor.requires_grad else still.expand_as(factor) for factor in factors]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def pairs(self, arm: int, like: Pairs, values: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Copies of one arm's factors, on the CPU and without padding; `like` says which and how wide.

        values: other numbers (N, P) of the same arms, in place of the stack's.
        """
        found = {}
        for site in (self if values is None else self.over(values, slice(None))).sites:
            if site.path in like:
                rank = like[site.path][0].shape[0]
                a, b = site.a[arm, :rank].detach(), site.b[arm, :, :rank].detach()
                found[site.path] = (a.cpu().clone(), b.cpu().clone(memory_format=torch.contiguous_format))
        return found


def stacked_shapes(starts: Sequence[Pairs]) -> dict[str, tuple[int, int, int]]:
    """Path → (widest rank, m, n). UsageError where factors do not fit each other or another arm's."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for arm, start in enumerate(starts):
        for path, (a, b) in start.items():
            widest, m, n = shapes.get(path, (0, b.shape[0], a.shape[1]))
            if a.shape[0] != b.shape[1] or (m, n) != (b.shape[0], a.shape[1]):
                raise UsageError(
                    f"arm {arm}: A {tuple(a.shape)} and B {tuple(b.shape)} of {path} do not fit a matrix {(m, n)}"
                )
            shapes[path] = (max(widest, a.shape[0]), m, n)
    return shapes


def leaf(values: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
    """A part of every row as a tensor (N, *shape) that autograd takes for a parameter."""
    part = values[:, start : start + shape[0] * shape[1]]
    return part.view(-1, *shape).detach().requires_grad_()


def check_scales(starts: Sequence[Pairs], scales: Sequence[Mapping[str, float]]) -> None:
    for arm, (start, given) in enumerate(zip(starts, scales, strict=True)):
        unscaled = [path for path in start if path not in given]
        if unscaled:
            raise UsageError(f"arm {arm}: no scale for {unscaled[0]}")


def shared_scale(scales: Sequence[float | None], device: torch.device) -> Tensor | float:
    """One number where all arms that have the site agree; those that lack it (None) have no factors to scale."""
    known = [scale for scale in scales if scale is not None]
    if len(set(known)) == 1:
        return known[0]
    return torch.tensor([scale or 0.0 for scale in scales], device=device).view(-1, 1, 1)


@dataclass
class Together:
    """A model under the hooks of `running`, with the factors of the stack that runs: all arms or a part of them."""

    model: PreTrainedModel
    stack: Stack
    shape: tuple[int, int] = (0, 0)
    called: set[str] = field(default_factory=set)
    bare: bool = False

    def token_losses(self, stack: Stack, batch: Mapping[str, Tensor], learnt: Learnt) -> Tensor:
        """Negative log-likelihood (K,) in nats, float32, of all rows of the arms of a stack.

        UsageError where the batch holds more than tokens: it would not reach the model.
        """
        check_keys(batch)
        ids = batch["input_ids"]
        self.stack, self.shape = stack, (ids.shape[0], ids.shape[1])
        mask = None if padded_right(batch["attention_mask"]) else batch["attention_mask"].to(self.model.device)
        inputs = {"input_ids": ids.to(self.model.device, non_blocking=True)}
        losses = token_losses(self.model, {**inputs, "attention_mask": mask, "use_cache": False}, learnt)
        self.check_called()
        return losses

    def add(self, number: int, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        if self.bare:
            return outputs
        site = self.stack.sites[number]
        if inputs[0].shape[:-1] != self.shape:
            raise UsageError(
                f"{site.path} gets its input as {tuple(inputs[0].shape)}, not as {self.shape} rows of tokens, so arms "
                "cannot be told apart there; leave this site out, or train the arms one after the other"
            )
        self.called.add(site.path)
        return site.added(inputs[0], outputs)

    @torch.no_grad()
    def base_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed losses (n,) and learnt tokens (n,) of the rows of a batch under the base, without any factors."""
        check_keys(batch)
        self.bare = True
        try:
            return batch_losses(self.model, batch, self.model.device)
        finally:
            self.bare = False

    def check_called(self) -> None:
        if len(self.called) < len(self.stack.sites):
            missed = next(site.path for site in self.stack.sites if site.path not in self.called)
            raise VerificationError(f"the model never calls {missed}, so its factors would have no effect")


def check_keys(batch: Mapping[str, Tensor]) -> None:
    """UsageError for what a batch holds beside tokens: pictures, positions of packed rows, a model's own inputs."""
    foreign = sorted(set(batch) - PASSED_ON)
    if foreign:
        raise UsageError(
            f"the rows carry {', '.join(foreign)}, which arms in one batch do not pass on to the model: they take text "
            "rows of tokens; train such arms one after the other"
        )


def padded_right(mask: Tensor) -> bool:
    """Padding comes last in every row. A causal model then needs no mask: no learnt position sees what follows it."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


@contextmanager
def running(model: PreTrainedModel, stack: Stack) -> Iterator[Together]:
    """The model with the stack's factors at its sites: in eval mode, frozen; afterwards as it was, bit for bit.

    UsageError: a site that the model lacks, or whose matrix has another shape.
    """
    modules = {site.path: site_module(model, site) for site in stack.sites}
    together = Together(model, stack)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles: list[Any] = [
        modules[site.path].register_forward_hook(partial(together.add, number))
        for number, site in enumerate(stack.sites)
    ]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        yield together
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


def site_module(model: nn.Module, site: StackedSite) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    module = modules.get(site.path)
    shape = (site.b.shape[1], site.a.shape[2])
    if module is None or linear_shape(module) is None:
        linear = [path for path, other in modules.items() if linear_shape(other)]
        raise UsageError(f"the model has no linear layer {site.path}; nearest: {', '.join(nearest(site.path, linear))}")
    if linear_shape(module) != shape:
        raise UsageError(f"{site.path} is {linear_shape(module)} in the model, and the factors are for {shape}")
    return module


Active = Callable[[int], frozenset[str]]
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(frozen=True)
class ArmSettings:
    """Settings of all arms of a batch; the defaults are those of transformers' TrainingArguments, its rate apart.

    lr_scheduler: transformers' name of a schedule that follows from the step. max_grad_norm: of each arm by itself; 0
    never clips. phase_state: the optimizer state of a site that trains again is kept, or with `reset` starts anew.
    epoch_rows: rows after which a batch ends though it be short, as a data loader's last one does; 0: none does.
    """

    steps: int
    batch_size: int
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    phase_state: str = "keep"
    epoch_rows: int = 0
    scheduler_kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.phase_state not in PHASE_STATES:
            raise UsageError(f"phase_state {self.phase_state!r} is not one of {', '.join(PHASE_STATES)}")
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")

    @property
    def rows(self) -> int:
        """Rows that an arm trains on, repeated ones included."""
        stop: int = self.taken(self.steps - 1).stop
        return stop

    def taken(self, step: int) -> slice:
        """Places of a step's rows in an arm's order."""
        size, rows = self.batch_size, self.epoch_rows
        epoch, batch = divmod(step, -(-rows // size)) if rows else (0, step)
        start = epoch * rows + batch * size
        return slice(start, min(start + size, (epoch + 1) * rows) if rows else start + size)


@dataclass(frozen=True)
class Course:
    """Which sites of which arm move at which step; (steps, N, S) with S = 1 where no arm has phases.

    moves: the site trains. counts: how many steps its optimizer state has then seen. fresh: its state starts anew.
    """

    moves: Tensor
    counts: Tensor
    fresh: Tensor
    phased: bool

    @classmethod
    def of(cls, phases: Sequence[Active | None], paths: Sequence[str], steps: int, *, reset: bool) -> Course:
        """`active` of each arm, asked for every step. reset: state starts anew at each return of a site."""
        if all(active is None for active in phases):
            counts = torch.arange(1, steps + 1).view(-1, 1, 1).repeat(1, len(phases), 1)
            return cls(counts > 0, counts, counts < 0, phased=False)
        moves = torch.stack([moving(active, paths, steps) for active in phases], dim=1)
        fresh = torch.zeros_like(moves)
        if reset:
            fresh[1:] = moves[1:] & ~moves[:-1]
        seen = moves.cumsum(0)
        before = torch.where(fresh, seen - 1, 0).cummax(0).values
        return cls(moves, (seen - before).clamp(min=1), fresh, phased=True)

    def only(self, arms: Tensor) -> Course:
        return Course(self.moves[:, arms], self.counts[:, arms], self.fresh[:, arms], self.phased)

    def trains(self, step: int, first: int, arms: int) -> list[bool]:
        """Which sites train at all in so many arms from the first one on."""
        moves = self.moves[step, first : first + arms].any(0)
        return moves.tolist()


def moving(active: Active | None, paths: Sequence[str], steps: int) -> Tensor:
    """(steps, S) of one arm."""
    if active is None:
        return torch.ones(steps, len(paths), dtype=torch.bool)
    sets = [active(step) for step in range(steps)]
    return torch.tensor([[path in chosen for path in paths] for chosen in sets])


def learning_rates(settings: ArmSettings, peak: float) -> Tensor:
    """The learning rate at each step (steps,) float64, from transformers' schedule of that name."""
    name, own = settings.lr_scheduler, dict(settings.scheduler_kwargs) or None
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    try:
        scheduler = get_scheduler(name, optimizer, settings.warmup_steps, settings.steps, own)
    except (ValueError, TypeError) as error:
        raise UsageError(f"lr_scheduler {name!r}: {error}") from error
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise UsageError(f"lr_scheduler {name!r} depends on how a run goes; take one that follows from the step")
    factors = [scheduler.lr_lambdas[0](step) for step in range(settings.steps)]
    return peak * torch.tensor(factors, dtype=torch.float64)


def coefficients(course: Course, rates: Tensor, settings: ArmSettings) -> Tensor:
    """(steps, 3, N, S) float32: factor of the weight decay, √ of the second bias correction, size of the step."""
    counts = course.counts.double()
    first, second = (1 - beta**counts for beta in settings.betas)
    rate = rates[:, :, None].expand_as(counts)
    return torch.stack([1 - rate * settings.weight_decay, second.sqrt(), rate / first], dim=1).float()


class StackedAdamW:
    """The optimizer of a stack.

    Args:
        rates: (steps, N) float64, the learning rate of each arm at each step.

    `alive` (N, 1): arms whose losses and gradients were finite so far; the others don't move any more.
    """

    def __init__(self, stack: Stack, course: Course, rates: Tensor, settings: ArmSettings) -> None:
        self.stack, self.course, self.settings = stack, course, settings
        device = stack.values.device
        self.alive = torch.ones(len(stack.values), 1, dtype=torch.bool, device=device)
        self.mean, self.square = torch.zeros_like(stack.values), torch.zeros_like(stack.values)
        self.table = coefficients(course, rates, settings).to(device)
        self.moves, self.fresh = course.moves.to(device), course.fresh.to(device)
        widths = torch.tensor([site.columns.stop - site.columns.start for site in stack.sites])
        self.site_of_column = torch.repeat_interleave(widths).to(device)
        self.phased = course.phased
        self.restarts = course.fresh.flatten(1).any(1).tolist()

    @torch.no_grad()
    def step(self, step: int, losses: Tensor, gradients: Tensor) -> Tensor:
        """One step of every arm; returns the gradients' norms (N,) before clipping, of the sites that train.

        losses (N,) and gradients (N, P), overwritten, on the device. Arms with a loss or a norm that is not finite
        stay, now and later.
        """
        moves = self.columns(self.moves[step])
        if self.phased:
            gradients.masked_fill_(~moves, 0)
        norms: Tensor = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        self.alive &= torch.isfinite(norms) & torch.isfinite(losses)[:, None]
        if self.settings.max_grad_norm > 0:
            gradients.mul_((self.settings.max_grad_norm / (norms + CLIP_EPSILON)).clamp(max=1.0))
        gradients.masked_fill_(~self.alive, 0)
        self.restart(step)
        self.move(step, moves & self.alive, gradients)
        return norms[:, 0]

    def only(self, arms: Tensor, stack: Stack) -> StackedAdamW:
        """The optimizer of some of the arms, in the state it is in. stack: of the same arms."""
        device = arms.to(self.alive.device)
        found = copy(self)
        found.stack, found.course = stack, self.course.only(arms)
        found.alive, found.mean, found.square = self.alive[device], self.mean[device], self.square[device]
        found.table, found.moves, found.fresh = self.table[:, :, device], self.moves[:, device], self.fresh[:, device]
        return found

    def restart(self, step: int) -> None:
        if self.restarts[step]:
            fresh = self.columns(self.fresh[step])
            self.mean.masked_fill_(fresh, 0)
            self.square.masked_fill_(fresh, 0)

    def move(self, step: int, moves: Tensor, gradients: Tensor) -> None:
        """AdamW's formula. Where nothing moves, everything is multiplied by 1 and 0 is added: it stays bit-equal."""
        beta1, beta2 = self.settings.betas
        decay, root, size = self.columns(self.table[step])
        self.stack.values.mul_(torch.where(moves, decay, 1.0))
        self.mean.lerp_(gradients, moves * (1 - beta1))
        self.square.mul_(torch.where(moves, beta2, 1.0)).addcmul_(gradients, gradients, value=1 - beta2)
        change = self.square.sqrt().div_(root).add_(self.settings.eps)
        self.stack.values.sub_(torch.div(self.mean, change, out=change).mul_(torch.where(moves, size, 0.0)))

    def columns(self, by_site: Tensor) -> Tensor:
        """(…, N, S) → (…, N, P); where no arm has phases one column stands for all."""
        return by_site.index_select(-1, self.site_of_column) if self.phased else by_site
