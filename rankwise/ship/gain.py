"""What the shipped model keeps of what training gained, on items that all three models answered: right or wrong.

base ──── gain ────▶ tuned ── lost to conversion and rounding ──▶ shipped
kept = (shipped − base) / (tuned − base); undefined where the gain's interval touches 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.errors import need
from rankwise.ship.inferiority import paired_interval


@dataclass(frozen=True)
class Change:
    """From one model to another on the same items. difference and interval: of accuracy, in shares of 1 (Newcombe's
    paired interval). won, lost: items that only the second, only the first has right. p: exact McNemar, two-sided."""

    n: int
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    won: int
    lost: int
    p: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GainKept:
    """kept: share of the gain; None where the gain is not clearly above 0, and why says so."""

    gain: Change
    kept: float | None
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"gain": self.gain.as_dict(), "kept": self.kept, "why": self.why}


def change(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """Right or wrong of the same items, in the same order."""
    pairs = list(zip(before, after, strict=True))
    both, won, lost = pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False))
    n = len(pairs)
    p = need("scipy.stats", extra="eval").binomtest(won, won + lost).pvalue if won + lost else 1.0
    interval = paired_interval(both, won, lost, n)
    return Change(n, (both + lost) / n, (both + won) / n, (won - lost) / n, interval, won, lost, float(p))


def gain_kept(base: Sequence[bool], tuned: Sequence[bool], shipped: Sequence[bool]) -> GainKept:
    gain = change(base, tuned)
    if gain.interval[0] <= 0:
        low, high = (f"{100 * end:+.1f}" for end in gain.interval)
        return GainKept(gain, None, f"training's own gain is not clearly above 0 ({low} to {high} points)")
    return GainKept(gain, (sum(shipped) - sum(base)) / (sum(tuned) - sum(base)))
