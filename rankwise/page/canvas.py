"""Paper and ink of every plot: a figure without pyplot's global state, one palette, an atomic save.

The colours are cividis's: they differ in lightness, so they survive grey printing and colour blindness; lines
that share a panel also differ in style or marker.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from rankwise.errors import need
from rankwise.files.atomic import atomic_write

INK, BLUE, GREY, YELLOW = "#222222", "#123570", "#7d7c78", "#cfb93f"
FAINT = "#d9d9d6"
SEQUENCE = "cividis"
DPI = 150
FEW = 12  # points of a line that are marked
COLOURS = (BLUE, YELLOW, INK, GREY)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
LINES = ("-", "--", ":", "-.")
OWN = "DejaVu Sans"  # comes with matplotlib
PREFERRED = ("Noto Sans", "Noto", "WenQuanYi", "Droid")  # then all others, by name
NO_FONT = ("Last Resort", "Color Emoji")  # boxes only; bitmaps only
REGULAR = 400
EXTRA = "plots"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def drawable(what: str) -> bool:
    """The same; where it is not, a note says which pictures are left out."""
    if can_draw():
        return True
    print(f"note: {what} left out: matplotlib is not installed (pip install 'rankwise[plots]')")
    return False


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure of this size in inches and its axes."""
    figure, (axis,) = panels(width, height)
    return figure, axis


def panels(
    width: float, height: float, columns: int = 1, rows: int = 1, margins: dict[str, float] | None = None
) -> tuple[Any, list[Any]]:
    """A figure and its axes in reading order.

    Room for labels is found by matplotlib's constrained layout, or given as `margins` (twice as fast).
    """
    layout = None if margins else "constrained"
    figure = need("matplotlib.figure", extra=EXTRA).Figure(figsize=(width, height), layout=layout)
    if margins:
        figure.subplots_adjust(**margins)
    figure.set_facecolor("white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        plain(axis)
    return figure, axes


def plain(axis: Any) -> None:
    """Two spines, a faint grid behind the data, small labels."""
    axis.set_facecolor("white")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.tick_params(colors=INK, labelsize=8, length=3)
    axis.grid(True, color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)


def name_axes(axis: Any, x: str, y: str, title: str = "") -> None:
    """Labels and a left-aligned title. Text from files is never read as mathematics ($…$)."""
    for label in (axis.set_xlabel(x, fontsize=9, color=INK), axis.set_ylabel(y, fontsize=9, color=INK)):
        label.set_parse_math(False)
    axis.set_title(title, fontsize=10, color=INK, loc="left").set_parse_math(False)


def name_figure(figure: Any, title: str, size: float = 10) -> None:
    figure.suptitle(title, fontsize=size, color=INK, x=0.01, ha="left").set_parse_math(False)


def name_rows(axis: Any, names: Sequence[str]) -> None:
    """Named rows from the top down, one mark's height each; an empty name leaves its row without."""
    for tick in axis.set_yticks(range(len(names)), names):
        tick.label1.set_parse_math(False)
    axis.set_ylim(len(names) - 0.4, -0.6)


def legend(axis: Any, **where: Any) -> None:
    axis.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", **where)


def legend_outside(figure: Any, where: str, axes: Sequence[Any], size: float = 8, columns: int = 1) -> None:
    """One legend of all panels, beside ("right upper") or below ("lower center") them."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        labels, handles = zip(*found.items(), strict=True)
        figure.legend(handles, labels, loc=f"outside {where}", ncols=columns, fontsize=size, frameon=False)


def draw_line(
    axis: Any, x: Sequence[float], y: Sequence[float], label: str, colour: str, style: Any, width: float = 1.5
) -> None:
    """A line, with dots where the points are few: a single point is nothing but its dot."""
    dots = {"marker": "o", "markersize": 3} if len(x) <= FEW else {}
    axis.plot(x, y, color=colour, linestyle=style, linewidth=width, label=label, **dots)


def error_bars(values: Sequence[float], intervals: Iterable[Sequence[float] | None]) -> tuple[list[float], list[float]]:
    """How far the intervals reach below and above their values, as `errorbar` takes it; 0 where there is none."""
    reach = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, reach, strict=True)]
    return below, [max(0.0, high - value) for value, (_, high) in zip(values, reach, strict=True)]


def bare(axis: Any) -> None:
    """For a map of cells: no grid, no spines, no ticks."""
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def write_cells(axis: Any, image: Any, texts: Sequence[Sequence[str]], size: float) -> None:
    """Texts on the cells of an image, in the ink that can be read there; a cell without one stays blank."""
    colours = image.cmap(image.norm(image.get_array()))
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            if text:
                axis.text(x, y, text, ha="center", va="center", fontsize=size, color=readable_on(colours[y][x]))


def colour_bar(figure: Any, image: Any, axes: Any, label: str, **shape: Any) -> Any:
    """The bar beside a map; returned for its ticks."""
    bar = figure.colorbar(image, ax=axes, **shape)
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    return bar


def whole_ticks(axis: Any, most: int = 9) -> None:
    """Whole numbers at the ticks of an axis that counts something."""
    ticker = need("matplotlib.ticker", extra=EXTRA)
    axis.set_major_locator(ticker.MaxNLocator(most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def log_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, also within a decade."""
    ticker = need("matplotlib.ticker", extra=EXTRA)
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    steps = (1,) if decades > 3 else (1, 2, 5)
    axis.set_major_locator(ticker.MaxNLocator(5) if decades < 0.7 else ticker.LogLocator(subs=steps))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def save(figure: Any, path: Path | str, dpi: int = DPI) -> Path:
    """Write the picture whole or not at all, every character drawn or escaped; the suffix chooses the format."""
    with atomic_write(path) as temporary, every_glyph(figure):
        figure.savefig(temporary, dpi=dpi, facecolor="white")
    return Path(path)


def colormap(name: str = SEQUENCE) -> Any:
    """The colour map, with blank (white) for missing cells."""
    return need("matplotlib", extra=EXTRA).colormaps[name].with_extremes(bad="white")


def readable_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white ink, whichever contrasts more with this background (relative luminance, WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th arm: no two of the first twenty are alike in grey."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


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
