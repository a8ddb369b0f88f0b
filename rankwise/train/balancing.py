"""Rare classes more often: the order of the training rows of an epoch, with rows of rarer classes repeated.

fire 12, water 300 ── oversample ──▶ fire 300, water 300       every class as often as the largest
                   ── sqrt ────────▶ fire 60, water 300        shares as the square roots of the counts
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

RULES = ("oversample", "sqrt")


class Balanced(Sampler[int]):
    """Positions of the rows in random order, each at least once, rows of rarer classes several times.

    Repetition is as even as it can be: a row occurs ⌊target/count⌋ times or once more, and which ones get one more is
    drawn anew in each epoch. The order depends on seed and epoch alone, so that a resumed run sees the same rows.

    Args:
        labels: the class of every row.
        rule: `oversample`: target = count of the largest class. `sqrt`: √(count · that of the largest), between the
            counts as they are and equal ones: where equal counts would teach the few rows of a class by heart.
        seed: with the epoch, all that the order depends on.
    """

    def __init__(self, labels: Sequence[str], rule: str, seed: int) -> None:
        assert rule in RULES, rule
        self.places: dict[str, list[int]] = {}
        for place, label in enumerate(labels):
            self.places.setdefault(label, []).append(place)
        self.before: Mapping[str, int] = Counter(labels)
        most = max(self.before.values())
        between = {label: round(math.sqrt(count * most)) for label, count in self.before.items()}
        self.after = dict.fromkeys(between, most) if rule == "oversample" else between
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.after.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows: list[int] = []
        for label, places in self.places.items():
            whole, more = divmod(self.after[label], len(places))
            drawn = torch.randperm(len(places), generator=generator)[:more].tolist()
            rows += places * whole + [places[place] for place in drawn]
        return iter([rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()])
