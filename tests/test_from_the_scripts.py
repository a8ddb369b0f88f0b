"""Every documented command line that this version covers is understood: docs/from-the-scripts.md through --dry-run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from rankwise.cli import main, resolve
from rankwise.options import flatten

PAGE = Path(__file__).parents[1] / "docs" / "from-the-scripts.md"


def documented_commands() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    joined = [block.replace("\\\n", " ").strip() for block in blocks]
    return [" ".join(block.split()) for block in joined if block.startswith("rankwise ")]


def test_the_page_has_the_documented_workflow() -> None:
    verbs = {command.split()[1] for command in documented_commands()}
    wanted = "finetune ranks run batch compare train evaluate merge label export validate features"
    assert set(wanted.split()) <= verbs
    features = {command.split()[2] for command in documented_commands() if command.split()[1] == "features"}
    assert features == {"extract", "train", "compare", "show"}


GUIDE = {  # the config file of the depth guide, as it stands there
    "model_path": "./isaac_model",
    "data_path": "./data/train.json",
    "image_folder": "./data/images",
    "output_dir": "./checkpoints/isaac-lora",
    "use_depth": True,
    "depth_checkpoint_path": "./depth_anything_v2_vitl.pth",
    "lora_r": 128,
    "lora_alpha": 256,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-4,
    "fp16": True,
    "save_steps": 500,
    "logging_steps": 10,
}


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


@pytest.mark.parametrize("command", documented_commands())
def test_dry_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GUIDE))
    code = main([*shlex.split(command)[1:], "--dry-run"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "would " in printed.out
    assert not any(tmp_path.rglob("*.safetensors")), "a dry run writes nothing"
