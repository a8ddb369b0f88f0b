"""From right and wrong answers to tables: intervals by scene and seed, and verdicts in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.data.example import Example

DRAWS = 2000
MARGIN = 5.0  # points around chance that count as chance
CHANCE = 50.0
TRUTH = "ground truth"
Rights = NDArray[np.bool_]


@dataclass(frozen=True)
class Run:
    """One adapter. rights: test → whether each question was answered rightly. changed: the setting that was tried,
    empty for an arm's own run."""

    trained_with: str
    seed: int
    rights: Mapping[str, Sequence[bool]]
    gate: float | None
    seconds: float
    changed: str = ""

    def share(self, test: str) -> float:
        return 100 * sum(self.rights[test]) / len(self.rights[test])

    def record(self) -> dict[str, Any]:
        shares = {test: round(self.share(test), 2) for test in self.rights}
        return {**vars(self), "rights": shares, "seconds": round(self.seconds, 1)}


def scene_numbers(examples: Sequence[Example]) -> NDArray[np.intp]:
    """Which scene each question is about: (questions,)."""
    order = {image: number for number, image in enumerate(dict.fromkeys(one.images[0] for one in examples))}
    return np.array([order[one.images[0]] for one in examples])


def resampled(rights: Rights, scenes: NDArray[np.intp]) -> NDArray[np.float64]:
    """Accuracies in per cent, (DRAWS,), with scenes and seeds resampled. rights: (seeds, questions).

    Every call draws the same scenes and seeds, so differences of two calls are paired.
    """
    totals = np.stack([np.bincount(scenes, weights=one) for one in rights])
    seeds, count = totals.shape
    generator = np.random.default_rng(0)
    scene_weights = generator.multinomial(count, np.full(count, 1 / count), DRAWS).astype(float)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    found: NDArray[np.float64] = np.einsum("ds,sn,dn->d", seed_weights, totals, scene_weights, optimize=True)
    return 100 * found / (scene_weights @ np.bincount(scenes))


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def against_chance(low: float, high: float) -> str:
    if low >= CHANCE - MARGIN and high <= CHANCE + MARGIN:
        return f"chance (within {MARGIN:g} points)"
    if low > CHANCE:
        return "above chance"
    return "below chance" if high < CHANCE else "not told from chance"


def contrast(low: float, high: float) -> str:
    if low > 0:
        return "depth helps"
    return "depth harms" if high < 0 else "no difference shown"


def spread(value: float, found: tuple[float, float], sign: str = "") -> str:
    return f"{value:{sign}.1f} [{found[0]:{sign}.1f}, {found[1]:{sign}.1f}]"


def gathered(runs: Sequence[Run]) -> dict[tuple[str, str], Rights]:
    """(trained with, tested with) → right answers (seeds, questions) of the arms' own runs."""
    cells: dict[tuple[str, str], list[Sequence[bool]]] = {}
    for run in runs:
        for test, rights in run.rights.items() if not run.changed else ():
            cells.setdefault((run.trained_with, test), []).append(rights)
    return {cell: np.array(rights) for cell, rights in cells.items()}


def arm_lines(runs: Sequence[Run], scenes: NDArray[np.intp]) -> list[str]:
    """Every arm tested with what it was trained with, and what ground truth has over it."""
    cells = gathered(runs)
    best = cells[TRUTH, TRUTH]
    lines = ["| trained and tested with | right answers, % [95 %] | against chance | ground truth − this | verdict |"]
    lines += ["|---|---:|---|---:|---|"]
    for (arm, test), rights in cells.items():
        if arm == test:
            draws = resampled(rights, scenes)
            gap = interval(resampled(best, scenes) - draws)
            last = (
                f"{spread(100 * (best.mean() - rights.mean()), gap, '+')} | {contrast(*gap)}" if arm != TRUTH else "|"
            )
            mean = spread(100 * rights.mean(), interval(draws))
            lines.append(f"| {arm} | {mean} | {against_chance(*interval(draws))} | {last} |")
    return [*lines, ""]


def swap_lines(runs: Sequence[Run], scenes: NDArray[np.intp]) -> list[str]:
    """Arms tested with something else."""
    lines = ["| trained with | tested with | right answers, % [95 %] | against chance |", "|---|---|---:|---|"]
    for (arm, test), rights in gathered(runs).items():
        if arm != test:
            found = interval(resampled(rights, scenes))
            lines.append(f"| {arm} | {test} | {spread(100 * rights.mean(), found)} | {against_chance(*found)} |")
    return [*lines, ""]


def setting_lines(runs: Sequence[Run]) -> list[str]:
    """Ground truth under other settings, and the seeds of its arm beside them."""
    lines = ["| changed | seed | right answers, % | gate at the end |", "|---|---:|---:|---:|"]
    for run in runs:
        if run.trained_with == TRUTH:
            gate = "none" if run.gate is None else f"{run.gate:.3f}"
            lines.append(f"| {run.changed or 'nothing'} | {run.seed} | {run.share(TRUTH):.1f} | {gate} |")
    return [*lines, ""]
