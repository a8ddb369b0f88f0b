"""Several processes on one job: how sites are distributed and results gathered.

Started by `torchrun --nproc-per-node N -m rankwise …` (or accelerate launch); alone, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch.distributed as dist

LONGEST = timedelta(days=7)  # a process may wait for another that trains
MOST_WORKERS = 8  # beyond it the disk is what one waits for
Item = TypeVar("Item")
Key = TypeVar("Key")
Value = TypeVar("Value")


def process_index() -> tuple[int, int]:
    """(rank, number of processes) as torchrun tells them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def default_workers() -> int:
    """Processes to decode images with: the cores that this one may use, shared among those of the job; 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // process_index()[1]))


def announce(text: str) -> None:
    """Print once, whatever the number of processes: from the first."""
    if process_index()[0] == 0:
        print(text)


def own_share(items: Sequence[Item], costs: Sequence[float]) -> list[Item]:
    """Items of this process: largest first, each assigned to the process with the least work so far."""
    rank, count = process_index()
    load = [0.0] * count
    mine: list[Item] = []
    for index in sorted(range(len(items)), key=lambda i: -costs[i]):
        target = load.index(min(load))
        load[target] += costs[index]
        if target == rank:
            mine.append(items[index])
    return mine


def gathered(results: Mapping[Key, Value]) -> dict[Key, Value]:
    """The results of all processes, in every process."""
    _, count = process_index()
    if count == 1:
        return dict(results)
    parts: list[Mapping[Key, Value]] = [{} for _ in range(count)]
    dist.all_gather_object(parts, dict(results), patient_group())
    return {key: value for part in parts for key, value in part.items()}


@cache
def patient_group() -> dist.ProcessGroup | None:
    """Processes that wait for each other as long as it takes; those of the Trainer's group would not."""
    if dist.is_initialized():
        group: Any = dist.new_group(timeout=LONGEST, backend="gloo")
        return cast("dist.ProcessGroup", group)
    dist.init_process_group("gloo", timeout=LONGEST)
    return None


def finish() -> None:
    """Leave the process group, if there is one."""
    patient_group.cache_clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
