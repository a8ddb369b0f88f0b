"""A comparison of factorizations on a page, and on the terminal: verdicts, tables, pictures, small print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.page.blocks import Block, Picture, Table, Words
from rankwise.page.text import align, amount, printable
from rankwise.score.factorization import GRAM
from rankwise.show.factor_words import (
    Comparison,
    cost_of,
    effective,
    label,
    optimum_words,
    source_title,
    span,
    storage_words,
    timing_words,
    verdict,
)

CLOSE = ("method", "relative error", "excess error, %", "energy", "cosine", "angle")
COST = ("method", "time", "speed", "MFLOP", "parameters", "stored")


def comparison_blocks(comparison: Comparison, pictures: Sequence[Picture] = ()) -> list[Block]:
    """Everything about one comparison, in the order of its weight."""
    sources, names = comparison["sources"], comparison["networks"]
    return [
        *(Words(printable(verdict(comparison, sources[0], name))) for name in names),
        *(closeness_table(source) for source in sources),
        *(Words(printable(effective(row))) for row in sources[0]["rows"] if row.get("excess_at_effective_rank")),
        cost_table(comparison),
        *pictures,
        *(Words(text) for text in (optimum_words(comparison), storage_words(comparison))),
    ]


def closeness_table(source: Mapping[str, Any]) -> Table:
    rows = [[printable(cell, 60) for cell in closeness_cells(row)] for row in source["rows"]]
    note = f"{source_title(source)}. 95 % intervals over images; angle: mean principal angle to the SVD's row space."
    return Table(CLOSE, rows, note=note)


def closeness_cells(row: Mapping[str, Any]) -> list[str]:
    """A refined output has neither an excess nor an angle: its rank is open."""
    excess, angle = row.get("excess_error"), row.get("principal_angle")
    return [
        label(row),
        span(row["relative_error"]),
        span(excess, 2, 100) if excess else "",
        f"{row['explained_energy']['mean']:.4f}",
        f"{row['cosine']['mean']:.4f}",
        f"{math.degrees(angle['mean']):.1f}°" if angle else "",
    ]


def cost_table(comparison: Comparison) -> Table:
    exact = cost_of(comparison, GRAM)["seconds"]
    rows = [[printable(cell, 60) for cell in cost_cells(row, exact)] for row in comparison["cost"]]
    return Table(COST, rows, note=f"Per matrix; speed: against the exact Gram factors. {timing_words(comparison)}")


def cost_cells(row: Mapping[str, Any], exact: float) -> list[str]:
    return [
        row["method"],
        milliseconds(row["seconds"]),
        f"{exact / row['seconds']:.2f}×",
        f"{row['flops'] / 1e6:,.3g}" if row["flops"] < 1e9 else f"{row['flops'] / 1e6:,.0f}",
        amount(row["parameters"]) if row["parameters"] else "",
        f"{row['stored']:,}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} µs"


def terminal(comparison: Comparison) -> str:
    """Both tables and the verdicts, for a terminal."""
    parts = []
    for source in comparison["sources"]:
        parts += [f"{source_title(source)}, rank {comparison['rank']} (95 % intervals over images)"]
        parts += [aligned(closeness_table(source)), ""]
    parts += [
        "per matrix (speed: against the exact Gram factors)",
        aligned(cost_table(comparison)),
        timing_words(comparison),
        storage_words(comparison),
        "",
    ]
    parts += [verdict(comparison, comparison["sources"][0], name) for name in comparison["networks"]]
    parts += [effective(row) for row in comparison["sources"][0]["rows"] if row.get("excess_at_effective_rank")]
    return "\n".join(parts)


def aligned(table: Table) -> str:
    return "\n".join(align([table.header, *table.rows]))
