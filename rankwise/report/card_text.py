"""The model card: README.md with the metadata that the Hugging Face hub reads, and what was measured in words.

    CardFacts ── model_card ──▶ "---\\nbase_model: …\\n---\\n# Title …"

What was not measured is said so; a number that nobody took does not appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rankwise.errors import UsageError
from rankwise.files.atomic import read_bytes, write_text
from rankwise.files.checkpoint import HUB_ID

MARK = "<!-- written by rankwise card; running it again replaces this file -->"
LIBRARIES = {"adapter": "peft", "merged": "transformers", "export": "llama.cpp", "bundle": "llama.cpp"}
RELATIONS = {"adapter": "adapter", "merged": "finetune", "export": "quantized", "bundle": "quantized"}
TAGS = {"adapter": ("lora",), "merged": ("lora",), "export": ("gguf", "llama.cpp"), "bundle": ("gguf", "llama.cpp")}
NOT_LICENSES = ("", "unknown", "none")
TABLE_SPECIAL = re.compile(r"([|\\`<>])")


@dataclass(frozen=True)
class Metric:
    """A score for the card's metadata. how: what was scored, by which method, on how many items."""

    task: str
    data: str
    name: str
    value: float
    how: str = ""


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says. sections: title → Markdown lines, in order; empty ones are left out.

    kind: adapter, merged, export or bundle. base: a hub id or a folder's name. sees: whether the model takes images.
    """

    title: str
    kind: str
    base: str | None = None
    sees: bool = False
    license: str | None = None
    datasets: Sequence[str] = ()
    metrics: Sequence[Metric] = ()
    summary: str = ""
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The whole file. Only hub ids enter the metadata: the hub refuses paths, and they are nobody's business."""
    lines = [MARK, "", f"# {facts.title}", "", facts.summary]
    for title, content in facts.sections.items():
        lines += ["", f"## {title}", "", *content] if content else []
    card = ModelCard("---\n" + metadata(facts).to_yaml() + "\n---\n" + "\n".join(lines) + "\n")
    return str(card)


def metadata(facts: CardFacts) -> ModelCardData:
    base = facts.base if facts.base and HUB_ID.fullmatch(facts.base) else None
    pipeline = "image-text-to-text" if facts.sees else "text-generation"
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=one.task,
            dataset_name=one.data,
            metric_type=one.name,
            metric_name=f"{one.name} ({one.how})" if one.how else None,
            metric_value=one.value,
        )
        for one in facts.metrics
    ]
    relation = {"base_model_relation": RELATIONS[facts.kind]} if base else {}
    return ModelCardData(
        base_model=base,
        library_name=LIBRARIES[facts.kind],
        pipeline_tag=pipeline,
        tags=["rankwise", *TAGS[facts.kind]],
        license=facts.license,
        datasets=[name for name in facts.datasets if HUB_ID.fullmatch(name)] or None,
        model_name=facts.title if results else None,
        eval_results=results or None,
        **relation,
    )


def license_of(base: Path) -> str | None:
    """What the card of a model folder says its license is; None where there is no card, or it says nothing."""
    card = base / "README.md"
    if not card.is_file():
        return None
    data = ModelCard(card.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data
    found = str(getattr(data, "license", None) or "").strip()
    return None if found.lower() in NOT_LICENSES else found


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows as a Markdown table; nothing for no rows. Text from files is escaped."""
    if not rows:
        return []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]


def cell(value: object) -> str:
    text = TABLE_SPECIAL.sub(lambda match: f"&#{ord(match[1])};", str(value))
    return " ".join(text.split())


def save_card(text: str, path: Path) -> Path:
    """Write the card atomically. UsageError where a README that somebody else wrote is in the place."""
    if path.exists() and MARK.encode() not in read_bytes(path):
        raise UsageError(f"{path}: is not one of `rankwise card`'s; name another file with --out")
    return write_text(path, text)
