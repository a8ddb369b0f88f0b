"""Curves as SVG text: drawn without a plotting library, thinned to what the pixels show, coloured by the page's style.

    Curves(name, caption, lines, x, y, phases).markup(width=680)      # inline in a page
    Curves(…).drawn(folder / "training_loss.svg").file                # a file of its own, for Markdown

A line of any length keeps the first, last, lowest and highest point of each pixel column, so no extreme is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path
from typing import ClassVar

from rankwise.files.atomic import write_text
from rankwise.page.text import clip, printable

WIDE, NARROW = 720, 340  # CSS pixels: the page's column, and a phone's
HEIGHT = 250  # of the area with the curves and their axes
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 20, 40
LETTER = 6.4  # width of a character of 12 px, about
ROW = 18  # of the legend
FEW = 12  # points of a line that are marked
LOOKS, TINTS = 5, 6  # styles of lines, and of phases, in chart.css
MOST_BANDS = 300
DECADES = 2  # of a logarithmic axis, from which only powers of ten are labelled

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points in the order of x; a NaN is a gap. `faint`: behind the others and without a name in the legend.

    `marked`: a point to mark, as the minimum is. `look`: which style, as `chart.css` numbers them.
    """

    label: str
    points: Sequence[Point]
    look: int = 0
    faint: bool = False
    marked: Point | None = None


@dataclass(frozen=True)
class Curves:
    """Lines over one horizontal axis; `phases` are (where it begins, name), shaded by name up to the next one."""

    name: str
    caption: str
    lines: Sequence[Line]
    x: str
    y: str
    phases: Sequence[tuple[float, str]] = ()
    logarithmic: bool = False
    file: Path | None = None
    kind: ClassVar[str] = "curves"
    suffix: ClassVar[str] = ".svg"

    def drawn(self, path: Path) -> Curves:
        """The same with its file written: an image of its own."""
        style = files("rankwise.page").joinpath("templates", "chart.css").read_text(encoding="utf-8")
        write_text(path, self.markup(WIDE, f"<style>{style}</style>") + "\n")
        return replace(self, file=path)

    def markup(self, width: int, style: str = "") -> str:
        """An <svg> element `width` pixels wide."""
        plot = _Area(self, width)
        rows = list(_legend(self, width))
        height = HEIGHT + ROW * (rows[-1][1] + 1 if rows else 0)
        said = ", ".join(line.label for line in self.lines if not line.faint)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{escape(printable(f"{self.caption}: {said}"))}">{style}',
            *plot.bands(),
            *plot.axes(),
            *(plot.line(line) for line in sorted(self.lines, key=lambda line: not line.faint)),
            *(_key(item, x, HEIGHT + ROW * row) for x, row, item in rows),
            "</svg>",
        ]
        return "".join(parts)

    @cached_property
    def tints(self) -> dict[str, int]:
        """Name of a phase → its shade, in order of appearance; none where they change too often to be seen."""
        names = dict.fromkeys(name for _, name in self.phases) if len(self.phases) <= MOST_BANDS else {}
        return {name: place % TINTS for place, name in enumerate(names)}


