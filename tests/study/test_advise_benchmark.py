"""The benchmark of `advise` at its smallest: all stages, what is kept, what its table says of a failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_advise import AREAS, NAMES
from tiny import tiny_llama

from rankwise.study import trials

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Benchmarks are scripts: they find each other in their own folder."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


def words(work: Path, *more: str) -> list[str]:
    places = ["--model", str(work / "base"), "--data", str(work / "trainset.csv"), "--work", str(work / "work")]
    return ["advise.py", "--quick", "--pair", "e2e", *places, "--out", str(work / "out"), *more]


@pytest.fixture(scope="module")
def finished(importable: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import advise

    work = tmp_path_factory.mktemp("benchmark")
    (work / "base").mkdir()
    tiny_llama(work / "base")
    rows = [f'"name[{name}], area[{area}]",{name} is in the {area}.' for name, area in product(NAMES, AREAS)]
    (work / "trainset.csv").write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words(work))
        advise.main()
    return work


def result(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / "out" / "advise.json").read_text())["e2e"]
    return found


def test_all_stages_come_to_a_table(finished: Path) -> None:
    found = result(finished)
    assert (found["sweep"]["runs"], found["sweep"]["tokens"] > 0) == (18, True)
    cells = [
        (loss, int(rank), float(rate)) for rank, row in found["sweep"]["losses"].items() for rate, loss in row.items()
    ]
    best = found["sweep"]["best"]
    assert (best["loss"], best["rank"], best["learning_rate"]) == min(cells)
    assert found["advise"]["rung"] >= "A" and found["judge"]["gain"] > 0
    assert len(found["plans"]["differences"]) == 3
    assert max(found["plans"]["parameters"].values()) <= 1.1 * min(found["plans"]["parameters"].values())
    text = (finished / "out" / "advise.md").read_text()
    assert all(part in text for part in ("| sweep's best |", "| advised |", "| prior |", "rank correlation"))


def test_the_climb_ends_where_a_fifth_of_the_sweeps_tokens_does(finished: Path) -> None:
    import advise

    found = result(finished)["advise"]
    runs = [json.loads(line) for line in (finished / "work" / "e2e" / "advise" / "runs.jsonl").read_text().splitlines()]
    assert found["runs"] == len(runs)
    assert found["rung"] == "B"
    assert found["share"] <= advise.SHARE < found["share"] * (1 + 2 / found["runs"]), "rung C would be two runs more"


def test_a_finished_benchmark_trains_nothing_and_says_the_same(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import advise

    before = (finished / "out" / "advise.json").read_text()
    monkeypatch.setattr(trials, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(sys, "argv", words(finished))
    advise.main()
    assert (finished / "out" / "advise.json").read_text() == before


def test_the_judgement(finished: Path) -> None:
    import advise_table

    found = result(finished)
    cell = found["judge"]["cells"]["advised"]
    margin = found["judge"]["margin"]
    assert margin == pytest.approx(max(0.02, 0.01 * found["judge"]["gain"]))
    assert cell["passed"] == (cell["diverged"] == 0 and cell["estimate"] <= margin and cell["bound"] <= 2 * margin)
    good = cell | {"passed": True, "diverged": 0, "estimate": 0.0, "bound": 0.01}
    for changes, share, word in (
        ({}, 0.2, "passed"),
        ({}, 0.21, "**failed**"),
        ({"passed": False, "bound": 0.5}, 0.1, "**failed**"),
        ({"passed": False, "diverged": 1}, 0.1, "1 seeds diverged"),
    ):
        judged = found["judge"] | {"cells": {"advised": good | changes, "prior": good}}
        told = found | {"judge": judged, "advise": found["advise"] | {"share": share}}
        row = next(row for row in advise_table.verdict_rows(told) if "| advised |" in row)
        assert word in row
        assert any("advised, rate" in line for line in advise_table.failures(told)) == (word != "passed")


def test_what_is_not_finished_is_said(finished: Path) -> None:
    import advise_table

    unfinished = {name: value for name, value in result(finished).items() if name not in ("judge", "plans")}
    text = "\n".join(advise_table.page({"e2e": unfinished}))
    assert "not judged: judge to be run" in text and "not finished; judge to be run" in text
