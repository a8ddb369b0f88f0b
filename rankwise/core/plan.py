"""The rank plan: site → rank and scale, with the reason for each, and the content of its file.

plan = RankPlan(by_threshold(spectra, Rule()))
plan.rank_pattern, plan.alpha_pattern, plan.parameters, plan.dumps()
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.core.site import EXPERT_FIELDS, Site, from_row, nearest, pattern
from rankwise.errors import DataError, UsageError

FORMAT = "rankwise-rank-plan/2"
FORMER = "rankwise-rank-plan/1"  # the same, but for what alpha_over_rank means with use_rslora


@dataclass(frozen=True)
class PlannedSite:
    """Rank of one site, with the reason for it.

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
        row = self.site.as_dict()
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
            **{name: row[name] for name in EXPERT_FIELDS if name in row},
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
        """Reasons to distrust these ranks; empty where there are none."""
        return str(self.metadata.get("doubt", ""))

    @property
    def adapted(self) -> dict[str, Site]:
        """Path → site, of the sites that get a LoRA pair."""
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


KNOWN_KEYS = frozenset(RankPlan(()).as_dict())


def recorded_sites(content: Mapping[str, Any]) -> dict[str, Site]:
    """The sites as the plan's own `layer_metadata` describes them, for readers that have no model at hand."""
    return {
        row["path"]: replace(from_row(row), kind=row.get("kind", "other"))
        for rows in content.get("layer_metadata", {}).values()
        for row in rows
        if "path" in row and "shape" in row
    }


def load_plan(content: Mapping[str, Any], sites: Mapping[str, Site] | None, where: str) -> RankPlan:
    """A plan from a file's content, matched with the sites of the model it is for.

    Args:
        content: the parsed JSON.
        sites: path → site of the model; a `layer_ranks`-only file expands over its language tower. None: the
            sites that the plan itself records.
        where: the file's name, for messages.

    Raises:
        DataError: unknown fields, ranks that are not whole numbers ≥ 0, sites that the model lacks (with the
            nearest names), shapes that differ, scales that are not `alpha_over_rank`.
    """
    check_fields(content, where)
    if sites is None:
        sites = recorded_sites(content)
        if not sites:
            raise DataError(f"{where}: layer_metadata has no site shapes; read the plan together with its model")
    if content.get("rank_pattern"):
        rows = rows_from_patterns(content, sites, where)
    elif content.get("layer_ranks"):
        rows = rows_from_types(content["layer_ranks"], sites, where)
    else:
        raise DataError(f"{where}: neither rank_pattern nor layer_ranks: not a rank plan")
    check_scales(content, where)
    return RankPlan(
        sites=tuple(rows),
        model_name=str(content.get("model_name", "")),
        use_rslora=bool(content.get("use_rslora", False)),
        alpha_over_rank=float(content.get("alpha_over_rank", 2.0)),
        description=str(content.get("description", "")),
        timestamp=str(content.get("timestamp", "")),
        metadata=content.get("analysis_metadata", {}),
    )


