"""From spectra to ranks: the energy rule with bounds and smoothing, and the budget allocator.

Order of the energy rule: r_raw → bounds → smoothing (floor) → rounding → bounds again; never above ⌊mn/(m+n)⌋,
where a LoRA pair would have more parameters than the matrix. With a budget, threshold and smoothing are off and
rounding is the allocator's step.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum, Undecided
from rankwise.errors import UsageError
from rankwise.options.sections import SpectrumSection


@dataclass(frozen=True)
class Rule:
    """How spectra become ranks. The defaults are the documented ones."""

    threshold: float = 0.9
    min_rank: int = 4
    max_rank: int = 128
    smoothing: float = 0.8
    round: str = "none"
    per: str = "site"

    def __post_init__(self) -> None:
        # UsageError: out of range, no choice
        SpectrumSection(self.threshold, self.min_rank, self.max_rank, self.smoothing, self.round, self.per)
        if self.min_rank > self.max_rank:
            raise UsageError(f"bounds need --min_rank ≤ --max_rank; got {self.min_rank} and {self.max_rank}")

    def most(self, site: Site) -> int:
        return min(self.max_rank, site.largest_rank)

    def least(self, site: Site) -> int:
        return min(self.min_rank, self.most(site))


def round_rank(rank: float, rule: str) -> int:
    """Nearest power of two or multiple of eight, ties up; `none` keeps the rank."""
    if rule == "power-of-two" and rank > 0:
        low = 1 << math.floor(math.log2(rank))
        return low if rank - low < 2 * low - rank else 2 * low
    if rule == "multiple-of-8":
        return 8 * math.floor(rank / 8 + 0.5)
    return int(rank)


def smooth(ranks: Sequence[int], factor: float) -> list[int]:
    """r' = ⌊s·mean + (1 − s)·r⌋ over the layers of one projection."""
    mean = statistics.fmean(ranks)
    return [math.floor(factor * mean + (1 - factor) * rank + 1e-9) for rank in ranks]


def raw_rank(site: Site, spectrum: Spectrum, rule: Rule) -> int:
    """r_raw; one above the computed values where the threshold is not reached (saturated), and the bound
    itself where all that is known of r_raw is on which side of a bound it lies. Raises Undecided."""
    low, high = spectrum.rank_bounds(rule.threshold)
    bounded = spectrum.rank_for(rule.threshold, rule.least(site), rule.most(site))
    return high if low == high else bounded


def by_threshold(spectra: Mapping[Site, Spectrum], rule: Rule) -> tuple[PlannedSite, ...]:
    """The energy rule over all sites. Spectra must decide `rule.threshold` within the bounds (see `measure`)."""
    raw = {site: raw_rank(site, spectrum, rule) for site, spectrum in spectra.items()}
    bounded = {site: min(max(rank, rule.least(site)), rule.most(site)) for site, rank in raw.items()}
    final: dict[Site, int] = {}
    for group in groups(bounded):
        ranks = [bounded[site] for site in group]
        if rule.per == "type":
            ranks = [int(statistics.median(ranks))] * len(group)
        else:
            ranks = smooth(ranks, rule.smoothing)
        final |= dict(zip(group, ranks, strict=True))
    rows = []
    for site in spectra:
        chosen = min(max(round_rank(final[site], rule.round), rule.least(site)), rule.most(site))
        row = explain(site, spectra[site], chosen)
        saturated = spectra[site].saturated(rule.threshold, rule.most(site))
        rows.append(replace(row, r_raw=raw[site], clipped=clip_reason(raw[site], site, rule), saturated=saturated))
    return tuple(rows)


def clip_reason(raw: int, site: Site, rule: Rule) -> str | None:
    """The bound that limits r_raw: `min`, `max`, or the rank above which a LoRA pair is larger than its matrix."""
    if raw < rule.least(site):
        return "min"
    if raw <= rule.most(site):
        return None
    return "max" if rule.max_rank <= site.largest_rank else f"⌊mn/(m+n)⌋ = {site.largest_rank}"


