"""From paired runs to words: better, worse, equivalent within δ, or undecided and by how many seeds.

    effect = measure_effect(first - second, tokens)     # seeds × groups of items, the same seeds and items for both
    judge({"energy vs uniform": effect, …}, 0.02)      # Holm over all contrasts, a verdict for each

Two things vary: the seed of a run and the items it is scored on. Both are resampled, crossed: the pigeonhole bootstrap
(Owen 2007), which never understates the variance of a crossed mean. One fewer than there are is drawn at each level,
which makes the variance of few seeds unbiased (Rao and Wu 1988).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import need

LEVEL = 0.95
RESAMPLES = 2000
MOST_SEEDS = 100_000
WORDS = ("better", "worse", "equivalent", "undecided")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and items, or a difference of two, per token.

    error: standard error of the two-level bootstrap. degrees: of freedom, after Satterthwaite from both levels, for
    few seeds make the error itself uncertain. seed_variance, item_variance: of the mean, what each level adds.
    """

    estimate: float
    error: float
    degrees: float
    seeds: int
    groups: int
    seed_variance: float
    item_variance: float

    def half_width(self, level: float = LEVEL) -> float:
        """Of the two-sided interval at this level, by Student's t."""
        return float(student().ppf((1 + level) / 2, self.degrees)) * self.error

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        half = self.half_width(level)
        return self.estimate - half, self.estimate + half

    @property
    def p_difference(self) -> float:
        """Two-sided, of no difference at all."""
        return 2 * self.upper_tail(abs(self.estimate))

    def p_equivalence(self, smallest_effect: float) -> float:
        """Two one-sided tests (Schuirmann 1987): the larger p of "not above −δ" and "not below δ".

        Below 0.05 exactly where the 90 % interval lies within ±δ.
        """
        return max(self.upper_tail(self.estimate + smallest_effect), self.upper_tail(smallest_effect - self.estimate))

    def upper_tail(self, distance: float) -> float:
        """p of a mean this far above 0 by chance; without any spread it is certain one way or the other."""
        if self.error == 0:
            return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
        return float(student().sf(distance / self.error, self.degrees))

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval()
        return asdict(self) | {"low": low, "high": high}


@dataclass(frozen=True)
class Verdict:
    """Result of a contrast. p-values after Holm; more_seeds: for `undecided`, None where seeds alone cannot decide."""

    word: str
    effect: Effect
    p_difference: float
    p_equivalence: float
    more_seeds: int | None = None

    def as_dict(self) -> dict[str, Any]:
        rest = {"p_difference": self.p_difference, "p_equivalence": self.p_equivalence, "more_seeds": self.more_seeds}
        return {"verdict": self.word} | self.effect.as_dict() | rest


def student() -> Any:
    return need("scipy.stats", extra="eval").t


def by_group(values: Array, groups: Sequence[str]) -> Array:
    """Sums over the items of each group, groups in order of first appearance: (…, items) → (…, groups)."""
    names = {name: position for position, name in enumerate(dict.fromkeys(groups))}
    total = np.zeros((*values.shape[:-1], len(names)))
    np.add.at(total.T, [names[name] for name in groups], values.T)
    return total


def measure_effect(sums: Array, weights: Array, *, resamples: int = RESAMPLES, seed: int = 42) -> Effect:
    """The ratio Σ sums ÷ Σ weights of a mean run, with its error.

    Args:
        sums: (seeds, groups): of losses in nats, or of their paired differences.
        weights: (groups,): tokens, the same for every seed.
        seed: of the resampling; the same resamples for every effect of the same shape.

    Raises ValueError for fewer than two seeds or groups, which have no spread.
    """
    seeds, groups = sums.shape
    if seeds < 2 or groups < 2:
        raise ValueError(f"an interval needs two seeds and two groups of items, got {seeds} and {groups}")
    estimate = float(sums.sum() / (seeds * weights.sum()))
    per_seed = sums.sum(1) / weights.sum()
    influence = (sums.mean(0) - estimate * weights) / weights.mean()
    seed_variance, item_variance = (float(each.var(ddof=1) / len(each)) for each in (per_seed, influence))
    spread = float(resampled(sums, weights, resamples, seed).std(ddof=1))
    error = spread if spread > 1e-12 * max(1.0, abs(estimate)) else 0.0  # rounding of equal numbers is no spread
    degrees = satterthwaite((seed_variance, seeds - 1), (item_variance, groups - 1))
    return Effect(estimate, error, degrees, seeds, groups, seed_variance, item_variance)


