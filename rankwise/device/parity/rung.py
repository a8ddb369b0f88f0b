"""One rung of the parity ladder: a comparison, what it found, and why it is broken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rankwise.device.parity.reference import Observed

OK, BROKEN, NOT_MEASURED = "ok", "broken", "not measured"
NO_PICTURE, WEAK = "no case has a picture", "weak"
MOST_IDS = 3  # cases that a reason names


@dataclass(frozen=True)
class Rung:
    """measured: numbers; threshold: what they are held to; why: where the rung is broken, what was seen, where it comes
    from and what to do; where it is not measured, why not. note: how much a rung that holds is worth."""

    name: str
    status: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    threshold: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def said(self) -> str:
        return said(self.as_dict())


def said(rung: Mapping[str, Any]) -> str:
    """A stored rung in a table: `ok (weak: k = 199)`, `not measured`."""
    return f"{rung['status']} ({rung['note']})" if rung.get("note") else str(rung["status"])


def unmeasured(rungs: Iterable[Mapping[str, Any]]) -> list[str]:
    """What rungs do not show: those that were not measured though there are pictures, and why."""
    return [
        f"{rung['name']} not measured: {rung['why']}"
        for rung in rungs
        if rung["status"] == NOT_MEASURED and rung["why"] != NO_PICTURE
    ]


def judged(name: str, measured: Mapping[str, Any], threshold: Mapping[str, Any], why: str, note: str = "") -> Rung:
    """Broken where there is a reason, else ok, with the note."""
    return Rung(name, BROKEN, measured, threshold, why) if why else Rung(name, OK, measured, threshold, note=note)


def named(cases: Sequence[Observed]) -> str:
    """3 cases (a, b, c)"""
    ids = [one.case.id for one in cases]
    shown = ", ".join(ids[:MOST_IDS]) + (", …" if len(ids) > MOST_IDS else "")
    return f"{len(ids)} case{'s' if len(ids) != 1 else ''} ({shown})"
