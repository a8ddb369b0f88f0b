"""The card's metadata, from the records: metrics with intervals, the data's hub id, a widget example, the license.

    scores ── metrics ──▶ model-index        data ── hub_dataset ──▶ datasets        prompts ── widget ──▶ widget

Hub ids enter, never paths. A hub id may be that of a private data set, so of rows only those of official files enter,
told by their SHA-256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from rankwise.data.sources.load import HUB_ID as DATA_ID
from rankwise.data.sources.table import official_on_hub
from rankwise.report.card_facts import FileScore, ManifestEntry, Sources, span
from rankwise.report.contents import Scored

NOT_LICENSES = ("", "unknown", "none")
METRIC_IDS = {"macro_f1": "f1", "meteor_exact_stem": "meteor"} | {
    f"rouge_{each}": "rouge" for each in ("1", "2", "l", "lsum")
}  # where the hub's name is another


@dataclass(frozen=True)
class Metric:
    """A score for the card's metadata. interval: at 95 %. where: what was scored, if not the model in transformers.
    data: the hub id of the items, where they are of the hub."""

    task: str
    name: str
    value: float
    interval: Sequence[float] | None
    n: int
    method: str = ""
    where: str = ""
    data: str | None = None

    @property
    def metric_id(self) -> str:
        return METRIC_IDS.get(self.name, self.name)

    @property
    def title(self) -> str:
        by = f"by {self.method}" if self.method else ""
        within = f"95 % interval {span(self.interval)}" if self.interval else ""
        return f"{self.name} ({', '.join(filter(None, [self.where, by, f'n = {self.n:,}', within]))})"

    @property
    def measured(self) -> dict[str, Any]:
        """For programs."""
        interval = {"interval_95": [round(end, 4) for end in self.interval]} if self.interval else {}
        return {"n": self.n, **interval}


@dataclass(frozen=True)
class WidgetExample:
    """A prompt and the model's answer, for the model page."""

    prompt: str
    answer: str
    title: str

    def as_widget(self) -> dict[str, Any]:
        return {"text": self.prompt, "example_title": self.title, "output": {"text": self.answer}}


def metrics(sources: Sources) -> list[Metric]:
    """Of the model after training, for the metadata."""
    after = [one for one in sources.scores if not one.is_before]
    return [
        Metric(
            one.result.task,
            name,
            value,
            one.result.intervals.get(name),
            one.result.n,
            one.result.method,
            data=hub_dataset(evaluation_of(sources, one)),
        )
        for one in after[-1:]
        for name, value in one.result.metrics.items()
    ]


def evaluation_of(sources: Sources, scored: Scored) -> ManifestEntry | None:
    """The entry of the evaluation that left these scores."""
    found = [
        ManifestEntry(one.run / stage.folder, stage.entry)
        for one in sources.contents
        if scored in one.scores
        for stage in one.stages
        if stage.name == "evaluate" and stage.folder == scored.folder
    ]
    return found[-1] if found else None


def hub_dataset(entry: ManifestEntry | None) -> str | None:
    """Hub id of the data that a stage read: of the hub, or an official file of a data set that is there, byte for byte.
    None for all others, whatever they are called."""
    named = DATA_ID.fullmatch(data_input(entry).get("name", ""))
    return named["id"] if named else official_dataset(entry)


def official_dataset(entry: ManifestEntry | None) -> str | None:
    """Hub id of the data set whose official file a stage read. Only of these it is known that anybody may see the rows:
    a data set named by its hub id may be private or gated."""
    row = data_input(entry)
    return official_on_hub(Path(row["path"]), row.get("fingerprint")) if "path" in row else None


def data_input(entry: ManifestEntry | None) -> dict[str, Any]:
    found: dict[str, Any] = entry.entry.get("inputs", {}).get("data", {}) if entry else {}
    return found


def widget(sources: Sources) -> list[WidgetExample]:
    """A prompt as the model got it, with its answer: the first scored item of an official file. Of other data no
    row goes out."""
    for one in [one for one in sources.scores if not one.is_before and one.predictions][-1:]:
        if official_dataset(evaluation_of(sources, one)):
            row = next(iter(one.predictions.values()))
            return [WidgetExample(str(row["prompt"]), str(row["prediction"]), one.result.task)]
    return []


def file_metrics(found: Sequence[FileScore]) -> list[Metric]:
    """Of the form to ship, for the metadata."""
    return [
        Metric(one.task, one.name, one.value, one.interval, one.n, one.method, f"{one.form} in llama.cpp")
        for one in found
        if one.ships
    ]


def license_of(base: Path) -> str | None:
    """What the card of a model folder says its license is; None where there is no card, or it says nothing."""
    card = base / "README.md"
    if not card.is_file():
        return None
    data = ModelCard(card.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data
    found = str(getattr(data, "license", None) or "").strip()
    return None if found.lower() in NOT_LICENSES else found
