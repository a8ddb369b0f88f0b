"""MultiNLI: does a hypothesis follow from a premise? entailment, neutral or contradiction.

Official form: multinli_1.0_{train,dev_matched,dev_mismatched}.jsonl or .txt (tab-separated), alone or in
multinli_1.0.zip; GLUE's .tsv files have the same columns in another order. Rows without a majority label (`-`) are
left out and counted, as the official loaders do. Pairs with one premise are one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rankwise.data.example import Example, Turn
from rankwise.data.label_answer import label_called
from rankwise.data.sources.download import Download
from rankwise.data.sources.rows import BadRow, LeftOut, RowFile, json_rows, samples, text_of, tsv_rows

INSTRUCTION = "Say whether the hypothesis follows from the premise: entailment, neutral or contradiction."
LABELS = ("entailment", "neutral", "contradiction")
NO_MAJORITY = "-"


def _names(part: str) -> tuple[str, ...]:
    file = f"multinli_1.0_{part}"
    return tuple(f"{folder}{file}{suffix}" for suffix in (".jsonl", ".txt") for folder in ("", "multinli_1.0/"))


FILES = {
    "train": (*_names("train"), "train.tsv"),
    "dev": (*_names("dev_matched"), "dev_matched.tsv"),
    "dev_mismatched": (*_names("dev_mismatched"), "dev_mismatched.tsv"),
}
ARCHIVES = ("multinli_1.0.zip",)
DOWNLOADS = (
    Download(
        "https://cims.nyu.edu/~sbowman/multinli/multinli_1.0.zip",
        "049f507b9e36b1fcb756cfd5aeb3b7a0cfcb84bf023793652987f7e7e0957822",
        226_850_426,
    ),
)


def read(source: RowFile) -> Iterator[Example]:
    """One sample per pair, named by its pairID."""
    rows = tsv_rows(source) if source.path.suffix.lower() in {".txt", ".tsv"} else json_rows(source)
    return samples(source, rows, _example, id_key="pairID")


def _example(identity: str, row: dict[str, Any]) -> Example:
    given = row.get("gold_label")
    if given == NO_MAJORITY:
        raise LeftOut("pairs on whose label the annotators did not agree (gold_label -)")
    label = label_called(given, LABELS) if isinstance(given, str) else None
    if label is None:
        raise BadRow(f"gold_label must be {', '.join(LABELS)} or {NO_MAJORITY}, found {given!r:.60}")
    premise = text_of(row, "sentence1")
    turns = (
        Turn("user", INSTRUCTION, "Instruction"),
        Turn("user", premise, "Premise"),
        Turn("user", text_of(row, "sentence2"), "Hypothesis"),
        Turn("assistant", label, "Classification"),
    )
    return Example(identity, premise, turns, facts={"label": label, "labels": LABELS, "genre": row.get("genre")})
