"""One rung of the parity ladder: a comparison, what it found, and why it is broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rankwise.ship.parity.observed import Observed

OK, BROKEN, NOT_MEASURED = "ok", "broken", "not measured"
MOST_IDS = 3  # cases that a reason names


@dataclass(frozen=True)
class Rung:
    """measured: numbers; threshold: what they are held to; why: where the rung is broken, what was seen, where it comes
    from and what to do; where it is not measured, why not."""

    name: str
    status: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    threshold: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judged(name: str, measured: Mapping[str, Any], threshold: Mapping[str, Any], why: str) -> Rung:
    """Broken where there is a reason, else ok."""
    return Rung(name, BROKEN if why else OK, measured, threshold, why)


def named(cases: Sequence[Observed]) -> str:
    """3 cases (a, b, c)"""
    ids = [one.case.id for one in cases]
    shown = ", ".join(ids[:MOST_IDS]) + (", …" if len(ids) > MOST_IDS else "")
    return f"{len(ids)} case{'s' if len(ids) != 1 else ''} ({shown})"
