"""What a study's registration and records are for: protocol, data, code or results changed, and the command says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_study import small
from tiny import tiny_llama

from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.options.field import flatten
from rankwise.options.study import StudyConfig
from rankwise.study import command as stage
from rankwise.study import design, plans, protocol, registration
from rankwise.study.design import design_study
from rankwise.study.registration import DEVIATIONS, FILE, TEST_READ, Registration


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, data.csv and a finished study of two arms and two seeds in out/."""
    folder = tmp_path_factory.mktemp("study")
    tiny_llama(folder / "base")
    rows = [
        f'"name[{name}], area[{area}]",{name} is in the {area}.'
        for name in ("The Vaults", "Alimentum", "Cotto", "Zizzi", "Aromi", "Fitzbillies", "Strada", "Giraffe")
        for area in ("riverside", "city centre", "north", "old town")
    ]
    (folder / "data.csv").write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage.run(own())
    return folder


@pytest.fixture
def copy(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All of it, to be damaged, as the current folder: paths are part of the protocol."""
    shutil.copytree(material, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "study"


def own(**changes: Any) -> StudyConfig:
    sizes = {"train_size": 14, "arms": ["uniform", "energy"], "most_seeds": 2} | changes
    return small(Path("base"), Path("data.csv"), Path("out"), **sizes)


def test_started_again_it_finds_everything_as_it_was(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_needed(*_: Any) -> None:
        raise AssertionError("nothing is trained again")

    monkeypatch.setattr("rankwise.study.execution.Bench.make", not_needed)
    before = (copy / "out" / "study.json").read_text()
    stage.run(own())
    after = (copy / "out" / "study.json").read_text()
    assert json.loads(after)["verdicts"] == json.loads(before)["verdicts"]
    assert not (copy / "out" / DEVIATIONS).exists()


# --- the registration ------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before weights are loaded, which may take minutes."""

    def load(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rankwise.study.material.load_weights", load)


def test_all_that_decides_the_outcome_is_registered(copy: Path) -> None:
    """Whatever is added to a study's options is registered, and makes runs of another recipe, unless named here."""
    later = {"predictions": ["energy vs uniform: better"], "primary_budgets": ["uniform:3"]}
    config = own(**later, assumed_seed_sd=1.0, assumed_item_sd=1.0)
    found = design_study(config)
    assert set(flatten(config)) - set(found.content) == {"output_dir", "batch_arms", "device", "deviation", "time_only"}
    grids = {name for name in flatten(config) if name in flatten(config.grid)}
    asked = {"question", "arms", "primary", "budgets", "smallest_effect", "resamples", "kind", "metric"}
    asked |= {*later, "assumed_seed_sd", "assumed_item_sd"}
    others = {
        name
        for name, value in flatten(config).items()
        if name in found.content and recipe_without(found, name) == found.recipe
    }
    assert others <= grids | asked | {"first_seeds", "more_seeds", "most_seeds"}


def recipe_without(found: design.Design, name: str) -> str:
    """The recipe that the design would have if this option had another value."""
    content = {**found.content, name: "another"}
    return design.Design.recipe.fget(type("Other", (), {"content": content, "config": found.config})())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"smallest_effect": 0.5}, "smallest_effect: 1e-06 → 0.5"),
        ({"arms": ["uniform", "energy", "shuffled"]}, "arms"),
        ({"primary": ["uniform vs energy"]}, "primary"),
        ({"dev_size": 4}, "dev_size: 5 → 4"),
        ({"steps": 3}, "steps: 2 → 3"),
        ({"seed": 7}, "seed: 42 → 7"),
        ({"most_seeds": 3}, "most_seeds: 2 → 3"),
    ],
)
def test_another_protocol(copy: Path, unloaded: None, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"registered otherwise:(\n.*)*{said}"):
        stage.run(own(**change))


def test_other_rows_under_the_same_name(copy: Path, unloaded: None) -> None:
    file = copy / "data.csv"
    file.write_text(file.read_text().replace("Cotto is in the north", "Cotto is far in the north"))
    with pytest.raises(UsageError, match=r"registered otherwise:\n  inputs: "):
        stage.run(own())


