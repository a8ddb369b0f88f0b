"""Several votes per image: the majority, how far they agree, and what that leaves a student to reach.

votes (images × k) ── kappa, agreement of pairs ──▶ error of one vote ──▶ error of the majority: the student's floor

The step from agreement to errors needs a model of errors; it is written down at `symmetric_error`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.errors import need

MODEL = (
    "each vote is right with one probability and otherwise any other class, independently of the other votes; errors "
    "that the teacher makes every time are not seen by votes and come on top"
)


def majority(votes: Sequence[str]) -> str | None:
    """The label with more votes than any other; None where the first place is shared, or there is no vote."""
    ranked = Counter(votes).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


@dataclass(frozen=True)
class Agreement:
    """How far k votes per image agree.

    pair_agreement: share of pairs of votes on one image that are equal. kappa: Fleiss', None where it is not defined
    (all votes are one class). vote_error, majority_error: share of wrong labels that `symmetric_error` implies, for one
    vote and for the majority of k (ties left out). accuracy_ceiling: 1 − majority_error, the accuracy that a student
    who is always right would reach against these labels.
    """

    images: int
    votes: int
    pair_agreement: float
    kappa: float | None
    vote_error: float
    majority_error: float
    accuracy_ceiling: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error_model": MODEL}


def agreement(votes: Sequence[Sequence[str]], labels: Sequence[str]) -> Agreement | None:
    """Agreement of images that all have the same number k ≥ 2 of votes; None where there are none."""
    if not votes or len(votes[0]) < 2:
        return None
    k = len(votes[0])
    table = [[row.count(label) for label in labels] for row in (list(row) for row in votes)]
    pairs = sum(count * (count - 1) for row in table for count in row) / (len(table) * k * (k - 1))
    error = symmetric_error(pairs, len(labels))
    wrong = majority_error(error, k, len(labels))
    return Agreement(len(table), k, pairs, fleiss(table), error, wrong, 1 - wrong)


def fleiss(table: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' kappa of counts (images, classes), as statsmodels computes it."""
    if sum(any(row[column] for row in table) for column in range(len(table[0]))) < 2:
        return None  # chance agreement is 1: 0 / 0
    return float(need("statsmodels.stats.inter_rater", extra="label").fleiss_kappa(table, method="fleiss"))


def symmetric_error(pair_agreement: float, classes: int) -> float:
    """The error ε of one vote that makes two votes agree this often.

    Right with 1 − ε, each other class with ε / (C − 1): two votes agree with (1 − ε)² + ε² / (C − 1). Of the two roots
    the one below (C − 1) / C, where the true class is the likeliest; agreement below chance gives that value itself.
    """
    if classes < 2:
        return 0.0
    chance = 1 / classes
    above = max(0.0, pair_agreement - chance) / (1 - chance)
    return (1 - chance) * (1 - math.sqrt(above))


def majority_error(error: float, votes: int, classes: int) -> float:
    """How often the majority of k votes is wrong, where it has one: summed over all outcomes of the votes."""
    others = classes - 1
    right = wrong = 0.0
    for counts in compositions(votes, classes):
        leader = max(counts)
        if counts.count(leader) > 1:
            continue
        missed = votes - counts[0]
        ways = math.factorial(votes) / math.prod(math.factorial(count) for count in counts)
        spread = (error / others) ** missed if others else float(not missed)
        probability = ways * (1 - error) ** counts[0] * spread
        right, wrong = (right + probability, wrong) if counts[0] == leader else (right, wrong + probability)
    return wrong / (right + wrong) if right + wrong else 0.0


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered sum of so many parts, zeros included."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)
