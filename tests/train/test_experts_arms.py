"""`rankwise train --arms` on a base with fused experts: arm after arm, each what a run of its own would have been."""

from __future__ import annotations

import json
from pathlib import Path

import experts
import pytest
from rows import logged
from safetensors.torch import load_file
from test_finetune import restaurants

from rankwise import cli
from rankwise.files.adapter import read_adapter

ARMS = {
    "a": {"rank": 2},
    "b": {"rank": 3, "learning_rate": 1e-2, "seed": 5, "scale": 0.7},
}
SHAPE = "--use_cpu --per_device_train_batch_size 4 --lr 5e-3 --max_steps 6 --logging_steps 2 --eval_steps 6".split()


def words(folder: Path, out: Path, *more: str) -> list[str]:
    own = ["train", "--model_name", str(folder / "base"), "--task", "e2e_nlg", "--arms", str(folder / "arms.json")]
    rows = ["--data_path", str(folder / "trainset.csv"), "--val_path", str(folder / "trainset.csv")]
    return [*own, *rows, *SHAPE, "--eval_strategy", "steps", "-o", str(out), *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arms")
    experts.saved("llama4_text", folder / "base")
    restaurants(folder)
    (folder / "arms.json").write_text(json.dumps([{"name": name, **arm} for name, arm in ARMS.items()]))
    assert cli.main(words(folder, folder / "run", "--target", "experts", "--schedule", "down_proj:2 > experts")) == 0
    return folder


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_what_its_own_config_trains_alone(name: str, world: Path, tmp_path: Path) -> None:
    arm = world / "run" / name
    assert cli.main(["train", str(arm / "resolved_config.json"), "-o", str(tmp_path / "alone")]) == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (arm, tmp_path / "alone"))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5
    (last, alone) = (
        [row["eval_loss"] for row in logged(folder) if row["eval_loss"]][-1] for folder in (arm, tmp_path / "alone")
    )
    assert float(last) == pytest.approx(float(alone), rel=1e-4)
    pairs = read_adapter(arm).pairs
    assert {pair.experts for pair in pairs.values()} == {4}
    assert json.loads((arm / "adapter_config.json").read_text())["lora_dropout"] == 0.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--select loss", "keep their last weights"),
        ("--lora_dropout 0.1", "--lora_dropout 0.1"),
        ("--init_lora_weights orthogonal", "start as default or gaussian"),
    ],
)
def test_what_such_arms_cannot_do(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, said: str
) -> None:
    assert cli.main(words(world, tmp_path / "out", "--dry-run", *more.split())) == 2
    assert said in capsys.readouterr().err
