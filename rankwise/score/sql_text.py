"""A generated SQL text, read back into a WikiSQL query, or not at all.

    "select count(Player) from table where No. = 3", ("Player", "No.") ── parsed ──▶ Query(0, 3, ((1, 0, "3"),))

Column names hold spaces, slashes, commas and signs, and nothing is quoted, so the header decides where a name ends.
The longest name that leaves a readable rest is taken; a value ends at the first AND after which conditions follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from rankwise.data.sources.wikisql import AGGREGATES, OPERATORS, Condition, Query

LONGEST = 4096  # characters; the longest official query has a few hundred, and hostile ones are not worth the time
MOST_CONDITIONS = 32
FROM = re.compile(r"\s*(?<!\w)from\s+\S+\s*", re.IGNORECASE)
WHERE = re.compile(r"where\s+", re.IGNORECASE)
AND = re.compile(r"\s+and\s+", re.IGNORECASE)
OPERATOR = re.compile(r"\s*([=<>])(?![=<>])\s*|\s+(op)\s+", re.IGNORECASE)
SELECT = re.compile(r"select\s+", re.IGNORECASE)
AGGREGATE = re.compile(rf"({'|'.join(AGGREGATES[1:])})\s*(\(?)\s*", re.IGNORECASE)
Names = tuple[tuple[re.Pattern[str], int], ...]


def normalised(text: str) -> str:
    """Case-folded, every stretch of white space one space: the form in which texts are compared."""
    return " ".join(text.casefold().split())


def parsed(text: str, header: Sequence[str]) -> Query | None:
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
