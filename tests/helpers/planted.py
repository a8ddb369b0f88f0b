"""Matrices whose spectra are known: planted directions and white noise."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(m: int, n: int, rank: int, noise: float, seed: int, decay: float = 0.5) -> Tensor:
    """Float32: `rank` directions of energies decay^i and white noise that has `noise` times their energy."""
    draw = generator(seed)
    left = torch.linalg.qr(torch.randn(m, rank, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, rank, generator=draw, dtype=torch.float64)).Q
    values = torch.tensor([decay ** (i / 2) for i in range(rank)], dtype=torch.float64)
    white = torch.randn(m, n, generator=draw, dtype=torch.float64)
    return ((left * values) @ right.T + white * (noise * values.square().sum() / (m * n)).sqrt()).float()


def truth(matrix: Tensor) -> Tensor:
    """Singular values by LAPACK's SVD in float64, not by our own Gram matrix."""
    return torch.linalg.svdvals(matrix.double())
