"""When an app should say "unsure": the least confidence at which what the model says is right often enough.

    (confidence, right)* ── the surest first, one more at a time, tested ──▶ Abstention(threshold, coverage)

Looking for the best of many thresholds on the items that also judge it promises too much. Here they are tried in an
order that is fixed beforehand, from the surest answer down, and the first that fails its test ends the search: then
the level of one test holds for the threshold that was found (fixed-sequence testing; Angelopoulos et al. 2021,
"Learn then Test").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.errors import need

ABSTAIN_LEVEL = 0.95


@dataclass(frozen=True)
class Abstention:
    """threshold: answer where the confidence is at least this, else say "unsure"; None where no threshold is known to
    give the precision. n: validation items; answered: those at or above the threshold; right: of these. low: one-sided
    95 % lower bound (Clopper-Pearson) of the precision above the threshold. why: a sentence where there is none."""

    min_precision: float
    n: int
    threshold: float | None = None
    answered: int = 0
    right: int = 0
    low: float | None = None
    why: str = ""

    @property
    def coverage(self) -> float:
        return self.answered / self.n if self.n else 0.0

    def as_dict(self) -> dict[str, Any]:
        precision = self.right / self.answered if self.answered else None
        known = {"coverage": self.coverage, "precision": precision, "level": ABSTAIN_LEVEL}
        return {
            **asdict(self),
            **known,
            "coverage_95": list(interval(self.answered, self.n)) if self.threshold is not None else None,
            "confidence": "product of the probabilities of all generated tokens, the end token's included, before any "
            "grammar or sampling",
        }


def abstention(rows: Sequence[Mapping[str, Any]], min_precision: float) -> Abstention:
    """rows: validation.json's predictions. What has no confidence counts as never answered."""
    judged = [row for row in rows if row.get("correct") is not None]
    known = [(float(row["confidence"]), bool(row["correct"])) for row in judged if row.get("confidence") is not None]
    n = len(judged)
    if not known:
        return Abstention(min_precision, n, why="no validated answer is right or wrong, or none has a confidence")
    least = fewest(min_precision, wrong=0)
    if len(known) < least:
        return Abstention(
            min_precision,
            n,
            why=f"{len(known)} validated items are too few: {min_precision:.0%} takes {least}, all of them right",
        )
    return searched(sorted(known, key=lambda one: -one[0]), n, min_precision)


def searched(known: Sequence[tuple[float, bool]], n: int, min_precision: float) -> Abstention:
    """known: (confidence, right), the surest first; n: all items. Those of one confidence stay together.

    The first test stands where one wrong answer is not yet the end, if there are so many items.
    """
    all_known, best = len(known), None
    ends = [at for at in range(1, all_known + 1) if at == all_known or known[at][0] < known[at - 1][0]]
    start = fewest(min_precision, wrong=1)
    start = start if all_known >= start else fewest(min_precision, wrong=0)
    for count in [at for at in ends if at >= start]:
        right = sum(correct for _, correct in known[:count])
        low = lower_bound(right, count)
        if low < min_precision:
            break
        best = Abstention(min_precision, n, known[count - 1][0], count, right, low)
    if best:
        return best
    right = sum(correct for _, correct in known[:start])
    return Abstention(
        min_precision,
        n,
        why=f"of the {start} surest answers {right} are right: that does not show a precision of {min_precision:.0%}",
    )


def fewest(min_precision: float, wrong: int) -> int:
    """Items of which at most `wrong` are wrong that show a precision, at the level."""
    count = math.ceil(math.log(1 - ABSTAIN_LEVEL) / math.log(min_precision))
    while lower_bound(count - wrong, count) < min_precision:
        count += 1
    return count


def lower_bound(right: int, n: int) -> float:
    """One-sided 95 % lower bound of a share, exact (Clopper-Pearson)."""
    test = need("scipy.stats", extra="eval").binomtest(right, n, alternative="greater")
    return float(test.proportion_ci(ABSTAIN_LEVEL, method="exact").low)


def interval(count: int, n: int) -> tuple[float, float]:
    """Two-sided 95 % interval of a share, exact."""
    found = need("scipy.stats", extra="eval").binomtest(count, n).proportion_ci(ABSTAIN_LEVEL, method="exact")
    return float(found.low), float(found.high)
