"""Ranks by layer range × projection type: the small table of the summary, the long one of the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rankwise.core.plan import PlannedSite

MOST_RANGES = 6


def rank_table(rows: Sequence[PlannedSite], room: int, width: int) -> list[str]:
    """Median rank by layer range × projection type, in at most `room` lines of `width` columns."""
    columns = list(dict.fromkeys(row.site.projection for row in rows))
    ranges = layer_ranges(rows, max(1, min(MOST_RANGES, room - 1)))
    first = max(len("median rank"), *(len(name) for name, _ in ranges)) if ranges else 0
    shown, used = [], first
    for column in columns:
        used += 2 + max(len(column), 4)
        if used > width - len("  +99 more types"):
            break
        shown.append(column)
    more = f"  +{len(columns) - len(shown)} more types" if len(shown) < len(columns) else ""
    table = ["median rank".ljust(first) + "".join(f"  {column:>4}" for column in shown) + more]
    for name, members in ranges:
        cells = (cell(members, column).rjust(max(len(column), 4)) for column in shown)
        table.append(name.ljust(first) + "".join(f"  {text}" for text in cells))
    return table


def cell(members: Iterable[PlannedSite], projection: str) -> str:
    ranks = [row.rank for row in members if row.site.projection == projection]
    return f"{statistics.median_low(ranks)}" if ranks else ""


def layer_ranges(rows: Sequence[PlannedSite], most: int) -> list[tuple[str, list[PlannedSite]]]:
    """Sites grouped into at most about `most` ranges of layers, tower by tower."""
    towers: dict[str, dict[int | None, list[PlannedSite]]] = {}
    for row in rows:
        towers.setdefault(row.site.tower, {}).setdefault(row.site.layer, []).append(row)
    found = []
    for tower, layers in list(towers.items())[:most]:
        order = sorted(layers, key=lambda layer: (layer is None, layer or 0))
        size = -(-len(order) // max(1, most // len(towers)))
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            name = range_name(chunk) if len(towers) == 1 else f"{tower} {range_name(chunk)}"
            found.append((name, [row for layer in chunk for row in layers[layer]]))
    return found


def range_name(layers: Sequence[int | None]) -> str:
    numbers = [layer for layer in layers if layer is not None]
    if not numbers:
        return "no layer"
    name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}–{numbers[-1]}"
    return name if len(numbers) == len(layers) else f"{name} + rest"
