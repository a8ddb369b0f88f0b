"""The statistics of a study once more, for check.py: a bootstrap over seeds and groups of items, Student's t, Holm.

effect = measured(sums, weights)      # (seeds, groups) summed losses or paired differences, (groups,) tokens
judged([effect, …], 0.02)             # better, worse, equivalent or undecided, with p-values after Holm

numpy only, nothing of rankwise. One fewer than there are is drawn of seeds and of groups, independently; the degrees of
freedom are Satterthwaite's.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

ALPHA, RESAMPLES, MOST_SEEDS = 0.05, 10_000, 100_000
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)
Json, Array = dict[str, Any], np.ndarray[Any, Any]


def tail(t: float, freedom: float) -> float:
    """P(T > t): with t = √ν·tan(π/2 − u²) the density is 2u·sin^(ν−1) u²."""
    if t < 0:
        return 1 - tail(-t, freedom)
    start = math.pi / 2 - math.atan(t / math.sqrt(freedom))
    low, high = math.sqrt(max(0.0, start - 40 / math.sqrt(freedom))), math.sqrt(start)
    u = low + (high - low) * (NODES + 1) / 2
    area = float(WEIGHTS @ (2 * u * np.sin(u * u) ** (freedom - 1))) * (high - low) / 2
    return area * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)


@functools.cache
def quantile(level: float, freedom: float) -> float:
    low, high = 0.0, 1e5
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > 1 - level else (low, middle)
    return high


def measured(sums: Array, weights: Array) -> Json:
    """The effect of (seeds, groups) losses over (groups,) tokens, and the kurtosis of the bootstrap of its error."""
    (seeds, groups), total, generator = sums.shape, weights.sum(), np.random.default_rng(1)
    estimate, by_seed = float(sums.sum() / (seeds * total)), sums.sum(1) / total
    by_item = (sums.mean(0) - estimate * weights) / weights.mean()
    drawn = [generator.multinomial(n - 1, np.full(n, 1 / n), RESAMPLES) for n in (seeds, groups)]
    ratios = (drawn[0] @ sums * drawn[1]).sum(1) / ((seeds - 1) * (drawn[1] @ weights))
    error = float(ratios.std(ddof=1)) if ratios.std() > 1e-12 * max(1.0, abs(estimate)) else 0.0
    kurtosis = float(((ratios - ratios.mean()) ** 4).mean() / ratios.var() ** 2) if error else 1.0
    own = {"seed_variance": float(by_seed.var(ddof=1) / seeds), "item_variance": float(by_item.var(ddof=1) / groups)}
    own |= {"estimate": estimate, "error": error, "kurtosis": kurtosis, "seeds": seeds, "groups": groups}
    return own | {"degrees": degrees(own["seed_variance"], seeds, own["item_variance"], groups)}


def degrees(by_seed: float, seeds: int, by_item: float, groups: int) -> float:
    parts = by_seed**2 / (seeds - 1) + by_item**2 / (groups - 1)
    return (by_seed + by_item) ** 2 / parts if parts else float(min(seeds, groups) - 1)


def above(effect: Json, distance: float) -> float:
    """p of a mean this far above 0 by chance."""
    certain = 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
    return tail(distance / effect["error"], effect["degrees"]) if effect["error"] else certain


def holm(p_values: list[float]) -> list[float]:
    order = np.argsort(p_values, kind="stable").tolist()
    steps = [(len(order) - rank) * p_values[index] for rank, index in enumerate(order)]
    return [min(1.0, max(steps[: order.index(index) + 1])) for index in range(len(order))]


def judged(effects: list[Json], delta: float) -> list[Json]:
    """Word and adjusted p-values of every primary contrast; less is better."""
    different = holm([2 * above(e, abs(e["estimate"])) for e in effects])
    equal = holm([max(above(e, e["estimate"] + delta), above(e, delta - e["estimate"])) for e in effects])
    rows = []
    for e, p, q in zip(effects, different, equal, strict=True):
        sign = "undecided" if p >= ALPHA else "better" if e["estimate"] < 0 else "worse"
        rows.append({"verdict": "equivalent" if q < ALPHA else sign, "p_difference": p, "p_equivalence": q})
    return rows


def enough(e: Json, delta: float, level: float, more: int) -> bool:
    """Whether so many more seeds would bring the half-width of this level down to δ/2."""
    by_seed, by_item = e["seed_variance"] * e["seeds"] / (e["seeds"] + more), e["item_variance"]
    variance = e["error"] ** 2 * (by_seed + by_item) / max(e["seed_variance"] + e["item_variance"], 1e-300)
    freedom = degrees(by_seed, e["seeds"] + more, by_item, e["groups"])
    return quantile(level, freedom) * math.sqrt(variance) <= delta / 2


def takes(e: Json, delta: float, level: float, more: int | None) -> bool:
    """Whether it takes just so many more seeds; None: no number of them, for the items alone are too few."""
    if more is None:
        return not enough(e, delta, level, MOST_SEEDS - e["seeds"])
    return enough(e, delta, level, more) and (more == 1 or not enough(e, delta, level, more - 1))
