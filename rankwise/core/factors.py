"""Low-rank factors: a truncated SVD, a trained adapter and a feature decomposition are all left·right.

factors = truncate(delta, rank=16)        # the best rank-16 approximation of a delta
smaller = factors.compress(8)             # exact, without ever forming the dense matrix
lora_a, lora_b = smaller.lora(scale=2.0)  # scale·B·A = left·right
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.core.measure import OVERSAMPLE, SMALL_SIDE, range_basis
from rankwise.core.spectrum import Spectrum, all_values


@dataclass(frozen=True)
class Factors:
    """A matrix of rank at most r as `left` (…, m, r) times `right` (…, r, n), float32; or a batch of them.

    What is written below for (m, n) holds for a single matrix.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        assert self.left.shape[-1] == self.right.shape[-2], "left is (…, m, r), right is (…, r, n)"

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[-2], self.right.shape[-1]

    def product(self) -> Tensor:
        """The dense (…, m, n) matrix."""
        return self.left @ self.right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), σ (k,), Vᵀ (k, n) with k = min(r, m, n), in float64: two thin QRs and an r×r SVD."""
        left_q, left_r = torch.linalg.qr(self.left.double())
        right_q, right_r = torch.linalg.qr(self.right.double().T)
        u, values, vt = torch.linalg.svd(left_r @ right_r.T)
        k = min(u.shape[1], vt.shape[0])
        return left_q @ u[:, :k], values[:k], vt[:k] @ right_q.T

    def spectrum(self) -> Spectrum:
        """The exact spectrum of the product; its energy is the sum of the squares, and nothing is missing."""
        _, values, _ = self.svd()
        return all_values(values.cpu(), self.shape, "factors")

    def inner(self, other: Factors) -> float:
        """⟨left·right, other's⟩_F in float64, through an r × r' matrix: tr((LᵀL')(R'Rᵀ))."""
        left = self.left.double().T @ other.left.double()
        return float((left * (self.right.double() @ other.right.double().T)).sum())

    def compress(self, rank: int) -> Factors:
        """The best approximation of the product with this rank (Eckart–Young), balanced: left and right share σ."""
        u, values, vt = self.svd()
        return balanced(u[:, :rank], values[:rank], vt[:rank])

    def padded(self, rank: int) -> Factors:
        """The same product written with a larger rank: columns and rows of zeros."""
        extra = rank - self.rank
        assert extra >= 0, "padding only grows"
        zeros_left = self.left.new_zeros(self.left.shape[0], extra)
        zeros_right = self.right.new_zeros(extra, self.right.shape[1])
        return Factors(torch.cat([self.left, zeros_left], 1), torch.cat([self.right, zeros_right], 0))

    def lora(self, scale: float) -> tuple[Tensor, Tensor]:
        """(A (r, n), B (m, r)) of a LoRA pair with scale·B·A = left·right."""
        return self.right.contiguous(), (self.left / scale).contiguous()


def squared_norms(left: Tensor, right: Tensor) -> Tensor:
    """‖left·right‖²_F of each product of a batch, (…): of left (…, m, r) and right (…, r, n), in their precision.

    ⟨LᵀL, RRᵀ⟩, matrices of r × r: no product is formed. Exactly 0 where either is; else to rounding of ‖L‖²‖R‖², by
    which it may lie below 0.
    """
    return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1))


def share_kept(inner: float, after: float, before: float) -> float:
    """1 − ‖Δ − P‖² / ‖Δ‖² of an approximation P: from ⟨Δ, P⟩, ‖P‖² and ‖Δ‖². Of a truncated SVD it is ‖P‖² / ‖Δ‖²."""
    return (2 * inner - after) / before


def balanced(u: Tensor, values: Tensor, vt: Tensor) -> Factors:
    """U√σ and √σVᵀ, float32: equal norms, so that both factors learn at the same pace."""
    root = values.clamp(min=0).sqrt()
    return Factors((u * root).float(), (root[:, None] * vt).float())


def leading_svd(matrix: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triplets U (m, k), σ (k,), Vᵀ (k, n); randomized where the matrix is large.

    Four power iterations: triplets that are kept, unlike values that are only counted, are wanted to full
    float32 accuracy wherever the spectrum has any gap.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= SMALL_SIDE * (rank + OVERSAMPLE):
        tall = matrix.shape[0] >= matrix.shape[1]
        u, values, vt = torch.linalg.svd(matrix if tall else matrix.T, full_matrices=False)
        if not tall:
            u, vt = vt.T, u.T
        return u[:, :rank], values[:rank], vt[:rank]
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    basis = range_basis(wide, rank + OVERSAMPLE, power_iterations=4, generator=generator)
    short, values, vt = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    u = basis @ short
    if wide is not matrix:
        u, vt = vt.T, u.T
    return u[:, :rank], values[:rank], vt[:rank]


def truncate(matrix: Tensor, rank: int, generator: torch.Generator | None = None) -> Factors:
    """The best rank-`rank` approximation of a dense (m, n) matrix as balanced factors."""
    return balanced(*leading_svd(matrix, rank, generator))
