"""The table of tasks: a data source and a scorer. To add one: a source, a scorer if it needs its own, one row here."""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data import Example, Examples, load, one_per_prompt
from rankwise.errors import UsageError
from rankwise.score.generate import Generator
from rankwise.score.predictions import Prediction, predict
from rankwise.score.result import EvaluationResult, Scores
from rankwise.score.text import check_installed, score_text

LIBRARIES = ("rankwise", "torch", "transformers", "sacrebleu", "rouge-score", "nltk", "scipy")


def score_predictions(predictions: Sequence[Prediction]) -> Scores:
    """Text scores of predictions against all their references."""
    return score_text([p.prediction for p in predictions], [p.references for p in predictions])


@dataclass(frozen=True)
class Task:
    """What can be evaluated: `source` names its data, `score` turns predictions into numbers, `headline` is the
    one number to show first."""

    name: str
    source: str
    headline: str
    score: Callable[[Sequence[Prediction]], Scores]
    check: Callable[[], None]

    def examples(self, path: str | Path, split: str = "test", *, skip_bad: bool = False) -> Examples:
        """One sample per distinct prompt, with all its references."""
        read = load(self.source, path, split, skip_bad=skip_bad)
        return Examples(tuple(one_per_prompt(read)), read.files, read.skipped)


TASKS = {task.name: task for task in (Task("e2e_nlg", "e2e_nlg", "bleu", score_predictions, check_installed),)}


def task(name: str) -> Task:
    """The task of that name, or a UsageError with the nearest names."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS) or sorted(TASKS)
        raise UsageError(f"no task is called {name!r}; did you mean {', '.join(near)}?")
    return TASKS[name]


def evaluate(
    task: Task,
    generator: Generator,
    examples: Sequence[Example],
    folder: str | Path,
    made_from: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """Generate, score, and write `predictions.jsonl` and `evaluation_results.json` in the folder.

    made_from: fingerprints of model and data; a folder with predictions made from others is refused.
    """
    task.check()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scores = task.score(predict(generator, examples, folder / "predictions.jsonl", made_from))
    result = EvaluationResult(
        task=task.name,
        metrics=scores.metrics,
        intervals=scores.intervals,
        n=scores.n,
        settings={**generator.settings, "scoring": scores.details, "made_from": dict(made_from or {})},
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        unavailable=scores.unavailable,
    )
    result.save(folder)
    return result
