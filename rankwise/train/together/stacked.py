"""The low-rank factors of several arms as one stack, and the frozen model that runs them.

    stack = Stack.of([arm.start for arm in arms], [arm.scales for arm in arms], device)
    with running(model, stack) as together:                        # hooks; afterwards the model is as it was
        losses = together.token_losses(stack, batch, Learnt.of(batch["labels"]))

    input (N·b, T, n) ─┬─ frozen linear layer ───────────────┬─ + ─→ (N·b, T, m)
                       └─ as (N, b·T, n) ─ bmm Aᵀ ─ bmm Bᵀ ──┘

All numbers of an arm lie in one row of one matrix, so that an optimizer step or a norm is a few operations whatever the
number of sites. Sites of unequal rank are padded with zeros: with a zero row of A and its zero column of B both
gradients are exactly zero, so AdamW (`optimizer.py`) leaves them at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import nearest
from rankwise.errors import UsageError, VerificationError
from rankwise.evaluate.likelihood import BESIDE, Learnt, batch_losses, token_losses
from rankwise.models.sites import linear_shape

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
