"""The table of tasks: a data source and a scorer. To add one: a source, a scorer if it needs its own, one row here."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.data.example import Example, Examples, one_per_prompt
from rankwise.data.sources import load
from rankwise.errors import UsageError
from rankwise.evaluate import classify, sql, text
from rankwise.evaluate.generate import Answering, Generator
from rankwise.evaluate.predictions import EvaluationResult, Prediction, Scores, installed, predict
from rankwise.evaluate.text import check_installed, score_text
from rankwise.files.processes import process_index

LIBRARIES = ("rankwise", "torch", "transformers", "sacrebleu", "rouge-score", "nltk", "scikit-learn", "scipy")
CLASSIFY = ("likelihood", "generation")
Scorer = Callable[[Sequence[Prediction], Sequence[Example]], Scores]


def score_texts(predictions: Sequence[Prediction], _: Sequence[Example], **how: Any) -> Scores:
    """Text scores of predictions against all their references."""
    return score_text([p.prediction for p in predictions], [p.references for p in predictions], **how)


def score_queries(predictions: Sequence[Prediction], examples: Sequence[Example]) -> Scores:
    """Scores of SQL texts; the tables are named in the examples' facts."""
    return sql.score_sql([p.prediction for p in predictions], examples)


def score_classes(predictions: Sequence[Prediction], examples: Sequence[Example]) -> Scores:
    """Scores of chosen labels; the classes are named in the examples' facts."""
    return classify.score_labels(predictions, examples, labels=classify.label_set(examples))


@dataclass(frozen=True)
class Task:
    """What can be evaluated: `source` names its data, `score` turns predictions into numbers, `headline` is the
    one number to show first.

    classifies: each item has a class, named with all there are in the items' facts. several_references: samples with
    one prompt are one item that may be answered in several ways; else every row is an item with its own answer, as the
    official counts have it.
    """

    name: str
    source: str
    headline: str
    score: Scorer
    check: Callable[[], None]
    classifies: bool = False
    several_references: bool = False

    def examples(self, path: str | Path, split: str = "test", *, skip_bad: bool = False, **how: Any) -> Examples:
        """The items to answer, each with its references. Further options are those of `data.load`."""
        read = load(self.source, path, split, skip_bad=skip_bad, **how)
        if self.several_references:
            return replace(read, items=tuple(one_per_prompt(read)))
        return replace(read, items=tuple(replace(example, references=(example.answer,)) for example in read))


TASKS = {
    task.name: task
    for task in (
        # As the official E2E script does: lowercase.
        Task("e2e_nlg", "e2e_nlg", "bleu", score_texts, check_installed, several_references=True),
        # As the field reports dialogue summaries: stemmed ROUGE; BLEU with sacrebleu's own defaults.
        Task("samsum", "samsum", "rouge_l", partial(score_texts, lowercase=False, stem=True), check_installed),
        Task("wikisql", "wikisql", "exact_match", score_queries, sql.check_installed),
        Task("multi_nli", "multi_nli", "accuracy", score_classes, classify.check_installed, classifies=True),
        Task("labels", "labels", "accuracy", score_classes, classify.check_installed, classifies=True),
        Task("cota", "cota", "exact_match", text.score_final_answers, text.check_answers_installed),
        Task("conversations", "conversations", "exact_match", text.score_answers, text.check_answers_installed),
    )
}


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
    by: str = "likelihood",
) -> EvaluationResult | None:
    """Generate, score, and write `predictions.jsonl` and `evaluation_results.json` in the folder.

    by: how a classification task's label is chosen, `likelihood` or `generation` (see classify.py). made_from:
    fingerprints of model and data; a folder with predictions made from others is refused. Of several processes the
    first one scores and writes; the others return None.
    """
    assert by in CLASSIFY, by
    task.check()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    engine: Answering = generator
    if task.classifies and by == "likelihood":
        engine = classify.ByLikelihood(generator, classify.label_set(examples))
    predictions = predict(engine, examples, folder / "predictions.jsonl", made_from)
    if process_index()[0] != 0:
        return None
    scores = task.score(predictions, examples)
    result = EvaluationResult(
        task=task.name,
        metrics=scores.metrics,
        intervals=scores.intervals,
        n=scores.n,
        settings={
            **engine.settings,
            **pictures_of(generator, predictions, folder),
            "scoring": scores.details,
            "made_from": dict(made_from or {}),
        },
        versions=installed(LIBRARIES),
        unavailable=scores.unavailable,
    )
    result.save(folder)
    return result


def pictures_of(generator: Generator, predictions: Sequence[Prediction], folder: Path) -> dict[str, str]:
    """`image_folder`: where the predictions' image paths start, as a path from `folder`; {} where none has images."""
    sight = generator.renderer.sight if any(prediction.images for prediction in predictions) else None
    return {"image_folder": Path(os.path.relpath(sight.reader.folder, folder)).as_posix()} if sight else {}
