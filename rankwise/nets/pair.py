"""Two checkpoints as a source of deltas: sites by the loaded model's paths, or by key where no config says more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.core.site import TOWERS, Site
from rankwise.errors import DataError, UsageError
from rankwise.nets.load import meta_model
from rankwise.nets.sites import fused_experts, model_sites, site_weights, weight_table
from rankwise.store.checkpoint import Checkpoint, open_checkpoint, resolve
from rankwise.store.deltas import (
    WEIGHT_TYPES,
    CheckpointPair,
    Weight,
    flat_site_weights,
    foreign_sites,
    match_keys,
)


@dataclass(frozen=True)
class SiteFilter:
    """Which sites are analysed, and how keys are brought together."""

    include: str | None = None
    exclude: str | None = None
    towers: tuple[str, ...] = ("language",)
    rename: tuple[str, ...] = ()
    allow_unmatched: bool = False
    flatten_conv: bool = False

    def apply(self, sites: Mapping[str, Site]) -> dict[str, Site]:
        """The sites that pass, in order. Raises UsageError for a bad regex or where nothing is left."""
        for tower in self.towers:
            if tower not in TOWERS:
                raise UsageError(f"--towers: {tower!r} is not one of {', '.join(TOWERS)}")
        include, exclude = compiled(self.include, "--include"), compiled(self.exclude, "--exclude")
        kept = {
            path: site
            for path, site in sites.items()
            if site.tower in (*self.towers, "unknown")
            and (include is None or include.search(path))
            and not (exclude and exclude.search(path))
        }
        if not kept:
            towers = sorted({site.tower for site in sites.values()})
            raise UsageError(
                f"no site is left of {len(sites)} (towers here: {', '.join(towers) or 'none'}); look at --towers "
                f"{','.join(self.towers)}, --include {self.include} and --exclude {self.exclude}"
            )
        return kept


def compiled(regex: str | None, flag: str) -> re.Pattern[str] | None:
    try:
        return re.compile(regex) if regex else None
    except re.error as error:
        raise UsageError(f"{flag} {regex!r} is not a regular expression: {error}") from error


def open_pair(base: str, tuned: str, filter_: SiteFilter, notes: list[str]) -> CheckpointPair:
    """The pair as a source of deltas. What is left out is counted in `notes`.

    Raises DataError listing the keys and shapes that do not match (unless `allow_unmatched`).
    """
    before, after = open_checkpoint(resolve(base)), open_checkpoint(resolve(tuned))
    if before.config is None or filter_.rename:
        return foreign_pair(before, after, filter_, notes)
    return model_pair(before, after, filter_, notes)


def model_pair(before: Checkpoint, after: Checkpoint, filter_: SiteFilter, notes: list[str]) -> CheckpointPair:
    model = meta_model(str(before.path if before.path.is_dir() else before.path.parent))
    sites = filter_.apply(model_sites(model))
    tables = [weight_table(model, list(checkpoint.keys())) for checkpoint in (before, after)]
    left, right = (site_weights(sites, table) for table in tables)
    experts = fused_experts(model)
    if experts:
        notes.append(f"{len(experts)} fused expert tensors are not analysed ({experts[0]} …)")
    reasons = {path: mismatch(path, before, left, after, right) for path in sites}
    lines = [f"{path} {reason}" for path, reason in reasons.items() if reason]
    refuse_unmatched(lines, before.path, after.path, filter_.allow_unmatched, notes)
    matching = {path: site for path, site in sites.items() if not reasons[path]}
    if not matching:
        raise DataError(f"{before.path} and {after.path} have no site in common ({lines[0]} …)")
    return CheckpointPair(before, after, matching, left, right, f"{before.path} → {after.path}")


def mismatch(
    path: str, before: Checkpoint, left: Mapping[str, Weight], after: Checkpoint, right: Mapping[str, Weight]
) -> str | None:
    """Why this site's two weights cannot be subtracted; None where they can."""
    absent = [where for where, table in (("base", left), ("tuned checkpoint", right)) if path not in table]
    if absent:
        return f"is missing in the {' and the '.join(absent)}"
    shapes = before.shape(left[path].key), after.shape(right[path].key)
    if shapes[0] != shapes[1]:
        return f"is {shapes[0]} in the base and {shapes[1]} in the tuned checkpoint"
    types = [before.dtype(left[path].key), after.dtype(right[path].key)]
    odd = [str(dtype).removeprefix("torch.") for dtype in types if dtype not in WEIGHT_TYPES]
    return f"is stored as {odd[0]}, which is not a plain weight: dequantize it first" if odd else None


def foreign_pair(before: Checkpoint, after: Checkpoint, filter_: SiteFilter, notes: list[str]) -> CheckpointPair:
    matching = match_keys(before, after, filter_.rename, filter_.flatten_conv)
    lines = [f"{name} is only in the base" for name in matching.only_base]
    lines += [f"{name} is only in the tuned checkpoint" for name in matching.only_tuned]
    lines += [f"{name} is of another shape" for name in matching.other_shape]
    if not matching.shared:
        raise DataError(
            f"{before.path} and {after.path} have no matrix in common ({matching.explain() or 'no matrices'}); "
            "see --rename REGEX=TEXT and --flatten_conv"
        )
    refuse_unmatched(lines, before.path, after.path, filter_.allow_unmatched, notes)
    if matching.skipped:
        notes.append(f"{len(matching.skipped)} tensors of the base are not matrices and were skipped")
    notes.append("no config.json: sites are named by their keys, their tower is unknown, and `train` refuses the plan")
    left, right = flat_site_weights(matching)
    sites = filter_.apply(foreign_sites(before, matching))
    return CheckpointPair(before, after, sites, left, right, f"{before.path} → {after.path}")


def refuse_unmatched(lines: Sequence[str], base: Path, tuned: Path, allowed: bool, notes: list[str]) -> None:
    if not lines:
        return
    if not allowed:
        shown = "\n  ".join(lines[:20]) + (f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise DataError(
            f"{base} and {tuned} do not match:\n  {shown}\n--rename REGEX=TEXT brings names together; "
            "--allow_unmatched analyses the rest"
        )
    notes.append(f"{len(lines)} tensors do not match and were left out ({lines[0]} …)")


def weights_of(name: str) -> tuple[dict[str, Site], Checkpoint, dict[str, Weight]]:
    """Sites of one model, its checkpoint, and where each site's weight lies in it."""
    model = meta_model(name)
    checkpoint = open_checkpoint(resolve(name))
    sites = model_sites(model)
    return sites, checkpoint, site_weights(sites, weight_table(model, list(checkpoint.keys())))
