"""How numbers and commands are written for people: durations, sizes, counts, shares, what to run next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest
from typing import Any

from rankwise.page.terminal import harmless

SCORE_FAMILIES = ("bleu", "rouge", "meteor", "nist", "cider", "chrf", "ter")


def duration(seconds: float) -> str:
    """0.8 s · 12 s · 3 min 20 s · 2 h 05 min"""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def command_line(*words: object, **options: object) -> str:
    """A `rankwise` command that runs as printed, quoted for the shell. Options that are None, False or empty are left
    out; True is the bare flag, and of a list every value has a flag of its own."""
    flags = []
    for name, value in options.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each not in (None, False, ""):
                flags += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return shlex.join(["rankwise", *map(str, words), *flags])


def memory(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def amount(count: float) -> str:
    """A count in full with separators up to a million, then as 3.15M or 7.62B."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:,.0f}{unit}"
    return f"{count:,.0f}"


def percent(share: float) -> str:
    """A share as a percentage with about three significant digits, so that 0.0004 is not "0 %"."""
    value = 100 * share
    if value and abs(value) < 10:
        digits = min(6, 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{max(1, digits)}f} %"
    return f"{value:.0f} %"


def score(value: float) -> str:
    """A metric: 61.42 on a scale to 100, 0.682 on a scale to 1."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def with_interval(value: float, interval: Sequence[float] | None, write: Callable[[float], str] = score) -> str:
    """61.42 [58.35, 64.49]; without an interval the value alone."""
    return write(value) + (f" [{write(interval[0])}, {write(interval[1])}]" if interval else "")


def number(value: float) -> str:
    """A score or setting: whole numbers as such, others with four significant digits."""
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.2f}" if 10 <= abs(value) < 1000 else f"{value:,.4g}"


def clip(text: str, width: int) -> str:
    """The text within `width` columns; the middle goes first, because both ends of a path tell more."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def align(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), gap: int = 2) -> list[str]:
    """Rows of cells as lines of a terminal, the columns in `left` aligned to the left, the others to the right."""
    single = [line for row in rows for line in zip_longest(*(cell.split("\n") for cell in row), fillvalue="")]
    widths = [max(map(len, column)) for column in zip(*single, strict=True)]
    lines = []
    for row in single:
        cells = enumerate(zip(row, widths, strict=True))
        padded = [cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in cells]
        lines.append((" " * gap).join(padded).rstrip())
    return lines


def metric_name(name: str) -> str:
    """bleu_1 → BLEU-1, rouge_l → ROUGE-L, meteor_exact_stem → METEOR (exact stem); other names with spaces."""
    family, _, rest = name.partition("_")
    if family in SCORE_FAMILIES and len(rest) <= 4:
        return f"{family.upper()}-{rest.capitalize()}" if rest else family.upper()
    if family in SCORE_FAMILIES:
        return f"{family.upper()} ({rest.replace('_', ' ')})"
    return name.replace("_", " ").replace(" f1", " F1")


def is_number(value: Any) -> bool:
    """Whether a value from a file can be drawn and compared: finite, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def has_numbers(row: Any, numbers: Sequence[str], name: str = "") -> bool:
    """Whether an object from a file has these numbers and, where one is named, another entry."""
    return isinstance(row, dict) and (not name or name in row) and all(is_number(row.get(each)) for each in numbers)


def printable(text: Any, most: int = 700) -> str:
    """Text from a file as one may show it: no control characters, no direction overrides, not endless."""
    shown = harmless(str(text)).encode("utf-8", "replace").decode()
    return shown if len(shown) <= most else shown[:most].rstrip() + " …"
