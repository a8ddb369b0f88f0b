"""Time and size of the report of a long run: 10,000 logged steps, gradient norms of every step and site by site.

    python benchmarks/report.py [--steps 10000] [--layers 30] [--work DIR] [--out benchmarks/results]

The run folder is synthetic, with the sites of SmolLM2-135M, in the files that `train` writes: a row of the log at every
step, group and layer norms at every step, site by site at the steps that the trainer keeps, four phases. The command is
run as a person runs it, three times; its time contains the start of Python and the drawing of every picture. On a
machine that others use, the processor's time is the better figure: it is given, too.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site, describe
from rankwise.train.gradient_table import (
    COLUMNS,
    GROUP_COLUMNS,
    GROUPS,
    LAYERS,
    LOG_COLUMNS,
    NORMS,
    TRAINING_LOG,
    SiteNorm,
    cells,
    kept,
    layer_columns,
    views,
)

HIDDEN, INNER, KEYS = 576, 1536, 192  # SmolLM2-135M
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
PHASES = ("attention", "mlp", "attention again", "both")
MOST_SECONDS, MOST_BYTES = 5.0, 3e6
RUNS = 3


def sites(layers: int) -> list[Site]:
    return [
        describe(f"model.layers.{layer}.{name}", shape, "language")
        for layer in range(layers)
        for name, shape in SHAPES.items()
    ]


def trains(site: Site, phase: str) -> bool:
    return phase == "both" or phase.startswith(site.kind)


def write_run(run: Path, steps: int, layers: int) -> None:
    """The files of a trained adapter with its plan."""
    dice, adapted = random.Random(0), sites(layers)
    planned = [
        PlannedSite(site, dice.choice((2, 4, 8, 16)), 9, dice.uniform(0.5, 1), 0.3, dice.uniform(1, 9))
        for site in adapted
    ]
    run.mkdir(parents=True)
    (run / "lora_rank_config.json").write_text(RankPlan(tuple(planned), "SmolLM2-135M").dumps())
    length = -(-steps // len(PHASES))
    with (run / "phases.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("step", "phase"), *((1 + place * length, name) for place, name in enumerate(PHASES))]
        )
    with (run / TRAINING_LOG).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(LOG_COLUMNS)
        for step in range(1, steps + 1):
            loss = 0.8 + 2 * math.exp(-step / 900) + dice.gauss(0, 0.1)
            held_out = f"{loss + 0.1:.6f}" if step % 100 == 0 else ""
            table.writerow((step, step / steps, f"{loss:.6f}", held_out, f"{dice.uniform(0.1, 2):.6f}", 1e-4, step))
    write_norms(run, steps, adapted, length)


def write_norms(run: Path, steps: int, adapted: list[Site], length: int) -> None:
    opened = [(run / name).open("w", newline="") for name in (NORMS, GROUPS, LAYERS)]
    long, groups = csv.writer(opened[0]), csv.DictWriter(opened[1], GROUP_COLUMNS, restval="")
    layers = csv.DictWriter(opened[2], layer_columns(adapted), restval="")
    long.writerow(COLUMNS)
    groups.writeheader()
    layers.writeheader()
    for step, rows in enumerate(norms(steps, adapted, length), 1):
        found = views(rows, max_grad_norm=1.0)
        groups.writerows(found.groups)
        layers.writerows(found.layers)
        if kept(step):
            long.writerows(map(cells, rows))
    for file in opened:
        file.close()


def norms(steps: int, adapted: list[Site], length: int) -> Iterator[list[SiteNorm]]:
    dice = random.Random(1)
    for step in range(steps):
        phase, rows = PHASES[step // length], []
        for site in adapted:
            a, b = (math.exp(dice.gauss(-3, 0.5)) for _ in "ab")
            there = (math.hypot(a, b), a, b, a / 90, step / steps) if trains(site, phase) else (None,) * 5
            rows.append(SiteNorm(step + 1, site.path, site.tower, site.kind, site.layer, *there, phase=phase))
        yield rows


def measured(run: Path) -> dict[str, float]:
    """One report by the command: wall and processor seconds, MiB at the peak, bytes of the page."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "rankwise", "report", str(run)], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = (run / "report.html").stat().st_size
    return {"seconds": wall, "processor_seconds": spent, "peak_mib": after.ru_maxrss / 1024, "bytes": size}


def written(result: dict[str, object]) -> str:
    runs = result["runs"]
    assert isinstance(runs, list)
    rows = "".join(
        f"| {place} | {one['seconds']:.1f} | {one['processor_seconds']:.1f} | {one['peak_mib']:,.0f} "
        f"| {one['bytes'] / 1e6:.2f} |\n"
        for place, one in enumerate(runs, 1)
    )
    seconds, size = (max(one[key] for one in runs) for key in ("seconds", "bytes"))
    kept = ("kept" if worst <= most else "missed" for worst, most in ((seconds, MOST_SECONDS), (size, MOST_BYTES)))
    verdict = f"Limit of {MOST_SECONDS:g} s {next(kept)}, of {MOST_BYTES / 1e6:g} MB {next(kept)}"
    return (
        f"# The report of a long run\n\n`python benchmarks/report.py`, {result['date']}, {result['machine']}: "
        f"{result['steps']:,} logged steps, gradient norms of {result['sites']:,} sites, "
        f"{result['input_bytes'] / 1e6:.0f} MB of tables. {verdict}. "  # type: ignore[operator]
        f"Load of the machine meanwhile: {result['load']}.\n\n"
        "| run | seconds | of the processor | peak MiB | page, MB |\n|---:|---:|---:|---:|---:|\n" + rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    run = Path(args.work or tempfile.mkdtemp()) / "run"
    if not run.is_dir():
        write_run(run, args.steps, args.layers)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "steps": args.steps,
        "sites": len(SHAPES) * args.layers,
        "input_bytes": sum(path.stat().st_size for path in run.glob("*.csv")),
        "runs": [measured(run) for _ in range(RUNS)],
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    (args.out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "report.md").write_text(written(result))
    print(written(result))


if __name__ == "__main__":
    main()
