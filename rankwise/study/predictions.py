"""What a study's author expects, and what the study could find: fixed before the first run, shown beside the verdicts.

predicted(config, arms, contrasts)["fisher vs uniform"]      PredictedOutcome("equivalent", "a published null")
power(config, contrasts=3)                                   shares of verdicts where the true difference is 0, or δ
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.errors import UsageError
from rankwise.options.study import StudyConfig
from rankwise.study.arms import INVERTED, VERSUS, contrast
from rankwise.study.evidence import WORDS, Effect, satterthwaite, words_of

NEGATED = ("not better", "not worse")
STUDIES = 1000  # simulated for one line of the table: a share has a standard error of at most 1.6 %


@dataclass(frozen=True)
class PredictedOutcome:
    """Of a contrast: a verdict, `not better` or `not worse`, and why."""

    word: str
    reason: str

    def holds(self, verdict: str) -> bool | None:
        """Whether a verdict is the predicted one; None where it decides nothing that was predicted."""
        if verdict == self.word:
            return True
        if verdict not in WORDS or verdict == "undecided":
            return None
        return self.word in NEGATED and verdict != self.word.removeprefix("not ")

    def beside(self, verdict: str) -> dict[str, Any]:
        """What study.json says of it beside the verdict."""
        return {"prediction": self.word, "predicted_because": self.reason, "as_predicted": self.holds(verdict)}


def predicted(
    config: StudyConfig, arms: tuple[str, ...], contrasts: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], PredictedOutcome]:
    """The predictions by contrast. UsageError for one that cannot be read, and of a contrast that nothing judges."""
    found: dict[tuple[str, str], PredictedOutcome] = {}
    for text in config.predictions:
        pair, colon, rest = text.partition(": ")
        word, _, reason = (part.strip() for part in rest.partition(":"))
        if not colon or word not in (*WORDS, *NEGATED):
            raise UsageError(
                f"--predictions takes `ARM vs ARM: OUTCOME: REASON`; got {text!r}; outcomes are "
                + ", ".join((*WORDS, *NEGATED))
            )
        names = contrast(pair, arms, "--predictions")
        if names not in contrasts and names[0].partition(":")[0] != INVERTED:
            raise UsageError(
                f"--predictions {pair!r}: no verdict is given on it; predict primary contrasts "
                f"({', '.join(VERSUS.join(each) for each in contrasts)}), or what `{INVERTED}` does"
            )
        if names in found:
            raise UsageError(f"--predictions {pair!r} is there twice")
        found[names] = PredictedOutcome(word, reason)
    return found


def power(config: StudyConfig, contrasts: int) -> list[dict[str, Any]]:
    """Shares of the verdicts on a contrast, at the fewest and the most seeds, where all primary contrasts differ by
    nothing, and by δ (first is better); empty where no standard deviations are assumed.

    Simulated: a mean over seeds and items with the assumed spread, its error as uncertain as that many seeds and items
    make it, judged with the others by Holm, as in the study. Whether an arm differs from seed to seed and from item to
    item as assumed is known only afterwards.
    """
    if config.assumed_seed_sd is None or config.assumed_item_sd is None:
        return []
    rows = []
    for seeds in dict.fromkeys((config.first_seeds, config.most_seeds)):
        for true in (0.0, -config.smallest_effect):
            spread = (config.assumed_seed_sd, config.assumed_item_sd)
            shares = shares_of_verdicts(true, spread, (seeds, config.test_size), contrasts, config.smallest_effect)
            rows.append({"true": true, "seeds": seeds, "contrasts": contrasts, **shares})
    return rows


def shares_of_verdicts(
    true: float, spread: tuple[float, float], sizes: tuple[int, int], contrasts: int, smallest_effect: float
) -> Mapping[str, float]:
    """Of simulated studies. spread, sizes: standard deviation and number of seeds, and of items."""
    generator = np.random.default_rng(0)
    variances = [deviation**2 / count for deviation, count in zip(spread, sizes, strict=True)]
    counts = dict.fromkeys(WORDS, 0)
    for _ in range(STUDIES):
        effects = []
        for estimate in generator.normal(true, sum(variances) ** 0.5, contrasts):
            seen = [
                variance * generator.chisquare(count - 1) / (count - 1)
                for variance, count in zip(variances, sizes, strict=True)
            ]
            degrees = satterthwaite(*((part, count - 1) for part, count in zip(seen, sizes, strict=True)))
            effects.append(Effect(float(estimate), sum(seen) ** 0.5, degrees, *sizes, *seen))
        for word, _, _ in words_of(effects, smallest_effect):
            counts[word] += 1
    return {word: count / (STUDIES * contrasts) for word, count in counts.items()}


def power_lines(config: StudyConfig, contrasts: int) -> list[str]:
    """The table in words, or how to get it."""
    found = power(config, contrasts)
    if not found:
        return ["power: unknown without --assumed_seed_sd and --assumed_item_sd (a pilot's, of paired differences)"]
    return [
        f"power: at {row['seeds']} seeds, a true difference of {abs(row['true']):g} comes out "
        + ", ".join(f"{word} {row[word]:.0%}" for word in WORDS)
        for row in found
    ]
