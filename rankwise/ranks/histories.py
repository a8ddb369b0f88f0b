"""One pair of rounded checkpoints, two histories that made it, and whether they ask for the same ranks.

    found = ranks_by_history(settings, probe.measured, probe.source.read)
    found.refuse(allowed, warnings)

Only the tuned weights were rounded (the run started from this very base), or base and tuned are both rounded copies of
float32 weights. The files are the same; the noise of the second has about twice the energy (`core.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rankwise.core.measure import Delta
from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.errors import DataError
from rankwise.ranks.decide import DecisionSettings, decide
from rankwise.ranks.spectra import ALLOWED, FLOAT32_DELTAS, Measured, finding, noise_share, noise_share_both

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
    settings: DecisionSettings, measured: Mapping[Site, Measured], read: Callable[[Site], Delta]
) -> Histories | None:
    """Both plans by the deltas' own spectra; None where rounding is negligible or the deltas decide nothing."""
    if settings.signal != "delta" or all(row.spectrum_both is None for row in measured.values()):
        return None
    asked = replace(settings, metric="weight")
    tuned = decide(asked, {site: row.spectrum for site, row in measured.items()}, read, None).plan
    both = decide(asked, {site: row.if_base_rounded for site, row in measured.items()}, read, None).plan
    return Histories(tuned, both, measured, settings.budget is not None)
