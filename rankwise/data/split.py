"""Which samples: a stratified subset for the preliminary fine-tune, and a train/validation split by group."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.example import Example, chosen
from rankwise.data.label_names import name_key
from rankwise.errors import DataError

FORMAT = "rankwise-split/1"


def subset(examples: Sequence[Example], ratio: float, cap: int | None, generator: random.Random) -> Sequence[Example]:
    """max(1, round(n · ratio)) samples of every stratum, in file order; a cap is shared in proportion.

    generator: the run's seed decides, and nothing else.
    """
    strata: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        strata.setdefault(name_key(example.stratum or ""), []).append(position)
    wanted = {name: max(1, round(len(positions) * ratio)) for name, positions in strata.items()}
    if cap is not None and sum(wanted.values()) > cap:
        wanted = _share(wanted, cap)
    drawn = [position for name in sorted(strata) for position in generator.sample(strata[name], wanted[name])]
    return chosen(examples, sorted(drawn))


def _share(wanted: Mapping[str, int], cap: int) -> dict[str, int]:
    """Largest-remainder shares of the cap; one of each stratum first, as far as the cap goes."""
    names = sorted(wanted, key=lambda name: (-wanted[name], name))
    shares = dict.fromkeys(names, 0) | dict.fromkeys(names[:cap], 1)
    exact = {name: cap * wanted[name] / sum(wanted.values()) for name in names}
    while sum(shares.values()) < cap:
        neediest = max(names, key=lambda name: exact[name] - shares[name])
        shares[neediest] += 1
    return shares


@dataclass(frozen=True)
class Split:
    """Training and validation samples; no group is in both."""

    train: Sequence[Example]
    val: Sequence[Example]

    def record(self) -> dict[str, Any]:
        """Content of `split.json`: ids, so that a later run trains and validates on the same samples."""
        return {
            "format": FORMAT,
            "train": [example.id for example in self.train],
            "val": [example.id for example in self.val],
        }


def split_groups(examples: Sequence[Example], fraction: float, generator: random.Random) -> Split:
    """Put a fraction of the groups, one at least, aside for validation; 0 puts none aside."""
    if fraction == 0:
        return Split(chosen(examples, range(len(examples))), ())
    group_of = [example.group for example in examples]
    groups = list(dict.fromkeys(group_of))
    if len(groups) < 2:
        raise DataError(
            f"all {len(examples)} samples are of one group, so none can be set aside for validation; "
            "pass --val_path, or --val_fraction 0"
        )
    count = min(max(1, round(len(groups) * fraction)), len(groups) - 1)
    held_out = set(generator.sample(groups, count))
    train = [position for position, group in enumerate(group_of) if group not in held_out]
    return Split(
        chosen(examples, train),
        chosen(examples, [position for position, group in enumerate(group_of) if group in held_out]),
    )
