"""Conclusions from trials: learning rates within δ of the best, the smallest sufficient rank, the prior's rate.

    scores = TrialLosses({TrialRun(16, 2e-4, seed=1): sums, …}, tokens, base)   # summed by group of held-out items
    gain = scores.gain(trial)                                              # base − trial, with its interval
    rates = find_rates(scores.curve(16, "uniform", 1), delta, gain)        # the set, its middle, the parabola's vertex
    ranks = find_rank(scores, best, delta)                                 # top down by the upper bound of the excess

All differences are paired by item and seed. Few seeds say little of their own spread, so it is pooled over all arms
that share seeds (`TrialLosses.noise`); with one seed there is none, and then no rank is given up (`undecided`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rankwise.study.evidence import LEVEL, MOST_SEEDS, Array, Effect, satterthwaite, student

UNIFORM = "uniform"
CLIFF = 0.5  # a rate that loses this share of the gain against the best one, or that diverged, is a cliff
Curve = Mapping[float, float]  # learning rate → loss per token; infinite where the trial diverged


@dataclass(frozen=True)
class TrialRun:
    """A short training run. placement: `uniform`, or which sites or which rule the same parameters are spent by."""

    rank: int
    learning_rate: float
    seed: int
    placement: str = UNIFORM

    @property
    def arm(self) -> TrialRun:
        """What trials that differ in their seed alone have in common."""
        return replace(self, seed=0)


@dataclass(frozen=True)
class SeedNoise:
    """Variance of one run's loss per token from seed to seed, with the arms' and the seeds' own means taken out."""

    variance: float
    degrees: int


@dataclass(frozen=True)
class TrialLosses:
    """Held-out losses of trials, in nats.

    sums: trial → summed loss of each group of items (groups,); not finite for a trial that diverged. tokens (groups,):
    learnt tokens. base (groups,): sums of the model without any adapter.
    """

    sums: Mapping[TrialRun, Array]
    tokens: Array
    base: Array

    def loss(self, trial: TrialRun) -> float:
        """Nats per token; infinite for a trial that diverged."""
        total = float(self.sums[trial].sum() / self.tokens.sum())
        return total if math.isfinite(total) else math.inf

    def curve(self, rank: int, placement: str, seed: int) -> dict[float, float]:
        """Loss by learning rate, ascending; infinite from the lowest rate on that diverged for any of its seeds."""
        arms = [t for t in self.sums if (t.rank, t.placement, t.seed) == (rank, placement, seed)]
        limit = min((arm.learning_rate for arm in arms if self.diverged(arm)), default=math.inf)
        found = {arm.learning_rate: self.loss(arm) if arm.learning_rate < limit else math.inf for arm in arms}
        return dict(sorted(found.items()))

    def seeds(self, arm: TrialRun) -> list[int]:
        """Seeds of an arm's finite trials."""
        return sorted(t.seed for t in self.sums if t.arm == arm.arm and math.isfinite(self.loss(t)))

    def diverged(self, arm: TrialRun) -> bool:
        """Whether any of an arm's trials did."""
        return any(trial.arm == arm.arm and not math.isfinite(self.loss(trial)) for trial in self.sums)

    def gain(self, trial: TrialRun) -> Effect:
        """base − trial. One seed: the interval is over items only."""
        return effect((self.base - self.sums[trial])[None], self.tokens, None)

    def mean(self, arm: TrialRun) -> Effect:
        """Mean loss of an arm over its seeds; the seeds' spread is the pooled one, where there is one."""
        return effect(np.stack([self.sums[replace(arm, seed=s)] for s in self.seeds(arm)]), self.tokens, self.noise, 1)

    def excess(self, arm: TrialRun, other: TrialRun) -> Effect | None:
        """arm − other over the seeds that both have; None where they share none."""
        shared = sorted({*self.seeds(arm)} & {*self.seeds(other)})
        pairs = [self.sums[replace(arm, seed=s)] - self.sums[replace(other, seed=s)] for s in shared]
        return effect(np.stack(pairs), self.tokens, self.noise) if pairs else None

    @property
    def noise(self) -> SeedNoise | None:
        """Pooled over all arms by their sets of seeds: residuals of loss ~ arm + seed. None where no two arms share two
        seeds."""
        blocks: dict[tuple[int, ...], list[list[float]]] = {}
        for arm in dict.fromkeys(t.arm for t in self.sums):
            seeds = self.seeds(arm)
            if len(seeds) > 1:
                blocks.setdefault(tuple(seeds), []).append([self.loss(replace(arm, seed=s)) for s in seeds])
        squares, degrees = 0.0, 0
        for block in map(np.array, blocks.values()):
            residuals = block - block.mean(0) - block.mean(1, keepdims=True) + block.mean()
            squares += float((residuals**2).sum())
            degrees += (block.shape[0] - 1) * (block.shape[1] - 1)
        return SeedNoise(squares / degrees, degrees) if degrees else None


