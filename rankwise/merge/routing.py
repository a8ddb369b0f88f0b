"""The experts that a comparison's tokens reach: what a router leaves out shows in no logit.

adapted = adapted_experts(plan.change)
with reached_experts(model, adapted) as reached:
    logits(model, batches)
RoutedExperts.of(adapted, reached)         # 46 of 48 adapted experts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.merge.plan import Skeleton

Experts = dict[str, set[int]]  # path of the module that holds them → numbers


@dataclass(frozen=True)
class RoutedExperts:
    """Number of the adapted experts, and of those that at least one of the compared tokens is routed to."""

    adapted: int
    reached: int

    @classmethod
    def of(cls, adapted: Experts, reached: Experts) -> RoutedExperts:
        found = sum(len(numbers & reached.get(path, set())) for path, numbers in adapted.items())
        return cls(sum(map(len, adapted.values())), found)

    @property
    def whole(self) -> bool:
        return self.adapted == self.reached

    def sentence(self) -> str:
        return (
            f"the logits' tokens reach {self.reached} of {self.adapted} adapted experts, and the entries of each "
            "expert are compared alone"
        )


def adapted_experts(change: Skeleton) -> Experts:
    """The experts whose matrices an adapter changes."""
    found: Experts = {}
    for name, pair in change.experts.items():
        moved = pair.lora_A.flatten(1).any(1) & pair.lora_B.flatten(1).any(1)
        found.setdefault(name.rpartition(".")[0], set()).update(moved.nonzero().flatten().tolist())
    return found


@contextmanager
def reached_experts(model: nn.Module, adapted: Mapping[str, set[int]]) -> Iterator[Experts]:
    """Collect the experts that tokens are routed to, in the modules that hold adapted ones."""
    reached: Experts = {path: set() for path in adapted}

    def collect(path: str, module: nn.Module, inputs: list[Any]) -> None:
        experts = next(len(value) for value in module.parameters() if value.dim() == 3)
        reached[path] |= routed(inputs, experts)

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: collect(path, module, [*args, *kwargs.values()]), with_kwargs=True
        )
        for path in adapted
    ]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


def routed(inputs: list[Any], experts: int) -> set[int]:
    """By what a module of experts is given: their indices per token, or the number of tokens of each; all of them,
    where it is given nothing but the tokens (Llama 4 sends a row to every expert, zero where it is not chosen)."""
    for value in inputs:
        if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() == 2:
            return {number for number in value.unique().tolist() if 0 <= number < experts}
        counts = value.tolist() if isinstance(value, Tensor) and value.dim() == 1 else value
        if isinstance(counts, list) and len(counts) == experts:
            return {number for number, count in enumerate(counts) if count}
    return set(range(experts)) if len(inputs) == 1 else set()
