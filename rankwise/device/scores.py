"""The content of validation.json: how good the shipped model is under the device's conditions, and item by item.

    predictions, scores, records of the answers ──▶ {"accuracy": 0.87, "per_class": {…}, "confusion_matrix": […], …}

Shares of 1, as scikit-learn's reports have them; a task without labels has its own metrics instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rankwise.data.example import Example
from rankwise.data.label_answer import UNPARSED
from rankwise.device.llama.generator import Answered
from rankwise.errors import need
from rankwise.evaluate.answers import is_right
from rankwise.evaluate.bootstrap import LEVEL, wilson
from rankwise.evaluate.classify import label_set, predicted_label, true_label
from rankwise.evaluate.predictions import EvaluationResult, Prediction
from rankwise.files.document import Document

DOCUMENT = Document(
    "validation.json",
    "rankwise-validation/1",
    "a validation",
    "rankwise validate",
    ("outtype", "by_outtype", "parity", "verdict", "reference", "failures"),
)


def rights(task: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[bool] | None:
    """Whether each answer is right: the label it names, or its words; None for texts that are only more or less
    like a reference."""
    if all(example.facts.get("labels") for example in examples):
        labels = label_set(examples)
        pairs = zip(predictions, examples, strict=True)
        return [predicted_label(one.prediction, labels) == true_label(item, labels) for one, item in pairs]
    if task in ("conversations", "cota"):
        return [is_right(task, one.prediction, one.references) for one in predictions]
    return None


def scores(result: EvaluationResult, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, Any]:
    """Aggregate scores of one runtime."""
    right = rights(result.task, predictions, examples)
    found: dict[str, Any] = {"task": result.task, "method": "generation", "n": result.n}
    if right is not None:
        found |= {"accuracy": sum(right) / len(right), "interval": list(wilson(sum(right), len(right)))}
    details = result.settings.get("scoring", {})
    if "confusion" in details:
        return found | label_scores(details)
    return found | {"metrics": result.metrics, "intervals_95": result.intervals}


def label_scores(details: Mapping[str, Any]) -> dict[str, Any]:
    """The classifier's numbers (0 to 100, as evaluate has them) as shares of 1."""
    baseline = details["majority_baseline"]
    per_class = {
        label: {
            "precision": row["precision"] / 100,
            "recall": row["recall"] / 100,
            "f1_score": row["f1"] / 100,
            "support": row["n"],
        }
        for label, row in details["by_class"].items()
    }
    return {
        "majority_baseline": {"label": baseline["label"], "accuracy": baseline["accuracy"] / 100},
        "macro_f1": float(np.mean([row["f1_score"] for row in per_class.values()])),
        "per_class": per_class,
        "labels": details["labels"],
        "confusion_matrix": details["confusion"],
        "confusion_columns": [*details["labels"], UNPARSED],
        "unparsed": details["unparsed"],
    }


def items(
    task: str, predictions: Sequence[Prediction], examples: Sequence[Example], answers: Mapping[str, Answered]
) -> list[dict[str, Any]]:
    """One row per item. latency: seconds; confidence: probability of the whole answer."""
    right = rights(task, predictions, examples)
    rows = []
    for number, (one, example) in enumerate(zip(predictions, examples, strict=True)):
        answer = answers.get(one.id)
        labels = example.facts.get("labels")
        rows.append(
            {
                "image_id": one.id,
                "images": list(one.images),
                "true_label": true_label(example, labels) if labels else example.answer,
                "predicted_label": predicted_label(one.prediction, labels) if labels else one.prediction,
                "raw_output": one.prediction,
                "correct": None if right is None else right[number],
                "confidence": answer.confidence if answer else None,
                "latency": answer.seconds if answer else None,
            }
        )
    return rows


def latency(seconds: Sequence[float]) -> dict[str, float] | None:
    """Of the seconds of each request, the picture included; None without any."""
    return {"median": float(np.median(seconds)), "p95": float(np.quantile(seconds, 0.95))} if seconds else None


# --- when an app should say "unsure" ---------------------------------------------------------------------------------
#
# Looking for the best of many thresholds on the items that also judge it promises too much. Here they are tried in an
# order that is fixed beforehand, from the surest answer down, and the first that fails its test ends the search: then
# the level of one test holds for the threshold that was found (fixed-sequence testing; Angelopoulos et al. 2021,
# "Learn then Test").

