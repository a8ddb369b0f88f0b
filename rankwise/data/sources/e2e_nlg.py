"""E2E NLG: a restaurant's meaning representation (MR) → a sentence or two. Several references per MR.

Official form: github.com/tuetschek/e2e-dataset, CSV with the columns `mr` and `ref`; e2e-cleaning adds `fixed` and
`orig_mr`. Samples with the same MR are one group.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.data.example import Example, Turn
from rankwise.data.sources.download import Download
from rankwise.data.sources.rows import RowFile, csv_rows
from rankwise.errors import DataError

INSTRUCTION = "Describe the restaurant in one or two sentences, using all of the given facts."

FILES = {
    "train": ("trainset.csv", "train-fixed.no-ol.csv"),
    "dev": ("devset.csv", "devel-fixed.no-ol.csv"),
    "test": ("testset_w_refs.csv", "test-fixed.csv"),
}
OFFICIAL = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
DOWNLOADS = (
    Download(f"{OFFICIAL}trainset.csv", "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6", 9_340_189),
    Download(f"{OFFICIAL}devset.csv", "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9", 1_161_305),
    Download(
        f"{OFFICIAL}testset_w_refs.csv", "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd", 1_310_822
    ),
)


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
            asked = (Turn("user", INSTRUCTION, "Instruction"), Turn("user", facts, "Input"))
            turns = (*asked, Turn("assistant", text, "Output"))
            yield Example(f"{source.path.stem}-{line}", facts, turns, line=line)
        else:
            source.reject(line, f"empty {'ref' if facts else 'mr'}")
