"""The config file of the depth guide and the recipes that take its place, read alone by `train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documented_world import GUIDE
from PIL import Image
from tiny_isaac import tiny_isaac

from rankwise.cli import main, resolve
from rankwise.options.field import flatten


def test_the_guides_json_is_the_recipes_training_stage(tmp_path: Path) -> None:
    """The recipe says what the guide's file says; beyond it only what the guide states in its text."""
    (tmp_path / "config.json").write_text(json.dumps(GUIDE))
    guide, recipe = (resolve("train", [file])[0] for file in (str(tmp_path / "config.json"), "isaac_depth.yaml"))
    from_json, from_recipe = flatten(guide), flatten(recipe)
    other = {name for name in from_recipe if from_recipe[name] != from_json.get(name)}
    assert other == {"task", "max_seq_length", "lora", "target", "output_dir", "lora_dropout"}
    assert guide.lora.dropout == recipe.lora.dropout == from_recipe["lora_dropout"] == 0.05
    assert from_recipe["max_seq_length"] == 16384
    assert from_recipe["lora"] == ["language", "projector"]


def test_the_guides_plain_command_trains_as_the_guide_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All linear layers but those of the vision tower and depth, up to 16384 tokens; --target_modules overrides."""
    tiny_isaac(tmp_path / "isaac", max_sequence_length=16384, max_position_embeddings=40960)
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(number), "image": "a.png", "conversations": turns} for number in range(2)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    plain = (
        "train --model_path isaac --data_path train.json --max_steps 1 --use_cpu --val_fraction 0 --save_strategy no"
    )
    assert main([*plain.split(), "-o", "plain", "--dry-run"]) == 0
    assert "train adapters in language, projector" in capsys.readouterr().out
    assert main([*plain.split(), "-o", "plain"]) == 0
    adapted = {site["path"]: site["tower"] for site in json.loads(Path("plain/sites.json").read_text())["sites"]}
    assert set(adapted.values()) == {"language", "projector"} and len(adapted) == 2 * 7 + 2
    assert json.loads(Path("plain/input.json").read_text())["max_seq_length"] == 16384
    assert main([*plain.split(), "-o", "named", "--target_modules", "q_proj,v_proj", "--max_seq_length", "512"]) == 0
    assert {site["tower"] for site in json.loads(Path("named/sites.json").read_text())["sites"]} == {"language"}


def test_a_recipe_without_the_command_is_no_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "isaac_depth.yaml", "--dry-run"]) == 2
    assert "0 stages of the command 'finetune' (it has check, train, report)" in capsys.readouterr().err
    assert main(["evaluate", "qwen_vl_ranks.yaml", "--dry-run"]) == 2
    assert "2 stages" in capsys.readouterr().err
    assert main(["train", "no_such_recipe.yaml", "--dry-run"]) == 2
