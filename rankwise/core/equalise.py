"""Equal parameters: ranks brought within half a percent of a budget, at the least loss of what decided them.

The allocator never exceeds a budget and may leave a part of one rank's cost unspent: next to nothing in a large model,
percents in a small one with a small budget. A comparison of plans needs them equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rankwise.core.site import Site
from rankwise.errors import UsageError

TOLERANCE = 0.005
MOST_COMBINATIONS = 200_000
Ranks = Mapping[Site, int]


@dataclass(frozen=True)
class Change:
    """Some sites of equal cost one rank up, or some one rank down: what it costs and what it is worth."""

    sites: tuple[Site, ...]
    step: int
    cost: int
    worth: float


def spent(ranks: Ranks) -> int:
    return sum(site.parameters(rank) for site, rank in ranks.items())


def is_equal(ranks: Ranks, budget: int, tolerance: float = TOLERANCE) -> bool:
    return abs(spent(ranks) - budget) <= tolerance * budget


def equalised(
    ranks: Ranks, budget: int, gains: Mapping[Site, Tensor], most: Mapping[Site, int], tolerance: float = TOLERANCE
) -> dict[Site, int]:
    """The ranks with a few moved by one, so that their parameters are within `tolerance` of the budget.

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


def cost_of(changes: Iterable[Change]) -> int:
    return sum(change.cost for change in changes)


def combinations(ranks: Ranks, gains: Mapping[Site, Tensor], most: Mapping[Site, int]) -> Iterable[tuple[Change, ...]]:
    """One change, or none, per cost of a rank; fewer ranks each where there are many costs."""
    costs = sorted({site.parameters(1) for site in ranks})
    reach = next(reach for reach in (3, 2, 1, 0) if (2 * reach + 1) ** len(costs) <= MOST_COMBINATIONS or not reach)
    options = []
    for cost in costs:
        members = [site for site in ranks if site.parameters(1) == cost]
        options.append([change for change in changes(members, ranks, gains, most) if len(change.sites) <= reach])
    return itertools.product(*options)


def changes(members: list[Site], ranks: Ranks, gains: Mapping[Site, Tensor], most: Mapping[Site, int]) -> list[Change]:
    """Nothing; the best one, two, three ranks to add; the one, two, three that are missed least."""
    cost = members[0].parameters(1)
    up = sorted(((gain_at(gains[s], ranks[s]), s) for s in members if ranks[s] < most[s]), key=lambda x: -x[0])
    down = sorted(((gain_at(gains[s], ranks[s] - 1), s) for s in members if ranks[s] > 0), key=lambda x: x[0])
    found = [Change((), 0, 0, 0.0)]
    for step, ranked in ((1, up), (-1, down)):
        for count in range(1, min(3, len(ranked)) + 1):
            sites, worth = tuple(s for _, s in ranked[:count]), sum(gain for gain, _ in ranked[:count])
            found.append(Change(sites, step, step * count * cost, step * worth))
    return found


def gain_at(gains: Tensor, rank: int) -> float:
    return float(gains[rank]) if rank < len(gains) else 0.0