def check_fields(content: Mapping[str, Any], where: str) -> None:
    """Check that all fields are known and have values of the right type."""
    unknown = set(content) - KNOWN_KEYS
    if unknown:
        raise DataError(f"{where}: unknown fields {sorted(unknown)}; a rank plan has {sorted(KNOWN_KEYS)}")
    if content.get("format", FORMAT) not in (FORMAT, FORMER):
        raise DataError(f"{where}: format {content['format']!r} is not {FORMAT!r}")
    for name in ("layer_ranks", "rank_pattern", "alpha_pattern", "layer_metadata", "analysis_metadata"):
        if not isinstance(content.get(name, {}), dict):
            raise DataError(f"{where}: {name} must be an object {{…}}; got {type(content[name]).__name__}")
    for name, rows in content.get("layer_metadata", {}).items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{where}: layer_metadata of {name} must be a list of objects")
    alpha = content.get("alpha_over_rank", 2.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise DataError(f"{where}: alpha_over_rank must be a number above 0; got {alpha!r}")
    if not isinstance(content.get("use_rslora", False), bool):
        raise DataError(f"{where}: use_rslora must be true or false; got {content['use_rslora']!r}")


def check_scales(content: Mapping[str, Any], where: str) -> None:
    """The plan owns the scale, as one number: an alpha_pattern that says anything else is not obeyed silently.

    Nor is what the former format meant by use_rslora, whose alpha followed each rank.
    """
    ratio = content.get("alpha_over_rank", 2.0)
    if content.get("use_rslora"):
        one = f"with use_rslora all sites have one alpha, alpha_over_rank ({ratio:g}) × the largest rank"
        if content.get("format") == FORMER:
            raise DataError(
                f"{where}: {one}, which {FORMER} took from each site's own rank; make the plan again with `rankwise "
                f"ranks`, or set its format to {FORMAT} and leave alpha_pattern out to train with one alpha"
            )
        if content.get("alpha_pattern"):
            raise DataError(f"{where}: {one}, so alpha_pattern does not apply; leave alpha_pattern out")
    for key, alpha in content.get("alpha_pattern", {}).items():
        rank = content.get("rank_pattern", {}).get(key)
        if rank is None or alpha != ratio * rank:
            raise DataError(
                f"{where}: alpha_pattern gives {key} {alpha!r}, but alpha is alpha_over_rank ({ratio:g}) × the rank "
                f"({rank}) at every site; change alpha_over_rank, or leave alpha_pattern out"
            )


def whole_rank(rank: Any, name: str, where: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise DataError(f"{where}: rank of {name} is {rank!r}; a rank is a whole number ≥ 0")
    return rank


def rows_from_patterns(content: Mapping[str, Any], sites: Mapping[str, Site], where: str) -> list[PlannedSite]:
    rows = []
    details = {
        row["path"]: row for rows_ in content.get("layer_metadata", {}).values() for row in rows_ if "path" in row
    }
    for key, value in content["rank_pattern"].items():
        path = re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$"))
        if path not in sites:
            near = ", ".join(nearest(path, sites)) or "none that look alike"
            raise DataError(f"{where}: the model has no site {path}; nearest: {near}. Is this plan for another model?")
        row = details.get(path, {})
        if row.get("shape") and tuple(row["shape"]) != sites[path].shape:
            raise DataError(
                f"{where}: {path} is {tuple(row['shape'])} in the plan and {sites[path].shape} in the model"
            )
        experts = row.get("experts", 0)
        if row and experts != sites[path].experts:
            raise DataError(f"{where}: {path} has {experts} experts in the plan and {sites[path].experts} in the model")
        rows.append(clamped(sites[path], whole_rank(value, path, where), row))
    planned = {row.site.path for row in rows}
    left_out = [path for path, row in details.items() if row.get("r_final") == 0 and path not in planned]
    return rows + [clamped(sites[path], 0, details[path]) for path in left_out if path in sites]


def rows_from_types(layer_ranks: Mapping[str, Any], sites: Mapping[str, Site], where: str) -> list[PlannedSite]:
    """One rank per projection name, over the language tower."""
    language = [site for site in sites.values() if site.tower in ("language", "unknown")]
    names = {site.projection for site in language}
    missing = [name for name in layer_ranks if name not in names]
    if missing:
        raise DataError(f"{where}: the model has no projection {', '.join(missing)}; it has {', '.join(sorted(names))}")
    return [
        clamped(site, whole_rank(layer_ranks[site.projection], site.projection, where), {})
        for site in language
        if site.projection in layer_ranks
    ]


def clamped(site: Site, rank: int, row: Mapping[str, Any]) -> PlannedSite:
    """The site with its rank and the file's reasons. A rank above min(m, n) is cut to it, and says so."""
    fits = min(rank, site.full_rank)
    return PlannedSite(
        site=site,
        rank=fits,
        r_raw=row.get("r_raw"),
        energy_retained=row.get("energy_retained"),
        decay_rate=row.get("decay_rate"),
        stable_rank=row.get("stable_rank"),
        entropy_rank=row.get("entropy_rank"),
        saturated=bool(row.get("saturated", False)),
        clipped=row.get("clipped") if fits == rank else f"{rank} is above min(m, n) = {site.full_rank}",
        method=row.get("method", "given"),
        rank_if_base_rounded=row.get("rank_if_base_rounded"),
    )
