"""The power of a registration once more, for check.py: simulated from the standard deviations that it assumes.

Two simulations of 1,000 studies agree within five standard errors: an edit of more than 11 percentage points is found,
and every edit after which the shares of a row do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from folder import SIGMAS, Study, unlike
from intervals import degrees, judged

STUDIES = 1000  # as rankwise simulates for a row


def power(s: Study) -> Iterator[str]:
    """Of the first registration: simulated once more from the deviations that it assumes."""
    content, where = s.first["content"], "power of preregistration.json"
    spread = (content.get("assumed_seed_sd"), content.get("assumed_item_sd"))
    if None in spread:
        yield from [f"there is none without assumed deviations, {where}"] if "power" in s.first else []
        return
    contrasts, told = len(s.primary(content)), s.first.get("power", [])
    counts = dict.fromkeys((content["first_seeds"], content["most_seeds"]))
    cases = [(count, true) for count in counts for true in (0.0, -content["smallest_effect"])]
    if [(row["seeds"], row["true"], row["contrasts"]) for row in told] != [(*case, contrasts) for case in cases]:
        yield f"the seeds, differences or contrasts are not those registered, {where}"
        return
    for row, (count, true) in zip(told, cases, strict=True):
        sizes = (count, content["test_size"])
        own = simulated(true, spread, sizes, contrasts, content["smallest_effect"])
        yield from unlike({"sum": sum(row[word] for word in own)}, {"sum": 1.0}, where)
        for word, share in own.items():
            mean = (share + row[word]) / 2
            if abs(share - row[word]) > SIGMAS * math.sqrt(2 * mean * (1 - mean) / STUDIES):
                yield f"{word} at {count} seeds is {row[word]:.1%} and should be about {share:.1%}, {where}"


def simulated(
    true: float, spread: tuple[float, float], sizes: tuple[int, int], contrasts: int, delta: float
) -> dict[str, float]:
    """Word → its share where all contrasts truly differ by `true`, their error estimated from as many seeds and items
    (sizes) as a study has. spread: standard deviations from seed to seed and from item to item."""
    generator, words = np.random.default_rng(1), dict.fromkeys(("better", "worse", "equivalent", "undecided"), 0)
    by_seed, by_item = (deviation**2 / count for deviation, count in zip(spread, sizes, strict=True))
    for _ in range(STUDIES):
        effects = []
        for estimate in true + math.sqrt(by_seed + by_item) * generator.standard_normal(contrasts):
            seeds, items = (
                variance * generator.chisquare(count - 1) / (count - 1)
                for variance, count in zip((by_seed, by_item), sizes, strict=True)
            )
            freedom = degrees(seeds, sizes[0], items, sizes[1])
            effects.append({"estimate": float(estimate), "error": math.sqrt(seeds + items), "degrees": freedom})
        for row in judged(effects, delta):
            words[row["verdict"]] += 1
    return {word: count / (STUDIES * contrasts) for word, count in words.items()}
