"""Whether bounds of singular values are close enough for a budget: what a plan made from sketches can lose at most.

sites = unsettled(spectra, budget, rule)      # measure these exactly, ask again

A sketch is low by a fifth and more in a flat tail and exact where values stand out, so that a budget divided by its
values starves the sites with flat tails. Here the best that any plan can keep under the upper bounds is compared with
what the same budget keeps under the values.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rankwise.core.allocate import Rule, by_budget, decreasing, next_rank, spectral_gains
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum

TOLERANCE = 1e-3  # of the energy kept: the law of --budget


def upper_gains(spectra: Mapping[Site, Spectrum], normalise: str = "none") -> dict[Site, Tensor]:
    """Certified bounds of `spectral_gains`: summed up to any rank, they are not below the true ones."""
    found = {}
    for site, spectrum in spectra.items():
        sums = spectrum.values.square().cumsum(0) + spectrum.missed()
        if normalise == "site":
            sums = sums / (spectrum.energy_total or 1.0) * (1 + spectrum.rounding)
        found[site] = sums.diff(prepend=sums.new_zeros(1))
    return found


def most_gain(gains: Mapping[Site, Tensor], budget: int, rule: Rule) -> float:
    """What no plan within the budget and the rule's bounds exceeds: the best one if ranks were divisible."""
    total, left = 0.0, float(budget)
    steps: list[tuple[float, int]] = []
    for site, gain in gains.items():
        rank = rule.least(site)
        total, left = total + float(gain[:rank].sum()), left - site.parameters(rank)
        curve = decreasing(gain[rank:]).clamp(min=0)
        start = rank
        while (target := next_rank(rank, 8 if rule.round == "multiple-of-8" else 1, rule)) <= rule.most(site):
            cost = site.parameters(target - rank)
            steps.append((float(curve[rank - start : target - start].sum()) / cost, cost))
            rank = target
    for density, cost in sorted(steps, reverse=True):
        if left <= 0:
            break
        total, left = total + density * min(cost, left), left - cost
    return total


def unsettled(spectra: Mapping[Site, Spectrum], budget: int, rule: Rule, normalise: str = "none") -> list[Site]:
    """Sites to measure exactly, so that the plan keeps what exact spectra would make it keep, within TOLERANCE.

    None are left where the bounds prove that (up to one step of the allocator); else those whose bounds are widest
    where the budget would go under the upper bounds.
    """
    low, high = spectral_gains(spectra, normalise), upper_gains(spectra, normalise)
    kept = most_gain(low, budget, rule)
    if most_gain(high, budget, rule) - kept <= TOLERANCE * kept:
        return []
    ranks = by_budget(high, budget, rule)
    gaps = {site: float((high[site] - low[site])[: max(1, ranks[site])].sum()) for site in spectra}
    chosen: list[Site] = []
    left = sum(gaps.values())
    for site in sorted(gaps, key=lambda site: -gaps[site]):
        if gaps[site] <= 0 or (chosen and left <= TOLERANCE / 2 * kept):
            break
        chosen.append(site)
        left -= gaps[site]
    return chosen
