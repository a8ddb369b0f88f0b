"""What the converter did to one tensor: how a GGUF's tensor follows from a checkpoint's.

    attn_q (heads · head, width) ◀── rope order ── q_proj: in each head, two halves become pairs
    ffn_up (rows, width)         ◀── same ──────── up_proj

A tensor whose rows are all there, in an order that no rule makes, is another tensor: reversed rows of a projector or
colours that changed places are errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SAME, ROPE, ROWS, TRANSPOSED, PLUS_ONE, PART = (
    "same",
    "rope order",
    "rows reordered",
    "transposed",
    "plus one",
    "part of it",
)
ROTATED = frozenset(["attn_q", "attn_k"])
FUSED = frozenset(["attn_qkv", "attn_gate"])  # whole heads change places in these
PATCHES = frozenset(["patch_embd"])
ODD = 0x9E3779B97F4A7C15 - 2**64  # 2⁶⁴ / the golden ratio, as a signed number: spreads neighbouring values


def relation(
    stored: Tensor, source: Tensor, heads: Sequence[int] = (), name: str = ""
) -> tuple[str, int | None] | None:
    """How a GGUF's tensor follows from a checkpoint's, the plainest answer first; None where it does not.

    heads: the counts that the file states. name: the tensor's in the GGUF, which decides what orders it may have.
    """
    if stored.numel() != source.numel():
        return (PART, None) if holds(source, stored, heads if is_one_of(name, ROTATED) else ()) else None
    flat = source.reshape(stored.shape)
    if torch.equal(stored, flat):
        return SAME, None
    for count in heads:
        if divides(count, stored) and torch.equal(stored, rope_order(flat, count)):
            return ROPE, count
    if source.dim() == 2 and stored.shape == source.T.shape and torch.equal(stored, source.T):
        return TRANSPOSED, None
    if stored.dim() == 1 and torch.equal(stored, flat + 1):
        return PLUS_ONE, None
    if is_one_of(name, PATCHES) and colours_last(stored, source):
        return TRANSPOSED, None
    return (ROWS, None) if reordered(stored, flat, heads, name) else None


def is_one_of(name: str, kinds: frozenset[str]) -> bool:
    return not kinds.isdisjoint(name.split("."))


def divides(heads: int, weight: Tensor) -> bool:
    return heads > 0 and weight.shape[0] % (2 * heads) == 0


def rope_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head, (first half, second half) → pairs: llama.cpp rotates neighbours, transformers halves."""
    head = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return head.swapaxes(1, 2).reshape(weight.shape)


def half_order(weight: Tensor, heads: int) -> Tensor:
    """The way back from `rope_order`."""
    head = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return head.swapaxes(1, 2).reshape(weight.shape)


def colours_last(stored: Tensor, source: Tensor) -> bool:
    """(width, 3, side, side) of a linear map over patches whose pixels are (side, side, 3), as SigLIP 2 has it."""
    if stored.dim() != 4 or source.dim() != 2 or len(source) != len(stored):
        return False
    width, colours, high, wide = stored.shape
    return torch.equal(stored, source.reshape(width, high, wide, colours).permute(0, 3, 1, 2))


def reordered(stored: Tensor, source: Tensor, heads: Sequence[int], name: str) -> bool:
    """Whether rows of an attention weight are in an order that a converter makes.

    Such orders exchange two axes of the row number: of queries and keys, inside each head (pairs of other families); of
    fused weights, whole blocks (heads · 3 · head → 3 · heads · head). Any other order is an error of somebody's.
    """
    inside, between = is_one_of(name, ROTATED), is_one_of(name, FUSED)
    if stored.dim() > 2 or not (inside or between):
        return False
    there, here = (row_keys(one.reshape(len(one), -1)) for one in (stored, source))
    if not torch.equal(there.sort().values, here.sort().values):
        return False
    numbers = torch.arange(len(here))
    return any(
        torch.equal(there, here[numbers.reshape(shape).swapaxes(1, 2).reshape(-1)])
        for shape in exchanges(len(here))
        if (inside and any(count and shape[0] % count == 0 for count in heads)) or (between and shape[3] > 1)
    )


def exchanges(rows: int) -> Iterator[tuple[int, int, int, int]]:
    """All (a, b, c, d) with a · b · c · d = rows and b, c > 1: rows as four axes, of which the middle two change."""
    for outer in divisors(rows):
        for first in divisors(rows // outer)[1:]:
            for second in divisors(rows // outer // first)[1:]:
                yield outer, first, second, rows // outer // first // second


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def holds(whole: Tensor, part: Tensor, heads: Sequence[int] = ()) -> bool:
    """Whether `part` was cut out of `whole`: split, fused and sliced weights.

    All rows of its last dimension are rows of the whole and come in the same order, or do so once the rope order of a
    head count in `heads` is undone; a vector is a run of entries.
    """
    if part.numel() >= whole.numel() or (part.dim() != 1 and whole.shape[-1] != part.shape[-1]):
        return False
    if part.dim() == 1:
        return whole.dim() == 1 and bool((whole.unfold(0, len(part), 1) == part).all(1).any())
    forms = [part, *(half_order(part, count) for count in heads if divides(count, part))]
    return any(in_order(row_keys(form), row_keys(whole)) for form in forms)


def in_order(some: Tensor, every: Tensor) -> bool:
    """Whether `some` is left of `every` when entries are taken out."""
    if not torch.isin(some, every).all():
        return False
    rest = iter(every.tolist())
    return all(key in rest for key in some.tolist())


def row_keys(tensor: Tensor) -> Tensor:
    """(rows,) a 64-bit number of each row of the last dimension, from its bits."""
    bits = tensor.contiguous().reshape(-1, tensor.shape[-1]).view(torch.int32).long()
    factors = (torch.arange(1, bits.shape[1] + 1) * ODD) | 1
    return (bits * factors).sum(1)
