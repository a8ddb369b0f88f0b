"""WikiSQL's tables in SQLite, asked with care: a query that a model wrote is input from a stranger.

    with Database(Path("dev.db")) as database:
        database.answer("1-10015132-11", query)        # → ["guard"], or a Refused

The file is opened read-only. SQLite itself refuses everything but SELECT of these tables with the five aggregates
(authorizer), stops what runs too long (progress handler) or grows too large (limits). Values are bound, never pasted.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import TracebackType
from typing import Any

from rankwise.data.sources.rows import RowFile, json_rows
from rankwise.data.sources.wikisql import AGGREGATES, OPERATORS, Query
from rankwise.errors import DataError
from rankwise.files.atomic import atomic_write

SECONDS = 5.0
MOST_ROWS = 100_000
LONGEST_VALUE = 2**20  # bytes
NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")  # the official engine's idea of a number within a text
COLUMN = re.compile(r"(col\d+) (\w+)")
TABLE = re.compile(r"table_\w+")
STEPS = 1000  # of SQLite's machine between two looks at the clock
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: LONGEST_VALUE,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 2**16,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}


class QueryRefused(Exception):
    """Why a query has no answer: it is wrong, forbidden, too slow or too large."""


class Stopped(QueryRefused):
    """A query that ran into a limit of time or size, or was not allowed."""


class Database:
    """A WikiSQL database, read-only. seconds: the longest that one query may run."""

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        """DataError where the file is missing or no SQLite database."""
        if not path.is_file():
            raise DataError(f"{path}: no such database")
        self.path, self.seconds, self._deadline = path, seconds, 0.0
        self._connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            self.types = self._read_types()
        except sqlite3.Error as error:
            self._connection.close()
            raise DataError(f"{path}: not a database that SQLite can read ({error})") from error
        for limit, value in LIMITS.items():
            self._connection.setlimit(limit, value)
        self._connection.set_authorizer(_allow)
        self._connection.set_progress_handler(self._late, STEPS)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()

    def answer(self, table_id: str, query: Query) -> list[Any]:
        """The selected values of the rows that meet every condition, in the table's order.

        As the official engine: texts are lower-cased (the official tables are), and a text compared with a `real`
        column becomes a number, or the first number within it. Unlike it, each condition is bound on its own, even
        where two are on one column. Raises Refused.
        """
        name = table_name(table_id)
        types = self.types.get(name)
        if types is None:
            raise QueryRefused(f"{self.path} has no table {name}")
        if max(query.columns) >= len(types):
            raise QueryRefused(f"{name} has {len(types)} columns")
        values = [_bound(value, types[column]) for column, _, value in query.conditions]
        where = " AND ".join(f"col{column} {OPERATORS[operator]} ?" for column, operator, _ in query.conditions)
        selected = f"{AGGREGATES[query.aggregate]}(col{query.column})"
        statement = f"SELECT {selected} FROM {name}" + (f" WHERE {where}" if where else "")
        return [row[0] for row in self.run(statement, values)]

    def run(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of one statement within the limits; Stopped where it leaves them, Refused where it is wrong."""
        self._deadline = time.monotonic() + self.seconds
        try:
            with closing(self._connection.execute(statement, values)) as cursor:
                rows = cursor.fetchmany(MOST_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError) as error:
            code = getattr(error, "sqlite_errorcode", None)
            stopped = code in {sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_TOOBIG}
            raise (Stopped if stopped else QueryRefused)(str(error)) from error
        if len(rows) > MOST_ROWS:
            raise Stopped(f"more than {MOST_ROWS:,} rows")
        return rows

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def _read_types(self) -> dict[str, list[str]]:
        rows = self._connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        return {name: [kind.lower() for _, kind in COLUMN.findall(sql)] for name, sql in rows if TABLE.fullmatch(name)}


def table_name(table_id: str) -> str:
    """The official name of a table in the database: 1-10015132-11 is table_1_10015132_11."""
    return table_id if table_id.startswith("table") else f"table_{table_id.replace('-', '_')}"


def _allow(action: int, first: str | None, second: str | None, _database: str | None, _view: str | None) -> int:
    if action not in ALLOWED:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION:
        return sqlite3.SQLITE_OK if (second or "").upper() in AGGREGATES[1:] else sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_READ:
        return sqlite3.SQLITE_OK if TABLE.fullmatch(first or "") else sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _bound(value: str | int | float, kind: str) -> str | int | float:
    if not isinstance(value, str):
        return value
    text = value.lower()
    return _number(text) if kind == "real" else text


def _number(text: str) -> float:
    """A text as a number, thousands separated by commas; else the first number in it. Refused where there is none."""
    try:
        return float(Decimal(text.replace(",", "")))
    except InvalidOperation:
        found = NUMBER.search(text)
        if not found:
            raise QueryRefused(f"{text!r:.60} is compared with numbers") from None
        return float(found[0])


# --- building one ------------------------------------------------------------------------------------------------


def build_database(tables: Path, path: Path, only: Iterable[str] | None = None) -> Path:
    """A database like the official ones, from the whole tables of a .tables.jsonl; returns its path.

    only: ids of the tables that are needed [all]. DataError where one is missing or has no rows (a header alone
    answers nothing), or where types or rows don't fit the header.
    """
    wanted = None if only is None else set(only)
    found: set[str] = set()
    with atomic_write(path) as temporary, closing(sqlite3.connect(temporary)) as connection, connection:
        for line, row in json_rows(RowFile(tables)):
            if wanted is None or str(row.get("id")) in wanted:
                _create(connection, row, f"{tables}, line {line}")
                found.add(str(row["id"]))
        missing = (wanted or set()) - found
        if missing:
            raise DataError(f"{tables} lacks {len(missing)} of the tables, {min(missing)} for one")
    return path


def _create(connection: sqlite3.Connection, table: Mapping[str, Any], where: str) -> None:
    name, types, rows = table_name(str(table.get("id"))), table.get("types"), table.get("rows")
    if not TABLE.fullmatch(name) or not isinstance(types, list) or not set(types) <= {"text", "real"}:
        raise DataError(f"{where}: a table needs an id like 1-1000181-1 and types, text or real")
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}: the table {table['id']} has no rows, only a header; nothing can be executed on it")
    if any(not isinstance(row, list) or len(row) != len(types) for row in rows):
        raise DataError(f"{where}: the table {table['id']} has rows of another length than its header")
    columns = ", ".join(f"col{number} {kind}" for number, kind in enumerate(types))
    connection.execute(f"CREATE TABLE {name} ({columns})")
    cells = [[_cell(cell) for cell in row] for row in rows]
    connection.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(types))})", cells)


def _cell(value: Any) -> str | int | float | None:
    """Texts in lower case, as in the official databases."""
    if isinstance(value, str):
        return value.lower()
    return value if value is None or isinstance(value, int | float) else json.dumps(value).lower()
