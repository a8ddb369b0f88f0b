"""Predictions, on the disk as soon as they are made, and the result: what a scorer found in them, with intervals.

predictions.jsonl            {"id", "prompt", "prediction", "references"} per line, and "scores" of labels, "images"
predictions.settings.json    engine, decoding, model and data that made them: others must not be mixed in
predictions.part1.jsonl      what process 1 of several has made so far; the first process joins the parts at the end
evaluation_results.json      `EvaluationResult`: metrics, 95 % intervals, how they were made
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.data.example import Example
from rankwise.data.template import without_images
from rankwise.errors import UsageError
from rankwise.files.atomic import read_object, write_json
from rankwise.files.document import Document, as_plain, build, drop_cut_line, lines_of, read_lines
from rankwise.files.processes import gathered, own_share, process_index
from rankwise.page.progress import progress

if TYPE_CHECKING:  # an engine imports the models; to read a result needs none
    from rankwise.evaluate.generate import Answering

RESULTS = Document(
    "evaluation_results.json",
    "rankwise-evaluation/1",
    "an evaluation result",
    "rankwise evaluate",
    ("task", "n", "metrics", "intervals_95"),
)
FORGETTING, FORGETTING_TASK = "forgetting.json", "forgetting"
READ_FIRST = (
    *("bleu", "accuracy", "exact_match", "logical_form", "execution_accuracy", "macro_f1"),
    *("rouge_l", "meteor", "meteor_exact_stem", "rouge_lsum", "rouge_1", "rouge_2"),
)


@dataclass(frozen=True)
class Scores:
    """What a scorer found.

    intervals: 95 %, by metric: Wilson's of shares, a bootstrap of the rest; none where all items score alike.
    unavailable: metrics that could not be computed, and why. details: how the numbers were made (signatures,
    tokenisation, scale).
    """

    n: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult(Mapping[str, float]):
    """One evaluation. Reads like a mapping of its metrics, with `num_samples` for n: `result["bleu"]`."""

    task: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    n: int
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """How labels were chosen, `likelihood` or `generation`; "" for a task without classes."""
        if "classify" not in self.settings.get("scoring", {}):
            return ""
        return "likelihood" if self.settings.get("classify") == "likelihood" else "generation"

    @property
    def title(self) -> str:
        """The task, and the method where there are two: `labels by generation`."""
        return f"{self.task} by {self.method}" if self.method else self.task

    def __getitem__(self, name: str) -> float:
        if name == "num_samples":
            return self.n
        if name in self.unavailable:
            raise KeyError(f"{name} could not be computed: {self.unavailable[name]}")
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.metrics, "num_samples"))

    def __len__(self) -> int:
        return len(self.metrics) + 1

    def save(self, folder: str | Path, name: str = "") -> Path:
        """Write `evaluation_results.json`, or a file of that form and another name, in the folder; returns its path."""
        content = {
            "task": self.task,
            "n": self.n,
            "metrics": self.metrics,
            "intervals_95": self.intervals,
            "unavailable": self.unavailable,
            "settings": self.settings,
            "versions": self.versions,
        }
        return RESULTS.write(folder, content, name)

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read a results file, or that of a folder; DataError where it is none."""
        content = RESULTS.read(path)
        intervals = {name: (low, high) for name, (low, high) in content.pop("intervals_95").items()}
        return cls(**content, intervals=intervals)


@dataclass(frozen=True)
class Prediction:
    """One generated text, or chosen label, with what it was made from and is compared with.

    scores: log-likelihood of every label where the label was chosen by them. images: references as the data have
    them; question: the last user turn without its image slots, for rows with images.
    """

    id: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    scores: dict[str, float] | None = None
    images: tuple[str, ...] = ()
    question: str | None = None

    def record(self) -> dict[str, Any]:
        """A line of the file."""
        row = asdict(self)
        if self.scores is None:
            del row["scores"]
        if not self.images:
            del row["images"], row["question"]
        return row


def earlier_answers(folder: Path) -> list[Path]:
    """Files of predictions in a folder, whole or of one process, with their settings."""
    return sorted(folder.glob("predictions*.json*"))


