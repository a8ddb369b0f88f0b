"""Scores of generated WikiSQL queries: the text, its logical form, and what it finds in the table.

    "select count(Player) from table where No. = 3", ("Player", "No.") ── parsed ──▶ Query(0, 3, ((1, 0, "3"),))

Each on the scale 0 to 100, with Wilson's 95 % interval. A text that states no WikiSQL query is wrong in form and
execution, and is never sent to a database. Column names hold spaces, slashes, commas and signs, and nothing is quoted,
so the header decides where a name ends: the longest name that leaves a readable rest is taken; a value ends at the
first AND after which conditions follow.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankwise.data.example import Example
from rankwise.data.sources.wikisql import AGGREGATES, OPERATORS, Condition, Query, same_query
from rankwise.errors import DataError
from rankwise.evaluate import bootstrap
from rankwise.evaluate.predictions import Prediction, Scores
from rankwise.evaluate.sql_database import SECONDS, Database, QueryRefused, Stopped, build_database

LONGEST = 4096  # characters; the longest official query has a few hundred, and hostile ones are not worth the time
MOST_CONDITIONS = 32
FROM = re.compile(r"\s*(?<!\w)from\s+\S+\s*", re.IGNORECASE)
WHERE = re.compile(r"where\s+", re.IGNORECASE)
AND = re.compile(r"\s+and\s+", re.IGNORECASE)
OPERATOR = re.compile(r"\s*([=<>])(?![=<>])\s*|\s+(op)\s+", re.IGNORECASE)
SELECT = re.compile(r"select\s+", re.IGNORECASE)
AGGREGATE = re.compile(rf"({'|'.join(AGGREGATES[1:])})\s*(\(?)\s*", re.IGNORECASE)
HOW = {
    "exact_match": "equal texts, case-folded, white space as one space",
    "logical_form": "column, aggregate and set of conditions equal, values in lower case, as the official evaluator",
}
Names = tuple[tuple[re.Pattern[str], int], ...]


def normalised(text: str) -> str:
    """Case-folded, every stretch of white space one space: the form in which texts are compared."""
    return " ".join(text.casefold().split())


def parse_query(text: str, header: Sequence[str]) -> Query | None:
    """The query that a text states about a table with these columns; None where it states none.

    Case and the amount of white space don't matter, nor a closing semicolon, nor quotation marks around column names,
    nor the table's name; `COUNT x` is read as `COUNT(x)`. Values are texts, as they stand (see `without_quotes`). Of
    several columns with one name the first is meant.
    """
    text = text.strip().rstrip(";").rstrip()
    start = SELECT.match(text)
    if len(text) > LONGEST or not start:
        return None
    names = _names(tuple(header))
    for aggregate, column, end in _selections(text, start.end(), names):
        table = FROM.match(text, end)
        if not table:
            continue
        if table.end() == len(text):
            return Query(column, aggregate)
        where = WHERE.match(text, table.end())
        conditions = _conditions(text, where.end(), names) if where else None
        if conditions:
            return Query(column, aggregate, conditions)
    return None


def first_columns(header: Sequence[str]) -> dict[str, int]:
    """Normalised name → the first column that bears it."""
    first: dict[str, int] = {}
    for column, name in enumerate(header):
        first.setdefault(normalised(name), column)
    return first


def without_quotes(query: Query) -> Query:
    """The query with values as SQL means them: 'it''s' is it's. Official values may hold quotation marks themselves,
    so which of the two readings is right depends on the table."""
    conditions = tuple((column, operator, _unquoted(value)) for column, operator, value in query.conditions)
    return Query(query.column, query.aggregate, conditions)


def _unquoted(value: str | int | float) -> str | int | float:
    if not isinstance(value, str) or len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
        return value
    return value[1:-1].replace(value[0] * 2, value[0])


@lru_cache(maxsize=4096)
def _names(header: tuple[str, ...]) -> Names:
    """A pattern for each column name, bare or in quotation marks; longer names first, of equal ones the first only."""
    patterns = []
    for column in sorted(first_columns(header).values(), key=lambda column: -len(header[column])):
        words = r"\s+".join(map(re.escape, header[column].split()))
        patterns.append((re.compile(rf"\"{words}\"|'{words}'|`{words}`|\[{words}\]|{words}", re.IGNORECASE), column))
    return tuple(patterns)


def _columns(text: str, position: int, names: Names) -> Iterator[tuple[int, int]]:
    """(column, where its name ends) for every name that the text has at the position, longest first."""
    for pattern, column in names:
        found = pattern.match(text, position)
        if found:
            yield column, found.end()


def _selections(text: str, position: int, names: Names) -> Iterator[tuple[int, int, int]]:
    """(aggregate, column, end) for every reading of what is selected; a column may be called `Max Speed`."""
    for column, end in _columns(text, position, names):
        yield 0, column, end
    found = AGGREGATE.match(text, position)
    if not found:
        return
    aggregate, closing = AGGREGATES.index(found[1].upper()), re.compile(r"\s*\)" if found[2] else "")
    for column, end in _columns(text, found.end(), names):
        closed = closing.match(text, end)
        if closed:
            yield aggregate, column, closed.end()


def _conditions(text: str, position: int, names: Names) -> tuple[Condition, ...] | None:
    """The conditions from a position to the end, or None.

    From the back: what can follow each AND is known before it is asked for, so the time is bounded by the number of
    ANDs squared, whatever the text.
    """
    joints = [match.span() for match in AND.finditer(text, position)]
    readable: dict[int, tuple[Condition, ...]] = {}
    for start in [position, *(end for _, end in joints)][::-1]:
        rest = _from(text, start, [joint for joint in joints if joint[0] > start], names, readable)
        if rest is not None and len(rest) <= MOST_CONDITIONS:
            readable[start] = rest
    return readable.get(position)


def _from(
    text: str, start: int, joints: Sequence[tuple[int, int]], names: Names, readable: dict[int, tuple[Condition, ...]]
) -> tuple[Condition, ...] | None:
    for column, name_end in _columns(text, start, names):
        operator = OPERATOR.match(text, name_end)
        if not operator:
            continue
        kind = OPERATORS.index((operator[1] or operator[2]).upper())
        for value_end, next_start in joints:
            if value_end > operator.end() and next_start in readable:
                value = text[operator.end() : value_end].strip()
                return ((column, kind, value), *readable[next_start])
        if operator.end() < len(text):
            return ((column, kind, text[operator.end() :].strip()),)
    return None


def check_installed() -> None:
    """Raise UsageError naming the extra of a missing library."""
    bootstrap.check_installed()


def score_queries(predictions: Sequence[Prediction], examples: Sequence[Example]) -> Scores:
    return score_sql([one.prediction for one in predictions], examples)


def score_sql(
    predictions: Sequence[str], examples: Sequence[Example], *, database: Path | None = None, seconds: float = SECONDS
) -> Scores:
    """exact_match, logical_form and execution_accuracy of texts; examples are those of the source `wikisql`.

    database: what queries run on [the official .db beside the questions; where there is none, one built from the
    tables file, if it has the tables' rows]. Without any, execution accuracy is unavailable, with the reason. seconds:
    the longest that one query may run. `details["wrong"]` counts texts that state no query and queries that were
    stopped or refused by the database.
    """
    if not predictions:
        raise DataError("nothing to score: there are no predictions")
    items = [Item.of(text, example) for text, example in zip(predictions, examples, strict=True)]
    right = {
        "exact_match": [normalised(item.text) == normalised(item.example.answer) for item in items],
        "logical_form": [item.same for item in items],
    }
    wrong = Counter({"no query": sum(item.query is None for item in items)})
    details: dict[str, Any] = dict(HOW)
    unavailable = {}
    try:
        with _opened(examples, database, seconds) as (tables, how):
            right["execution_accuracy"] = [item.executes(tables, wrong) for item in items]
            details["execution_accuracy"] = how
    except DataError as reason:
        unavailable["execution_accuracy"] = str(reason)
    return Scores(
        n=len(items),
        metrics={name: 100 * sum(rows) / len(rows) for name, rows in right.items()},
        intervals={name: bootstrap.percent(sum(rows), len(rows)) for name, rows in right.items()},
        unavailable=unavailable,
        details=details | {"wrong": dict(wrong), "scale": "0-100"},
    )


@dataclass(frozen=True)
class Item:
    """A prediction beside its question. query: what the text states, None where that is no query."""

    text: str
    example: Example
    gold: Query
    query: Query | None

    @classmethod
    def of(cls, text: str, example: Example) -> Item:
        header, gold = example.facts["header"], Query.of(example.facts["sql"])
        query = parse_query(text, header)
        return cls(text, example, gold, None if query is None else _reading(query, gold))

    @property
    def same(self) -> bool:
        if self.query is None:
            return False
        header = self.example.facts["header"]
        return same_query(_as_text(self.query, header), _as_text(self.gold, header))

    def executes(self, database: Database, wrong: Counter[str]) -> bool:
        """Whether both queries find the same; DataError where the official one fails: it is not its database."""
        table = self.example.facts["table_id"]
        try:
            expected = database.answer(table, self.gold)
        except QueryRefused as error:
            raise DataError(f"{database.path}: the query of {self.example.id} fails there ({error})") from error
        if self.query is None:
            return False
        try:
            return self.same or database.answer(table, self.query) == expected
        except Stopped:
            wrong["stopped"] += 1
        except QueryRefused:
            wrong["refused"] += 1
        return False


def _reading(query: Query, gold: Query) -> Query:
    """A value that is written in quotation marks keeps them where the official one has them, else it loses them."""
    official = {normalised(str(value)) for *_, value in gold.conditions}
    conditions = [
        literal if normalised(str(literal[2])) in official else bare
        for literal, bare in zip(query.conditions, without_quotes(query).conditions, strict=True)
    ]
    return replace(query, conditions=tuple(conditions))


def _as_text(query: Query, header: Sequence[str]) -> Query:
    """What a text can tell of a query: of columns with one name the first, of white space that there is some."""
    first = first_columns(header)
    column_of = [first[normalised(name)] for name in header]
    conditions = [(column_of[column], operator, _spaced(value)) for column, operator, value in query.conditions]
    return Query(column_of[query.column], query.aggregate, tuple(conditions))


def _spaced(value: str | int | float) -> str:
    return " ".join(str(value).split())


@contextmanager
def _opened(examples: Sequence[Example], database: Path | None, seconds: float) -> Iterator[tuple[Database, str]]:
    """A database with the examples' tables, and how it came about."""
    facts = examples[0].facts
    known = database or (Path(facts["database"]) if facts.get("database") else None)
    if known:
        with Database(known, seconds) as tables:
            yield tables, f"equal results on {known.name}"
        return
    source = Path(facts["tables"])
    with TemporaryDirectory() as folder:
        path = build_database(source, Path(folder) / "tables.db", {e.facts["table_id"] for e in examples})
        with Database(path, seconds) as tables:
            yield tables, f"equal results on a database built from {source.name}: there is no official .db"
