"""Whether one form of a model is worse than another by more than a margin, from the same items answered by both.

(both right, only the one, only the other) ── Newcombe's paired interval of the difference ──▶ a verdict

low > -margin    not inferior         the worst that is plausible is still within the margin
high < -margin   inferior             the best that is plausible is outside it
else             undecided            and about how many items would tell
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rankwise.errors import need
from rankwise.evaluate.bootstrap import LEVEL, wilson

NOT_INFERIOR, INFERIOR, UNDECIDED = "not inferior", "inferior", "undecided"
POWER = 0.8  # for the number of items that would decide


@dataclass(frozen=True)
class Difference:
    """Accuracy of a form minus the largest's. lost, won: items that only the largest, only the form has right.

    low, high: 95 % interval by Newcombe's hybrid score method for paired proportions. p: exact McNemar, two-sided, of
    no difference at all; for information, the verdict is about the margin. needed: items that would decide with 80 %
    power were there truly no difference; of a form that is undecided.
    """

    lost: int
    won: int
    low: float
    high: float
    p: float
    verdict: str
    needed: int | None = None


def compared(form: Mapping[str, bool], largest: Mapping[str, bool], margin: float) -> Difference:
    """A form against the largest: item id → right or not, of the same items."""
    pairs = [(form[name], right) for name, right in largest.items()]
    both, won, lost = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    low, high = paired_interval(both, won, lost, len(pairs))
    verdict = NOT_INFERIOR if low > -margin else INFERIOR if high < -margin else UNDECIDED
    p = need("scipy.stats", extra="eval").binomtest(won, won + lost).pvalue if won + lost else 1.0
    needed = _needed(won + lost, len(pairs), margin) if verdict == UNDECIDED else None
    return Difference(lost, won, low, high, float(p), verdict, needed)


def paired_interval(both: int, first: int, second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares that were measured on the same n items.

    both: items that count in both shares; first, second: in that one only. Newcombe 1998 (Statistics in Medicine 17,
    2635), method 10: Wilson's intervals of the two shares, put together with their correlation, which is continuity
    corrected. Unlike a bootstrap it has a width where no item differs.
    """
    neither = n - both - first - second
    one, two = (both + first) / n, (both + second) / n
    (low1, high1), (low2, high2) = wilson(both + first, n), wilson(both + second, n)
    cross = both * neither - first * second
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = (max(cross - n / 2, 0.0) if cross > 0 else float(cross)) / math.sqrt(margins) if margins else 0.0
    below = _joined(one - low1, high2 - two, phi)
    above = _joined(high1 - one, two - low2, phi)
    return one - two - below, one - two + above


def _joined(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def _needed(differing: int, n: int, margin: float) -> int:
    """Items for an interval that stays above -margin in 80 % of the cases, if as many of them differ as is plausible
    (the upper end of Wilson's interval)."""
    normal = need("scipy.stats", extra="eval").norm
    z = normal.ppf(0.5 + LEVEL / 2) + normal.ppf(POWER)
    return max(n + 1, math.ceil(float(z) ** 2 * wilson(differing, n)[1] / margin**2))
