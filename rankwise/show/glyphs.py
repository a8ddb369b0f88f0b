"""Characters that the plots' own font lacks: drawn from another installed font, else written as `U+1F525`.

Class names come from the user's rows: emoji, Han, Devanagari. matplotlib would draw a box and warn for each.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from typing import Any

from rankwise.errors import need

OWN = "DejaVu Sans"  # comes with matplotlib
PREFERRED = ("Noto Sans", "Noto", "WenQuanYi", "Droid")  # then all others, by name
NO_FONT = ("Last Resort", "Color Emoji")  # boxes only; bitmaps only
REGULAR = 400
EXTRA = "plots"


@contextmanager
def every_glyph(figure: Any) -> Iterator[None]:
    """Draw the figure inside: each text has the fonts that it needs, and a font without a regular weight is no news."""
    fit_fonts(figure)
    log = logging.getLogger("matplotlib.font_manager")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def fit_fonts(figure: Any) -> None:
    """Give each text of a figure the fonts that its characters need; what no font has is escaped."""
    texts = figure.findobj(need("matplotlib.text", extra=EXTRA).Text)
    missing = lacking("".join(text.get_text() for text in texts))
    if not missing:
        return
    fonts, absent = fonts_for(missing)
    for axes in figure.axes:  # an axis writes its labels anew from its own list
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_text() for label in axis.get_ticklabels()]
            if absent & set("".join(labels)):
                axis.set_ticklabels([escaped(label, absent) for label in labels])
    for text in texts:
        if set(text.get_text()) & missing:
            text.set_text(escaped(text.get_text(), absent))
            text.set_fontfamily([OWN, *fonts])


def escaped(text: str, absent: set[str]) -> str:
    """These characters as Unicode writes them, `U+092A U+093E`; joiners and selectors, no glyphs, are left out."""
    seen = "".join(char for char in text if not (char in absent and invisible(char)))
    runs = groupby(seen, absent.__contains__)
    return "".join(" ".join(f"U+{ord(char):04X}" for char in run) if gone else "".join(run) for gone, run in runs)


def invisible(char: str) -> bool:
    return unicodedata.category(char) == "Cf" or 0xFE00 <= ord(char) <= 0xFE0F


def lacking(text: str) -> set[str]:
    """The characters that the plots' own font does not have; control characters are no glyphs."""
    manager = need("matplotlib.font_manager", extra=EXTRA)
    known = characters(manager.findfont(OWN))
    return {char for char in set(text) if ord(char) not in known and unicodedata.category(char) != "Cc"}


def fonts_for(missing: set[str]) -> tuple[list[str], set[str]]:
    """Installed fonts that have these characters, as few as come first; and the characters that none has."""
    left, chosen = set(missing), []
    for name, path in installed():
        if not left:
            break
        found = {char for char in left if ord(char) in characters(path)}
        chosen += [name] if found else []
        left -= found
    return chosen, left


def installed() -> list[tuple[str, str]]:
    """(family, file) of matplotlib's list, preferred ones first; of each family the upright face nearest to regular."""
    manager = need("matplotlib.font_manager", extra=EXTRA)
    upright = [one for one in manager.fontManager.ttflist if one.style == "normal"]
    by_weight = sorted(upright, key=lambda one: -abs(manager.weight_dict.get(one.weight, one.weight) - REGULAR))
    usable = {one.name: one.fname for one in by_weight if not any(part in one.name for part in NO_FONT)}
    return sorted(usable.items(), key=lambda one: (rank(one[0]), one[0]))


def rank(name: str) -> int:
    return next((place for place, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))


@cache
def characters(path: str) -> frozenset[int]:
    """The code points of a font file; none of one that matplotlib cannot draw from."""
    try:
        return frozenset(need("matplotlib.ft2font", extra=EXTRA).FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # gone since the list was made; bitmaps without outlines
        return frozenset()
