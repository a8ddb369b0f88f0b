"""The numbers of the one-screen summary, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rankwise.core.allocate import Rule
from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.show.rank_files import Evidence
from rankwise.show.summary import RanksSummary
from rankwise.store.spectra import Measured, dtypes, noise_share


def summarise(
    plan: RankPlan,
    measured: Mapping[Site, Measured],
    rule: Rule,
    budget: int | None,
    evidence: Evidence,
    seconds: float,
    peak_memory: int,
) -> RanksSummary:
    """Everything that can be said without knowing the command line: next commands and files are the caller's."""
    gain, compared = evidence.gain, list((evidence.repeats or {}).get("compared", []))
    defined = gain is not None and gain.defined
    bounds = [site_bounds(site, row, rule) for site, row in measured.items()]
    return RanksSummary(
        model=plan.model_name,
        plan=plan,
        stored_as=dtypes(measured),
        seconds=seconds,
        peak_memory=peak_memory,
        noise_share=noise_share(measured) or None,
        rounding=evidence.rounding.sentence() if evidence.rounding else "",
        exact_sites=sum("undecided" in row.spectrum.method for row in measured.values()),
        threshold=rule.threshold,
        max_rank=rule.max_rank,
        saturated_sites=sum(row.spectrum.saturated(rule.threshold, rule.max_rank) for row in measured.values()),
        clipped_sites=sum(row.clipped is not None for row in plan.sites) if budget is None else 0,
        energy_rank_share=statistics.median(bounds) if bounds else None,
        budget=budget,
        above_null=sum(row.above_null for row in measured.values()),
        rho_all=least(row["rho_all"] for row in compared),
        rho_within=least(row["rho_within"] for row in compared),
        probes=1 + len(compared),
        gain_plan=gain.arm("plan").kept if defined and gain else None,
        gain_uniform=gain.arm("uniform").kept if defined and gain else None,
        gain_shuffles=tuple(arm.kept for arm in gain.shuffles) if defined and gain else (),
        gain_margin=gain.margin if defined and gain else None,
        gain_note=undefined_note(evidence),
    )


def site_bounds(site: Site, row: Measured, rule: Rule) -> float:
    """Energy rank ÷ full rank; for a saturated site what was computed, which is a lower bound."""
    return min(row.spectrum.rank_bounds(rule.threshold)[0], site.full_rank) / site.full_rank


def undefined_note(evidence: Evidence) -> str:
    gain = evidence.gain
    if gain is None or gain.defined:
        return ""
    return (
        f"undefined: the probe's own gain on this data is {gain.base_loss - gain.tuned_loss:+.3f} nats per token "
        f"[{gain.gain_low:+.3f}, {gain.gain_high:+.3f}], which touches 0"
    )


def least(values: object) -> float | None:
    """The smallest of the numbers that are there: repeatability is as good as its worst comparison."""
    found = [value for value in values if value is not None]  # type: ignore[attr-defined]
    return min(found) if found else None
