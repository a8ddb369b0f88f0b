"""From the content of a plan file back to a plan, strictly, matched with the sites of the model it is for.

The file is a superset of the documented `lora_rank_config.json`; a file with `layer_ranks` alone loads too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rankwise.core.plan import FORMAT, FORMER, PlannedSite, RankPlan
from rankwise.core.site import Site, describe, nearest
from rankwise.errors import DataError

KNOWN_KEYS = frozenset(RankPlan(()).as_dict())


def recorded_sites(content: Mapping[str, Any]) -> dict[str, Site]:
    """The sites as the plan's own `layer_metadata` describes them, for readers that have no model at hand."""
    return {
        row["path"]: replace(
            describe(row["path"], row["shape"], row.get("tower", "unknown"), row.get("transposed", False)),
            kind=row.get("kind", "other"),
        )
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
            raise DataError(f"{where}: says nothing of its sites' shapes, so that it can be read for a model only")
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
    """Known names with values of the right kind."""
    unknown = set(content) - KNOWN_KEYS
    if unknown:
        raise DataError(f"{where}: unknown fields {sorted(unknown)}; a rank plan has {sorted(KNOWN_KEYS)}")
    if content.get("format", FORMAT) not in (FORMAT, FORMER):
        raise DataError(f"{where}: format {content['format']!r} is not {FORMAT!r}")
    for name in ("layer_ranks", "rank_pattern", "alpha_pattern", "layer_metadata", "analysis_metadata"):
        if not isinstance(content.get(name, {}), dict):
            raise DataError(f"{where}: {name} is an object {{…}}; got {type(content[name]).__name__}")
    for name, rows in content.get("layer_metadata", {}).items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{where}: layer_metadata of {name} is a list of objects")
    alpha = content.get("alpha_over_rank", 2.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise DataError(f"{where}: alpha_over_rank is a number above 0; got {alpha!r}")
    if not isinstance(content.get("use_rslora", False), bool):
        raise DataError(f"{where}: use_rslora is true or false; got {content['use_rslora']!r}")


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
            raise DataError(f"{where}: {one}, so there is no alpha_pattern beside it; leave alpha_pattern out")
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
