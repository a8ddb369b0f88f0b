"""What docs/families.md and the table of results say is what the run of the benchmark measured."""

from __future__ import annotations

import json
import random
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


LAW_FAMILIES = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "llama4", "llama4_text"}


def test_the_goal_is_held(coverage: Any) -> None:
    """At least 98 % of the matrix parameters in at least 95 % of the types that are tried at a small size; also where
    a type counts as missed of which no usual input fits a tower."""
    rows = json.loads(coverage.RESULTS.read_text())["rows"]
    named = {(task, kind) for task, kinds in coverage.TASKS.items() for kind in kinds}
    assert {(row["task"], row["type"]) for row in rows} == named and len(rows) == len(named)
    assert all(row["script"] for row in rows), "what measured it"
    assert all(len({"share", "unshrunk", "unbuilt"} & set(row)) == 1 for row in rows)
    shares = [row["share"] for row in rows if "share" in row]
    good = sum(share >= coverage.ENOUGH for share in shares)
    without_input = sum("no usual input" in row.get("unshrunk", "") for row in rows)
    assert good >= coverage.GOAL * (len(shares) + without_input)
    page = coverage.PAGE.read_text()
    assert f"**{good} of {len(shares)} ({good / len(shares):.1%}) are adapted to at least 98%.**" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_types_is_measured_again(coverage: Any) -> None:
    """Seeded; of types whose small model is of the first size, so that it takes seconds."""
    rows = json.loads(coverage.RESULTS.read_text())["rows"]
    known = [row for row in rows if "share" in row and (row["layers"], row["divided"]) == (4, 16)]
    sample = random.Random(17).sample([row for row in known if row["type"] not in LAW_FAMILIES], 6)
    for row in sample:
        again = coverage.examined(row["type"], row["task"])
        assert again["share"] == pytest.approx(row["share"], abs=1e-9), row["type"]
        assert again["missed"] == row["missed"] and again["experts"] == row["experts"], row["type"]
