"""Subsets keep every stratum and their size; splits never part a group; both are the seed's doing alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.example import Example, Turn
from rankwise.data.sources.load import load
from rankwise.data.split import split_groups, subset
from rankwise.errors import DataError, UsageError
from rankwise.options.commands import FinetuneConfig


def example(number: int, group: str = "", stratum: str | None = None) -> Example:
    return Example(str(number), group or str(number), (Turn("user", "q"), Turn("assistant", "a")), stratum=stratum)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    ratio=st.floats(0.01, 1.0),
    cap=st.one_of(st.none(), st.integers(1, 80)),
)
def test_subset_takes_its_share_of_every_stratum(sizes: list[int], ratio: float, cap: int | None) -> None:
    examples = [example(i * 1000 + k, stratum=str(i)) for i, size in enumerate(sizes) for k in range(size)]
    wanted = {str(i): max(1, round(size * ratio)) for i, size in enumerate(sizes)}
    chosen = subset(examples, ratio, cap, random.Random(0))
    got = Counter(e.stratum for e in chosen)
    assert [examples.index(e) for e in chosen] == sorted({examples.index(e) for e in chosen})
    if cap is None or sum(wanted.values()) <= cap:
        assert got == wanted
    else:
        assert got.total() == cap
        assert all(got[name] <= wanted[name] for name in got)
        share = cap / sum(wanted.values())
        assert all(abs(got[name] - wanted[name] * share) <= max(1, len(sizes) - 1) for name in wanted)
        assert cap < len(sizes) or all(got[name] >= 1 for name in wanted)


def test_subset_depends_on_the_generator_only() -> None:
    examples = [example(i) for i in range(100)]
    first, again, other = (subset(examples, 0.1, None, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_wrong_ratio_and_cap_are_usage_errors() -> None:
    for ratio, cap in ((0.0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(UsageError):
            FinetuneConfig(subset_ratio=ratio, max_samples=cap)


@given(groups=st.lists(st.integers(0, 20), min_size=2, max_size=80), fraction=st.floats(0.01, 0.9))
def test_no_group_is_in_both_parts(groups: list[int], fraction: float) -> None:
    examples = [example(number, f"g{group}") for number, group in enumerate(groups)]
    distinct = len(set(groups))
    if distinct < 2:
        with pytest.raises(DataError, match="one group"):
            split_groups(examples, fraction, random.Random(0))
        return
    split = split_groups(examples, fraction, random.Random(0))
    train, val = ({e.group for e in part} for part in (split.train, split.val))
    assert not train & val
    assert train
    assert len(val) == min(max(1, round(distinct * fraction)), distinct - 1)
    assert sorted(split.train + split.val, key=lambda e: int(e.id)) == examples


def test_zero_fraction_trains_on_everything() -> None:
    examples = [example(1), example(2)]
    assert split_groups(examples, 0, random.Random(0)).train == tuple(examples)


def test_no_mr_of_the_real_data_is_in_both_parts(shared_data: Path) -> None:
    split = split_groups(load("e2e_nlg", shared_data / "e2e_nlg", "dev").items, 0.05, random.Random(42))
    assert not {e.group for e in split.train} & {e.group for e in split.val}
    assert len({e.group for e in split.val}) == 27
