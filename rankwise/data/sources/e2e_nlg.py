"""E2E NLG: a restaurant's meaning representation (MR) → a sentence or two. Several references per MR.

Official form: github.com/tuetschek/e2e-dataset, CSV with the columns `mr` and `ref`; e2e-cleaning adds `fixed` and
`orig_mr`. Samples with the same MR are one group.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.data.example import Example, Turn
from rankwise.data.sources.rows import RowFile, csv_rows
from rankwise.errors import DataError

INSTRUCTION = "Describe the restaurant in one or two sentences, using all of the given facts."

FILES = {
    "train": ("trainset.csv", "train-fixed.no-ol.csv"),
    "dev": ("devset.csv", "devel-fixed.no-ol.csv"),
    "test": ("testset_w_refs.csv", "test-fixed.csv"),
}


def read(source: RowFile) -> Iterator[Example]:
    """One sample per row, so several per MR; ids are the file's name and the line on which the row starts."""
    for line, row in csv_rows(source):
        columns = {name.lower(): text for name, text in row.items()}
        if missing := {"mr", "ref"} - columns.keys():
            raise DataError(
                f"{source.path}: no column {' and '.join(sorted(missing))} (found {', '.join(row)}); the files with "
                "references are trainset.csv, devset.csv and testset_w_refs.csv"
            )
        facts, text = columns["mr"].strip(), columns["ref"].strip()
        if facts and text:
            yield Example(f"{source.path.stem}-{line}", facts, _turns(facts, text))
        else:
            source.reject(line, f"empty {'ref' if facts else 'mr'}")


def _turns(facts: str, text: str) -> tuple[Turn, ...]:
    return (
        Turn("user", INSTRUCTION, "Instruction"),
        Turn("user", facts, "Input"),
        Turn("assistant", text, "Output"),
    )
