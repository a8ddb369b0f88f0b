"""From per-matrix measures to means with 95 % intervals over images, and paired differences.

    row  = summary(closeness, groups)                        # {"relative_error": {"mean", "low", "high"}, …}
    pair = paired(network, pca, groups, "relative_error")    # network − PCA on the same matrices

groups: of every matrix the image it belongs to; all tiles of an image are drawn together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rankwise.score.bootstrap import intervals
from rankwise.score.factorization import Closeness

Array = NDArray[np.float64]
Estimate = dict[str, float | None]


def summary(found: Closeness, groups: Sequence[str], seed: int = 42) -> dict[str, Estimate]:
    """Mean over the matrices of every measure, with the interval of a bootstrap over images (None for one image)."""
    names = list(found.values)
    estimates = estimated(np.stack([array(found.values[name]) for name in names]), groups, seed)
    return dict(zip(names, estimates, strict=True))


def paired(first: Closeness, second: Closeness, groups: Sequence[str], measure: str, seed: int = 42) -> dict[str, Any]:
    """first − second of a measure on the same matrices."""
    difference = array(first.values[measure]) - array(second.values[measure])
    (estimate,) = estimated(difference[None], groups, seed)
    return {"network": first.method, "against": second.method, "measure": measure, **estimate}


def estimated(values: Array, groups: Sequence[str], seed: int) -> list[Estimate]:
    """Means of k rows (k, n) with their intervals. An image counts with all its matrices."""
    order = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    places = np.array([order[group] for group in groups])
    counts = np.bincount(places).astype(float)
    sums = np.stack([np.bincount(places, weights=row) for row in values])

    def means(drawn: NDArray[np.intp]) -> Array:
        found: Array = sums[:, drawn].sum(-1) / counts[drawn].sum(-1)
        return found

    spans: Sequence[tuple[float | None, float | None]] = intervals(means, len(order), seed=seed) or [
        (None, None)
    ] * len(values)
    return [
        {"mean": float(row.mean()), "low": low, "high": high} for row, (low, high) in zip(values, spans, strict=True)
    ]


def array(values: Tensor) -> Array:
    found: Array = values.double().cpu().numpy()
    return found
