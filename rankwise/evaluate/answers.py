"""Scores of short answers to questions, about an image or a text: exact match, token F1, ROUGE-L.

    " A red\\ncircle. " ── normalised ──▶ "a red circle"

A conversation's item is its last turn; the turns before it are given, with the answers that the file has.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rankwise.data.example import Example
from rankwise.data.label_answer import name_key, spellings
from rankwise.data.sources.cota import final_answer
from rankwise.errors import DataError, need
from rankwise.evaluate import bootstrap
from rankwise.evaluate.predictions import Prediction, Scores

FINAL = ".!?…。 "
DETAILS = {
    "exact_match": "equal to a reference, regardless of case, final punctuation and spacing",
    "token_f1": "F1 of words shared with the best reference, as SQuAD has it but articles count",
    "rouge_l": "rouge-score, F1 of the best reference per item, no stemming",
    "scale": "0-100",
}


def check_installed() -> None:
    """Raise UsageError naming the extra of a missing library."""
    need("rouge_score.rouge_scorer", extra="eval")
    bootstrap.check_installed()


def normalised(text: str) -> str:
    """One spacing, one Unicode form, no case, nothing of `FINAL` at the end."""
    return " ".join(name_key(unicodedata.normalize("NFKC", text)).split()).rstrip(FINAL)


def exact_match(prediction: str, reference: str) -> float:
    return float(normalised(prediction) == normalised(reference))


def token_f1(prediction: str, reference: str) -> float:
    """2·shared / (words of both), words with punctuation taken off their ends; two empty texts agree."""
    said, wanted = _words(prediction), _words(reference)
    if not said and not wanted:
        return 1.0
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    stripped = (word.strip(".,;:!?…\"'()") for word in normalised(text).split())
    return [word for word in stripped if word]


def score_answers(predictions: Sequence[Prediction], examples: Sequence[Example], *, seed: int = 42) -> Scores:
    """Exact match, token F1 and ROUGE-L against each item's best reference, with 95 % intervals: Wilson's of exact
    match, a bootstrap of the means.

    details: `by_type`, exact match and items of every `task_type` of the rows, where they have one.
    """
    if not predictions:
        raise DataError("nothing to score: there are no predictions")
    rouge = need("rouge_score.rouge_scorer", extra="eval").RougeScorer(["rougeL"], use_stemmer=False)
    measures: dict[str, Callable[[str, str], float]] = {
        "exact_match": exact_match,
        "token_f1": token_f1,
        "rouge_l": lambda said, wanted: float(rouge.score(wanted, said)["rougeL"].fmeasure),
    }
    values = np.array(
        [
            [100 * max(measure(one.prediction, wanted) for wanted in one.references) for one in predictions]
            for measure in measures.values()
        ]
    )
    intervals = bootstrap.named([*measures], bootstrap.means(values, seed=seed))
    intervals |= {"exact_match": bootstrap.percent(int((values[0] > 0).sum()), len(predictions))}
    types = by_type(values[0].tolist(), examples)
    return Scores(
        n=len(predictions),
        metrics=dict(zip(measures, values.mean(axis=1).tolist(), strict=True)),
        intervals=intervals,
        details={**DETAILS, **({"by_type": types} if types else {})},
    )


def score_final_answers(predictions: Sequence[Prediction], examples: Sequence[Example], *, seed: int = 42) -> Scores:
    """`score_answers` of what stands behind the last `Answer:`, on both sides: no thoughts, no actions."""
    final = [
        replace(one, prediction=final_answer(one.prediction), references=tuple(map(final_answer, one.references)))
        for one in predictions
    ]
    scores = score_answers(final, examples, seed=seed)
    return replace(scores, details={**scores.details, "compared": "what stands behind the last `Answer:`"})


def is_right(task: str, said: str, references: Sequence[str]) -> bool:
    """Whether an answer counts as an exact match in this task."""
    compared = final_answer if task == "cota" else str
    return any(exact_match(compared(said), compared(wanted)) for wanted in references)


def by_type(values: Sequence[float], examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """task_type → {n, exact_match} in the order of their names; {} where no row has a type."""
    groups: dict[str, list[float]] = {}
    spelt = spellings(example.stratum for example in examples if example.stratum is not None)
    for value, example in zip(values, examples, strict=True):
        if example.stratum is not None:
            groups.setdefault(spelt[example.stratum], []).append(value)
    return {name: {"n": len(group), "exact_match": float(np.mean(group))} for name, group in sorted(groups.items())}
