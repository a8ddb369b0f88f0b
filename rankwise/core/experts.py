"""LoRA pairs of a layer's experts: one matrix per expert, and the two flat matrices in which PEFT keeps them.

PEFT (`lora.ParamWrapper`) trains one pair per parameter, with an own rank-r part for every expert e of E:

    A (E·r, n)   expert after expert:            A_e = A[e·r : (e+1)·r]
    B (m, r·E)   channel after channel, expert fastest:  B_e = B[:, e::E]

    split_experts(A, B, E)      →  (E, r, n), (E, m, r); the change of expert e is scale · B_e @ A_e
    join_experts(A_e, B_e)      →  A, B

Where the parameter is stored (E, in, out) and its module does not say so (`Site.swapped`: Llama 4), PEFT takes in for
out, and its product is the transpose of the site's: split with `swapped` gives the site's own.
"""

from __future__ import annotations

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
