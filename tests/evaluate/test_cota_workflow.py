"""The documented workflow on CoTA rows of one file: the task is seen, the threshold decides unless a budget does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_llama

from rankwise.cli import main
from rankwise.files.atomic import read_object
from rankwise.files.plan import read_plan

SHORT = (
    "--set finetune.learning_rate=1e-2 --set finetune.gradient_accumulation=1 --set ranks.no_plots=true "
    "--set train.no_plots=true --set train.max_steps=3"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and data/cota_train.json: sixteen rows about pubs."""
    folder = tmp_path_factory.mktemp("place")
    tiny_llama(folder / "base")
    rows = [
        {"question": f"What is near[Café {n}]?", "chain_of_thought": ["A pub."], "answer": f"The Vaults {n}"}
        for n in range(16)
    ]
    (folder / "data").mkdir()
    (folder / "data" / "cota_train.json").write_text(json.dumps(rows))
    return folder


def workflow(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str, **variables: str) -> Path:
    monkeypatch.chdir(place)
    given = {"MODEL_NAME": "base", "DATA_PATH": "data/cota_train.json", "SUBSET_RATIO": "0.5", "MAX_NEW_TOKENS": "4"}
    with monkeypatch.context() as environment:
        for name, value in (given | variables).items():
            environment.setenv(name, value)
        assert main(["run", "svd_ranks", "-o", str(out), *SHORT.split(), *more]) == 0
    return out


def test_the_documented_variables_run_it_and_scores_on_training_rows_are_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = workflow(place, tmp_path / "run", monkeypatch, SVD_THRESHOLD="0.9")
    said = capsys.readouterr().out
    assert f"data/cota_train.json is what {out / 'train'} was trained on, so scores tell how well" in said
    assert f"data/cota_train.json is what {out / 'finetune'} was trained on, so the gain tells how well" in said
    before, after = (read_object(out / name / "evaluation_results.json") for name in ("before", "after"))
    assert before["task"] == after["task"] == "cota"
    assert read_object(out / "train" / "resolved_config.json")["task"] == "cota"
    assert read_plan(out / "ranks", None).metadata["budget"] is None
    capsys.readouterr()
    held_out = tmp_path / "test.json"
    held_out.write_text((place / "data" / "cota_train.json").read_text().replace("pub", "inn"))
    workflow(place, out, monkeypatch, SVD_THRESHOLD="0.9", TEST_PATH=str(held_out))
    assert "was trained on" not in capsys.readouterr().out


def test_the_threshold_decides_unless_a_budget_does(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"  # one fine-tune, and its ranks anew for each pair of settings

    def parameters(**variables: str) -> int:
        workflow(place, out, monkeypatch, "--only", "finetune,ranks", MIN_RANK="1", **variables)
        return read_plan(out / "ranks", None).parameters

    low, high = (parameters(SVD_THRESHOLD=energy) for energy in ("0.5", "0.99"))
    assert low < high
    budgets = [parameters(SVD_THRESHOLD=energy, BUDGET="uniform:2") for energy in ("0.5", "0.99")]
    assert budgets[0] == budgets[1] < high
