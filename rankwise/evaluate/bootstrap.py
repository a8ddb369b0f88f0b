"""Confidence intervals of scores, by scipy: Wilson's for shares of the items, a percentile bootstrap for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import need

RESAMPLES = 1000
LEVEL = 0.95
Array = NDArray[np.float64]


def check_installed() -> None:
    """Raise UsageError naming the extra where scipy is missing: before hours of evaluation, not after."""
    need("scipy.stats", extra="eval")


def intervals(
    statistic: Callable[[NDArray[np.intp]], Array], n: int, *, seed: int = 42, resamples: int = RESAMPLES
) -> list[tuple[float, float]] | None:
    """95 % intervals of k statistics of n items; None for fewer than two items, which have no spread.

    statistic: positions (batch, n) of resampled items → values (k, batch).
    """
    if n < 2:
        return None
    result = need("scipy.stats", extra="eval").bootstrap(
        (np.arange(n),),
        lambda positions, axis=-1: statistic(np.atleast_2d(positions)),
        n_resamples=resamples,
        batch=max(1, 2**20 // n),
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return [(float(a), float(b)) for a, b in zip(np.ravel(low), np.ravel(high), strict=True)]


def means(values: Array, *, seed: int = 42) -> list[tuple[float, float]] | None:
    """95 % intervals of the means of k rows of item values (k, n)."""
    return intervals(lambda positions: values[:, positions].mean(axis=-1), values.shape[1], seed=seed)


def named(names: Sequence[str], spread: Sequence[tuple[float, float]] | None) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals by metric. One without any width is left out: where all items score alike, every resample
    does, and says nothing of how sure the score is."""
    pairs = zip(names, spread, strict=True) if spread else ()
    return {name: (low, high) for name, (low, high) in pairs if low < high}


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of 1; it has a width at 0 and at 1 too."""
    found = need("scipy.stats", extra="eval").binomtest(right, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def percent(right: int, n: int) -> tuple[float, float]:
    """The same on the scale 0 to 100."""
    low, high = wilson(right, n)
    return 100 * low, 100 * high


def f1_percent(right: int, named_or_true: int) -> tuple[float, float]:
    """95 % interval of an F1, 0 to 100: right ones among all items that are of the class or were taken for it is a
    share J, and F1 = 2J / (1 + J) rises with it (Lam et al. 2023, the indirect Wilson method)."""
    low, high = wilson(right, named_or_true)
    return 200 * low / (1 + low), 200 * high / (1 + high)