def groups(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites grouped by projection, over all layers."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.type_path, []).append(site)
    return list(found.values())


def explain(site: Site, spectrum: Spectrum, rank: int) -> PlannedSite:
    """A planned site with what its spectrum says about the chosen rank."""
    try:
        kept = spectrum.energy(rank).low
    except Undecided:
        kept = None
    return PlannedSite(
        site=site,
        rank=rank,
        energy_retained=kept,
        decay_rate=spectrum.decay_rate,
        stable_rank=spectrum.stable_rank,
        entropy_rank=spectrum.entropy_rank,
        method="zero delta" if spectrum.is_zero else spectrum.method,
    )


def parse_budget(text: str, sites: Iterable[Site]) -> int:
    """Parameters that a plan may spend: `N`, `uniform:R`, or `0.5%` of the analysed matrices' parameters."""
    sites = list(sites)
    try:
        if text.startswith("uniform:"):
            rank = int(text.removeprefix("uniform:"))
            budget = sum(site.parameters(rank) for site in sites)
        elif text.endswith("%"):
            budget = int(float(text[:-1]) / 100 * sum(site.size for site in sites))
        else:
            budget = int(float(text))
    except (ValueError, OverflowError):
        raise UsageError(f"--budget takes N, uniform:R or P%; got {text!r}") from None
    if budget <= 0:
        raise UsageError(f"--budget {text} allows no parameters; give a budget above 0")
    return budget


def spectral_gains(spectra: Mapping[Site, Spectrum], normalise: str = "none") -> dict[Site, Tensor]:
    """Marginal energy of every further rank: σ², or σ²/‖Δ‖² of its own site."""
    return {
        site: spectrum.values.square() / (spectrum.energy_total or 1.0 if normalise == "site" else 1.0)
        for site, spectrum in spectra.items()
    }


def decreasing(gains: Tensor) -> Tensor:
    """The closest non-increasing sequence in the sense of the concave majorant of the cumulative sum.

    Greedy allocation is optimal for concave gains; shares of a loss need not be concave in the rank, and
    pooling adjacent violators makes each step worth what reaching the end of its block is worth.
    """
    blocks: list[tuple[float, int]] = []
    for gain in gains.tolist():
        total, count = gain, 1
        while blocks and blocks[-1][0] / blocks[-1][1] < total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    return torch.tensor([total / count for total, count in blocks for _ in range(count)], dtype=torch.float64)


def by_budget(gains: Mapping[Site, Tensor], budget: int, rule: Rule) -> dict[Site, int]:
    """Ranks that maximise Σ gains subject to Σ r(m + n) ≤ budget, between the bounds.

    Minima first, then greedily by gain per parameter; for non-increasing gains short of the best by less than the
    one step that no longer fitted is worth. Of equal gains the lower rank grows first. The budget is never
    exceeded; UsageError where the minima alone exceed it.
    """
    step = 8 if rule.round == "multiple-of-8" else 1
    ranks = {site: rule.least(site) for site in gains}
    spent = sum(site.parameters(rank) for site, rank in ranks.items())
    if spent > budget:
        raise UsageError(
            f"--budget {budget:,} is below what --min_rank {rule.min_rank} alone takes ({spent:,} parameters); "
            "lower --min_rank or raise the budget"
        )
    curves = {site: torch.cat([gain[: ranks[site]], decreasing(gain[ranks[site] :])]) for site, gain in gains.items()}
    heap: list[tuple[float, int, int, Site]] = []

    def offer(order: int, site: Site) -> None:
        target = next_rank(ranks[site], step, rule)
        curve = curves[site]
        if target <= min(rule.most(site), len(curve)):
            worth = float(curve[ranks[site] : target].sum()) / site.parameters(target - ranks[site])
            if worth > 0:
                heapq.heappush(heap, (-worth, target, order, site))

    for order, site in enumerate(gains):
        offer(order, site)
    while heap:
        _, target, order, site = heapq.heappop(heap)
        cost = site.parameters(target - ranks[site])
        if spent + cost <= budget:
            ranks[site], spent = target, spent + cost
            offer(order, site)
    return ranks


def next_rank(rank: int, step: int, rule: Rule) -> int:
    if rule.round == "power-of-two":
        return 1 << rank.bit_length() if rank else 1
    return (rank // step + 1) * step


def uniform(sites: Sequence[Site], parameters: int) -> dict[Site, int]:
    """One rank everywhere within these parameters, ⌊mn/(m+n)⌋ where that is less; what sites at that limit leave
    goes to the others alike, and the rest buys one more rank for the first sites that fit."""
    ranks = dict.fromkeys(sites, 0)
    left, growing = parameters, list(sites)
    while growing and (step := left // sum(site.parameters(1) for site in growing)):
        for site in growing:
            more = min(step, site.largest_rank - ranks[site])
            ranks[site] += more
            left -= site.parameters(more)
        growing = [site for site in growing if ranks[site] < site.largest_rank]
    for site in growing:
        if site.parameters(1) <= left:
            ranks[site] += 1
            left -= site.parameters(1)
    return ranks


def shape_classes(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites whose ranks can be exchanged without changing the number of parameters."""
    found: dict[tuple[int, int, int], list[Site]] = {}
    for site in sites:
        found.setdefault((site.experts, min(site.shape), max(site.shape)), []).append(site)
    return list(found.values())


def shuffle(ranks: Mapping[Site, int], generator: torch.Generator) -> dict[Site, int]:
    """Ranks shuffled within each shape class: the null hypothesis of every claim about a plan."""
    result = dict(ranks)
    for members in shape_classes(ranks):
        order = torch.randperm(len(members), generator=generator).tolist()
        result |= {site: ranks[members[i]] for site, i in zip(members, order, strict=True)}
    return result


def invert(ranks: Mapping[Site, int]) -> dict[Site, int]:
    """Ranks inverted within each shape class: largest where the plan has the smallest."""
    result = dict(ranks)
    for members in shape_classes(ranks):
        ordered = sorted(members, key=lambda site: ranks[site])
        result |= {site: ranks[other] for site, other in zip(ordered, reversed(ordered), strict=True)}
    return result


def explain_by(rows: Iterable[PlannedSite], spectra: Mapping[Site, Spectrum]) -> tuple[PlannedSite, ...]:
    """Ranks that other spectra decided (of inputs, of gradients), with what the deltas' own say about them."""
    return tuple(
        replace(
            explain(row.site, spectra[row.site], row.rank),
            r_raw=row.r_raw,
            clipped=row.clipped,
            saturated=row.saturated,
        )
        for row in rows
    )


def plan_of(ranks: Mapping[Site, int], spectra: Mapping[Site, Spectrum], model_name: str = "") -> RankPlan:
    """A plan from chosen ranks, with what each spectrum says about them."""
    return RankPlan(tuple(explain(site, spectra[site], rank) for site, rank in ranks.items()), model_name)


TOLERANCE = 0.005
MOST_COMBINATIONS = 200_000
Ranks = Mapping[Site, int]


@dataclass(frozen=True)
class RankStep:
    """One rank more, or one less, at some sites of equal cost: the change in parameters and in gain."""

    sites: tuple[Site, ...]
    step: int
    cost: int
    worth: float


def spent(ranks: Ranks) -> int:
    return sum(site.parameters(rank) for site, rank in ranks.items())


def is_equal(ranks: Ranks, budget: int, tolerance: float = TOLERANCE) -> bool:
    return abs(spent(ranks) - budget) <= tolerance * budget


def equalise(
    ranks: Ranks, budget: int, gains: Mapping[Site, Tensor], most: Mapping[Site, int], tolerance: float = TOLERANCE
) -> dict[Site, int]:
    """Adjust a few ranks by one, so that their parameters are within `tolerance` of the budget.

    Args:
        gains: site → what each further rank is worth; beyond its end nothing.
        most: site → its largest rank.

    Of all changes that reach the budget the most valuable one, and one that exceeds it only where none else does.
    Raises UsageError where moving three ranks per cost is not enough.
    """
    if is_equal(ranks, budget, tolerance):
        return dict(ranks)
    left = budget - spent(ranks)
    slack = tolerance * budget
    found = [chosen for chosen in combinations(ranks, gains, most) if abs(left - cost_of(chosen)) <= slack]
    within = [chosen for chosen in found if cost_of(chosen) <= left]
    if not found:
        raise UsageError(
            f"no ranks come within {tolerance:.1%} of {budget:,} parameters: one rank of a matrix costs "
            f"{min(site.parameters(1) for site in ranks):,} or more; raise the budget"
        )
    best = max(within or found, key=lambda chosen: sum(change.worth for change in chosen))
    moved = {site: change.step for change in best for site in change.sites}
    return {site: rank + moved.get(site, 0) for site, rank in ranks.items()}


def cost_of(changes: Iterable[RankStep]) -> int:
    return sum(change.cost for change in changes)


def combinations(
    ranks: Ranks, gains: Mapping[Site, Tensor], most: Mapping[Site, int]
) -> Iterable[tuple[RankStep, ...]]:
    """One change, or none, per cost of a rank; fewer ranks each where there are many costs."""
    costs = sorted({site.parameters(1) for site in ranks})
    reach = next(reach for reach in (3, 2, 1, 0) if (2 * reach + 1) ** len(costs) <= MOST_COMBINATIONS or not reach)
    options = []
    for cost in costs:
        members = [site for site in ranks if site.parameters(1) == cost]
        options.append([change for change in changes(members, ranks, gains, most) if len(change.sites) <= reach])
    return itertools.product(*options)


def changes(
    members: list[Site], ranks: Ranks, gains: Mapping[Site, Tensor], most: Mapping[Site, int]
) -> list[RankStep]:
    """Nothing; the best one, two, three ranks to add; the one, two, three that are missed least."""
    cost = members[0].parameters(1)
    up = sorted(((gain_at(gains[s], ranks[s]), s) for s in members if ranks[s] < most[s]), key=lambda x: -x[0])
    down = sorted(((gain_at(gains[s], ranks[s] - 1), s) for s in members if ranks[s] > 0), key=lambda x: x[0])
    found = [RankStep((), 0, 0, 0.0)]
    for step, ranked in ((1, up), (-1, down)):
        for count in range(1, min(3, len(ranked)) + 1):
            sites, worth = tuple(s for _, s in ranked[:count]), sum(gain for gain, _ in ranked[:count])
            found.append(RankStep(sites, step, step * count * cost, step * worth))
    return found


def gain_at(gains: Tensor, rank: int) -> float:
    return float(gains[rank]) if rank < len(gains) else 0.0
