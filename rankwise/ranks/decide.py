"""From spectra to ranks: by threshold or by budget, by whatever signal, under either history of rounding.

decision = decide(config, probe.spectra, partial(dense, probe.source), running)
found = ranks_by_history(config, probe.measured, partial(dense, probe.source))      # two plans, where rounding matters

Sketches: `unsettled` names the sites to measure exactly, so that a plan keeps what exact spectra would make it keep. A
sketch is low by a fifth and more in a flat tail and exact where values stand out: a budget divided by its values would
starve flat tails. So the best that any plan can keep under upper bounds is compared with what the budget keeps.

Histories: only the tuned weights were rounded (the run started from this very base), or base and tuned are both rounded
copies of float32 weights. The files are the same; the noise of the second has about twice the energy (`core.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.allocate import (
    Rule,
    by_budget,
    by_threshold,
    decreasing,
    explain_by,
    next_rank,
    parse_budget,
    plan_of,
    spectral_gains,
    uniform,
)
from rankwise.core.measure import Delta
from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SpectrumSection
from rankwise.ranks.choice import MetricChoice
from rankwise.ranks.gain import Batch, Gain, gradient_spectra, input_spectra, loss_gains, output_change_spectra
from rankwise.ranks.intruders import IntruderTable
from rankwise.ranks.measured import ALLOWED, FLOAT32_DELTAS, Measured, finding, noise_share, noise_share_both

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
    """Upper bound on the gain of any plan within the budget and the rule's bounds: the fractional relaxation."""
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
    """Sites that need exact spectra for the plan to keep the same energy within TOLERANCE.

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


def rule_of(own: SpectrumSection) -> Rule:
    """UsageError for bounds that exclude each other."""
    return Rule(own.svd_threshold, own.min_rank, own.max_rank, own.smoothing_factor, own.round, own.per)


def runs_the_model(config: RanksConfig) -> bool:
    """Whether ranks are computed from more than the weights."""
    return config.metric != "weight" or config.signal in ("activation", "gradient")


@dataclass(frozen=True)
class Running:
    """A model in evaluation mode with rendered batches to run it on."""

    model: nn.Module
    batches: Sequence[Batch]


@dataclass(frozen=True)
class Decision:
    """The plan; the budget in parameters, where there was one; the loss drop that loss shares add up to; with
    `--metric auto` what chose."""

    plan: RankPlan
    budget: int | None = None
    explained_loss: float | None = None
    choice: MetricChoice | None = None


def decide(
    config: RanksConfig, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> Decision:
    """Ranks of all sites. Whatever decides, the plan's rows are explained by the deltas' own spectra."""
    own, rule = config.spectrum, rule_of(config.spectrum)
    if own.budget is None:
        deciding = deciding_spectra(config, spectra, read, running)
        return Decision(RankPlan(explain_by(by_threshold(deciding, rule), spectra)))
    budget = parse_budget(own.budget, spectra)
    if config.signal == "uniform":
        return Decision(plan_of(uniform(list(spectra), budget), spectra), budget)
    gains, explained = deciding_gains(config, spectra, read, running)
    return Decision(plan_of(by_budget(gains, budget, rule), spectra), budget, explained)


def unsettled_sites(config: RanksConfig, spectra: Mapping[Site, Spectrum]) -> list[Site]:
    """Sites whose sketches leave open how a budget is best divided by the deltas' own energy."""
    own = config.spectrum
    if own.budget is None or config.signal != "delta" or config.metric not in ("weight", "auto"):
        return []
    return unsettled(spectra, parse_budget(own.budget, spectra), rule_of(own), own.normalise)


