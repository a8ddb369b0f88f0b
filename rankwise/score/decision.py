"""From what was measured to a plan: which spectra decide, by threshold or by budget.

decision = decide(settings, probe.spectra, probe.source.read, running)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.core.allocate import (
    Rule,
    by_budget,
    by_threshold,
    explained_by,
    parse_budget,
    plan_of,
    spectral_gains,
    uniform,
)
from rankwise.core.measure import Delta
from rankwise.core.plan import RankPlan
from rankwise.core.settled import unsettled
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.score.directions import gradient_spectra, input_spectra, loss_gains, output_change_spectra
from rankwise.score.signals import Batch


@dataclass(frozen=True)
class DecisionSettings:
    """signal: delta, activation, gradient, uniform or random; metric: weight, activation or loss."""

    rule: Rule
    budget: str | None = None
    normalise: str = "none"
    signal: str = "delta"
    metric: str = "weight"
    seed: int = 42

    @property
    def runs_the_model(self) -> bool:
        return self.metric != "weight" or self.signal in ("activation", "gradient")


@dataclass(frozen=True)
class Running:
    """A model in evaluation mode with rendered batches to run it on."""

    model: nn.Module
    batches: Sequence[Batch]


@dataclass(frozen=True)
class Decision:
    """The plan; the budget in parameters, where there was one; the loss drop that loss shares add up to."""

    plan: RankPlan
    budget: int | None = None
    explained_loss: float | None = None


def decide(
    settings: DecisionSettings, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> Decision:
    """Ranks of all sites. Whatever decides, the plan's rows are explained by the deltas' own spectra."""
    if settings.budget is None:
        deciding = deciding_spectra(settings, spectra, read, running)
        return Decision(RankPlan(explained_by(by_threshold(deciding, settings.rule), spectra)))
    budget = parse_budget(settings.budget, spectra)
    if settings.signal == "uniform":
        return Decision(plan_of(uniform(list(spectra), budget), spectra), budget)
    gains, explained = deciding_gains(settings, spectra, read, running)
    return Decision(plan_of(by_budget(gains, budget, settings.rule), spectra), budget, explained)


def unsettled_sites(settings: DecisionSettings, spectra: Mapping[Site, Spectrum]) -> list[Site]:
    """Sites whose sketches leave open how a budget is best divided by the deltas' own energy."""
    if settings.budget is None or settings.signal != "delta" or settings.metric != "weight":
        return []
    return unsettled(spectra, parse_budget(settings.budget, spectra), settings.rule, settings.normalise)


def deciding_spectra(
    settings: DecisionSettings, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> Mapping[Site, Spectrum]:
    if not settings.runs_the_model:
        return spectra
    assert running is not None, "the stage loads a model where one is needed"
    sites = list(spectra)
    if settings.signal == "activation":
        return input_spectra(running.model, sites, running.batches)
    if settings.signal == "gradient":
        return gradient_spectra(running.model, sites, running.batches)
    return output_change_spectra(running.model, sites, read, running.batches)


def deciding_gains(
    settings: DecisionSettings, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> tuple[dict[Site, Tensor], float | None]:
    """Gains per further rank of every site, and for loss shares what they add up to."""
    if settings.signal == "random":
        return random_gains(list(spectra), settings.rule, settings.seed), None
    if settings.metric == "loss":
        assert running is not None, "the stage loads a model where one is needed"
        deltas = {site: read(site).matrix for site in spectra}
        return loss_gains(running.model, deltas, running.batches, settings.rule.max_rank)
    # EVA compares explained-variance ratios, so its gains are shares of each site's own variance.
    normalise = "site" if settings.signal == "activation" else settings.normalise
    return spectral_gains(deciding_spectra(settings, spectra, read, running), normalise), None


def random_gains(sites: Sequence[Site], rule: Rule, seed: int) -> dict[Site, Tensor]:
    """A null: every site gets a random weight, so that ranks under the budget are random but as uneven as others'."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(sites), generator=generator, dtype=torch.float64) + 0.05
    steps = torch.arange(1, rule.max_rank + 1, dtype=torch.float64)
    return {
        site: weight * sum(site.shape) / steps[: site.full_rank] for site, weight in zip(sites, weights, strict=True)
    }
