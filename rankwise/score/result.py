"""Numbers of an evaluation with their intervals, and the file `evaluation_results.json` that holds them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.files.atomic import read_document, write_json

FORMAT = "rankwise-evaluation/1"
FILE = "evaluation_results.json"
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

    def save(self, folder: str | Path, name: str = FILE) -> Path:
        """Write `evaluation_results.json`, or a file of that form and another name, in the folder; returns its path."""
        content = {
            "format": FORMAT,
            "task": self.task,
            "n": self.n,
            "metrics": self.metrics,
            "intervals_95": self.intervals,
            "unavailable": self.unavailable,
            "settings": self.settings,
            "versions": self.versions,
        }
        return write_json(Path(folder) / name, content)

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read a results file, or that of a folder; DataError where it is none."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        content = read_document(file, FORMAT, "an evaluation result")
        return cls(
            task=content["task"],
            metrics=content["metrics"],
            intervals={name: (low, high) for name, (low, high) in content["intervals_95"].items()},
            n=content["n"],
            settings=content["settings"],
            versions=content["versions"],
            unavailable=content["unavailable"],
        )


def installed(names: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
