"""Orthonormal bases of many small subspaces at once, by Cholesky QR: once, twice with a shift, or Householder's.

basis = orthonormal(columns)     # (B, m, r) → (B, m, r) with the same span

LAPACK goes through a batch one matrix at a time. Here nearly all work is in products of whole batches, and LAPACK gets
blocks so small that they cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3  # of QᵀQ − I: what it costs an approximation is of its square
SHIFT = 1e-6  # of the trace of the Gram matrix: some ten times what float32 rounds
BLOCK = 32


def orthonormal(columns: Tensor, exact: bool = False, tolerance: float = TOLERANCE) -> Tensor:
    """Orthonormal basis Q (B, m, r) of the span of each (B, m, r), r ≤ m.

    Cholesky QR loses orthogonality like ε·κ², with κ the condition of the columns scaled to length 1 (Higham 2002,
    section 19.9). A matrix for which that is above the tolerance gets it with a shift, which conditions it, and then
    again without (Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa 2020). One whose columns are dependent even so
    goes to Householder's QR. exact: all do (it has a gradient everywhere, too).
    """
    if exact:
        return householder(columns)
    basis, right = cholesky_basis(columns, tolerance)
    if bool(right.all()):
        return basis
    hard = columns[~right]
    conditioned, _ = cholesky_basis(hard, tolerance, SHIFT)
    again, sound = cholesky_basis(conditioned, tolerance)
    if not bool(sound.all()):
        again[~sound] = householder(hard[~sound])
    basis[~right] = again
    return basis


def cholesky_basis(columns: Tensor, tolerance: float, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """(columns·L⁻ᵀ with L·Lᵀ their shifted Gram matrix, whether its columns are orthonormal within the tolerance)."""
    gram = columns.mT @ columns
    squares = gram.diagonal(dim1=-2, dim2=-1)
    if shift:
        squares += shift * squares.sum(-1, keepdim=True)
    inverse = inverse_cholesky(gram)
    condition = (inverse.square() * squares[..., None, :]).sum((-2, -1))  # ‖L⁻¹·D‖_F², at least κ² / r
    right = condition * torch.finfo(gram.dtype).eps < tolerance  # false for what is no number
    right &= (inverse.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    return columns @ inverse.mT, right


def householder(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def inverse_cholesky(gram: Tensor) -> Tensor:
    """L⁻¹ (B, r, r) of gram = L·Lᵀ, by halves down to blocks of BLOCK.

    With [[G₁₁, ·], [G₂₁, G₂₂]]: L₂₁ = G₂₁·L₁₁⁻ᵀ, and L₂₂ belongs to G₂₂ − L₂₁·L₂₁ᵀ. Where a matrix is not positive, a
    number on the diagonal is not positive or not finite.
    """
    size = gram.shape[-1]
    if size <= BLOCK:
        lower, _ = torch.linalg.cholesky_ex(gram)
        unit = torch.eye(size, dtype=gram.dtype, device=gram.device).expand_as(lower)
        inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return inverse
    half = size // 2
    first = inverse_cholesky(gram[..., :half, :half])
    below = gram[..., half:, :half] @ first.mT
    second = inverse_cholesky(gram[..., half:, half:] - below @ below.mT)
    whole = torch.zeros_like(gram)
    whole[..., :half, :half], whole[..., half:, half:] = first, second
    whole[..., half:, :half] = -second @ (below @ first)
    return whole
