"""From photos to a phone: the recipes say what the documents say, and the small one really walks the whole way."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankwise
from rankwise import cli
from rankwise.device.parity.pixels import unavailable
from rankwise.errors import UsageError
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.gguf.converter import find_converter
from rankwise.pipeline.recipe import find_recipe, load_recipe

RECIPES = Path(rankwise.__file__).parent / "recipes"
WAY = ("label", "check", "before", "train", "after", "merge", "export", "validate", "bundle", "report")


def stages(name: str, run: Path) -> dict[str, dict[str, Any]]:
    return {stage.name: stage.options for stage in load_recipe(find_recipe(name), run).stages}


def test_the_way_in_its_order(tmp_path: Path) -> None:
    android, quick = stages("smolvlm_android", tmp_path), stages("quickstart", tmp_path)
    shared = [name for name in android if name in WAY]
    assert tuple(shared) == WAY
    assert list(quick) == ["tiny", *android], "the same way, from a model of its own"


def test_the_documented_values(tmp_path: Path) -> None:
    found = stages("smolvlm_android", tmp_path)
    label, train = found["label"], found["train"]
    assert (label["num_images"], label["teacher_model"], label["min_confidence"]) == ("1000", "gpt-4o", 0.75)
    assert (train["lora_r"], train["lora_alpha"], train["lora_dropout"], train["num_epochs"]) == (16, 32, 0.05, "3")
    assert (train["batch_size"], train["gradient_accumulation"], train["learning_rate"]) == (4, 4, "2e-4")
    assert found["export"]["outtype"] == ["f16", "q8_0"] and found["export"]["mmproj"] is True
    assert found["merge"]["dtype"] == "float16"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_score_labels_as_they_select_them(path: Path, tmp_path: Path) -> None:
    """A checkpoint chosen by what it generates, scored by likelihood: 100 % beside the 0 % of the device."""
    listed = list(stages(path.stem, tmp_path).values())
    methods = {one["select_by"] for one in listed if one.get("select") == "accuracy" and "select_by" in one}
    scored = [one for one in listed if one.get("task") == "labels" and "model_path" in one]
    for method in methods:
        assert scored
        assert {one.get("classify", "likelihood") for one in scored} == {method}


def test_the_environment_reaches_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"NUM_IMAGES": "40", "TEACHER_MODEL": "mine", "BASE_MODEL": "org/vlm", "IMAGES": "photos", "EPOCHS": "1"}
    given |= {"TEACHER_URL": "http://127.0.0.1:1/v1", "DATASET": "elsewhere"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = stages("smolvlm_android", tmp_path)
    label = found["label"]
    assert [label[key] for key in ("num_images", "teacher_model", "images")] == ["40", "mine", "photos"]
    assert label["base_url"] == given["TEACHER_URL"]
    assert {found[name]["data_path"] for name in ("check", "before", "train", "after", "merge", "validate")} == {
        "elsewhere"
    }
    assert label["output_dir"] == "elsewhere"
    assert {found["train"]["model_name"], found["merge"]["base_model"], found["validate"]["base_model"]} == {"org/vlm"}


def test_every_stage_works_in_the_run_folder(tmp_path: Path) -> None:
    for options in stages("quickstart", tmp_path / "here").values():
        places = [options[key] for key in ("output_dir", "run", "data_path", "images") if key in options]
        assert places and all(str(place).startswith(str(tmp_path / "here")) for place in places)


def test_new_stages_stand_before_the_one_that_they_precede(tmp_path: Path) -> None:
    rows = {"a": "ranks", "b": "train", "c": "report"}
    parent = {"name": "parent", "stages": [{"name": name, "command": command} for name, command in rows.items()]}
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent), encoding="utf-8")

    def order(*names: str) -> list[str]:
        content = [{"name": name} if name in rows else {"name": name, "command": "merge"} for name in names]
        child = tmp_path / "child.yaml"
        child.write_text(yaml.safe_dump({"extends": "parent", "name": "child", "stages": content}), encoding="utf-8")
        return [stage.name for stage in load_recipe(child, tmp_path).stages]

    assert order("x", "y", "a") == ["x", "y", "a", "b", "c"]
    assert order("b", "x") == ["a", "b", "c", "x"]
    assert order("x", "c", "y") == ["a", "b", "x", "c", "y"]
    assert order("x", "c", "y", "a") == ["y", "a", "b", "x", "c"], "each before its own"
    (tmp_path / "child.yaml").write_text("extends: parent\nstages: [{name: x}]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="command"):
        load_recipe(tmp_path / "child.yaml", tmp_path)


def can_convert() -> bool:
    if any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "gguf", "openai", "aiolimiter")):
        return False
    try:
        find_converter(None)
    except UsageError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not can_convert(), reason="no converter (rankwise export --install-converter), or no device extra")
def test_quickstart_walks_the_whole_way_and_is_done_then(
    trained_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the base on that its first stage trains (test_tiny_command.py), and with a third of its epochs."""
    monkeypatch.setenv("EPOCHS", "4")
    out = tmp_path / "run"
    shutil.copytree(trained_base, out / "tiny" / "base")
    assert cli.main(["run", "quickstart", "-o", str(out)]) == 0
    capsys.readouterr()
    found = json.loads((out / "validation" / "validation.json").read_text(encoding="utf-8"))
    assert found["n"] == 5
    assert (out / "export" / "tiny-elements-q8_0.gguf").is_file()
    for name in ("before", "after"):
        result = EvaluationResult.load(out / name)
        assert (result.method, result.n) == ("generation", 5), "as the checkpoint is selected and the device answers"
    assert EvaluationResult.load(out / "before")["accuracy"] == pytest.approx(100 * found["base"]["accuracy"])
    assert EvaluationResult.load(out / "after")["accuracy"] == pytest.approx(100 * found["reference"]["accuracy"])
    golden = json.loads((out / "bundle" / "golden" / "golden.json").read_text(encoding="utf-8"))
    assert found["tolerance"] == 50 <= golden["tolerance"]["k"], "one number"
    pairs = [one for row in golden["cases"] for one in row["images"]]
    folder = out / "bundle" / "golden"
    assert len(pairs) == 5 + 3, "and the shapes that the data set lacks"
    assert all((folder / one["source"]).read_bytes() != (folder / one["device"]).read_bytes() for one in pairs)
    pixels = found["parity"]["q8_0"]["rungs"][0]
    assert pixels["status"] == ("not measured" if unavailable() else "ok"), pixels
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "labels by generation" in page and "weak: k = " in page
    assert "no rung is broken" in page and "confusion" in page and "## time and memory" in page
    assert cli.main(["run", "quickstart", "-o", str(out)]) == 0
    assert capsys.readouterr().out.count("done already") == len(WAY) + 1
