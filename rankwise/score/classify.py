"""Classification: a label chosen by its likelihood or found in a generated text, and what such guesses are worth.

    Generator ── ByLikelihood ──▶ predictions with log-likelihoods ─┐
    Generator ────────────────▶ predictions with texts ─────────────┴─ score_labels ──▶ Scores

All numbers on the scale 0 to 100. `confusion_table` and `class_table` read the details of a result for files and eyes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.data.example import Example
from rankwise.data.label_answer import UNPARSED, found_label, label_called
from rankwise.errors import DataError, need
from rankwise.score import bootstrap
from rankwise.score.generate import Generated, GenerationSettings, Generator
from rankwise.score.predictions import Prediction
from rankwise.score.result import Scores

BY_CLASS = ("precision", "recall", "f1")
LIKELIHOOD = "log-likelihood of the label and its end token, not normalised by length; a tie goes to the first label"
GENERATION = "the label that the generated text is, or the only one that it names; else wrong (unparsed)"


@dataclass(frozen=True)
class ByLikelihood:
    """An engine whose answer is the likeliest of the labels, with the log-likelihoods of all.

    A label counts with the end token behind it, as training sees it: "this answer and nothing more". These are
    disjoint events, so their probabilities compare as they are, whatever the labels' lengths.
    """

    generator: Generator
    labels: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the engine without decoding, which has no part in this."""
        decoding = GenerationSettings().deciding
        kept = {name: value for name, value in self.generator.settings.items() if name not in decoding}
        return kept | {"classify": "likelihood", "labels": list(self.labels)}

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        for found in self.generator.label_scores(examples, self.labels):
            best = max(self.labels, key=found.log_likelihoods.__getitem__)
            yield Generated(found.position, found.prompt, best, found.log_likelihoods)


def label_set(examples: Sequence[Example]) -> tuple[str, ...]:
    """The classes of these samples' task, in its own order; every sample names all of them."""
    named = examples[0].facts.get("labels") if examples else None
    if not named:
        raise DataError("nothing to classify: no sample names the classes that there are")
    return tuple(named)


def check_installed() -> None:
    """UsageError naming the extra where a library is missing: before hours of evaluation, not after."""
    for module in ("sklearn.metrics", "scipy.stats"):
        need(module, extra="eval")


def score_labels(
    predictions: Sequence[Prediction], examples: Sequence[Example], *, labels: Sequence[str], seed: int = 42
) -> Scores:
    """Accuracy, macro F1, and precision, recall and F1 of each class (`f1_neutral`), with 95 % intervals: Wilson's of
    shares and of F1, a bootstrap of the mean of F1s.

    A sample's own answer is its true label. Details hold the confusion matrix (rows: true labels, in the order of
    `labels`; columns: guesses, `unparsed` last), the numbers by class, and the majority baseline.
    """
    if not predictions:
        raise DataError("nothing to score: there are no predictions")
    gold = [true_label(example, labels) for example in examples]
    by_likelihood = all(prediction.scores is not None for prediction in predictions)
    guesses = [guess(prediction.prediction, labels) for prediction in predictions]
    counts = need("sklearn.metrics", extra="eval").confusion_matrix(gold, guesses, labels=[*labels, UNPARSED])
    by_class = _by_class(gold, guesses, labels)
    names = ["accuracy", "macro_f1", *(f"{kind}_{label}" for kind in BY_CLASS for label in labels)]
    accuracy = need("sklearn.metrics", extra="eval").accuracy_score(gold, guesses)
    rows = [by_class[label][kind] for kind in BY_CLASS for label in labels]
    values = [100 * accuracy, float(np.mean([by_class[label]["f1"] for label in labels])), *rows]
    spread = bootstrap.intervals(_resampled(gold, guesses, labels), len(gold), seed=seed)
    intervals = _shares(gold, guesses, labels) | bootstrap.named(["macro_f1"], spread)
    ties = sum(_tied(prediction.scores) for prediction in predictions if prediction.scores is not None)
    return Scores(
        n=len(gold),
        metrics=dict(zip(names, map(float, values), strict=True)),
        intervals={name: intervals[name] for name in names if name in intervals},
        details={
            "scale": "0-100",
            "classify": LIKELIHOOD if by_likelihood else GENERATION,
            "labels": list(labels),
            "unparsed": guesses.count(UNPARSED),
            "ties": ties,
            "majority_baseline": _majority(gold),
            "by_class": by_class,
            "confusion": counts[: len(labels)].tolist(),
        },
    )


