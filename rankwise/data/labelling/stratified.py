"""Shares of a number among groups, and draws that depend on names and a seed alone.

    {"water": 90, "fire": 6}, 10 ── shares ──▶ {"water": 9, "fire": 1}

No draw depends on the order in which things were listed or on what else there is: a data set that grows keeps nearly
all of its earlier draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def shares(
    sizes: Mapping[str, int],
    total: int,
    *,
    least: Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Largest-remainder shares of `total` in proportion to the sizes; ties go to the earlier name.

    least, most: bounds of each share (default 0 and the size). They stand over the total where both can't hold.
    """
    least, most = least or dict.fromkeys(sizes, 0), most or sizes
    whole, names = sum(sizes.values()) or 1, sorted(sizes)
    given = {name: min(max(total * sizes[name] // whole, least[name]), most[name]) for name in names}

    def owed(name: str) -> int:
        return total * sizes[name] - given[name] * whole

    while sum(given.values()) < total and (open_names := [name for name in names if given[name] < most[name]]):
        given[max(open_names, key=owed)] += 1
    while sum(given.values()) > total and (open_names := [name for name in names if given[name] > least[name]]):
        given[min(open_names, key=owed)] -= 1
    return given


def drawn_order(names: Iterable[str], seed: int) -> list[str]:
    """The names in a random order that the seed and the names decide."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())


def held_out_groups(stratum_of: Mapping[str, str], fraction: float, seed: int) -> set[str]:
    """Which groups validate: of every stratum its share of the fraction, one at least where it has two groups or more,
    and never all."""
    if not fraction:
        return set()
    members: dict[str, list[str]] = {}
    for group, stratum in stratum_of.items():
        members.setdefault(stratum, []).append(group)
    sizes = {stratum: len(groups) for stratum, groups in members.items()}
    least = {stratum: int(size > 1) for stratum, size in sizes.items()}
    most = {stratum: size - 1 for stratum, size in sizes.items()}
    wanted = shares(sizes, round(fraction * len(stratum_of)), least=least, most=most)
    return {group for stratum, groups in members.items() for group in drawn_order(groups, seed)[: wanted[stratum]]}


def in_turn(items: Sequence[T], kind: Callable[[T], str]) -> list[T]:
    """One of every kind, then a second one of each, and so on; each kind in its own order."""
    kinds: dict[str, list[T]] = {}
    for item in items:
        kinds.setdefault(kind(item), []).append(item)
    turns = [(number, place, item) for place, group in enumerate(kinds.values()) for number, item in enumerate(group)]
    return [item for _, _, item in sorted(turns, key=lambda turn: turn[:2])]
