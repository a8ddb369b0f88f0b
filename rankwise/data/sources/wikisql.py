"""WikiSQL: a question about one table → a query.

Official form: {train,dev,test}.jsonl (`table_id`, `question`, `sql`) with {…}.tables.jsonl (`id`, `header`, `types`,
`rows`) and {…}.db beside them, or data.tar.bz2 with all of them. Questions about one table are one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.data.example import Example, Turn
from rankwise.data.sources.rows import BadRow, RowFile, json_rows, json_samples, text_of
from rankwise.errors import DataError

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")
Condition = tuple[int, int, str | int | float]


@dataclass(frozen=True)
class Query:
    """`column` and a condition's first number are positions in the table's header; `aggregate` and a condition's
    second number are positions in AGGREGATES and OPERATORS; a condition's value is as the file has it.
    """

    column: int
    aggregate: int
    conditions: tuple[Condition, ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Query:
        """From the official form (`sel`, `agg`, `conds`); ValueError where it is another."""
        try:
            column, aggregate, conditions = content["sel"], content["agg"], content["conds"]
            query = cls(column, aggregate, tuple((left, operator, value) for left, operator, value in conditions))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("needs sel, agg and conds, a list of [column, operator, value]") from error
        query._check()
        return query

    def _check(self) -> None:
        positions = [self.column, self.aggregate, *(part for left in self.conditions for part in left[:2])]
        if not all(type(position) is int and position >= 0 for position in positions):
            raise ValueError("columns, aggregates and operators must be positions: 0, 1, 2 …")
        if self.aggregate >= len(AGGREGATES) or any(operator >= len(OPERATORS) for _, operator, _ in self.conditions):
            raise ValueError(f"there are {len(AGGREGATES)} aggregates and {len(OPERATORS)} operators")
        if not all(type(value) in (str, int, float) for *_, value in self.conditions):
            raise ValueError("a condition's value must be a text or a number")

    @property
    def columns(self) -> tuple[int, ...]:
        """Every column that is named, the selected one first."""
        return (self.column, *(column for column, *_ in self.conditions))

    def text(self, header: Sequence[str]) -> str:
        """The query as a model writes it. Nothing is quoted: column names and values stand as the table has them."""
        name = header[self.column]
        selected = f"{AGGREGATES[self.aggregate]}({name})" if self.aggregate else name
        conditions = [f"{header[column]} {OPERATORS[operator]} {value}" for column, operator, value in self.conditions]
        return f"SELECT {selected} FROM table" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


def same_query(first: Query, second: Query) -> bool:
    """Logical form as the official evaluator has it: values as lower-case text, conditions as a set."""
    return _form(first) == _form(second)


def _form(query: Query) -> tuple[int, int, frozenset[tuple[int, int, str]]]:
    conditions = frozenset((column, operator, str(value).lower()) for column, operator, value in query.conditions)
    return query.column, query.aggregate, conditions


INSTRUCTION = "Write the SQL query that answers the question about the table."
TABLES, DATABASE = ".tables.jsonl", ".db"


@dataclass(frozen=True)
class TableColumns:
    """Names and types (`text` or `real`) of a table's columns."""

    header: tuple[str, ...]
    types: tuple[str, ...]


def read(source: RowFile) -> Iterator[Example]:
    """One sample per question, named by the file and its line, with what a scorer needs in `facts`."""
    tables_file, database = (source.path.with_suffix(suffix) for suffix in (TABLES, DATABASE))
    tables = read_tables(tables_file, source.path)
    source.companions.append(tables_file)
    files = {"tables": str(tables_file), "database": str(database) if database.is_file() else None}
    return json_samples(source, partial(_example, tables, files))


def read_tables(file: Path, questions: Path) -> dict[str, TableColumns]:
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
        tables[str(row.get("id"))] = TableColumns(header, types)
    return tables


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts; empty where it is none."""
    texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return tuple(value) if texts else ()


def _example(
    tables: dict[str, TableColumns], files: dict[str, str | None], identity: str, row: dict[str, Any]
) -> Example:
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


def _query(content: Any, table: TableColumns) -> Query:
    try:
        query = Query.of(content)
    except ValueError as error:
        raise BadRow(f"sql: {error}") from error
    if max(query.columns) >= len(table.header):
        raise BadRow(f"sql names column {max(query.columns)}; the table has {len(table.header)}")
    return query
