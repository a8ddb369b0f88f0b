"""Exact compression of an adapter through QR against the dense SVD that PEFT's `convert_to_lora` and others run.

    python benchmarks/compress.py [--adapter DIR] [--out benchmarks/results]

Without --adapter: random pairs with the shapes of a 7B model's projections. Dense: `torch.linalg.svd` of B·A in
float32, which is the call that PEFT makes; its time to form B·A is counted too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from rankwise.core.factors import Factors
from rankwise.files.adapter import read_adapter

SHAPES = [(3584, 3584, 64), (3584, 3584, 16), (512, 3584, 64)]
KEEP = 8


def seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def dense(factors: Factors) -> Factors:
    u, values, vt = torch.linalg.svd(factors.product(), full_matrices=False)
    root = values[:KEEP].sqrt()
    return Factors(u[:, :KEEP] * root, root[:, None] * vt[:KEEP])


def pairs(adapter: Path | None) -> dict[str, Factors]:
    if adapter:
        found = read_adapter(adapter).pairs
        by_shape = {(*pair.shape, pair.rank): pair.factors() for pair in found.values()}
    else:
        generator = torch.Generator().manual_seed(0)
        by_shape = {
            (m, n, r): Factors(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))
            for m, n, r in SHAPES
        }
    return {f"{m}×{n}, r {r}": factors for (m, n, r), factors in by_shape.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    lines = [
        "# Compressing an adapter",
        "",
        f"{date.today()} · {platform.machine()}, {torch.get_num_threads()} threads · torch {torch.__version__} · "
        f"to rank {KEEP} · `python benchmarks/compress.py`",
        "",
        "| pair | rankwise, ms | dense SVD, ms | ratio | same product to |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, factors in pairs(options.adapter).items():
        factors.compress(KEEP)
        own = seconds(lambda f=factors: f.compress(KEEP), 5)  # type: ignore[misc]
        other = seconds(lambda f=factors: dense(f), 1)  # type: ignore[misc]
        difference = (factors.compress(KEEP).product() - dense(factors).product()).norm() / factors.product().norm()
        lines.append(f"| {name} | {1e3 * own:.1f} | {1e3 * other:.0f} | {other / own:.0f} | {float(difference):.0e} |")
        print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compress.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
