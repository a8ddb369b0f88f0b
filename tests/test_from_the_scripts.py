"""The config file of the depth guide and the recipes that take its place, read alone by `train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documented_world import GUIDE

from rankwise.cli import main, resolve
from rankwise.options import flatten


def test_the_guides_json_is_the_recipes_training_stage(tmp_path: Path) -> None:
    """The recipe says what the guide's file says; beyond it only what the guide states in its text."""
    (tmp_path / "config.json").write_text(json.dumps(GUIDE))
    from_json = flatten(resolve("train", [str(tmp_path / "config.json")])[0])
    from_recipe = flatten(resolve("train", ["isaac_depth.yaml"])[0])
    other = {name for name in from_recipe if from_recipe[name] != from_json.get(name)}
    assert other == {"task", "max_seq_length", "lora", "target", "output_dir"}
    assert from_recipe["max_seq_length"] == 16384
    assert from_recipe["lora"] == ["language", "projector"]


def test_a_recipe_without_the_command_is_no_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "isaac_depth.yaml", "--dry-run"]) == 2
    assert "0 stages of the command 'finetune' (it has check, train, report)" in capsys.readouterr().err
    assert main(["evaluate", "qwen_vl_ranks.yaml", "--dry-run"]) == 2
    assert "2 stages" in capsys.readouterr().err
    assert main(["train", "no_such_recipe.yaml", "--dry-run"]) == 2