def test_another_model_under_the_same_name(copy: Path, unloaded: None) -> None:
    file = copy / "base" / "model.safetensors"
    save_file({key: 1.001 * tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"registered otherwise:\n  inputs: "):
        stage.run(own())


def test_other_code(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the runs would be of one version, half of another: a deviation, once."""
    installed = registration.versions
    monkeypatch.setattr(registration, "versions", lambda: installed() | {"torch": "9.9"})
    with pytest.raises(UsageError, match=r"version of torch: .* → '9\.9'"):
        stage.run(own())
    stage.run(own(deviation="torch was updated"))
    stage.run(own())
    (row,) = Registration(copy / "out").deviations
    assert row["changed"]["version of torch"][1] == "9.9"


def test_a_registration_that_was_written_anew(copy: Path) -> None:
    """The protocol of today in the file of then; its hash tells."""
    file = copy / "out" / FILE
    content = json.loads(file.read_text())
    content["content"]["smallest_effect"] = 0.5
    file.write_text(json.dumps(content))
    with pytest.raises(VerificationError, match=rf"{FILE}: not what was registered"):
        stage.run(own(smallest_effect=0.5))


def test_a_deviation_that_was_written_anew(copy: Path) -> None:
    stage.run(own(smallest_effect=0.5, deviation="too small an effect"))
    file = copy / "out" / DEVIATIONS
    file.write_text(file.read_text().replace('"smallest_effect": 0.5', '"smallest_effect": 0.1'))
    with pytest.raises(VerificationError, match=rf"{DEVIATIONS}, line 1: not what was registered"):
        stage.run(own(smallest_effect=0.1))


def test_test_items_of_other_runs_are_read_once_only(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol is the same, and other code chooses other rates: other runs, whose test items nobody may look at."""
    best = protocol.best_point
    monkeypatch.setattr(protocol, "best_point", lambda curve: next(k for k in sorted(curve) if k != best(curve)))
    before = (copy / "out" / TEST_READ).read_text()
    with pytest.raises(UsageError, match=r"the test items were read on .* for 4 runs"):
        stage.run(own())
    assert (copy / "out" / TEST_READ).read_text() == before


# --- what was found --------------------------------------------------------------------------------------------------


def test_losses_that_were_altered(copy: Path) -> None:
    line = (copy / "out" / "runs.jsonl").read_text().splitlines()[-1]
    file = copy / "out" / json.loads(line)["file"]
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["dev"][0, 0] += 0.5
    save_file(tensors, file)
    with pytest.raises(DataError, match=rf"{file.name}: changed since it was written"):
        stage.run(own())


def test_a_line_that_is_no_run(copy: Path) -> None:
    with (copy / "out" / "runs.jsonl").open("a") as stream:
        stream.write('{"key": 5}\n')
    with pytest.raises(DataError, match=r"runs\.jsonl, line \d+: not an entry of a finished run"):
        stage.run(own())


def test_ranks_beyond_the_budget(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that spends more than the others: in its file, and in its code."""
    (file,) = (copy / "out" / "plans").rglob("energy-*.json")
    ranks = json.loads(file.read_text())
    file.write_text(json.dumps({path: rank + (number == 0) for number, (path, rank) in enumerate(ranks.items())}))
    with pytest.raises(
        VerificationError, match=r"energy has .* parameters at uniform:3, which is .*: more than 0\.5 %"
    ):
        stage.run(own())
    file.unlink()
    within = plans.ranks_within
    monkeypatch.setattr(plans, "ranks_within", lambda *given: {site: rank + 1 for site, rank in within(*given).items()})
    with pytest.raises(VerificationError, match="could not be compared"):
        stage.run(own())


def test_an_adapter_at_a_module_that_never_runs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its factors would train on nothing, and the arm be compared at parameters that it does not have."""
    shutil.rmtree(copy / "out")
    forward = "transformers.models.llama.modeling_llama.LlamaMLP.forward"
    monkeypatch.setattr(forward, lambda self, x: self.down_proj(self.act_fn(self.up_proj(x))))
    with pytest.raises(VerificationError, match=r"never calls model\.layers\.0\.mlp\.gate_proj"):
        stage.run(own())
    assert torch.is_grad_enabled()
