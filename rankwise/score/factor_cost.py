"""What factorizing one matrix costs: operations, and time measured side by side in one run.

    methods = counted(methods, batch)                   # flops per matrix
    timings(methods, batch, repeats=3)["Gram"].seconds  # per matrix, the fastest of 3 passes

Matrix products are counted by torch as they run. LAPACK's parts are not visible to it: for them stand the counts of
Golub and Van Loan, Matrix Computations (4th edition: sections 5.2 and 8.3.5, figure 8.6.1).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rankwise.score.factorization import Method


@dataclass(frozen=True)
class Timing:
    """Seconds per matrix: the fastest and the slowest pass."""

    seconds: float
    slowest: float


def eigh_flops(n: int) -> int:
    """All eigenvalues and eigenvectors of a symmetric n × n matrix."""
    return 9 * n**3


def svd_flops(m: int, n: int) -> int:
    """Thin SVD with both sides: Golub–Reinsch or R-SVD, whichever takes less."""
    m, n = max(m, n), min(m, n)
    return min(14 * m * n**2 + 8 * n**3, 6 * m * n**2 + 20 * n**3)


def qr_flops(m: int, n: int) -> int:
    """Householder QR of m × n (m ≥ n) with the thin Q formed."""
    m, n = max(m, n), min(m, n)
    return 2 * (2 * m * n**2 - 2 * n**3 // 3)


def lapack_counts() -> dict[Any, Any]:
    """Operation → count from the shape of its first argument (…, m, n): what FlopCounterMode takes."""

    def batched(count: Any) -> Any:
        return lambda shape, *rest, out_shape=None, **named: prod(shape[:-2]) * count(*shape[-2:])

    ops = torch.ops.aten
    return {
        ops._linalg_eigh: batched(lambda n, _: eigh_flops(n)),
        ops._linalg_svd: batched(svd_flops),
        ops.linalg_qr: batched(qr_flops),
    }


def counted(methods: Sequence[Method], batch: Tensor) -> list[Method]:
    """The methods with their `flops` per matrix, from one pass over the batch (B, T, D) each."""
    return [replace(method, flops=flops(method, batch)) for method in methods]


def flops(method: Method, batch: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=lapack_counts()) as counter:
        method.factorize(batch)
    total: int = counter.get_total_flops()
    return round(total / len(batch))


def timings(methods: Sequence[Method], batch: Tensor, repeats: int) -> dict[str, Timing]:
    """Seconds per matrix of every method on the same batch (B, T, D).

    One pass each to warm up; then every method takes its turn in each of the repeats, so that whatever else slows
    the machine hits all alike.
    """
    for method in methods:
        pass_seconds(method, batch)
    passes: dict[str, list[float]] = {method.name: [] for method in methods}
    for _ in range(repeats):
        for method in methods:
            passes[method.name].append(pass_seconds(method, batch) / len(batch))
    return {name: Timing(min(found), max(found)) for name, found in passes.items()}


def pass_seconds(method: Method, batch: Tensor) -> float:
    settle(batch.device)
    started = time.perf_counter()
    with torch.no_grad():
        method.factorize(batch)
    settle(batch.device)
    return time.perf_counter() - started


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
