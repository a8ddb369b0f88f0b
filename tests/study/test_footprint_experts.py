"""The memory that `advise` expects of a run with experts, against what one takes in a process of its own."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.core.site import describe
from rankwise.models.load import load_structure
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites
from rankwise.options.sections import ModelSection
from rankwise.study.footprint import footprint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import footprint as module

    yield module
    sys.path.remove(str(BENCHMARKS))


def test_experts_are_counted_once_more_and_the_largest_parameter_twice(bench: Any, tmp_path: Path) -> None:
    place = bench.place_of("mixture-2-layers", tmp_path)
    skeleton = load_structure(ModelSection(model_name=place), place)
    sites = choose_sites(model_sites(skeleton)).values()
    stacks = [site for site in sites if site.experts]
    dense = [site for site in sites if not site.experts]

    def activations(chosen: Any) -> int:
        return footprint(skeleton, chosen, 4, torch.bfloat16, [8], 8, 1).activations

    assert len(stacks) == 4
    more = sum(site.size for site in stacks) + max(site.size for site in stacks)
    assert activations(sites) - activations(dense) == 2 * more
    assert activations([*dense, describe("x", (8, 8))]) == activations(dense)


@pytest.mark.slow
def test_a_run_takes_what_is_expected(bench: Any, tmp_path: Path) -> None:
    """Never less: what does not fit ends the process. Without the largest parameter's gradient it was 10 % less."""
    place = bench.place_of("mixture-2-layers", tmp_path)
    asked = Namespace(lengths=[32], batches=[1], learnt=[1.0], rank=16, steps=2)
    (row,) = bench.compared(place, asked)
    assert 1.0 <= row["estimated"] / row["measured"] < 1.5