def resampled(sums: Array, weights: Array, resamples: int, seed: int) -> Array:
    """The ratio of each of the resamples, seeds and groups drawn independently."""
    generator = np.random.default_rng(seed)
    seeds, groups = sums.shape
    of_seeds = generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), resamples)
    of_groups = generator.multinomial(groups - 1, np.full(groups, 1 / groups), resamples)
    ratios: Array = ((of_seeds @ sums) * of_groups).sum(1) / ((seeds - 1) * (of_groups @ weights))
    return ratios


def satterthwaite(*parts: tuple[float, int]) -> float:
    """Degrees of freedom of a sum of independent variances (variance, its own degrees)."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return float(min(degrees for _, degrees in parts))
    return total**2 / sum(variance**2 / degrees for variance, degrees in parts)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): reject those below α and the family's error stays below α."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def judge(
    effects: Mapping[str, Effect], smallest_effect: float, *, lower_is_better: bool = True, level: float = LEVEL
) -> dict[str, Verdict]:
    """Judge every primary contrast; an effect is first − second.

    Tests of difference and of equivalence are two families, each adjusted by Holm. Where both reject, the difference
    is real and below δ: `equivalent` is then the more useful word.
    """
    found = words_of(list(effects.values()), smallest_effect, lower_is_better=lower_is_better, level=level)
    verdicts = {}
    for (name, effect), (word, p, q) in zip(effects.items(), found, strict=True):
        alpha = (1 - level) / len(effects)
        more = further_seeds(effect, smallest_effect, 1 - alpha) if word == "undecided" else None
        verdicts[name] = Verdict(word, effect, p, q, more)
    return verdicts


def words_of(
    effects: Sequence[Effect], smallest_effect: float, *, lower_is_better: bool = True, level: float = LEVEL
) -> list[tuple[str, float, float]]:
    """Verdict, p of a difference and p of equivalence, both after Holm, of each effect."""
    different = holm([effect.p_difference for effect in effects])
    equal = holm([effect.p_equivalence(smallest_effect) for effect in effects])
    alpha, rows = 1 - level, []
    for effect, p, q in zip(effects, different, equal, strict=True):
        better = (effect.estimate < 0) == lower_is_better
        word = "equivalent" if q < alpha else "undecided" if p >= alpha else "better" if better else "worse"
        rows.append((word, p, q))
    return rows


def further_seeds(effect: Effect, smallest_effect: float, level: float = LEVEL) -> int | None:
    """About how many more seeds bring the half-width down to δ/2, where one of the other verdicts must come out.

    None where the items' share of the error alone is larger: then only more items help.
    """
    inflation = effect.error**2 / max(effect.seed_variance + effect.item_variance, 1e-300)
    per_seed = effect.seed_variance * effect.seeds

    def half_width(seeds: int) -> float:
        variance = inflation * (per_seed / seeds + effect.item_variance)
        degrees = satterthwaite((per_seed / seeds, seeds - 1), (effect.item_variance, effect.groups - 1))
        return float(student().ppf((1 + level) / 2, degrees)) * math.sqrt(variance)

    if half_width(MOST_SEEDS) > smallest_effect / 2:
        return None
    counts = range(effect.seeds, MOST_SEEDS)
    return max(1, bisect_left(counts, True, key=lambda seeds: half_width(seeds) <= smallest_effect / 2))


def decides(effects: Sequence[Effect], smallest_effect: float) -> bool:
    """The stop rule: every 95 % half-width is at most δ/2."""
    return all(effect.half_width() <= smallest_effect / 2 for effect in effects)


def assay_works(bad_against: Sequence[Effect], *, lower_is_better: bool = True, level: float = LEVEL) -> bool:
    """Whether a plan known to be bad scored worse than any arm it was compared with (one-sided, Holm)."""
    sign = 1 if lower_is_better else -1
    p_values = [effect.upper_tail(sign * effect.estimate) for effect in bad_against]
    return any(p < 1 - level for p in holm(p_values))
