"""How alike two rankings of sites are: do plans repeat across probes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankwise.core.site import Site


def fractional_ranks(values: Sequence[float]) -> Tensor:
    """Ranks from 1, ties at their mean."""
    data = torch.tensor(list(values), dtype=torch.float64)
    below = (data[:, None] > data[None, :]).sum(1)
    equal = (data[:, None] == data[None, :]).sum(1)
    return below + (equal + 1) / 2


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation with ties; None where either side is constant or shorter than 3."""
    if len(first) < 3:
        return None
    a, b = fractional_ranks(first), fractional_ranks(second)
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else None


def repeatability(first: Mapping[Site, float], second: Mapping[Site, float]) -> tuple[float | None, float | None]:
    """Spearman over all common sites, and the mean over projections of Spearman within each.

    Within type is the honest one: that MLP matrices need more rank than attention repeats trivially.
    """
    common = [site for site in first if site in second]
    overall = spearman([first[site] for site in common], [second[site] for site in common])
    types: dict[str, list[Site]] = {}
    for site in common:
        types.setdefault(site.type_path, []).append(site)
    within = [
        rho
        for members in types.values()
        if (rho := spearman([first[site] for site in members], [second[site] for site in members])) is not None
    ]
    return overall, sum(within) / len(within) if within else None
