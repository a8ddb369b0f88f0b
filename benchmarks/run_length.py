"""How does the best learning rate of a LoRA run change with its number of steps?

    python benchmarks/run_length.py --model stories260K --data e2e_nlg --work FOLDER [--ranks 16,4]

Runs of 40, 160 and 640 steps of 8 rows, linear decay over each run's own steps, on the same rows to train on and the
same items held out; rates by factors of 2 around the best of the length before, further where the best is at an edge.
The exponent p of rate ∝ steps^p is the slope of log rate (lowest point of a parabola through the best rate and its
neighbours, mean of the seeds) over log steps; `rankwise.study.advice.LENGTH_EXPONENT` stands on it. Every run is kept
below --work. One thread.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from advise import PAIRS, STORIES, Contest, MeteredRuns, say
from workload import command, machine

from rankwise.files.atomic import read_if_there, write_json, write_text
from rankwise.study.advice import UNIFORM, TrialRun, find_rates, first_grid, growth, rounded, smallest_effect

LENGTHS, SEEDS, RATIO, POINTS, FIRST = (40, 160, 640), (1, 2), 2.0, 5, 8e-3
Curve = Mapping[float, float]


def optimum(runs: MeteredRuns, rank: int, centre: float) -> tuple[dict[str, Any], float]:
    """The best rate of one length and rank, with the curve of the seeds' mean; and the best rate that was tried."""
    grid = first_grid(centre, POINTS, RATIO)
    while True:
        for seed in SEEDS:
            runs.run([TrialRun(rank, rate, seed) for rate in grid], "A")
        curve = mean_curve(runs, rank)
        further = growth(curve, RATIO)
        if further is None:
            break
        grid = [further]
    best = TrialRun(rank, min(curve, key=lambda rate: curve[rate]), SEEDS[0])
    gain = runs.choose.gain(best)
    found = find_rates(curve, smallest_effect(gain, None), gain.estimate)
    told = {
        "curve": {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in curve.items()},
        "best": found.best,
        "within": found.within,
        "vertex": found.vertex,
        "gain": gain.estimate,
        "runs": len(SEEDS) * len(curve),
    }
    return told, found.best


def mean_curve(runs: MeteredRuns, rank: int) -> dict[float, float]:
    curves = [runs.choose.curve(rank, UNIFORM, seed) for seed in SEEDS]
    return {rate: sum(curve[rate] for curve in curves) / len(curves) for rate in curves[0]}


def exponent(found: Mapping[str, Mapping[str, Any]]) -> float:
    rates = [found[str(steps)]["vertex"] or found[str(steps)]["best"] for steps in LENGTHS]
    return float(np.polyfit(np.log(LENGTHS), np.log(rates), 1)[0])


def kept_rate(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, int, float, float]]:
    """Pairs of lengths: what the longer run loses with the best rate of the shorter one; steps, steps, loss, share of
    the gain."""
    rows = []
    for at, short in enumerate(LENGTHS):
        for long in LENGTHS[at + 1 :]:
            curve, rate = found[str(long)]["curve"], f"{found[str(short)]['best']:g}"
            if curve.get(rate) is not None:
                lost = curve[rate] - min(loss for loss in curve.values() if loss is not None)
                rows.append((short, long, lost, lost / found[str(long)]["gain"]))
    return rows


def page(result: Mapping[str, Any]) -> str:
    lines = [
        "# The best learning rate against the number of steps",
        "",
        f"{result['date']} · {result['machine']} · `{result['command']}` · {result['title']}, {len(SEEDS)} seeds.",
        "",
        "Loss on held-out items, nats per answer token. Vertex: lowest point of a parabola in log rate. Within: rates "
        "that lose at most 1 % of the gain, at least 0.01.",
        "",
        "| rank | steps | best rate tried | vertex | within | gain | runs |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rank, found in result["ranks"].items():
        for steps, row in found.items():
            vertex = f"{row['vertex']:.2g}" if row["vertex"] else "–"
            within = f"{row['within'][0]:g} to {row['within'][-1]:g}"
            lines.append(
                f"| {rank} | {steps} | {row['best']:g} | {vertex} | {within} | {row['gain']:.3f} | {row['runs']} |"
            )
    lines += ["", "| rank | exponent p of rate ∝ steps^p |", "|---:|---:|"]
    lines += [f"| {rank} | {p:+.2f} |" for rank, p in result["exponents"].items()]
    lines += ["", "What the longer run loses with the best rate of the shorter one:", ""]
    lines += ["| rank | shorter | longer | nats | share of the gain |", "|---:|---:|---:|---:|---:|"]
    for rank, found in result["ranks"].items():
        lines += [f"| {rank} | {a} | {b} | {lost:+.4f} | {share:.1%} |" for a, b, lost, share in kept_rate(found)]
    lines += ["", "Loss of every rate (– : a seed diverged):", ""]
    for rank, found in result["ranks"].items():
        for steps, row in found.items():
            told = ", ".join(f"{rate}: {'–' if loss is None else f'{loss:.4f}'}" for rate, loss in row["curve"].items())
            lines.append(f"- rank {rank}, {steps} steps: {told}")
    return "\n".join(lines) + "\n"


def measured(contest: Contest, rank: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    found, centre = dict(kept), FIRST
    for steps in LENGTHS:
        runs = contest.runs(f"steps{steps}", steps, slice(0))
        found[str(steps)], centre = optimum(runs, rank, centre)
        say(f"rank {rank}, {steps} steps: best {centre:g}, vertex {rounded(found[str(steps)]['vertex'] or 0):g}")
    return found


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=numbers, default=[16, 4])
    parser.add_argument("--work", type=Path, required=True, help="finished runs are kept here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    title, task, _ = PAIRS["e2e"]
    extent = replace(STORIES, steps=max(LENGTHS))
    contest = Contest(title, task, extent, options.model, options.data, options.work)
    kept = read_if_there(options.out / "run_length.json").get("ranks", {})
    for rank in options.ranks:
        kept = kept | {str(rank): measured(contest, rank, {})}
        result = {
            "title": title,
            "date": str(date.today()),
            "machine": machine(),
            "command": command(),
            "ranks": kept,
            "exponents": {name: exponent(found) for name, found in kept.items()},
        }
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "run_length.json", result)
        write_text(options.out / "run_length.md", page(result))
    print(page(result))


if __name__ == "__main__":
    main()
