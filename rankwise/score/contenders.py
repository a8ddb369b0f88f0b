"""What competes in a study of rank plans: every rule's ranks at one budget, and the nulls of a rule's ranks.

gains = gains_of("loss", probed)                     # once per probe
ranks = ranks_within(gains, budget, max_rank)        # site → rank, parameters within 0.5 % of the budget
null  = shuffled(ranks, generator)                   # fresh for every seed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.core.allocate import Rule, by_budget, decreasing, equalised, spectral_gains, uniform
from rankwise.core.factors import Factors
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.score.directions import input_spectra, loss_gains
from rankwise.score.signals import Batch

RULES = ("energy", "site", "type", "loss", "eva")
Gains = Mapping[Site, Tensor]


@dataclass(frozen=True)
class Probed:
    """What the rules look at: a model in evaluation mode, how its weights moved, and rows of the training part."""

    model: nn.Module
    spectra: Mapping[Site, Spectrum]
    deltas: Mapping[Site, Tensor]
    batches: Sequence[Batch]


def gains_of(rule: str, probed: Probed, max_rank: int) -> Gains:
    """What each further rank is worth by a rule.

    energy: σ² of the delta. site: its share of the site's own energy. type: the mean σ² over the layers of a
    projection, so that its sites get equal ranks. loss: share of the loss drop along the path from base to tuned.
    eva: share of the inputs' variance (Paischer et al. 2024).
    """
    if rule == "loss":
        return loss_gains(probed.model, probed.deltas, probed.batches, max_rank)[0]
    if rule == "eva":
        return spectral_gains(input_spectra(probed.model, list(probed.deltas), probed.batches), "site")
    gains = spectral_gains(probed.spectra, "site" if rule == "site" else "none")
    return type_means(gains) if rule == "type" else gains


def type_means(gains: Gains) -> dict[Site, Tensor]:
    """The mean over the sites of one projection and shape, for each of them."""
    kinds: dict[tuple[str, tuple[int, int]], list[Site]] = {}
    for site in gains:
        kinds.setdefault((site.type_path, site.shape), []).append(site)
    result: dict[Site, Tensor] = {}
    for sites in kinds.values():
        length = max(len(gains[site]) for site in sites)
        padded = [torch.nn.functional.pad(gains[site].double(), (0, length - len(gains[site]))) for site in sites]
        result |= dict.fromkeys(sites, torch.stack(padded).mean(0))
    return {site: result[site] for site in gains}


def ranks_within(gains: Gains, budget: int, max_rank: int) -> dict[Site, int]:
    """The rule's ranks: from 0, greedily by gain per parameter, then brought to the budget within 0.5 %.

    From 0, since at a starved budget a smallest rank of 1 would leave a plan nothing to decide.
    """
    rule = Rule(min_rank=0, max_rank=max_rank)
    worth = {site: decreasing(gain) for site, gain in gains.items()}
    return equalised(by_budget(gains, budget, rule), budget, worth, {site: rule.most(site) for site in gains})


def uniform_ranks(sites: Sequence[Site], budget: int) -> dict[Site, int]:
    """One rank everywhere, as nearly as the budget and the sizes of the matrices allow."""
    nothing = torch.zeros(0, dtype=torch.float64)
    most = {site: site.largest_rank for site in sites}
    return equalised(uniform(sites, budget), budget, dict.fromkeys(sites, nothing), most)


def compressed(
    pairs: Mapping[Site, tuple[Tensor, Tensor]], scales: Mapping[str, float], budget: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A trained adapter cut to the budget by the energy of its own product; path → A, B for the same scales."""
    factors = {site: Factors(scales[site.path] * b, a) for site, (a, b) in pairs.items()}
    gains = {site: each.svd()[1].square().cpu() for site, each in factors.items()}
    ranks = ranks_within(gains, budget, max(a.shape[0] for a, _ in pairs.values()))
    return {site.path: factors[site].compress(rank).lora(scales[site.path]) for site, rank in ranks.items() if rank}
