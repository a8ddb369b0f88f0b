"""WikiSQL's queries: one column, perhaps aggregated, of the rows of one table that meet every condition.

    {"sel": 3, "agg": 0, "conds": [[5, 0, "Butler CC (KS)"]]}
        ── Query.of ──▶ Query ── text(header) ──▶ SELECT Position FROM table WHERE School/Club Team = Butler CC (KS)

The text is what a model learns to write; `score/sql_text.py` reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