def deciding_spectra(
    config: RanksConfig, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> Mapping[Site, Spectrum]:
    if not runs_the_model(config):
        return spectra
    assert running is not None, "the stage loads a model where one is needed"
    sites = list(spectra)
    if config.signal == "activation":
        return input_spectra(running.model, sites, running.batches)
    if config.signal == "gradient":
        return gradient_spectra(running.model, sites, running.batches)
    return output_change_spectra(running.model, sites, read, running.batches)


def deciding_gains(
    config: RanksConfig, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> tuple[dict[Site, Tensor], float | None]:
    """Gains per further rank of every site, and for loss shares what they add up to."""
    if config.signal == "random":
        return random_gains(list(spectra), rule_of(config.spectrum), config.seed), None
    if config.metric == "loss":
        assert running is not None, "the stage loads a model where one is needed"
        deltas = {site: read(site).matrix for site in spectra}
        return loss_gains(running.model, deltas, running.batches, config.spectrum.max_rank)
    # EVA compares explained-variance ratios, so its gains are shares of each site's own variance.
    normalise = "site" if config.signal == "activation" else config.spectrum.normalise
    return spectral_gains(deciding_spectra(config, spectra, read, running), normalise), None


def random_gains(sites: Sequence[Site], rule: Rule, seed: int) -> dict[Site, Tensor]:
    """Null baseline: a random weight per site, so that ranks under the budget are random but as uneven as others'."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(sites), generator=generator, dtype=torch.float64) + 0.05
    steps = torch.arange(1, rule.max_rank + 1, dtype=torch.float64)
    return {
        site: weight * site.parameters(1) / steps[: site.full_rank] for site, weight in zip(sites, weights, strict=True)
    }


def fractional_ranks(values: Sequence[float]) -> Tensor:
    """Fractional ranking from 1: ties get their mean."""
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


FACTOR = 2
SMALL = 4  # ranks up to the default --min_rank count as equal
IDLE = 0.03  # of a site's energy: what a budget spends on less than that, it spends for want of anything better


@dataclass(frozen=True)
class Histories:
    """Ranks by history: `tuned` if only the tuned weights were rounded, `both` if the base was as well."""

    tuned: RankPlan
    both: RankPlan
    measured: Mapping[Site, Measured]
    budget: bool = False

    @property
    def pairs(self) -> dict[Site, tuple[int, int]]:
        second = {row.site: row.rank for row in self.both.sites}
        return {row.site: (row.rank, second[row.site]) for row in self.tuned.sites}

    @property
    def differing(self) -> dict[Site, tuple[int, int]]:
        """Sites whose ranks differ by more than a factor of two; under a budget, those where that matters."""
        found = {site: pair for site, pair in self.pairs.items() if max(pair) > FACTOR * max(min(pair), SMALL)}
        return {site: pair for site, pair in found.items() if not self.budget or self.disputed(site, *pair) > IDLE}

    def disputed(self, site: Site, first: int, second: int) -> float:
        """Share of the site's energy that lies between the two ranks, in the history where that is more."""
        row, (low, high) = self.measured[site], sorted((first, second))
        curves = [found.cumulative() for found in (row.spectrum, row.if_base_rounded)]
        return max(float(curve[high - 1] - (curve[low - 1] if low else 0.0)) for curve in curves)

    def sentence(self) -> str:
        """Both noise shares and both plans, in one line."""
        shares = noise_share(self.measured), noise_share_both(self.measured)
        spans = [f"ranks {min(ranks)} to {max(ranks)}" for ranks in zip(*self.pairs.values(), strict=True)]
        return (
            f"{shares[0]:.1%} of the energy if only the tuned weights were rounded: {spans[0]}, "
            f"{self.tuned.parameters:,} parameters; {shares[1]:.1%} if the base was, too: {spans[1]}, "
            f"{self.both.parameters:,}"
        )

    def facts(self) -> dict[str, object]:
        """For the plan file."""
        return {
            "noise_share": noise_share(self.measured),
            "noise_share_if_base_rounded": noise_share_both(self.measured),
            "parameters_if_base_rounded": self.both.parameters,
            "sites_that_differ": len(self.differing),
        }

    def marked(self, plan: RankPlan) -> RankPlan:
        """The plan with the other history's rank beside each site's own."""
        return replace(
            plan, sites=tuple(replace(row, rank_if_base_rounded=self.pairs[row.site][1]) for row in plan.sites)
        )

    def refuse(self, allowed: bool, warnings: list[str]) -> None:
        """DataError, or a warning, where the two plans differ by more than a factor of two at any site."""
        if not self.differing:
            return
        site, (tuned, both) = next(iter(self.differing.items()))
        doubt = (
            f"{finding(self.measured)}. At {len(self.differing)} of {len(self.pairs)} sites the ranks differ by more "
            f"than a factor of {FACTOR} between the two histories, which files cannot tell apart ({site.path}: {tuned} "
            f"if only the tuned weights were rounded, {both} if the base was as well; {self.tuned.parameters:,} and "
            f"{self.both.parameters:,} parameters in all)"
        )
        if not allowed:
            raise DataError(
                f"{doubt}: {FLOAT32_DELTAS}, leave these sites out (--exclude), or pass --allow_noise to get the first"
            )
        warnings.append(f"{doubt}: THESE RANKS ARE IN DOUBT {ALLOWED}")


def ranks_by_history(
    config: RanksConfig, measured: Mapping[Site, Measured], read: Callable[[Site], Delta]
) -> Histories | None:
    """Both plans by the deltas' own spectra; None where rounding is negligible or the deltas decide nothing."""
    if config.signal != "delta" or all(row.spectrum_both is None for row in measured.values()):
        return None
    asked = replace(config, metric="weight")
    tuned = decide(asked, {site: row.spectrum for site, row in measured.items()}, read, None).plan
    both = decide(asked, {site: row.if_base_rounded for site, row in measured.items()}, read, None).plan
    return Histories(tuned, both, measured, config.spectrum.budget is not None)


@dataclass(frozen=True)
class Evidence:
    """Measurements of the plan besides its spectra; None where there was nothing to measure."""

    gain: Gain | None = None
    repeats: Mapping[str, Any] | None = None
    explained_loss: float | None = None
    choice: MetricChoice | None = None
    rounding: Histories | None = None
    intruders: IntruderTable | None = None
