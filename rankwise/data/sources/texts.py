"""Data sets of texts whose official files have a row per sample: E2E NLG, SAMSum, MultiNLI.

**E2E NLG**: a restaurant's meaning representation (MR) → a sentence or two, several references per MR. CSV with the
columns `mr` and `ref`; e2e-cleaning adds `fixed` and `orig_mr`. Samples with the same MR are one group.

**SAMSum**: a chat between friends → a short summary. train.json, val.json and test.json (`id`, `dialogue`, `summary`),
alone or in corpus.7z; the common CSV copies have the same columns. Licence CC BY-NC-ND 4.0: it comes with no package
and its copies must not be changed.

**MultiNLI**: does a hypothesis follow from a premise? multinli_1.0_*.jsonl or .txt (tab-separated), alone or in
multinli_1.0.zip; GLUE's .tsv files have the same columns in another order. Rows without a majority label (`-`) are left
out and counted, as the official loaders do. Pairs with one premise are one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rankwise.data.example import Example, Turn
from rankwise.data.label_answer import label_called
from rankwise.data.sources.rows import BadRow, LeftOut, RowFile, csv_rows, json_rows, samples, text_of, tsv_rows
from rankwise.errors import DataError

DESCRIBE = "Describe the restaurant in one or two sentences, using all of the given facts."
SUMMARISE = "Summarise the dialogue in one to three sentences."
CLASSIFY = "Say whether the hypothesis follows from the premise: entailment, neutral or contradiction."
EMPTY = "13828807"  # the one official dialogue of SAMSum that is empty (train); some copies lack the row
LABELS = ("entailment", "neutral", "contradiction")
NO_MAJORITY = "-"


def read_e2e_nlg(source: RowFile) -> Iterator[Example]:
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
            asked = (Turn("user", DESCRIBE, "Instruction"), Turn("user", facts, "Input"))
            turns = (*asked, Turn("assistant", text, "Output"))
            yield Example(f"{source.path.stem}-{line}", facts, turns, line=line)
        else:
            source.reject(line, f"empty {'ref' if facts else 'mr'}")


def read_samsum(source: RowFile) -> Iterator[Example]:
    """One sample per dialogue; line ends within it are made alike."""
    rows = csv_rows(source) if source.path.suffix.lower() == ".csv" else json_rows(source)
    return samples(source, rows, _dialogue)


def _dialogue(identity: str, row: dict[str, Any]) -> Example:
    if identity == EMPTY and not row.get("dialogue"):
        raise LeftOut(f"the official row {EMPTY}, whose dialogue is empty")
    turns = (
        Turn("user", SUMMARISE, "Instruction"),
        Turn("user", text_of(row, "dialogue"), "Dialogue"),
        Turn("assistant", text_of(row, "summary"), "Summary"),
    )
    return Example(identity, identity, turns)


def read_multi_nli(source: RowFile) -> Iterator[Example]:
    """One sample per pair, named by its pairID."""
    rows = tsv_rows(source) if source.path.suffix.lower() in {".txt", ".tsv"} else json_rows(source)
    return samples(source, rows, _pair, id_key="pairID")


def _pair(identity: str, row: dict[str, Any]) -> Example:
    given = row.get("gold_label")
    if given == NO_MAJORITY:
        raise LeftOut("pairs on whose label the annotators did not agree (gold_label -)")
    label = label_called(given, LABELS) if isinstance(given, str) else None
    if label is None:
        raise BadRow(f"gold_label must be {', '.join(LABELS)} or {NO_MAJORITY}, found {given!r:.60}")
    premise = text_of(row, "sentence1")
    turns = (
        Turn("user", CLASSIFY, "Instruction"),
        Turn("user", premise, "Premise"),
        Turn("user", text_of(row, "sentence2"), "Hypothesis"),
        Turn("assistant", label, "Classification"),
    )
    return Example(identity, premise, turns, facts={"label": label, "labels": LABELS, "genre": row.get("genre")})