ABSTAIN_LEVEL = 0.95


@dataclass(frozen=True)
class Abstention:
    """threshold: answer where the confidence is at least this, else say "unsure"; None where no threshold is known to
    give the precision. n: validation items; answered: those at or above the threshold; right: of these. low: one-sided
    95 % lower bound (Clopper-Pearson) of the precision above the threshold. why: a sentence where there is none."""

    min_precision: float
    n: int
    threshold: float | None = None
    answered: int = 0
    right: int = 0
    low: float | None = None
    why: str = ""

    @property
    def coverage(self) -> float:
        return self.answered / self.n if self.n else 0.0

    def as_dict(self) -> dict[str, Any]:
        precision = self.right / self.answered if self.answered else None
        known = {"coverage": self.coverage, "precision": precision, "level": ABSTAIN_LEVEL}
        return {
            **asdict(self),
            **known,
            "coverage_95": list(interval(self.answered, self.n)) if self.threshold is not None else None,
            "confidence": "product of the probabilities of all generated tokens, the end token's included, before any "
            "grammar or sampling",
        }


def abstention(rows: Sequence[Mapping[str, Any]], min_precision: float) -> Abstention:
    """rows: validation.json's predictions. What has no confidence counts as never answered."""
    judged = [row for row in rows if row.get("correct") is not None]
    known = [(float(row["confidence"]), bool(row["correct"])) for row in judged if row.get("confidence") is not None]
    n = len(judged)
    if not known:
        return Abstention(min_precision, n, why="no validated answer is right or wrong, or none has a confidence")
    least = fewest(min_precision, wrong=0)
    if len(known) < least:
        why = f"{len(known)} validated items are too few: {min_precision:.0%} takes {least}, all of them right"
        return Abstention(min_precision, n, why=why)
    return searched(sorted(known, key=lambda one: -one[0]), n, min_precision)


def searched(known: Sequence[tuple[float, bool]], n: int, min_precision: float) -> Abstention:
    """known: (confidence, right), the surest first; n: all items. Those of one confidence stay together.

    The first test stands where one wrong answer is not yet the end, if there are so many items.
    """
    all_known, best = len(known), None
    ends = [at for at in range(1, all_known + 1) if at == all_known or known[at][0] < known[at - 1][0]]
    start = fewest(min_precision, wrong=1)
    start = start if all_known >= start else fewest(min_precision, wrong=0)
    for count in [at for at in ends if at >= start]:
        right = sum(correct for _, correct in known[:count])
        low = lower_bound(right, count)
        if low < min_precision:
            break
        best = Abstention(min_precision, n, known[count - 1][0], count, right, low)
    if best:
        return best
    right = sum(correct for _, correct in known[:start])
    why = f"of the {start} surest answers {right} are right: that does not show a precision of {min_precision:.0%}"
    return Abstention(min_precision, n, why=why)


def fewest(min_precision: float, wrong: int) -> int:
    """Items of which at most `wrong` are wrong that show a precision, at the level."""
    count = math.ceil(math.log(1 - ABSTAIN_LEVEL) / math.log(min_precision))
    while lower_bound(count - wrong, count) < min_precision:
        count += 1
    return count


def lower_bound(right: int, n: int) -> float:
    """One-sided 95 % lower bound of a share, exact (Clopper-Pearson)."""
    test = need("scipy.stats", extra="eval").binomtest(right, n, alternative="greater")
    return float(test.proportion_ci(ABSTAIN_LEVEL, method="exact").low)


def interval(count: int, n: int) -> tuple[float, float]:
    """Two-sided 95 % interval of a share, exact."""
    found = need("scipy.stats", extra="eval").binomtest(count, n).proportion_ci(ABSTAIN_LEVEL, method="exact")
    return float(found.low), float(found.high)


# --- two models on the same items ------------------------------------------------------------------------------------
#
# low > -margin    not inferior         the worst that is plausible is still within the margin
# high < -margin   inferior             the best that is plausible is outside it
# else             undecided            and about how many items would tell

NOT_INFERIOR, INFERIOR, UNDECIDED = "not inferior", "inferior", "undecided"
POWER = 0.8  # for the number of items that would decide


