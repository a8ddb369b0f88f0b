"""Scores of generated WikiSQL queries: the text, its logical form, and what it finds in the table.

Each on the scale 0 to 100, with Wilson's 95 % interval. A text that states no WikiSQL query (see sql_text.py) is wrong
in form and execution, and is never sent to a database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankwise.data.example import Example
from rankwise.data.sources.wikisql import Query, same_query
from rankwise.errors import DataError
from rankwise.score import bootstrap
from rankwise.score.result import Scores
from rankwise.score.sql_database import SECONDS, Database, Refused, Stopped, build_database
from rankwise.score.sql_text import first_columns, normalised, parsed, without_quotes

HOW = {
    "exact_match": "equal texts, case-folded, white space as one space",
    "logical_form": "column, aggregate and set of conditions equal, values in lower case, as the official evaluator",
}


def check_installed() -> None:
    """UsageError naming the extra where a library is missing: before hours of generation, not after."""
    bootstrap.check_installed()


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
        query = parsed(text, header)
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
        except Refused as error:
            raise DataError(f"{database.path}: the query of {self.example.id} fails there ({error})") from error
        if self.query is None:
            return False
        try:
            return self.same or database.answer(table, self.query) == expected
        except Stopped:
            wrong["stopped"] += 1
        except Refused:
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
