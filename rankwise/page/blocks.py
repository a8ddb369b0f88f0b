"""What a report page is made of: sections of tables, pictures, words and examples, in no format yet.

Both templates (HTML and Markdown) render these, and only they escape: every text in here is as it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Columns from `first_number` on are right-aligned. A cell is a text; `note` stands under the table."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    first_number: int = 1
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """An image file and what it shows, for those who do not see it."""

    path: Path
    caption: str
    kind: str = "picture"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: str = "words"


@dataclass(frozen=True)
class SideBySide:
    """Items as (title, text) pairs side by side: input, reference, one answer per result."""

    items: Sequence[Sequence[tuple[str, str]]]
    note: str = ""
    kind: str = "examples"


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
    kind: str = "gallery"


@dataclass(frozen=True)
class Folded:
    """Details that are closed until asked for: blocks, or one verbatim text."""

    title: str
    blocks: Sequence[Block] = ()
    verbatim: str = ""
    kind: str = "folded"


Block = Table | Picture | Words | SideBySide | Gallery | Folded


@dataclass(frozen=True)
class Figure:
    """One number of the headline: what, how much, and the small print."""

    name: str
    value: str
    before: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page; `started` orders it, `aside` is its time."""

    title: str
    blocks: Sequence[Block]
    started: str = ""
    aside: str = ""


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    headline: Sequence[Figure]
    lead: Sequence[Block]
    sections: Sequence[Section]
    appendix: Sequence[Block]
