"""The content of validation.json: how good the shipped model is under the device's conditions, and item by item.

    predictions, scores, records of the answers ──▶ {"accuracy": 0.87, "per_class": {…}, "confusion_matrix": […], …}

Shares of 1, as scikit-learn's reports have them; a task without labels has its own metrics instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rankwise.data.example import Example
from rankwise.data.label_answer import UNPARSED
from rankwise.evaluate.bootstrap import wilson
from rankwise.evaluate.classify import guess, label_set, true_label
from rankwise.evaluate.predictions import EvaluationResult, Prediction
from rankwise.evaluate.text import is_right
from rankwise.ship.witness import Answered

FILE, FORMAT = "validation.json", "rankwise-validation/1"


def rights(task: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[bool] | None:
    """Whether each answer is right: the label it names, or its words; None for texts that are only more or less
    like a reference."""
    if all(example.facts.get("labels") for example in examples):
        labels = label_set(examples)
        pairs = zip(predictions, examples, strict=True)
        return [guess(one.prediction, labels) == true_label(item, labels) for one, item in pairs]
    if task in ("conversations", "cota"):
        return [is_right(task, one.prediction, one.references) for one in predictions]
    return None


def scores(result: EvaluationResult, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, Any]:
    """The numbers of one runtime, without the items."""
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
                "predicted_label": guess(one.prediction, labels) if labels else one.prediction,
                "raw_output": one.prediction,
                "correct": None if right is None else right[number],
                "confidence": answer.confidence if answer else None,
                "latency": answer.seconds if answer else None,
            }
        )
    return rows


def latency(answers: Mapping[str, Answered]) -> dict[str, float] | None:
    """Seconds of a request, the picture included."""
    seconds = [answer.seconds for answer in answers.values()]
    if not seconds:
        return None
    return {"median": float(np.median(seconds)), "p95": float(np.quantile(seconds, 0.95))}