def thin(points: Sequence[Point], low: float, high: float, buckets: int) -> list[Point]:
    """At most four points of each of so many equal parts of [low, high]: its first, lowest, highest and last, in order.

    Drawn one bucket to a pixel, the line is the same as that of all points.
    """
    if len(points) <= 4 * buckets or high <= low:
        return list(points)
    kept: list[Point] = []
    for _, members in groupby(points, key=lambda point: int((point[0] - low) / (high - low) * buckets)):
        group = list(members)
        extremes = {0, len(group) - 1}
        for choose in (min, max):
            extremes.add(choose(range(len(group)), key=lambda place: group[place][1]))
        kept += [group[place] for place in sorted(extremes)]
    return kept


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high], steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, most)
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, within two decades 2 and 5 times them as well; fewer than two of them: round numbers instead."""
    factors = (1, 2, 5) if high / low < 10**DECADES else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = max(1, len(powers) // 6)
    found = [factor * 10.0**power for power in powers[::step] for factor in factors]
    inside = [tick for tick in found if low <= tick <= high]
    return inside if len(inside) > 1 else nice_ticks(low, high, 4)


class _Area:
    """The rectangle between the axes of one drawing, and what is drawn into it."""

    def __init__(self, curves: Curves, width: int) -> None:
        self.curves, self.width = curves, width
        self.right, self.bottom = width - RIGHT, HEIGHT - BOTTOM
        there = [p for line in curves.lines for p in line.points if math.isfinite(p[1])]
        xs = [x for x, _ in there] or [0.0, 1.0]
        ys = [y for _, y in there if y > 0 or not curves.logarithmic] or [1.0, 10.0]
        self.x_low, self.x_high = _spread(min(xs), max(xs), 0.0)
        if curves.logarithmic:
            low, high = _spread(math.log10(min(ys)), math.log10(max(ys)), 0.05)
            self.y_low, self.y_high = 10**low, 10**high
        else:
            self.y_low, self.y_high = _spread(min(ys), max(ys), 0.06)

    def at_x(self, x: float) -> float:
        share = (x - self.x_low) / (self.x_high - self.x_low)
        return LEFT + min(1.0, max(0.0, share)) * (self.right - LEFT)

    def at_y(self, y: float) -> float:
        low, high = self.y_low, self.y_high
        if self.curves.logarithmic:
            y, low, high = (math.log10(each) for each in (y, low, high))
        return self.bottom - (y - low) / (high - low) * (self.bottom - TOP)

    def bands(self) -> Iterator[str]:
        """One shaded rectangle per phase, its name above it where there is room."""
        phases, height = self.curves.phases, self.bottom - TOP
        for (start, name), (end, _) in pairwise([*phases, (math.inf, "")]) if self.curves.tints else ():
            left, right = self.at_x(start), self.at_x(end)
            said = escape(printable(name, 80))
            yield (
                f'<rect class="p{self.curves.tints[name]}" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
                f'height="{height}"><title>{said}</title></rect>'
            )
            letters = int((right - left) / LETTER) - 1
            if letters >= min(4, len(name)) and len(phases) <= FEW:
                yield f'<text x="{left + 3:.1f}" y="{TOP - 6}">{escape(clip(printable(name, 80), letters))}</text>'

    def axes(self) -> Iterator[str]:
        curves, middle = self.curves, (LEFT + self.right) / 2
        across = log_ticks(self.y_low, self.y_high) if curves.logarithmic else nice_ticks(self.y_low, self.y_high, 6)
        for tick in across:
            y = self.at_y(tick)
            yield f'<path class="rule" d="M{LEFT} {y:.1f}H{self.right}"/>'
            yield f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>'
        yield f'<path class="axis" d="M{LEFT} {TOP}V{self.bottom}H{self.right}"/>'
        for tick in nice_ticks(self.x_low, self.x_high, 4 if self.width < WIDE else 8):
            if tick == int(tick):
                x = min(self.at_x(tick), self.right - len(f"{tick:,.0f}") * LETTER / 2 + RIGHT)
                yield f'<text class="middle" x="{x:.1f}" y="{self.bottom + 16}">{tick:,.0f}</text>'
        yield f'<text class="middle quiet" x="{middle:.0f}" y="{self.bottom + 33}">{escape(curves.x)}</text>'
        turned = f'transform="rotate(-90 12 {(TOP + self.bottom) / 2:.0f})"'
        yield f'<text class="middle quiet" x="12" y="{(TOP + self.bottom) / 2:.0f}" {turned}>{escape(curves.y)}</text>'

    def line(self, line: Line) -> str:
        """One path, a dot at each of a few points, and the marked one."""
        parts, look = [], f"s{line.look % LOOKS}"
        for run in _runs(line.points, positive=self.curves.logarithmic):
            shown = thin(run, self.x_low, self.x_high, int(self.right - LEFT))
            parts.append("M" + "L".join(f"{self.at_x(x):.1f} {self.at_y(y):.1f}" for x, y in shown))
        path = f'<path class="line {look}{" faint" if line.faint else ""}" d="{"".join(parts)}"/>' if parts else ""
        lonely = [] if line.faint or len(line.points) > FEW else line.points
        dots = [(point, 2.5) for point in lonely] + ([(line.marked, 5.0)] if line.marked else [])
        return path + "".join(
            f'<circle class="{look}" cx="{self.at_x(x):.1f}" cy="{self.at_y(y):.1f}" r="{size:g}"/>'
            for (x, y), size in dots
            if math.isfinite(y) and (y > 0 or not self.curves.logarithmic)
        )


def _spread(low: float, high: float, margin: float) -> tuple[float, float]:
    """The range with a margin; one value alone gets room on both sides."""
    if high <= low:
        margin, high = 0.0, low
        return low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    return low - margin * (high - low), high + margin * (high - low)


def _runs(points: Sequence[Point], positive: bool) -> list[list[Point]]:
    """The stretches without a gap."""
    there = groupby(points, key=lambda point: math.isfinite(point[1]) and (point[1] > 0 or not positive))
    return [list(run) for fits, run in there if fits]


def _legend(curves: Curves, width: int) -> Iterator[tuple[float, int, tuple[str, str]]]:
    """(x, row, (class, label)) of what the legend names, as many to a row as fit."""
    items = [(f"line s{line.look % LOOKS}", line.label) for line in curves.lines if not line.faint]
    items += [(f"p{tint}", printable(name, 60)) for name, tint in list(curves.tints.items())[:TINTS]]
    x, row = float(LEFT), 0
    for look, label in items:
        shown = clip(label, int((width - LEFT - 30) / LETTER))
        needed = 44 + LETTER * len(shown)
        if x > LEFT and x + needed > width:
            x, row = float(LEFT), row + 1
        yield x, row, (look, shown)
        x += needed


def _key(item: tuple[str, str], x: float, y: float) -> str:
    look, label = item
    sample = (
        f'<path class="{look}" d="M{x:.0f} {y + 8:.0f}h22"/>'
        if look.startswith("line")
        else f'<rect class="{look}" x="{x:.0f}" y="{y + 2:.0f}" width="22" height="12"/>'
    )
    return f'{sample}<text x="{x + 28:.0f}" y="{y + 12:.0f}">{escape(label)}</text>'
