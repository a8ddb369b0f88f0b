"""Where an arm starts: its factors, their scales, the order of its rows.

    start, scales = random_start(ranks, seed, largest=16), scales_of(ranks, "constant", ranks)
    order = row_order(len(rows), steps * batch_size, seed)

`train --arms` starts as PEFT draws (`command.py`); here a site's A depends on the seed and its path alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise.core.factors import truncate
from rankwise.core.site import Site
from rankwise.ranks.spectra import site_generator

SCALE = 2.0
Pairs = dict[str, tuple[Tensor, Tensor]]  # path → A (r, n), B (m, r); of experts (E, r, n), (E, m, r)
Ranks = Mapping[Site, int]


def random_start(ranks: Ranks, seed: int, largest: int) -> Pairs:
    """LoRA's start: A uniform within ±1/√n as PEFT draws it, B zero.

    A site's A depends on the seed and its path alone: arms of unequal rank share their leading rows.
    """
    pairs = {}
    for site, rank in ranks.items():
        if rank:
            rows, (m, n) = max(largest, rank), site.shape
            each = (site.experts,) if site.experts else ()
            drawn = torch.rand(*each, rows, n, generator=site_generator(site, seed))
            start = ((2 * drawn - 1) / math.sqrt(n))[..., :rank, :].clone()
            pairs[site.path] = (start, torch.zeros(*each, m, rank))
    return pairs


def warm_start(ranks: Ranks, deltas: Mapping[Site, Tensor], scales: Mapping[str, float], seed: int) -> Pairs:
    """The probe's delta cut to the ranks: base + adapter is base + truncated delta."""
    return {
        site.path: truncate(deltas[site], rank, site_generator(site, seed)).lora(scales[site.path])
        for site, rank in ranks.items()
        if rank
    }


def directed_start(ranks: Ranks, directions: Mapping[str, Tensor]) -> Pairs:
    """A from given directions (r, n) of each site's inputs, B zero."""
    return {
        site.path: (directions[site.path][:rank].float().clone(), torch.zeros(site.shape[0], rank))
        for site, rank in ranks.items()
        if rank
    }


def scales_of(ranks: Ranks, rule: str, reference: Ranks) -> dict[str, float]:
    """Path → factor of B·A.

    constant: 2 everywhere (alpha = 2r). alpha: one alpha over r. rslora: one alpha over √r. The one alpha is that which
    gives 2 at the median rank of `reference`, the uniform arm of the same budget (`train` takes 2·largest rank for
    rsLoRA): arms are to differ in how the scale follows the rank, not in its size, which a tuned rate takes up.
    """
    typical = statistics.median([rank for rank in reference.values() if rank] or [1])
    power = {"constant": 0.0, "alpha": 1.0, "rslora": 0.5}[rule]
    return {site.path: SCALE * (typical / rank) ** power for site, rank in ranks.items() if rank}


def row_order(rows: int, count: int, seed: int) -> list[int]:
    """Positions of `count` rows: permutation after permutation. A longer order starts with the shorter one."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:count]