@dataclass(frozen=True)
class Difference:
    """Accuracy of a form minus the largest's. lost, won: items that only the largest, only the form has right.

    low, high: 95 % interval by Newcombe's hybrid score method for paired proportions. p: exact McNemar, two-sided, of
    no difference at all; for information, the verdict is about the margin. needed: items that would decide with 80 %
    power were there truly no difference; of a form that is undecided.
    """

    lost: int
    won: int
    low: float
    high: float
    p: float
    verdict: str
    needed: int | None = None


def compared(form: Mapping[str, bool], largest: Mapping[str, bool], margin: float) -> Difference:
    """Compare a quantization type with the largest one: item id → right or not, of the same items."""
    both, won, lost, p = counted([form[name] for name in largest], list(largest.values()))
    low, high = paired_interval(both, won, lost, len(largest))
    verdict = NOT_INFERIOR if low > -margin else INFERIOR if high < -margin else UNDECIDED
    needed = _needed(won + lost, len(largest), margin) if verdict == UNDECIDED else None
    return Difference(lost, won, low, high, p, verdict, needed)


def counted(one: Sequence[bool], other: Sequence[bool]) -> tuple[int, int, int, float]:
    """Paired counts: right in both, only in the first, only in the second; and McNemar's exact p, two-sided."""
    pairs = list(zip(one, other, strict=True))
    both, won, lost = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True)))
    p = need("scipy.stats", extra="eval").binomtest(won, won + lost).pvalue if won + lost else 1.0
    return both, won, lost, float(p)


def paired_interval(both: int, first: int, second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares that were measured on the same n items.

    both: items that count in both shares; first, second: in that one only. Newcombe 1998 (Statistics in Medicine 17,
    2635), method 10: Wilson's intervals of the two shares, put together with their correlation, which is continuity
    corrected. Unlike a bootstrap it has a width where no item differs.
    """
    neither = n - both - first - second
    one, two = (both + first) / n, (both + second) / n
    (low1, high1), (low2, high2) = wilson(both + first, n), wilson(both + second, n)
    cross = both * neither - first * second
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = (max(cross - n / 2, 0.0) if cross > 0 else float(cross)) / math.sqrt(margins) if margins else 0.0
    below = _joined(one - low1, high2 - two, phi)
    above = _joined(high1 - one, two - low2, phi)
    return one - two - below, one - two + above


def _joined(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def _needed(differing: int, n: int, margin: float) -> int:
    """Items for an interval that stays above -margin in 80 % of the cases, if as many of them differ as is plausible
    (the upper end of Wilson's interval)."""
    normal = need("scipy.stats", extra="eval").norm
    z = normal.ppf(0.5 + LEVEL / 2) + normal.ppf(POWER)
    return max(n + 1, math.ceil(float(z) ** 2 * wilson(differing, n)[1] / margin**2))


@dataclass(frozen=True)
class AccuracyChange:
    """From one model to another on the same items. difference and interval: of accuracy, in shares of 1 (Newcombe's
    paired interval). won, lost: items that only the second, only the first has right. p: exact McNemar, two-sided."""

    n: int
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    won: int
    lost: int
    p: float


@dataclass(frozen=True)
class GainKept:
    """kept: share of the gain; None where the gain is not clearly above 0, and why says so."""

    gain: AccuracyChange
    kept: float | None
    why: str = ""


def change(before: Sequence[bool], after: Sequence[bool]) -> AccuracyChange:
    """Right or wrong of the same items, in the same order."""
    (both, won, lost, p), n = counted(after, before), len(before)
    interval = paired_interval(both, won, lost, n)
    return AccuracyChange(n, (both + lost) / n, (both + won) / n, (won - lost) / n, interval, won, lost, p)


def gain_kept(base: Sequence[bool], tuned: Sequence[bool], shipped: Sequence[bool]) -> GainKept:
    gain = change(base, tuned)
    if gain.interval[0] <= 0:
        low, high = (f"{100 * end:+.1f}" for end in gain.interval)
        return GainKept(gain, None, f"training's own gain is not clearly above 0 ({low} to {high} points)")
    return GainKept(gain, (sum(shipped) - sum(base)) / (sum(tuned) - sum(base)))
