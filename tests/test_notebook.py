"""The notebook of two checkpoints: run as it is, in a kernel, offline; and with two lines changed for one's own.

It is committed without outputs: those of a tiny model say nothing, they hold paths and times, and what a reader of the
repository needs to see is the code. That it runs is shown here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from documented import REPOSITORY

import rankwise
from rankwise.core.plan import RankPlan
from rankwise.errors import DataError, UsageError
from rankwise.files.run_folder import RunFolder

NOTEBOOK = REPOSITORY / "notebooks" / "first_plan.ipynb"
RUNS = ("uniform", "planned")
YOURS = re.compile(r"^(.*) = (None(?:, None)+)(?=  # <- yours)", re.MULTILINE)


def code() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the notebook ran in, without a network."""
    nbclient = pytest.importorskip("nbclient", reason="the notebook runs with nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MPLBACKEND", raising=False)  # the kernel shows plots itself
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    nbformat.write(book, folder / "executed.ipynb")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own, starting a kernel
def test_it_runs_as_it_is(executed: Path) -> None:
    run = executed / "runs" / "first_plan"
    plan = rankwise.read_plan(run / "ranks" / "configs" / "lora_rank_config.json")
    assert isinstance(plan, RankPlan) and len(set(plan.ranks.values())) > 1
    told = json.loads((run / "comparison" / "comparison.json").read_text(encoding="utf-8"))["runs"]
    assert len(told) == 2
    small, large = sorted(RunFolder(run / name).stages()["train"]["trainable_parameters"] for name in RUNS)
    assert small > 0.97 * large, "of equal size"
    shown = json.dumps(json.loads((executed / "executed.ipynb").read_text(encoding="utf-8")))
    for words in ("hold half of the change", "| matrix | shape | rank |", "trainable parameters", "image/png"):
        assert words in shown, words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_lines_make_it_ones_own(executed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines are marked and no other names the example; with them changed nothing is made, and spectra are read."""
    run = executed / "runs" / "first_plan"
    own = {
        "BASE, TUNED": (str(run / "example" / "base"), str(run / "finetune" / "finetuned")),
        "TASK, ROWS, HELD_OUT": ("e2e_nlg", str(run / "example" / "data"), str(run / "example" / "data")),
    }
    first, example, spectra, *rest = code()
    assert [found[1] for found in YOURS.finditer(first)] == list(own)
    assert not any("tiny_example" in cell for cell in (first, spectra, *rest))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in (YOURS.sub(lambda found: f"{found[1]} = {own[found[1]]!r}", first), example, spectra):
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert names["TINY"] == {} and (names["BASE"], names["TUNED"]) == own["BASE, TUNED"]
    assert names["spectrum"].rank_for(0.5) > 0 and not list(tmp_path.iterdir())


def test_it_is_committed_without_outputs() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_a_command_from_python_refuses_what_the_command_line_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown command 'rank'; did you mean ranks"):
        rankwise.run_command("rank")
    with pytest.raises(UsageError, match=r"run_command\('ranks'\): unknown option 'bugdet'; did you mean budget"):
        rankwise.run_command("ranks", base="a/b", tuned="a/c", bugdet="uniform:4")
    with pytest.raises(UsageError, match="ranks needs one of"):
        rankwise.run_command("ranks", base=tmp_path)
    with pytest.raises(DataError, match="no such file"):
        rankwise.run_command("ranks", base=tmp_path / "here", tuned=tmp_path / "there", output_dir=tmp_path)
