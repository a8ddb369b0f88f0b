"""What is shown, in no format: tables, plots, words and examples. A room describes its result once, as blocks.

    blocks ── lines ──▶ a terminal · drawn, then template.render ──▶ Markdown and HTML

Text from files may go in as it was found: tables, words and titles take no control characters, no direction overrides
and nothing endless; only the templates escape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rankwise.page.grid import CellMap
from rankwise.page.svg import Curves
from rankwise.page.text import align, printable

CELL, PARAGRAPH = 400, 1500  # characters


def _clean(block: object, name: str, value: object) -> None:
    """Set a field of a frozen block, once."""
    object.__setattr__(block, name, value)


@dataclass(frozen=True)
class Table:
    """Columns from `first_number` on are right-aligned. A cell is a text; `note` stands under the table.

    `totals`: how many of the last rows sum up those above, and stay below them however these are sorted.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    first_number: int = 1
    note: str = ""
    totals: int = 0
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        _clean(self, "header", [printable(cell, CELL) for cell in self.header])
        _clean(self, "rows", [[printable(cell, CELL) for cell in row] for row in self.rows])
        _clean(self, "note", printable(self.note))


@dataclass(frozen=True)
class Plot:
    """A picture that is yet to be drawn: the stem of its file, what it shows, and the function that writes it."""

    name: str
    caption: str
    draw: Callable[[Path], Path]
    kind: ClassVar[str] = "plot"
    suffix: ClassVar[str] = ".png"

    def drawn(self, path: Path) -> Picture:
        return Picture(self.draw(path), self.caption)


@dataclass(frozen=True)
class Picture:
    """An image file and what it shows, for those who do not see it."""

    path: Path
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "words"

    def __post_init__(self) -> None:
        _clean(self, "text", printable(self.text, PARAGRAPH))


@dataclass(frozen=True)
class SideBySide:
    """Items as (title, text) pairs side by side: input, reference, one answer per result."""

    items: Sequence[Sequence[tuple[str, str]]]
    note: str = ""
    kind: ClassVar[str] = "examples"


@dataclass(frozen=True)
class Answer:
    """What somebody said; `right` is None where nothing can be right or wrong."""

    said_by: str
    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Shot:
    """A picture, what was asked about it, and the answers."""

    picture: Picture
    asked: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Gallery:
    """Small pictures with what was said about them, in a grid."""

    shots: Sequence[Shot]
    note: str = ""
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Folded:
    """Details that are closed until asked for: blocks, or one verbatim text."""

    title: str
    blocks: Sequence[Block] = ()
    verbatim: str = ""
    kind: ClassVar[str] = "folded"

    def __post_init__(self) -> None:
        _clean(self, "title", printable(self.title, CELL))


@dataclass(frozen=True)
class SourceFile:
    """A file that numbers came from: where it is, and its name relative to the folder that the page is about."""

    path: Path
    name: str


@dataclass(frozen=True)
class Sourced:
    """Blocks with the files that their numbers came from; the page links to them."""

    blocks: Sequence[Block]
    sources: Sequence[SourceFile]
    kind: ClassVar[str] = "sourced"


Block = Table | Plot | Curves | CellMap | Picture | Words | SideBySide | Gallery | Folded | Sourced


@dataclass(frozen=True)
class Finding:
    """A kind of stored result: its file, the commands that leave it, its reader, and the blocks that show it.

    read: DataError for a broken file; None for one that another program has named so.
    """

    file: str
    commands: tuple[str, ...]
    read: Callable[[Path], Any]
    blocks: Callable[[Any], list[Block]]


@dataclass(frozen=True)
class Figure:
    """One number of the headline: what, how much, and the small print."""

    name: str
    value: str
    before: str = ""
    detail: str = ""
    source: SourceFile | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page; `started` orders it, `aside` is its time, from the file `source`."""

    title: str
    blocks: Sequence[Block]
    started: str = ""
    aside: str = ""
    source: SourceFile | None = None

    def __post_init__(self) -> None:
        _clean(self, "title", printable(self.title, CELL))


@dataclass(frozen=True)
class Page:
    """A whole document."""

    title: str
    subtitle: str
    headline: Sequence[Figure] = ()
    lead: Sequence[Block] = ()
    sections: Sequence[Section] = ()
    appendix: Sequence[Block] = ()


Target = Callable[[Plot | Curves], Path | None]


def into(folder: Path) -> Target:
    """The target that names each file in a folder like its plot."""
    return lambda plot: folder / f"{plot.name}{plot.suffix}"


def drawn(blocks: Iterable[Block], target: Target | None) -> list[Block]:
    """The blocks with every plot drawn into its target; a plot that gets none is left out."""
    found: list[Block] = []
    for block in blocks:
        if isinstance(block, Folded | Sourced):
            inner = drawn(block.blocks, target)
            shown = inner or (isinstance(block, Folded) and block.verbatim)
            found += [replace(block, blocks=inner)] if shown else []
        elif not isinstance(block, Plot | Curves):
            found.append(block)
        elif target and (path := target(block)):
            found.append(block.drawn(path))
    return found


def each(blocks: Iterable[Block]) -> Iterator[Block]:
    """Every block, those that are within others as well."""
    for block in blocks:
        yield block
        yield from each(block.blocks) if isinstance(block, Folded | Sourced) else ()


def pictures(blocks: Iterable[Block]) -> dict[str, Path]:
    """Files of the pictures, by name."""
    return {block.path.stem: block.path for block in each(blocks) if isinstance(block, Picture)}


def lines(blocks: Iterable[Block]) -> list[str]:
    """For a terminal: words as they are, tables aligned. Pictures and what is folded are for pages."""
    found: list[str] = []
    for block in blocks:
        if isinstance(block, Words):
            found.append(block.text)
        elif isinstance(block, Table):
            note = [block.note] if block.note else []
            found += ["", *(f"  {line}" for line in [*table_lines(block), *note]), ""]
        elif isinstance(block, Sourced):
            found += ["", *lines(block.blocks), ""]
    tidy = [line for line, before in zip(found, ["", *found], strict=False) if line or before]
    return tidy[:-1] if tidy and not tidy[-1] else tidy


def table_lines(table: Table) -> list[str]:
    """Aligned columns."""
    rows = [table.header, *table.rows] if table.header else list(table.rows)
    return align(rows, left=range(table.first_number)) if rows else []
