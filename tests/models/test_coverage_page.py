"""What docs/families.md and the table of results say is what the run of the benchmark measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def coverage() -> Iterator[Any]:
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    import coverage

    yield coverage
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


def test_the_pages_are_those_of_the_run(coverage: Any) -> None:
    content = json.loads(coverage.RESULTS.read_text())
    assert coverage.PAGE.read_text() == coverage.families_page(content)
    assert coverage.RESULTS.with_suffix(".md").read_text() == coverage.measured_table(content)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_row_is_measured_again(coverage: Any) -> None:
    """And a matrix without a gradient, or without a site, does not count."""
    wanted = coverage.counted(coverage.default_model("gpt2", "causal"))
    whole = coverage.tried("gpt2", "causal", 4, 16, wanted)
    assert whole["share"] == 1
    more = coverage.tried("gpt2", "causal", 4, 16, wanted | {"transformer.nowhere.weight": sum(wanted.values())})
    assert more["share"] == 0.5
    assert more["missed"] == ["transformer.nowhere.weight (no site)"]
