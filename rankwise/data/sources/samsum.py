"""SAMSum: a chat between friends → a short summary of it.

Official form: train.json, val.json and test.json (`id`, `dialogue`, `summary`), alone or in corpus.7z; the common CSV
copies have the same columns. Licence CC BY-NC-ND 4.0: it comes with no package and its copies must not be changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rankwise.data.example import Example, Turn
from rankwise.data.sources.download import Download
from rankwise.data.sources.rows import LeftOut, RowFile, csv_rows, json_rows, samples, text_of

INSTRUCTION = "Summarise the dialogue in one to three sentences."
EMPTY = "13828807"  # the one official dialogue that is empty (train); some copies lack the row

FILES = {
    "train": ("train.json", "train.csv"),
    "dev": ("val.json", "validation.csv", "val.csv"),
    "test": ("test.json", "test.csv"),
}
ARCHIVES = ("corpus.7z",)
DOWNLOADS = (
    Download(
        "https://arxiv.org/src/1911.12237v2/anc/corpus.7z",
        "a97674c66726f66b98a08ca5e8868fb8af9d4843f2b05c4f839bc5cfe91e8899",
        2_944_100,
    ),
)


def read(source: RowFile) -> Iterator[Example]:
    """One sample per dialogue; line ends within it are made alike."""
    rows = csv_rows(source) if source.path.suffix.lower() == ".csv" else json_rows(source)
    return samples(source, rows, _example)


def _example(identity: str, row: dict[str, Any]) -> Example:
    if identity == EMPTY and not row.get("dialogue"):
        raise LeftOut(f"the official row {EMPTY}, whose dialogue is empty")
    turns = (
        Turn("user", INSTRUCTION, "Instruction"),
        Turn("user", text_of(row, "dialogue"), "Dialogue"),
        Turn("assistant", text_of(row, "summary"), "Summary"),
    )
    return Example(identity, identity, turns)
