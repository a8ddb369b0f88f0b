"""What an adapter keeps of what it was made from: the table of `extract` and `compress`, `fidelity.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.core.site import Site
from rankwise.show.format import amount, plural
from rankwise.store.files import write_json

FILE = "fidelity.json"
FORMAT = "rankwise-fidelity/1"


@dataclass(frozen=True)
class SiteFidelity:
    """One site: `energy_total` is ‖Δ‖²_F of what was to be kept, `energy_kept` the share of it that is.

    `rank` 0 means that the site is not in the adapter; `rank_before` is None where the source is no adapter.
    """

    site: Site
    rank: int
    energy_total: float
    energy_kept: float
    rank_before: int | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        before = {} if self.rank_before is None else {"rank_before": self.rank_before}
        return {
            "path": self.site.path,
            **before,
            "rank": self.rank,
            "energy_kept": self.energy_kept,
            "parameters": self.site.parameters(self.rank),
            "energy_total": self.energy_total,
            "shape": list(self.site.shape),
            "note": self.note,
        }


@dataclass(frozen=True)
class Fidelity:
    """The whole table. Sites whose delta is zero have nothing to keep and count for nothing."""

    rows: tuple[SiteFidelity, ...]

    @property
    def kept(self) -> tuple[SiteFidelity, ...]:
        return tuple(row for row in self.rows if row.rank > 0)

    @property
    def energy_kept(self) -> float:
        """Σ of the kept energies ÷ Σ of the energies."""
        total = sum(row.energy_total for row in self.rows)
        return sum(row.energy_kept * row.energy_total for row in self.rows) / total if total else 0.0

    @property
    def parameters(self) -> int:
        return sum(row.site.parameters(row.rank) for row in self.rows)

    @property
    def parameters_before(self) -> int:
        return sum(row.site.parameters(row.rank_before or 0) for row in self.rows)

    def write(self, folder: Path) -> Path:
        content = {
            "format": FORMAT,
            "energy_kept": self.energy_kept,
            "parameters": self.parameters,
            "parameters_before": self.parameters_before or None,
            "sites": [row.as_dict() for row in self.rows],
        }
        return write_json(folder / FILE, content)

    def summary(self) -> str:
        """24 sites · rank 3 to 9 · 590K parameters · energy kept 95.4 % (lowest: 95.0 % at model.layers.0…)"""
        kept = self.kept
        lowest = min((row for row in kept if row.energy_total > 0), key=lambda row: row.energy_kept)
        before = f"{amount(self.parameters_before)} → " if self.parameters_before else ""
        return (
            f"{plural(len(kept), 'site')} · rank {spread(row.rank for row in kept)} · "
            f"{before}{amount(self.parameters)} parameters · energy kept {self.energy_kept:.1%} "
            f"(lowest: {lowest.energy_kept:.1%} at {lowest.site.path})"
        )

    def notes(self) -> list[str]:
        """The remarks on sites, the same ones together."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note:
                found.setdefault(row.note, []).append(row.site.path)
        return [f"{plural(len(paths), 'site')} ({paths[0]} …): {note}" for note, paths in found.items()]


def spread(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]}" if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