def true_label(example: Example, labels: Sequence[str]) -> str:
    """A sample's own answer, as its class is spelt. DataError where it is no class."""
    label = label_called(example.answer, labels)
    if label is None:
        raise DataError(f"sample {example.id}: its label {example.answer!r} is none of {', '.join(labels)}")
    return label


def guess(text: str, labels: Sequence[str]) -> str:
    """The class that an answer means, or UNPARSED."""
    return found_label(text, labels) or UNPARSED


def _by_class(gold: Sequence[str], guesses: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    score = need("sklearn.metrics", extra="eval").precision_recall_fscore_support
    *found, support = score(gold, guesses, labels=list(labels), zero_division=0)
    columns = dict(zip(BY_CLASS, found, strict=True))
    return {
        label: {kind: 100 * float(column[number]) for kind, column in columns.items()} | {"n": int(support[number])}
        for number, label in enumerate(labels)
    }


def _majority(gold: Sequence[str]) -> dict[str, Any]:
    """What always naming the most frequent label of these samples would score."""
    label, count = Counter(gold).most_common(1)[0]
    return {"label": label, "accuracy": 100 * count / len(gold)}


def _tied(scores: Mapping[str, float]) -> bool:
    return sorted(scores.values())[-1] == sorted(scores.values())[-2]


def _shares(gold: Sequence[str], guesses: Sequence[str], labels: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Intervals of all that is a share of items, and of each F1; none of a share of nothing."""
    found = {"accuracy": bootstrap.percent(sum(map(str.__eq__, gold, guesses)), len(gold))}
    for label in labels:
        right = sum(true == guessed == label for true, guessed in zip(gold, guesses, strict=True))
        taken, there = guesses.count(label), gold.count(label)
        parts = {"precision": taken, "recall": there}
        found |= {f"{kind}_{label}": bootstrap.percent(right, n) for kind, n in parts.items() if n}
        found |= {f"f1_{label}": bootstrap.f1_percent(right, taken + there - right)} if taken + there else {}
    return found


def _resampled(gold: Sequence[str], guesses: Sequence[str], labels: Sequence[str]) -> Any:
    """positions (batch, n) → macro F1 (1, batch), from the confusion counts of every resample."""
    names = [*labels, UNPARSED]
    size = len(names)
    cells = np.array([names.index(a) * size + names.index(b) for a, b in zip(gold, guesses, strict=True)])

    def metrics(positions: NDArray[np.intp]) -> bootstrap.Array:
        rows = np.arange(len(positions))[:, None] * size**2
        counts = np.bincount((cells[positions] + rows).ravel(), minlength=len(positions) * size**2)
        tables = counts.reshape(-1, size, size)[:, : len(labels)]
        right = np.diagonal(tables, axis1=1, axis2=2).astype(float)
        either = tables.sum(axis=1)[:, : len(labels)] + tables.sum(axis=2)
        f1: bootstrap.Array = 2 * right / np.maximum(either, 1)
        average: bootstrap.Array = f1.mean(1)
        return 100 * average[None]

    return metrics


def confusion_table(details: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a CSV file: true labels downwards, guesses across."""
    head = ["true \\ guessed", *details["labels"], UNPARSED]
    rows = zip(details["labels"], details["confusion"], strict=True)
    return [head, *([label, *map(str, row)] for label, row in rows)]


def class_table(details: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: one per class, then the baseline and what could not be read."""
    width = max(len(label) for label in details["labels"])
    lines = [f"  {'':<{width}}  precision  recall     f1       n"]
    for label, row in details["by_class"].items():
        numbers = f"{row['precision']:9.2f}  {row['recall']:6.2f} {row['f1']:6.2f} {row['n']:7d}"
        lines.append(f"  {label:<{width}}  {numbers}")
    baseline = details["majority_baseline"]
    lines.append(f"  always {baseline['label']}: accuracy {baseline['accuracy']:.2f}")
    if details["unparsed"]:
        lines.append(f"  {details['unparsed']} texts name no label, or several; they count as wrong")
    return lines
