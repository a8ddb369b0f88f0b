"""The honest baselines of a feature matrix's factorization: per sample the SVD, three ways; and one basis for all.

    features (B, T, D) ── normalised ──▶ X ── by_gram(X, r) ──▶ Factors (B, T, r) · (B, r, D), the optimum

By Eckart and Young no product of rank r is closer to X than its truncated SVD. `by_gram` finds that from the
eigenvectors of the smaller Gram matrix, many times faster than `by_svd`. The Gram matrix squares the spectrum, so
that float32 keeps nothing of directions below √ε = 3e-4 of the largest: with the optimum's relative error e, the
excess is at most about 1.2e-7 / e² (1e-5 at e = 0.1, 1e-3 at 0.01; at 3e-4 it doubles the error). Features are far
above that; a steep spectrum wants `by_svd`, or float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.core.factors import Factors


def normalised(features: Tensor) -> Tensor:
    """(…, D) with mean 0 and variance 1 over the channels of each token, float32: layer normalisation without
    parameters. What every method is given, and where every error is measured."""
    return F.layer_norm(features.float(), features.shape[-1:])


def restored(approximation: Tensor, features: Tensor) -> Tensor:
    """An approximation of `normalised(features)` back on the scale of the features (…, T, D): two numbers per token."""
    whole = features.float()
    mean, variance = whole.mean(-1, keepdim=True), whole.var(-1, keepdim=True, unbiased=False)
    return (approximation * (variance + 1e-5).sqrt() + mean).to(features.dtype)


def by_svd(features: Tensor, rank: int) -> Factors:
    """The truncated SVD of each matrix (…, T, D), by LAPACK: what scripts use."""
    u, values, vt = torch.linalg.svd(features, full_matrices=False)
    return Factors(u[..., :rank] * values[..., None, :rank], vt[..., :rank, :])


def by_gram(features: Tensor, rank: int) -> Factors:
    """The same from the eigenvectors of X·Xᵀ, or of Xᵀ·X where there are fewer channels than tokens."""
    if features.shape[-2] > features.shape[-1]:
        turned = by_gram(features.mT, rank)
        return Factors(turned.right.mT, turned.left.mT)
    leading = torch.linalg.eigh(features @ features.mT).eigenvectors[..., -rank:].flip(-1)
    return Factors(leading, leading.mT @ features)


def by_randomized(
    features: Tensor,
    rank: int,
    oversample: int = 10,
    power_iterations: int = 1,
    generator: torch.Generator | None = None,
) -> Factors:
    """Randomized SVD of each matrix (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1)."""
    width = min(rank + oversample, *features.shape[-2:])
    probe = torch.randn(features.shape[-1], width, generator=generator, dtype=features.dtype, device=features.device)
    basis: Tensor = torch.linalg.qr(features @ probe).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(features @ (features.mT @ basis)).Q
    inner = by_gram(basis.mT @ features, rank)
    return Factors(basis @ inner.left, inner.right)


def shared_basis(batches: Iterable[Tensor], rank: int) -> Tensor:
    """The leading `rank` principal directions (rank, D) of the tokens of all matrices (B, T, D), not centred, so that
    the product stays of that rank. Second moments are summed in float64."""
    moment: Tensor | None = None
    for batch in batches:
        tokens = batch.flatten(0, -2)
        part = (tokens.mT @ tokens).double()
        moment = part if moment is None else moment + part
    assert moment is not None, "no features"
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors[:, -rank:].flip(-1).mT.float().contiguous()


def by_basis(features: Tensor, basis: Tensor) -> Factors:
    """One B (r, D) of orthonormal rows for all matrices, A = X·Bᵀ: what a shared PCA gives. B is stored once."""
    return Factors(features @ basis.mT, basis.expand(*features.shape[:-2], *basis.shape))


def singular_values(features: Tensor) -> Tensor:
    """All min(T, D) singular values of each matrix (…, T, D), descending, float64."""
    wide = (features if features.shape[-2] <= features.shape[-1] else features.mT).double()
    energies: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return energies.flip(-1).clamp(min=0).sqrt()


def best_errors(values: Tensor) -> Tensor:
    """Relative error (…, k) of the optimum at rank 1 … k, from all k singular values of each matrix (…, k)."""
    energy = values.square()
    left = energy.flip(-1).cumsum(-1).flip(-1)
    rest = F.pad(left[..., 1:], (0, 1))
    return (rest / left[..., :1].clamp(min=torch.finfo(values.dtype).tiny)).sqrt()
