"""How sure a score is: percentile bootstrap over the scored items, by scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import need

RESAMPLES = 1000
LEVEL = 0.95
Array = NDArray[np.float64]


def check_installed() -> None:
    """UsageError naming the extra where scipy is missing: before hours of evaluation, not after."""
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
