"""What `expert_norms.csv` of a run folder says: experts without a gradient, and change that the forward does not see.

    step, site, layer, experts, routed, without_effect, norms, deltas        a row per parameter of experts and step

`norms` and `deltas` have a number for each expert, spaces between; 0 in `norms`: no token of the step went there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from rankwise.core.site import layer_of
from rankwise.errors import DataError
from rankwise.page.text import percent, plural
from rankwise.train.gradient_table import StepTable

EXPERT_NORMS = "expert_norms.csv"
EXPERT_COLUMNS = ("step", "site", "layer", "experts", "routed", "without_effect", "norms", "deltas")
LARGE = 0.5  # share of entries without effect above which it is warned
NAMED = 12  # experts, or layers, named in a line


def expert_table(folder: Path) -> StepTable:
    return StepTable(folder / EXPERT_NORMS, EXPERT_COLUMNS)


@dataclass(frozen=True)
class Routing:
    """One layer's experts over the measured steps. seen: share of the steps at which each had a gradient."""

    module: str
    seen: tuple[float, ...]

    @property
    def layer(self) -> int | None:
        return layer_of(self.module)

    @property
    def never(self) -> list[int]:
        return [number for number, share in enumerate(self.seen) if not share]


@dataclass(frozen=True)
class ExpertRecord:
    """What a run's table says. without_effect: the last measured share, by site, of bases in 16 bits. norms: of each
    parameter's gradient, all experts together, the mean over the steps at which it trained. changes: ‖s·B·A‖² of each
    expert of a parameter, as last measured.
    """

    steps: int = 0
    routings: tuple[Routing, ...] = ()
    without_effect: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "experts": sum(len(routing.seen) for routing in self.routings),
            "without_gradient": {routing.module: routing.never for routing in self.routings if routing.never},
            "without_effect": dict(self.without_effect),
        }

    def sentences(self) -> list[str]:
        """Experts that had no gradient, counted and named; and how much of the change the forward pass does not see."""
        said = []
        if self.routings:
            never = [f"{one.module} {', '.join(map(str, one.never))}" for one in self.routings if one.never]
            count = sum(len(one.never) for one in self.routings)
            of = plural(sum(len(one.seen) for one in self.routings), "expert")
            shown = "; ".join(never[:NAMED]) + (f" and {len(never) - NAMED} layers more" if len(never) > NAMED else "")
            named = f" ({shown})" if never else ""
            said.append(
                f"Experts without a gradient at any of {self.steps:,} measured steps: {count:,} of {of}{named}."
            )
        if self.without_effect:
            site, most = max(self.without_effect.items(), key=lambda pair: pair[1])
            mean = math.fsum(self.without_effect.values()) / len(self.without_effect)
            said.append(
                f"Of the adapted experts' entries W + s·B·A equals W, rounded to the base's precision, at "
                f"{percent(mean)} (most: {percent(most)}, {site})."
            )
        return said

    def warning(self) -> str | None:
        if not any(share > LARGE for share in self.without_effect.values()):
            return None
        return (
            "warning: most of the experts' change has no effect yet, since PEFT adds it to weights of 16 bits: train "
            "longer or at a higher --learning_rate, or load the base in --dtype float32"
        )


def read_experts(folder: Path) -> ExpertRecord:
    """The record of a run folder; empty where no experts were adapted or measured.

    DataError: a cell that is not what was written.
    """
    table, hits, effect, steps = expert_table(folder), dict[str, list[list[bool]]](), dict[str, float](), 0
    totals, changes = dict[str, list[float]](), dict[str, tuple[float, ...]]()
    for _, rows in groupby(table.read(), key=lambda row: row["step"]):
        steps, routed = steps + 1, dict[str, list[bool]]()
        for row in rows:
            try:
                module, norms = row["site"].rpartition(".")[0], [float(norm) for norm in row["norms"].split()]
                effect |= {row["site"]: float(row["without_effect"])} if row["without_effect"] else {}
                if norms:
                    totals.setdefault(row["site"], []).append(math.hypot(*norms))
                changes[row["site"]] = tuple(float(delta) ** 2 for delta in row["deltas"].split())
                before = routed.get(module, [False] * len(norms))
                routed |= {module: [one or norm > 0 for one, norm in zip(before, norms, strict=True)]} if norms else {}
            except (AttributeError, KeyError, ValueError) as error:
                raise DataError(f"{table.path}: not a table of expert norms, at step {row['step']}: {error}") from error
        for module, found in routed.items():
            hits.setdefault(module, []).append(found)
    shares = {module: [fmean(column) for column in zip(*found, strict=True)] for module, found in hits.items()}
    routings = tuple(Routing(module, tuple(seen)) for module, seen in shares.items())
    return ExpertRecord(steps, routings, effect, {site: fmean(norms) for site, norms in totals.items()}, changes)
