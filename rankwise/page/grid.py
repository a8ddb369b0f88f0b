"""A map of cells: one value each, on a colour scale, and facts to show when a cell is pointed at.

In HTML it is a table, so that every value is text; a script adds other measures, keys and the facts. In Markdown its
columns are rows, since a page is higher than wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rankwise.page.text import printable

SHADES = 10  # colours of the scale, in page.css
LEAST_SPAN = 4  # ratio of the ends of a logarithmic scale: ranks from 6 to 9 are nearly uniform, and must look so


@dataclass(frozen=True)
class Measure:
    """What cells are coloured by: its name, how a value is written, and the ends of its scale."""

    name: str
    write: Callable[[float], str]
    low: float
    high: float
    logarithmic: bool = False

    def shade(self, value: float) -> int:
        """0 to SHADES − 1; values beyond the ends have the colours of the ends."""
        low, high = self.low, self.high
        if self.logarithmic:
            if value <= 0:
                return 0
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.0
        return max(0, min(SHADES - 1, int(share * SHADES)))


@dataclass(frozen=True)
class Cell:
    """One value per measure (None: unknown), and (name, text) pairs."""

    values: Sequence[float | None]
    facts: Sequence[tuple[str, str]] = ()

    @property
    def title(self) -> str:
        return "\n".join(printable(f"{name}: {text}", 300) for name, text in self.facts)


@dataclass(frozen=True)
class CellMap:
    """Named rows × named columns; a place without a cell stays blank. The first measure is shown."""

    name: str
    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Cell]
    measures: Sequence[Measure]
    corner: str = ""
    kind: ClassVar[str] = "grid"

    def at(self, row: int, column: int) -> Cell | None:
        return self.cells.get((row, column))

    def text(self, cell: Cell | None, measure: int = 0) -> str:
        value = cell.values[measure] if cell else None
        return "" if value is None else self.measures[measure].write(value)

    def look(self, cell: Cell, measure: int = 0) -> str:
        """The CSS class of a cell's colour."""
        value = cell.values[measure]
        return "blank" if value is None else f"c{self.measures[measure].shade(value)}"

    def ends(self) -> list[list[str]]:
        """What is written at the ends of each measure's scale."""
        return [[one.write(one.low), one.write(one.high)] for one in self.measures]

    def data(self) -> dict[str, Any]:
        """What the script needs to show the other measures: texts and looks of the cells, in reading order."""
        cells = [self.cells[place] for place in sorted(self.cells)]
        numbers = range(len(self.measures))
        return {
            "names": [one.name for one in self.measures],
            "ends": self.ends(),
            "cells": [[[self.text(cell, n), self.look(cell, n)] for n in numbers] for cell in cells],
        }
