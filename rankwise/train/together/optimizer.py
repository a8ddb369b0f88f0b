"""AdamW over a stack: the settings that its arms share, when which site of which arm trains, and the step.

    norms = StackedAdamW(stack, course, rates, settings).step(number, losses, gradients)

torch's AdamW has one rate per tensor, and a tensor per site and arm would bring back the many small operations that
stacking removes; per element this is its formula (Loshchilov & Hutter 2019, bias correction by the site's own count).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from rankwise.errors import UsageError
from rankwise.options.sections import PHASE_STATES
from rankwise.train.together.stacked import Stack

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
