"""rankwise ranks diff: differences between two rank plans.

rankwise ranks diff first/configs/lora_rank_config.json second/configs/lora_rank_config.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.files.plan import read_plan
from rankwise.options.commands import DiffConfig


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
    for path in paths:
        print(f"  {path}: {first.ranks.get(path, '-')} → {second.ranks.get(path, '-')}")
    return {"differing": paths, "parameters": (first.parameters, second.parameters)}