def effect(sums: Array, tokens: Array, noise: SeedNoise | None, runs: int = 2) -> Effect:
    """Mean over seeds of sums (seeds, groups) per token. runs: how many runs each row is the difference of.

    The variance over items is that of the ratio's linearization, over seeds the pooled one; degrees of freedom after
    Satterthwaite. Without noise the error is that of the items alone.
    """
    seeds, groups = sums.shape
    estimate = float(sums.sum() / (seeds * tokens.sum()))
    influence = (sums.mean(0) - estimate * tokens) / tokens.mean()
    of_items = float(influence.var(ddof=1) / groups)
    of_seeds = runs * noise.variance / seeds if noise else 0.0
    degrees = satterthwaite((of_seeds, noise.degrees if noise else 1), (of_items, groups - 1))
    return Effect(estimate, math.sqrt(of_seeds + of_items), degrees, seeds, groups, of_seeds, of_items)


def upper_bound(found: Effect, level: float = LEVEL) -> float:
    """One-sided."""
    return found.estimate + float(student().ppf(level, found.degrees)) * found.error


@dataclass(frozen=True)
class Rates:
    """Learning rates of one rank.

    best: the best that was tried. within: those tried without a gap around the best whose loss is at most δ above it.
    advised: the middle of these, and highest: the highest that may be advised; the last before a cliff only where no
    lower rate was tried. vertex: the minimum of the
    parabola through the best and its neighbours in log rate; None with the reason in `why`. cliff: the lowest rate
    above the best at which training diverged or lost half of the gain; None where no such rate was tried.
    """

    best: float
    within: tuple[float, ...]
    advised: float
    highest: float
    vertex: float | None
    why: str
    cliff: float | None
    at_edge: bool


def find_rates(curve: Curve, delta: float, gain: float) -> Rates:
    """gain: loss of the base less that of the best trial. ValueError where every trial diverged."""
    rates = sorted(curve)
    best = min(rates, key=lambda rate: (curve[rate], rate))
    if not math.isfinite(curve[best]):
        raise ValueError("every learning rate diverged")
    at, limit = rates.index(best), curve[best] + delta
    low, high = at, at
    while low > 0 and curve[rates[low - 1]] <= limit:
        low -= 1
    while high + 1 < len(rates) and curve[rates[high + 1]] <= limit:
        high += 1
    cliff = next((rate for rate in rates[at + 1 :] if not curve[rate] <= curve[best] + CLIFF * gain), None)
    within = rates[low : high + 1]
    last = None if cliff is None else rates[rates.index(cliff) - 1]
    safe = [rate for rate in within if rate != last] or [rates[max(0, at - 1)]]
    vertex, why = find_vertex(curve, at)
    edge = at in (0, len(rates) - 1)
    return Rates(best, tuple(within), middle(within, safe), max(safe), vertex, why, cliff, edge)


def middle(within: Sequence[float], allowed: Sequence[float]) -> float:
    """The allowed rate nearest to the geometric mean of the set's ends; of two equally near the lower."""
    centre = (math.log(within[0]) + math.log(within[-1])) / 2
    return min(allowed, key=lambda rate: (round(abs(math.log(rate) - centre), 9), rate))


LENGTH_EXPONENT = -0.11  # best rate ∝ steps^p, benchmarks/run_length.py


@dataclass(frozen=True)
class LongRun:
    """A run longer than the short ones: its learning rate is the middle of low to high."""

    steps: int
    low: float
    high: float
    learning_rate: float


def long_run(rates: Rates, short: int, steps: int) -> LongRun:
    """Learning rate of a run of so many steps, from the rates of runs of `short` steps.

    The longer a run, the lower its best rate. By how much was measured on one model only, so the interval is widened,
    not moved: its lower end is multiplied by (steps / short)^p. A run that is no longer gets the short runs' rate.
    """
    low = min(rates.within[0], rates.highest)
    if steps <= short:
        return LongRun(steps, low, rates.highest, rates.advised)
    low = rounded(low * (steps / short) ** LENGTH_EXPONENT)
    return LongRun(steps, low, rates.highest, rounded(math.sqrt(low * rates.highest)))


def find_vertex(curve: Curve, at: int) -> tuple[float | None, str]:
    """Minimum of the parabola in log rate through a point and its two neighbours, or None and why there is none."""
    rates = sorted(curve)
    if at in (0, len(rates) - 1):
        return None, "the best rate is at the edge of those tried"
    x, y = np.log(rates[at - 1 : at + 2]), np.array([curve[rate] for rate in rates[at - 1 : at + 2]])
    if not np.isfinite(y).all():
        return None, "a neighbour of the best rate diverged"
    second, first, _ = np.polyfit(x - x[1], y, 2)
    if second <= 0:
        return None, "the losses around the best rate are not convex"
    vertex = float(np.exp(x[1] - first / (2 * second)))
    if not rates[at - 1] < vertex < rates[at + 1]:
        return None, "the parabola's vertex lies outside its three points"
    return vertex, ""


