"""Divide samples: a stratified subset, a train/validation split by group, and parts that share nothing (`divided`).

Two prompts are near-duplicates when their words (case and punctuation aside) have a Jaccard similarity of 0.95 or more:
the same facts in another order, or one more word among twenty. What train shares with dev or test is taken out of
train, what dev shares with test out of dev, and counted.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rankwise.data.example import Example, Examples, chosen, one_per_prompt
from rankwise.data.label_answer import name_key
from rankwise.errors import DataError
from rankwise.files.document import Document

SPLIT = Document("split.json", "rankwise-split/1", "a split", "rankwise train")
T = TypeVar("T")


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
        return {"train": [one.id for one in self.train], "val": [one.id for one in self.val]}


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
    val = [position for position, group in enumerate(group_of) if group in held_out]
    return Split(chosen(examples, train), chosen(examples, val))


PARTS = Document("parts.json", "rankwise-parts/1", "the parts of a study's rows", "rankwise study")
SIMILAR = 0.95
COMMON = 0.5
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows. least: so many training rows will do where there are not as many as asked for. options: what a
    user lowers where there are too few, of each."""

    train: int
    dev: int
    test: int
    least: int | None = None
    options: tuple[str, str, str] = ("--train_size", "--dev_size", "--test_size")


@dataclass(frozen=True)
class Parts:
    """`removed`: rows taken out of a part because of another: "train, near dev" → count."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    removed: Mapping[str, int]

    def record(self) -> dict[str, Any]:
        """Content of `parts.json`."""
        named = {"train": self.train, "dev": self.dev, "test": self.test}
        ids = {name: [example.id for example in part] for name, part in named.items()}
        return {**ids, "removed": dict(self.removed)}


def divided(
    pool: Examples, dev: Examples | None, test: Examples | None, sizes: Sizes, generator: random.Random
) -> Parts:
    """The three parts. What has no rows of its own gets groups of the pool; dev and test take one row per prompt.

    Raises DataError, naming file and option, where fewer rows are left than asked for.
    """
    order = shuffled_by_group(pool.items, generator)
    of_train, of_dev, of_test = sizes.options
    test_rows, rest = held_out(test, pool, order, sizes.test, of_test, generator)
    dev_rows, order = held_out(dev, pool, rest, sizes.dev, of_dev, generator)
    words = telling_words([*order, *dev_rows, *test_rows])
    dev_left = without_near(dev_rows, test_rows, words)
    off_test = without_near(order, test_rows, words)
    off_both = without_near(off_test, dev_left, words)
    removed = {
        "dev, in or near test": len(dev_rows) - len(dev_left),
        "train, in or near test": len(order) - len(off_test),
        "train, in or near dev": len(off_test) - len(off_both),
    }
    needed = sizes.train if sizes.least is None else sizes.least
    if len(off_both) < needed:
        lower = f"lower {of_train}, {of_dev} or {of_test}, or give more rows"
        raise DataError(
            f"{place(pool)}{len(off_both):,} rows are left to train on, {needed:,} are needed; {lower}; removed: "
            f"{', '.join(f'{count} ({what})' for what, count in removed.items())}"
        )
    train = generator.sample(off_both, min(sizes.train, len(off_both)))
    return Parts(tuple(train), tuple(dev_left), tuple(test_rows), removed)


def shuffled_by_group(rows: Sequence[Example], generator: random.Random) -> list[Example]:
    """The rows, the groups in random order and the rows of a group together."""
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    names = list(groups)
    generator.shuffle(names)
    return [row for name in names for row in groups[name]]


def held_out(
    own: Examples | None, pool: Examples, order: list[Example], count: int, option: str, generator: random.Random
) -> tuple[list[Example], list[Example]]:
    """Items of their own rows, or of the pool in this order, and what is left of it. DataError where they are too
    few."""
    rows, left = take(order if own is None else shuffled_by_group(own.items, generator), count)
    if len(rows) < count:
        raise DataError(
            f"{place(pool if own is None else own)}{option} {count:,}: {len(rows):,} different prompts are there for "
            "it; lower it, or give more rows"
        )
    return rows, left if own is None else order


def take(order: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """One row per prompt of the first groups that give `count`, or fewer where all do not, and the rows of the other
    groups."""
    rows: list[Example] = []
    seen: set[str] = set()
    for row in one_per_prompt(order):
        if len(rows) == count:
            break
        rows.append(row)
        seen.add(row.group)
    return rows, [row for row in order if row.group not in seen]


def place(examples: Examples) -> str:
    return f"{examples.files[0]}: " if examples.files else ""


def without_near(
    rows: Sequence[Example], others: Sequence[Example], words: Mapping[str, frozenset[str]]
) -> list[Example]:
    """The rows that share no group with `others` and whose prompts are not near any of theirs."""
    groups = {other.group for other in others}
    index = Index(words[other.id] for other in others)
    near: dict[frozenset[str], bool] = {}
    for row in rows:
        mine = words[row.id]
        if mine not in near:
            near[mine] = index.holds_similar(mine)
    return [row for row in rows if row.group not in groups and not near[words[row.id]]]


def telling_words(rows: Iterable[Example]) -> dict[str, frozenset[str]]:
    """Row id → the words of its prompt, less the turns that most rows share (instructions). Words about other pictures
    are other words."""
    rows = list(rows)
    counts = Counter(turn.text for row in rows for turn in row.prompt[0])
    common = {text for text, count in counts.items() if count > COMMON * len(rows)}
    found = {}
    for row in rows:
        text = " ".join(turn.text for turn in row.prompt[0] if turn.text not in common)
        words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        found[row.id] = frozenset(f"{row.images} {word}" for word in words) if row.images else frozenset(words)
    return found


class Index:
    """Sets of words, asked whether one similar to a given one is among them.

    Two sets with a Jaccard similarity of t or more share one of their first |x| − ⌈t·|x|⌉ + 1 words in any fixed
    order of all words (prefix filtering, Chaudhuri et al. 2006); the rare words first, few sets need comparing.
    """

    def __init__(self, sets: Iterable[frozenset[str]]) -> None:
        self.sets = list(dict.fromkeys(sets))
        self.frequency = Counter(word for words in self.sets for word in words)
        self.holders: dict[str, list[frozenset[str]]] = {}
        for words in self.sets:
            for word in self.prefix(words):
                self.holders.setdefault(word, []).append(words)

    def prefix(self, words: frozenset[str]) -> list[str]:
        ordered = sorted(words, key=lambda word: (self.frequency[word], word))
        return ordered[: len(words) - math.ceil(SIMILAR * len(words)) + 1]

    def holds_similar(self, words: frozenset[str]) -> bool:
        candidates = {other for word in self.prefix(words) for other in self.holders.get(word, ())}
        return any(len(words & other) >= SIMILAR * len(words | other) for other in candidates)


def in_turn(items: Sequence[T], kind: Callable[[T], str]) -> list[T]:
    """One of every kind, then a second one of each, and so on; each kind in its own order."""
    kinds: dict[str, list[T]] = {}
    for item in items:
        kinds.setdefault(kind(item), []).append(item)
    turns = [(number, place, item) for place, group in enumerate(kinds.values()) for number, item in enumerate(group)]
    return [item for _, _, item in sorted(turns, key=lambda turn: turn[:2])]
