"""The rank plan: site → rank and scale, with the reason for each, and the content of its file (read: `plan_content`).

plan = RankPlan(by_threshold(spectra, Rule()))
plan.rank_pattern, plan.alpha_pattern, plan.parameters, plan.dumps()
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.core.site import Site, pattern
from rankwise.errors import UsageError

FORMAT = "rankwise-rank-plan/2"
FORMER = "rankwise-rank-plan/1"  # the same, but for what alpha_over_rank means with use_rslora


@dataclass(frozen=True)
class PlannedSite:
    """One site's rank and why it is that.

    `r_raw`: what the energy rule asked for before bounds, smoothing and rounding (None for plans that no
    spectrum decided); `energy_retained`: share of the delta's energy that the final rank keeps (what is certain of it,
    where the spectrum is a sketch); `rank_if_base_rounded`: the rank if the base is a rounded copy of other weights,
    where that matters.
    """

    site: Site
    rank: int
    r_raw: int | None = None
    energy_retained: float | None = None
    decay_rate: float | None = None
    stable_rank: float | None = None
    entropy_rank: float | None = None
    saturated: bool = False
    clipped: str | None = None
    method: str = "given"
    rank_if_base_rounded: int | None = None

    @property
    def parameters(self) -> int:
        return self.site.parameters(self.rank)

    @property
    def compression_ratio(self) -> float:
        """LoRA parameters of this site ÷ entries of its matrix."""
        return self.parameters / self.site.size

    def as_dict(self) -> dict[str, Any]:
        return {
            "layer": self.site.layer,
            "path": self.site.path,
            "shape": list(self.site.shape),
            "tower": self.site.tower,
            "kind": self.site.kind,
            "transposed": self.site.transposed,
            "r_raw": self.r_raw,
            "r_final": self.rank,
            "energy_retained": self.energy_retained,
            "decay_rate": self.decay_rate if self.decay_rate != math.inf else None,
            "stable_rank": self.stable_rank,
            "entropy_rank": self.entropy_rank,
            "saturated": self.saturated,
            "clipped": self.clipped,
            "method": self.method,
            "rank_if_base_rounded": self.rank_if_base_rounded,
            "compression_ratio": self.compression_ratio,
        }


@dataclass(frozen=True)
class RankPlan:
    """Ranks of all sites. alpha = `alpha_over_rank`·rank at every site, so that the scale alpha/r is one everywhere.

    With rsLoRA there is one alpha, `alpha_over_rank`·(largest rank), and the scale is alpha/√r: an alpha that followed
    each rank would let the scale grow with √r.
    """

    sites: tuple[PlannedSite, ...]
    model_name: str = ""
    use_rslora: bool = False
    alpha_over_rank: float = 2.0
    description: str = ""
    timestamp: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def doubt(self) -> str:
        """Why these ranks are not to be trusted; empty where nothing speaks against them."""
        return str(self.metadata.get("doubt", ""))

    @property
    def adapted(self) -> dict[str, Site]:
        """Path → site of what gets a LoRA pair."""
        return {row.site.path: row.site for row in self.sites if row.rank}

    @property
    def ranks(self) -> dict[str, int]:
        """Path → rank, of the sites that train (rank 0 leaves a site out)."""
        return {row.site.path: row.rank for row in self.sites if row.rank > 0}

    def require_ranks(self, where: str = "the rank plan") -> None:
        """UsageError for a plan of no parameters."""
        if not self.ranks:
            raise UsageError(f"{where} gives every site rank 0: nothing would train")

    @property
    def parameters(self) -> int:
        """Trainable parameters, Σ r(m + n)."""
        return sum(row.parameters for row in self.sites)

    @property
    def kept_fraction(self) -> float:
        """Plan parameters ÷ parameters of the analysed matrices: `compression_ratio` in the file."""
        return self.parameters / max(1, sum(row.site.size for row in self.sites))

    @property
    def rank_pattern(self) -> dict[str, int]:
        return {pattern(path): rank for path, rank in self.ranks.items()}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """alpha of every site; empty with rsLoRA, whose alpha is one number."""
        if self.use_rslora:
            return {}
        return {pattern(path): self.alpha(rank) for path, rank in self.ranks.items()}

    def alpha(self, rank: int) -> float:
        """Numerator of a site's scale."""
        return self.alpha_over_rank * (self.largest if self.use_rslora else rank)

    def scale(self, rank: int) -> float:
        """Factor of B·A at a site of this rank: alpha/r, with rsLoRA alpha/√r (Kalajdzievski 2023)."""
        return self.alpha(rank) / (math.sqrt(rank) if self.use_rslora else rank)

    def within(self, paths: Collection[str]) -> RankPlan:
        """The plan of these sites alone, every scale as it was: rsLoRA's one alpha does not follow the largest rank
        that is left."""
        part = replace(self, sites=tuple(row for row in self.sites if row.site.path in paths))
        if not self.use_rslora:
            return part
        return replace(part, alpha_over_rank=self.alpha_over_rank * self.largest / part.largest)

    @property
    def largest(self) -> int:
        """The largest rank; 1 where no site trains."""
        return max(self.ranks.values(), default=1)

    @property
    def layer_ranks(self) -> dict[str, int]:
        """Median rank per projection, lower middle for an even count: for reading, and for `--per type`."""
        groups: dict[str, list[int]] = {}
        for row in self.sites:
            groups.setdefault(row.site.projection, []).append(row.rank)
        return {name: int(statistics.median_low(ranks)) for name, ranks in groups.items()}

    def as_dict(self) -> dict[str, Any]:
        """The file's content."""
        metadata: dict[str, list[dict[str, Any]]] = {}
        for row in self.sites:
            metadata.setdefault(row.site.projection, []).append(row.as_dict())
        return {
            "format": FORMAT,
            "description": self.description,
            "timestamp": self.timestamp,
            "model_name": self.model_name,
            "layer_ranks": self.layer_ranks,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "use_rslora": self.use_rslora,
            "alpha_over_rank": self.alpha_over_rank,
            "layer_metadata": metadata,
            "total_parameters": self.parameters,
            "compression_ratio": self.kept_fraction,
            "analysis_metadata": dict(self.metadata),
        }

    def dumps(self) -> str:
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