def refinement(curve: Curve) -> float:
    """The rate half a step from the best towards its better neighbour; at an edge, or by a neighbour that diverged,
    towards the other one."""
    rates = sorted(curve)
    at = min(range(len(rates)), key=lambda index: (curve[rates[index]], index))
    around = [index for index in (at - 1, at + 1) if 0 <= index < len(rates)]
    return rounded(math.sqrt(rates[at] * rates[min(around, key=lambda index: curve[rates[index]])]))


def growth(curve: Curve, ratio: float) -> float | None:
    """The next rate beyond an edge that is best; None where the best lies inside. Where all diverged: a lower one."""
    rates = sorted(curve)
    best = min(rates, key=lambda rate: (curve[rate], rate))
    if not math.isfinite(curve[best]) or best == rates[0]:
        return rounded(rates[0] / ratio)
    return rounded(rates[-1] * ratio) if best == rates[-1] else None


def rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


@dataclass(frozen=True)
class RankExcess:
    """A smaller rank against the largest.

    verdict: `enough`, `worse`, `undecided`, or `diverged` where one of its seeds did. more_seeds: for `undecided`.
    """

    rank: int
    excess: Effect | None
    bound: float | None
    verdict: str
    more_seeds: int | None


@dataclass(frozen=True)
class Rank:
    """The smallest rank that is enough, by the bound and by the estimate alone. steps: descending."""

    by_bound: int
    by_estimate: int
    steps: tuple[RankExcess, ...]


def find_rank(scores: TrialLosses, arms: Mapping[int, TrialRun], delta: float) -> Rank:
    """arms: rank → its best arm. Top down from the largest: each next rank is taken as long as it is enough."""
    largest, *smaller = sorted(arms, reverse=True)
    steps = [rank_step(scores, arms[rank], arms[largest], delta) for rank in smaller]
    by_bound = by_estimate = largest
    for step in steps:
        if step.verdict != "enough":
            break
        by_bound = step.rank
    for step in steps:
        if step.excess is None or step.excess.estimate > delta:
            break
        by_estimate = step.rank
    return Rank(by_bound, by_estimate, tuple(steps))


def rank_step(scores: TrialLosses, arm: TrialRun, largest: TrialRun, delta: float) -> RankExcess:
    excess, noise = scores.excess(arm, largest), scores.noise
    if excess is None or scores.diverged(arm):
        return RankExcess(arm.rank, None, None, "diverged", None)
    if noise is None:
        return RankExcess(arm.rank, excess, None, "undecided", None)
    bound, lower = upper_bound(excess), 2 * excess.estimate - upper_bound(excess)
    verdict = "enough" if bound <= delta else "worse" if lower > delta else "undecided"
    more = further_seeds(excess, noise, delta) if verdict == "undecided" else None
    return RankExcess(arm.rank, excess, bound, verdict, more)


def further_seeds(found: Effect, noise: SeedNoise, delta: float) -> int | None:
    """How many more seeds bring the bound below δ or above it, at this estimate; None where only more items would.

    The pooled degrees of freedom grow in proportion to the seeds beyond the first.
    """
    distance, one = abs(delta - found.estimate), found.seed_variance * found.seeds

    def half(seeds: int) -> float:
        degrees = max(1, round(noise.degrees * (seeds - 1) / max(1, found.seeds - 1)))
        both = satterthwaite((one / seeds, degrees), (found.item_variance, found.groups - 1))
        return float(student().ppf(LEVEL, both)) * math.sqrt(one / seeds + found.item_variance)

    if half(MOST_SEEDS) > distance:
        return None
    return max(1, bisect_left(range(found.seeds, MOST_SEEDS), True, key=lambda seeds: half(seeds) <= distance))


def smallest_effect(gain: Effect, asked: float | None) -> float:
    """δ: the difference in nats per token below which two settings are as good as one another.

    As asked, or 1 % of the gain of the rate stage's best trial, at least 0.01.
    """
    return asked if asked is not None else max(0.01, 0.01 * gain.estimate)


PRIOR_RATE, PRIOR_HIDDEN, UNCALIBRATED = 5e-4, 2000, 0.4
PRIOR_EXPONENTS = {"llama": 0.78, "mistral": 0.78, "smollm": 0.78, "qwen": 0.08}  # by the start of model_type


def prior_rate(model_type: str, hidden: int) -> tuple[float, bool]:
    """Learning rate before any trial, 5e-4·(2000/hidden)^p, and whether p was calibrated for the family.

    Source: the rates that tinker-cookbook gives for LoRA by hidden size. Other families get p = 0.4, a compromise.
    """
    known = next((p for start, p in PRIOR_EXPONENTS.items() if model_type.startswith(start)), None)
    return PRIOR_RATE * (PRIOR_HIDDEN / hidden) ** (UNCALIBRATED if known is None else known), known is not None


def prior_of(model_config: Any) -> tuple[float, bool]:
    text = model_config.get_text_config()
    return prior_rate(text.model_type, text.hidden_size)


def first_grid(prior: float, points: int, ratio: float) -> list[float]:
    """Rates around the prior, evenly spaced on a log scale."""
    return [rounded(prior * ratio ** (index - (points - 1) / 2)) for index in range(points)]
