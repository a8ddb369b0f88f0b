"""A study of a mixture of experts: experts only, attention only and both, at equal parameters, one after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import experts
import pytest
from tiny import tiny_llama

from rankwise.core.allocate import TOLERANCE
from rankwise.errors import UsageError
from rankwise.files.ledger import Ledger
from rankwise.options.sections import DataSection, ModelSection
from rankwise.options.study import GridSection, ProbeSection, StudyConfig
from rankwise.study import command as stage

PARTS = ["uniform", "attention", "experts", "energy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [f'"name[{name}], area[{area}]",{name} is in area {area}.' for name in "ABCDEFGH" for area in range(8)]
    file = tmp_path_factory.mktemp("data") / "trainset.csv"
    file.write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.saved("qwen3_moe", tmp_path_factory.mktemp("mixture"))


def small(base: Path, data: Path, out: Path, **changes: Any) -> StudyConfig:
    return StudyConfig(
        model=ModelSection(model_name=str(base)),
        data=DataSection(task="e2e_nlg", data_path=str(data)),
        probe=ProbeSection(probe_rows=16, probe_steps=4, probe_batch_size=4, probe_learning_rate=1e-2),
        **{"grid": GridSection(grid_low=1e-3, grid_high=1e-2, grid_points=2, grid_growth=0, tuning_seeds=1)}
        | {"train_size": 30, "dev_size": 5, "test_size": 6, "budgets": ["uniform:2"], "arms": PARTS}
        | {"steps": 2, "batch_size": 4, "first_seeds": 2, "more_seeds": 1, "most_seeds": 2, "resamples": 200}
        | {"output_dir": str(out), "device": "cpu"}
        | changes,
    )


def test_the_parts_of_a_mixture_are_arms_of_equal_parameters(mixture: Path, data: Path, tmp_path: Path) -> None:
    stage.run(small(mixture, data, tmp_path))
    study = json.loads((tmp_path / "study.json").read_text())
    rows = {row["arm"]: row["parameters"] for row in study["arms"]}
    assert list(rows) == PARTS
    assert all(abs(count - rows["uniform"]) <= TOLERANCE * rows["uniform"] for count in rows.values())
    contrasts = [row["contrast"] for row in study["verdicts"]]
    assert contrasts == [f"{arm} vs uniform" for arm in PARTS[1:]]
    assert not any(row["diverged"] for row in Ledger(tmp_path).rows.values())
    plan = json.loads(next((tmp_path / "plans").rglob("energy-*.json")).read_text())
    assert any("experts" in path for path in plan)


REFUSED = "loss eva eva+start fisher gora gora+start adalora warm plan-warm compress shuffled:loss inverted:fisher"


@pytest.mark.parametrize("arm", REFUSED.split())
def test_arms_that_experts_cannot_be_are_refused_by_name(mixture: Path, data: Path, tmp_path: Path, arm: str) -> None:
    with pytest.raises(UsageError, match=rf"--arms {re.escape(arm)}: not for experts"):
        stage.run(small(mixture, data, tmp_path, arms=["uniform", arm], primary=[f"{arm} vs uniform"]))


def test_schedules_and_parts_that_are_not_there_are_refused(mixture: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--kind phases: .* is a parameter of experts"):
        stage.run(small(mixture, data, tmp_path / "a", kind="phases", arms=["static", "both:1 > mlp"]))
    dense = tiny_llama(tmp_path / "dense")
    with pytest.raises(UsageError, match="--arms experts: none of the matrices to adapt is of that kind"):
        stage.run(small(dense, data, tmp_path / "b", arms=["uniform", "experts"]))
