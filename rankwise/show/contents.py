"""What a run folder holds, as plain values. `reading.py` finds them, `sections.py` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rankwise.core.plan import RankPlan
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.pipeline.times import StageTime
from rankwise.train.gradient_summary import GradientTables


@dataclass(frozen=True, eq=False)
class Stage:
    """One entry of a manifest: which stage ran where (folder relative to the run), when and for how long."""

    name: str
    folder: str
    entry: Mapping[str, Any]

    @property
    def started(self) -> str:
        return str(self.entry.get("started", ""))

    @property
    def seconds(self) -> float | None:
        found = self.entry.get("seconds")
        return float(found) if isinstance(found, (int, float)) else None


@dataclass(frozen=True)
class Scored:
    """One evaluation_results.json with the label it is shown under and its predictions by id.

    `is_before`: this is what training started from, by its name or because an adapter was put on the same model.
    """

    label: str
    folder: str
    result: EvaluationResult
    written: float
    is_before: bool = False
    predictions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapted:
    """What a sites.json says was adapted: the ranks, their parameters Σ r(m + n), and how many sites were left out."""

    ranks: list[int]
    parameters: int
    left_out: int


@dataclass(frozen=True)
class Fidelity:
    """How well an extracted or compressed adapter keeps its source: totals by name, and a row per site."""

    totals: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Contents:
    """Everything found; the first member of each pair is the file's folder (or path) relative to the run."""

    run: Path
    stages: tuple[Stage, ...] = ()
    plans: tuple[tuple[str, RankPlan], ...] = ()
    scores: tuple[Scored, ...] = ()
    logs: tuple[tuple[str, list[dict[str, str]]], ...] = ()
    gains: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    fidelity: tuple[tuple[str, Fidelity], ...] = ()
    sites: tuple[tuple[str, Adapted], ...] = ()
    studies: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    gradients: tuple[tuple[str, GradientTables], ...] = ()
    validations: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    phases: tuple[tuple[str, list[tuple[int, str]]], ...] = ()
    factors: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    histories: tuple[tuple[str, Sequence[dict[str, Any]]], ...] = ()
    downstream: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    times: tuple[StageTime, ...] = ()
    pictures: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def is_empty(self) -> bool:
        return not any(getattr(self, one.name) for one in fields(self) if one.name not in ("run", "settings"))
