"""How close an approximation X̂ of feature matrices X comes: the measures, with the same names everywhere.

All are per matrix: (…, T, D) → (…). `relative_error` is ‖X − X̂‖_F / ‖X‖_F; of a zero matrix it is 0 where X̂ is zero
too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-30
ROUNDING = 1e-5


def mse(features: Tensor, approximation: Tensor) -> Tensor:
    """Mean squared error of the entries."""
    return (features - approximation).square().mean((-2, -1))


def relative_error(features: Tensor, approximation: Tensor) -> Tensor:
    missed, whole = frobenius(features - approximation), frobenius(features)
    return missed / whole.clamp(min=TINY)


def explained_energy(relative: Tensor) -> Tensor:
    """1 − relative_error². Below zero where the approximation is worse than none."""
    return 1 - relative.square()


def excess_error(relative: Tensor, best: Tensor) -> Tensor:
    """relative_error / (that of the truncated SVD at equal rank) − 1: 0 is the optimum, 0.05 is 5 % above it.

    Errors below 1e-5 count as that: a matrix whose own rank is no higher has an optimum of 0, and what float32 leaves
    of it (1e-7 to 1e-5 by any method) is rounding, not excess.
    """
    return relative.clamp(min=ROUNDING) / best.clamp(min=ROUNDING) - 1


def cosine(features: Tensor, approximation: Tensor) -> Tensor:
    """Mean over the tokens of the cosine between a token and its approximation."""
    return F.cosine_similarity(features, approximation, dim=-1).mean(-1)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles in radians (…, r), ascending, between the row spaces of two right factors (…, r, D).

    From the singular values of the product of two orthonormal bases (Björck and Golub 1973). Rows that are linearly
    dependent span less than r directions; the missing ones count as whatever QR completes them with.
    """
    one, other = (torch.linalg.qr(right.double().mT).Q for right in (first, second))
    cosines: Tensor = torch.linalg.svdvals(one.mT @ other)
    return cosines.clamp(-1, 1).acos()


def frobenius(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return norm


def stored_numbers(tokens: int, channels: int, rank: int) -> tuple[int, int]:
    """(numbers of the factors, r(T + D); of the matrix, T·D)."""
    return rank * (tokens + channels), tokens * channels


def break_even_rank(tokens: int, channels: int) -> int:
    """The largest rank at which factors take no more numbers than the matrix: ⌊TD/(T+D)⌋, 227 for 256 × 2048."""
    return tokens * channels // (tokens + channels)
