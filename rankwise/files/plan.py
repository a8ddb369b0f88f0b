"""Rank plans on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rankwise.core.plan import RankPlan, load_plan
from rankwise.core.site import Site
from rankwise.errors import DataError
from rankwise.files.atomic import read_object, write_text

PLAN_FILE = Path("configs") / "lora_rank_config.json"


def find_plan(path: Path) -> Path:
    """A plan file, or the plan in a run folder."""
    candidates = [path] if path.is_file() else [path / PLAN_FILE, path / PLAN_FILE.name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(f"{path}: no rank plan here; `rankwise ranks` writes {PLAN_FILE}")


def read_plan(path: Path, sites: Mapping[str, Site] | None = None) -> RankPlan:
    """A plan matched with a model's sites, or with the sites it records itself (`core.plan.load_plan`)."""
    file = find_plan(path)
    return load_plan(read_object(file), sites, str(file))


def write_plan(path: Path, plan: RankPlan) -> Path:
    """Write the plan as JSON, whole or not at all; returns the path."""
    return write_text(path, plan.dumps() + "\n")
