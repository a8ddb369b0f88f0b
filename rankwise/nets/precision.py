"""Whether this CPU computes 16-bit products in less time than float32, or only emulates them.

Without AVX512_BF16 or AMX a step of training in bfloat16 takes many times as long as one in float32, and is less exact.
What was asked for is computed nevertheless; that it is slow, and what is faster, is said before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn.functional import linear

from rankwise.files.processes import announce

ROWS, INNER, OUTER = 64, 576, 1536  # a product of the size that small models' are; 6 ms where it is emulated
RUNS = 4
SLOW = 2.0  # times as slow; below that, the measurement may be what differs


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in this type ÷ in float32, on this CPU; measured once, in hundredths of a second."""
    return seconds_of(dtype) / seconds_of(torch.float32)


def seconds_of(dtype: torch.dtype) -> float:
    """CPU time of the fastest of a few runs."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(count, INNER, generator=generator).to(dtype) for count in (ROWS, OUTER))
    return min(timed(lambda: linear(rows, weight)) for _ in range(RUNS))


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


@cache
def warn_if_slow(dtype: torch.dtype, instead: str) -> None:
    """Say once that this type is slow on this CPU. instead: the option that gives float32."""
    if dtype != torch.float32 and slowdown(dtype) > SLOW:
        name = str(dtype).removeprefix("torch.")
        announce(
            f"warning: this CPU has no {name} units: a matrix product takes {slowdown(dtype):.0f} times as long as in "
            f"float32 (measured; a training step up to 35 times). {instead} computes in float32"
        )