def predict(
    generator: Answering, examples: Sequence[Example], path: str | Path, made_from: Mapping[str, Any] | None = None
) -> list[Prediction]:
    """Texts for all samples, in their order; those already in the file are not generated again.

    Several processes (torchrun) share the samples; every process returns all of them.

    made_from: fingerprints of model and data; with the generator's settings they must be those of the file.
    """
    path = Path(path)
    names = [example.id for example in examples]
    assert len(set(names)) == len(names), "ids must be unique"
    rank, count = process_index()
    if rank == 0:
        _claim(path, {"generator": dict(generator.settings), "made_from": dict(made_from or {})})
        _join(path)
    gathered({rank: True})  # nobody reads the file before the first process has made it whole
    done = _read(path, {example.id: example.references for example in examples})
    missing = [example for example in examples if example.id not in done]
    lengths = [sum(len(turn.text) for turn in example.turns) for example in missing]
    own = own_share(missing, lengths) if count > 1 else missing
    part = path.with_suffix(f".part{rank}{path.suffix}")
    made = _generate(generator, own, path if count == 1 else part, len(done))
    done |= gathered(made)
    if rank == 0:
        _join(path)
    return [done[name] for name in names]


def _generate(generator: Answering, examples: Sequence[Example], path: Path, before: int) -> dict[str, Prediction]:
    """Predictions by id, each appended to the file as soon as it is known."""
    made: dict[str, Prediction] = {}
    bar = progress(total=before + len(examples), initial=before, desc="generate", unit="text", leave=True)
    with path.open("a", encoding="utf-8", newline="\n") as file, bar:
        for generated in generator.generate(examples) if examples else ():
            example = examples[generated.position]
            scores = None if generated.scores is None else dict(generated.scores)
            answer = (generated.prompt, generated.text, example.references)
            prediction = Prediction(example.id, *answer, scores, example.images, _question(example))
            file.write(lines_of([prediction.record()], allow_nan=True))
            file.flush()
            made[example.id] = prediction
            bar.update()
    return made


def _question(example: Example) -> str | None:
    """The question about the images, for people: the prompt has it between the family's image tokens."""
    asked = [turn.text for turn in without_images(example).turns if turn.role == "user"] if example.images else []
    return asked[-1] if asked else None


def _join(path: Path) -> None:
    """Complete the file: the parts of several processes go to its end; lines that a kill cut short go."""
    for file in (path, *sorted(path.parent.glob(f"{path.stem}.part*{path.suffix}"))):
        drop_cut_line(file)
        if file != path and file.exists():
            with path.open("ab") as whole:
                whole.write(file.read_bytes())
            file.unlink()


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write what makes the predictions, or check that it is what made those already there."""
    record = path.with_suffix(".settings.json")
    settings = as_plain(settings)
    parts = list(path.parent.glob(f"{path.stem}.part*{path.suffix}"))
    if not path.exists() and not parts:
        write_json(record, settings)
        return
    if not record.exists():
        raise UsageError(f"{path} exists, but {record.name} next to it does not: delete it or choose another folder")
    before = read_object(record)
    differences = [
        f"{name}: {before.get(part, {}).get(name)!r} then, {settings[part].get(name)!r} now"
        for part in settings
        for name in sorted({*before.get(part, {}), *settings[part]})
        if before.get(part, {}).get(name) != settings[part].get(name)
    ]
    if differences:
        listed = "\n    ".join(differences)
        advice = "Delete it or choose another output folder."
        raise UsageError(f"{path} holds predictions made with other settings:\n    {listed}\n  {advice}")


def _read(path: Path, references: Mapping[str, tuple[str, ...]]) -> dict[str, Prediction]:
    """Predictions of the wanted samples that the file holds."""
    done = {}
    kept = partial(build, Prediction, partial=True)
    for number, prediction in enumerate(read_lines(path, "a prediction", kept), 1):
        if prediction.id not in references:
            continue
        if prediction.references != references[prediction.id]:
            advice = "it was made from other data: delete it or choose another output folder"
            raise UsageError(f"{path}, line {number}: the references of {prediction.id} are not the data's; {advice}")
        done[prediction.id] = prediction
    return done
