"""Classification: a label chosen by its likelihood or found in a generated text, and how good such predictions are.

    Generator ── ByLikelihood ──▶ predictions with log-likelihoods ─┐
    Generator ────────────────▶ predictions with texts ─────────────┴─ score_labels ──▶ Scores ──▶ tables, plot
    validation samples ── LabelAccuracy.of ──▶ prompts up to the label ── right(model) ──▶ Tally: picks the checkpoint

All numbers on the scale 0 to 100. While training, accuracy is measured as `evaluate` does it: never by comparing the
logits of a forward pass with labels one position off, and never on the tokens of a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.data.example import Example
from rankwise.data.label_answer import UNPARSED, found_label, label_called
from rankwise.data.render import Renderer
from rankwise.errors import DataError, need
from rankwise.evaluate import bootstrap
from rankwise.evaluate.generate import Answering, Generated, GenerationSettings, Generator, HFGenerator
from rankwise.evaluate.likelihood import longest_answer
from rankwise.evaluate.predictions import Prediction, Scores
from rankwise.files.processes import own_share
from rankwise.page import canvas
from rankwise.page.blocks import Table
from rankwise.page.text import clip

MAX_NEW_TOKENS = 32  # where no device says how long an answer may be
CELL, NONE = 0.62, "no class"  # of the plot: inches, and the last column
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
        raise DataError("nothing to classify: no sample lists the task's classes")
    return tuple(named)


def check_installed() -> None:
    """Raise UsageError naming the extra of a missing library."""
    for module in ("sklearn.metrics", "scipy.stats"):
        need(module, extra="eval")


def score_labels(
    predictions: Sequence[Prediction], examples: Sequence[Example], *, labels: Sequence[str] = (), seed: int = 42
) -> Scores:
    """Accuracy, macro F1, and precision, recall and F1 of each class (`f1_neutral`), with 95 % intervals: Wilson's of
    shares and of F1, a bootstrap of the mean of F1s.

    labels: the classes [those that the samples name]. A sample's own answer is its true label. Details hold the
    confusion matrix (rows: true labels, in the order of `labels`; columns: predicted labels, `unparsed` last), the
    numbers by class, and the majority baseline.
    """
    if not predictions:
        raise DataError("nothing to score: there are no predictions")
    labels = labels or label_set(examples)
    gold = [true_label(example, labels) for example in examples]
    by_likelihood = all(prediction.scores is not None for prediction in predictions)
    guesses = [predicted_label(prediction.prediction, labels) for prediction in predictions]
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
        raise DataError(f"sample {example.id}: its label {example.answer!r} is not one of {', '.join(labels)}")
    return label


def predicted_label(text: str, labels: Sequence[str]) -> str:
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
    """Majority baseline: the score of always predicting the most frequent label."""
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


def class_table(details: Mapping[str, Any], title: str = "") -> Table:
    """A row per class: precision, recall and F1 from 0 to 100, and n; below it the baseline and what names no class."""
    rows = [
        (label, *(f"{row[name]:.2f}" for name in ("precision", "recall", "f1")), f"{row['n']:,}")
        for label, row in details["by_class"].items()
    ]
    baseline, unparsed = details.get("majority_baseline"), details["unparsed"]
    notes = [f"Always {baseline['label']}: accuracy {baseline['accuracy']:.2f}."] if baseline else []
    notes += [f"{unparsed:,} texts name no label, or several; they count as wrong."] if unparsed else []
    return Table((title, "precision", "recall", "F1", "n"), rows, note=" ".join(notes))


@dataclass(frozen=True)
class Tally:
    """Count of correct answers."""

    right: int
    asked: int


@dataclass(frozen=True)
class LabelAccuracy:
    """The samples of a classification task, ready to be put to a model again and again.

    examples: up to their label; what comes after it (a reason) is no part of the question. by: `likelihood` or
    `generation` (greedy, the label that is named). renderer: leaves room for the answer.
    """

    examples: tuple[Example, ...]
    renderer: Renderer
    by: str = "likelihood"
    batch_size: int = 8
    max_new_tokens: int = MAX_NEW_TOKENS

    @classmethod
    def of(
        cls, examples: Sequence[Example], renderer: Renderer, by: str = "likelihood", batch_size: int = 8
    ) -> LabelAccuracy:
        asked = tuple(map(up_to_label, examples))
        target = renderer.sight.target if renderer.sight else None
        tokens = target.max_new_tokens if target else MAX_NEW_TOKENS
        reserve = longest_answer(renderer, asked[0], label_set(asked)) if by == "likelihood" else tokens
        return cls(asked, renderer.leaving(reserve), by, batch_size, tokens)

    def right(self, model: Any) -> Tally:
        """This process's share of the samples, put to the model as it is; no random number is drawn."""
        lengths = [sum(len(turn.text) for turn in example.turns) for example in self.examples]
        share = own_share(list(self.examples), lengths)
        if not share:
            return Tally(0, 0)
        engine, labels = self._engine(model), label_set(share)
        guesses = {one.position: predicted_label(one.text, labels) for one in engine.generate(share)}
        right = sum(guesses[position] == true_label(example, labels) for position, example in enumerate(share))
        return Tally(right, len(share))

    def _engine(self, model: Any) -> Answering:
        engine = HFGenerator(model, self.renderer, GenerationSettings(self.max_new_tokens, batch_size=self.batch_size))
        return ByLikelihood(engine, label_set(self.examples)) if self.by == "likelihood" else engine


def up_to_label(example: Example) -> Example:
    """The sample up to its first answer, which is its label."""
    first = next(place for place, turn in enumerate(example.turns) if turn.role == "assistant")
    return replace(example, turns=example.turns[: first + 1])


def plot_confusion(labels: Sequence[str], counts: Sequence[Sequence[int]], path: Path, title: str = "") -> Path:
    """Counts in the cells, colour by the share of the row.

    counts: (classes, classes + 1), the last column for answers that name no class; it is left out where it is empty.
    """
    columns = [*labels, NONE] if any(row[-1] for row in counts) else list(labels)
    size = CELL * max(len(columns), 4)
    figure, axis = canvas.new_figure(size + 2.2, CELL * max(len(labels), 3) + 1.6)
    shares = [[count / max(1, sum(row)) for count in row[: len(columns)]] for row in counts]
    image = axis.imshow(shares, cmap=canvas.colormap(), vmin=0, vmax=1, aspect="auto")
    canvas.write_cells(axis, image, [[str(count) for count in row[: len(columns)]] for row in counts], size=9)
    axis.set_xticks(range(len(columns)), [clip(name, 14) for name in columns], rotation=30, ha="right")
    axis.set_yticks(range(len(labels)), [clip(name, 14) for name in labels])
    canvas.bare(axis)
    canvas.name_axes(axis, "answered", "true", f"{title}: items" if title else "items")
    return canvas.save(figure, path)
