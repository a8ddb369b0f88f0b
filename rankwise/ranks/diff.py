"""rankwise ranks diff: differences between two rank plans.

rankwise ranks diff first/configs/lora_rank_config.json second/configs/lora_rank_config.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.files.plan import find_plan, read_plan
from rankwise.options.commands import DiffConfig
from rankwise.page.text import percent
from rankwise.ranks.expert_map import CHANGES, SHOWN, MovedExpert, moved_experts, read_experts, shares
from rankwise.ranks.outputs import RAW_DATA


def plans(config: DiffConfig) -> tuple[str, str]:
    if not config.first or not config.second:
        raise UsageError("ranks diff needs two plans: rankwise ranks diff A.json B.json")
    return config.first, config.second


def run(config: DiffConfig) -> dict[str, Any]:
    """Print the sites whose ranks differ; a site that one plan lacks, or leaves out, has none."""
    names = plans(config)
    first, second = (read_plan(Path(name)) for name in names)
    paths = [path for path in {**first.ranks, **second.ranks} if first.ranks.get(path) != second.ranks.get(path)]
    print(f"{names[0]}: {len(first.ranks)} sites, {first.parameters:,} parameters")
    print(f"{names[1]}: {len(second.ranks)} sites, {second.parameters:,} parameters")
    print(f"{len(paths)} sites differ" + (":" if paths else ""))
    sites = {**second.adapted, **first.adapted}
    for path in paths:
        count = sites[path].experts
        of = f", of each of {count} experts" if count else ""
        print(f"  {path}: {first.ranks.get(path, '-')} → {second.ranks.get(path, '-')}{of}")
    moved = moved_apart(*(shares(experts_beside(find_plan(Path(name)))) for name in names))
    if moved:
        print("experts whose share of the experts' change differs most:")
        for name, (one, other) in moved.items():
            print(f"  {name}: {percent(one)} → {percent(other)}")
    return {"differing": paths, "parameters": (first.parameters, second.parameters), "experts": moved}


def experts_beside(plan: Path) -> list[MovedExpert]:
    """The experts that the analysis beside a plan measured; none where there is no such file."""
    file = plan.parent.parent / RAW_DATA / CHANGES.name
    return moved_experts(read_experts(file)) if file.is_file() else []


def moved_apart(first: dict[str, float], second: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Expert → its share in each, those that differ most first; empty where either has no experts."""
    both = (
        {name: (first.get(name, 0.0), second.get(name, 0.0)) for name in {**first, **second}}
        if first and second
        else {}
    )
    ordered = sorted(both, key=lambda name: -abs(both[name][0] - both[name][1]))
    return {name: both[name] for name in ordered[:SHOWN] if both[name][0] != both[name][1]}
