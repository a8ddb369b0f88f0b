"""WikiSQL: a question about one table → a query.

Official form: {train,dev,test}.jsonl (`table_id`, `question`, `sql`) with {…}.tables.jsonl (`id`, `header`, `types`,
`rows`) and {…}.db beside them, or data.tar.bz2 with all of them. Questions about one table are one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.data.example import Example, Turn
from rankwise.data.sources.download import Download
from rankwise.data.sources.rows import BadRow, RowFile, json_rows, json_samples, text_of
from rankwise.data.sql import Query
from rankwise.errors import DataError

INSTRUCTION = "Write the SQL query that answers the question about the table."
TABLES, DATABASE = ".tables.jsonl", ".db"

FILES = {split: (f"{split}.jsonl", f"data/{split}.jsonl") for split in ("train", "dev", "test")}
ARCHIVES = ("data.tar.bz2",)
COMPANIONS = (TABLES, DATABASE)
DOWNLOADS = (
    Download(
        "https://github.com/salesforce/WikiSQL/raw/master/data.tar.bz2",
        "755c728ab188e364575705c8641f3fafd86fb089cb8b08e8c03f01832aae0881",
        26_164_664,
    ),
)


@dataclass(frozen=True)
class Table:
    """Names and types (`text` or `real`) of a table's columns."""

    header: tuple[str, ...]
    types: tuple[str, ...]


def read(source: RowFile) -> Iterator[Example]:
    """One sample per question, named by the file and its line, with what a scorer needs in `facts`."""
    tables_file, database = (source.path.with_suffix(suffix) for suffix in COMPANIONS)
    tables = read_tables(tables_file, source.path)
    source.companions.append(tables_file)
    files = {"tables": str(tables_file), "database": str(database) if database.is_file() else None}
    return json_samples(source, partial(_example, tables, files))


def read_tables(file: Path, questions: Path) -> dict[str, Table]:
    """The tables by their ids. DataError where the file is missing or a table is broken: no question can be skipped
    for that."""
    if not file.is_file():
        raise DataError(
            f"{questions} needs the column names of its tables, from {file.name} in the same folder; "
            "there is no such file (the official archive, data.tar.bz2, has both)"
        )
    tables = {}
    for line, row in json_rows(RowFile(file)):
        header, types = _texts(row.get("header")), _texts(row.get("types"))
        if not header or len(header) != len(types):
            raise DataError(f"{file}, line {line}: a table needs header and types, lists of as many texts")
        tables[str(row.get("id"))] = Table(header, types)
    return tables


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts; empty where it is none."""
    texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return tuple(value) if texts else ()


def _example(tables: dict[str, Table], files: dict[str, str | None], identity: str, row: dict[str, Any]) -> Example:
    name = str(row.get("table_id"))
    if name not in tables:
        raise BadRow(f"its table {name} is not in {Path(str(files['tables'])).name}")
    table = tables[name]
    query = _query(row.get("sql"), table)
    turns = (
        Turn("user", INSTRUCTION, "Instruction"),
        Turn("user", ", ".join(table.header), "Table"),
        Turn("user", text_of(row, "question"), "Question"),
        Turn("assistant", query.text(table.header), "SQL"),
    )
    known = {"table_id": name, "header": table.header, "types": table.types, "sql": row["sql"], **files}
    return Example(identity, name, turns, facts=known)


def _query(content: Any, table: Table) -> Query:
    try:
        query = Query.of(content)
    except ValueError as error:
        raise BadRow(f"sql: {error}") from error
    if max(query.columns) >= len(table.header):
        raise BadRow(f"sql names column {max(query.columns)}; the table has {len(table.header)}")
    return query
