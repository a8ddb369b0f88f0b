"""LoRA pairs of a layer's experts: one matrix per expert, and the two flat matrices in which PEFT keeps them.

PEFT (`lora.ParamWrapper`) trains one pair per parameter, with an own rank-r part for every expert e of E:

    A (E·r, n)   expert after expert:            A_e = A[e·r : (e+1)·r]
    B (m, r·E)   channel after channel, expert fastest:  B_e = B[:, e::E]

    split_experts(A, B, E)      →  (E, r, n), (E, m, r); the change of expert e is scale · B_e @ A_e
    join_experts(A_e, B_e)      →  A, B

Where the parameter is stored (E, in, out) and its module does not say so (`Site.swapped`: Llama 4), PEFT takes in for
out, and its product is the transpose of the site's: split with `swapped` gives the site's own.

The pairs of several parameters of one module are nested, the one that the module registered first innermost:
`experts.base_layer.lora_A` belongs to it, `experts.lora_A` to the last. `nested_keys` names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rankwise.errors import DataError


def split_experts(lora_A: Tensor, lora_B: Tensor, experts: int, swapped: bool = False) -> tuple[Tensor, Tensor]:
    """PEFT's flat pair → A (E, r, n) and B (E, m, r), in the site's orientation.

    Raises DataError where the two do not hold E parts of one rank.
    """
    shapes = f"lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)}"
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise DataError(f"{shapes}: not the pair of a layer's experts: A (E·r, n) and B (m, r·E)")
    if experts < 1 or lora_A.shape[0] % experts:
        raise DataError(f"{shapes}: {lora_A.shape[0]} rank channels do not divide by {experts} experts")
    a = lora_A.reshape(experts, -1, lora_A.shape[1])
    b = lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 0, 1)
    return (b.mT, a.mT) if swapped else (a, b)


def join_experts(lora_A: Tensor, lora_B: Tensor, swapped: bool = False) -> tuple[Tensor, Tensor]:
    """A (E, r, n) and B (E, m, r) → PEFT's flat pair; the inverse of `split_experts`."""
    a, b = (lora_B.mT, lora_A.mT) if swapped else (lora_A, lora_B)
    return a.reshape(-1, a.shape[2]), b.permute(1, 2, 0).reshape(b.shape[1], -1)


@dataclass(frozen=True)
class ExpertPlace:
    """What the pair under a key of an adapter's file adapts: the parameter, the number of its experts; as a site's:
    `swapped`, `order`."""

    parameter: str
    experts: int
    swapped: bool = False
    order: int = 0


class Nested(Protocol):
    """Whatever knows its place among its module's parameters of experts: a site, a pair, an `ExpertPlace`."""

    @property
    def experts(self) -> int: ...

    @property
    def swapped(self) -> bool: ...

    @property
    def order(self) -> int: ...


def nested_keys(adapted: Mapping[str, Nested]) -> dict[str, str]:
    """Parameter → module path under which PEFT saves its pair, of all adapted parameters of experts."""
    modules: dict[str, list[str]] = {}
    for name in sorted(adapted, key=lambda name: adapted[name].order, reverse=True):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return {name: module + ".base_layer" * depth for module, held in modules.items() for depth, name in enumerate(held)}


def expert_places(adapted: Mapping[str, Nested]) -> dict[str, ExpertPlace]:
    """Key under which PEFT saves a pair → what it adapts, of all adapted parameters of experts."""
    keys = nested_keys(adapted)
    return {keys[name]: ExpertPlace(name, one.experts, one.swapped, one.order) for name, one in adapted.items()}


# A matrix of one expert, as models had them before their experts were one parameter.
SINGLE = re.compile(r"(?P<path>(?:.*\.)?experts\.\d+\..*?)(?:\.lora_.*)?")


def single_experts(names: Iterable[str]) -> list[str]:
    """The sites among these (paths, or keys of an adapter's file) that are matrices of single experts."""
    return list(dict.fromkeys(found["path"] for name in names if (found := SINGLE.fullmatch(name))))


def targeted(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The parameters that PEFT's target_parameters match: by full name or by the end of it."""
    targets = tuple(targets)
    ends = tuple(f".{target}" for target in targets)
    return [name for name in names if name in targets or name.endswith(ends)]
