"""The tasks that can be scored: a data source and a scorer each. To add one: a source, a scorer, a row of the table."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.data.example import Example, Examples, one_per_prompt
from rankwise.data.sources.load import BY_DEFAULT, load
from rankwise.evaluate.classify import ByLikelihood, label_set
from rankwise.evaluate.generate import Answering, Generator
from rankwise.evaluate.predictions import EvaluationResult, Prediction, Scores, predict
from rankwise.files.processes import process_index
from rankwise.files.versions import installed
from rankwise.options.field import unknown
from rankwise.options.sections import CLASSIFY, DataSection

LIBRARIES = ("rankwise", "torch", "transformers", "sacrebleu", "rouge-score", "nltk", "scikit-learn", "scipy")


def part(name: str) -> Any:
    """A file of this room that few runs need (SQL, WordNet, vLLM, the harness), imported where a run asks for it."""
    return importlib.import_module(f"rankwise.evaluate.{name}")


@dataclass(frozen=True)
class Task:
    """A data source (of the same name) and its scorer. headline: the metric to show first.

    scorer: file and function that turn predictions and examples into `Scores`; how: the function's options. classifies:
    each item has a class, named with all there are in its facts. several_references: samples with one prompt are one
    item with several references; else every row is an item with its own answer, as the official counts have it.
    """

    name: str
    headline: str
    scorer: tuple[str, str]
    how: Mapping[str, Any] = field(default_factory=dict)
    classifies: bool = False
    several_references: bool = False

    def examples(self, path: str | Path, split: str = "test", how: DataSection = BY_DEFAULT) -> Examples:
        """The items to answer, each with its references. Reasons (`how.aux_reason`) are not asked for."""
        read = load(self.name, path, split, replace(how, aux_reason=False))
        if self.several_references:
            return replace(read, items=tuple(one_per_prompt(read)))
        return replace(read, items=tuple(replace(example, references=(example.answer,)) for example in read))

    def check(self) -> None:
        """Raise UsageError naming the extra of a missing library: before hours of generation, not after."""
        part(self.scorer[0]).check_installed()

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> Scores:
        file, function = self.scorer
        scores: Scores = getattr(part(file), function)(predictions, examples, **self.how)
        return scores


TASKS = {
    task.name: task
    for task in (
        # As the official E2E script does: lowercase.
        Task("e2e_nlg", "bleu", ("text", "score_texts"), several_references=True),
        # As the field reports dialogue summaries: stemmed ROUGE; BLEU with sacrebleu's own defaults.
        Task("samsum", "rouge_l", ("text", "score_texts"), {"lowercase": False, "stem": True}),
        Task("wikisql", "exact_match", ("sql", "score_queries")),
        Task("multi_nli", "accuracy", ("classify", "score_labels"), classifies=True),
        Task("labels", "accuracy", ("classify", "score_labels"), classifies=True),
        Task("cota", "exact_match", ("answers", "score_final_answers")),
        Task("conversations", "exact_match", ("answers", "score_answers")),
    )
}


def task(name: str) -> Task:
    """The task of that name, or a UsageError with the nearest names."""
    if name not in TASKS:
        raise unknown(name, TASKS, "--task", "task")
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
    fingerprints of model and data; a folder with predictions made from others is refused. With several processes the
    first one scores and writes; the others return None.
    """
    assert by in CLASSIFY, by
    task.check()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    engine: Answering = generator
    if task.classifies and by == "likelihood":
        engine = ByLikelihood(generator, label_set(examples))
    predictions = predict(engine, examples, folder / "predictions.jsonl", made_from)
    if process_index()[0] != 0:
        return None
    scores = task.score(predictions, examples)
    images = image_folder(generator, predictions, folder)
    recorded = {"scoring": scores.details, "made_from": dict(made_from or {})}
    result = EvaluationResult(
        task=task.name,
        metrics=scores.metrics,
        intervals=scores.intervals,
        n=scores.n,
        settings={**engine.settings, **images, **recorded},
        versions=installed(LIBRARIES),
        unavailable=scores.unavailable,
    )
    result.save(folder)
    return result


def image_folder(generator: Generator, predictions: Sequence[Prediction], folder: Path) -> dict[str, str]:
    """`image_folder`: where the predictions' image paths start, as a path from `folder`; {} where none has images."""
    sight = generator.renderer.sight if any(prediction.images for prediction in predictions) else None
    return {"image_folder": Path(os.path.relpath(sight.reader.folder, folder)).as_posix()} if sight else {}
