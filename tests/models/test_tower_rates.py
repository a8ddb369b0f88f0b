"""Learning rates per tower: each parameter has its tower's, all are scheduled and logged, and resuming is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rows import equal, logged
from safetensors.torch import load_file
from test_train_vision import words
from towered import TOWERS, Bases, adapted, loaded, trainer_of, values

from rankwise import cli
from rankwise.files.adapter import read_adapter
from rankwise.models.adapt import full_parameters
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites, tower_of, tower_prefixes


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory)


@pytest.fixture(scope="module")
def data(bases: Bases) -> Path:
    return bases.rows


def finetuned(base: Path, folder: Path, rates: dict[str, float] | None, **given: Any) -> dict[str, torch.Tensor]:
    """All language parameters trained on text, with a rate of its own or not."""
    model = loaded(base)
    trainer = trainer_of(model, folder, rates, **given)
    trainer.train()
    return values(model)


def test_a_rate_of_zero_moves_nothing_of_its_tower(bases: Bases, data: Path, tmp_path: Path) -> None:
    base = bases("smolvlm")
    more = ("--lora", "vision,projector", "--language_lr", "0", "--vision_lr", "1e-3", "--max_steps", "3")
    assert cli.main(words(base, data, tmp_path, *more)) == 0
    towers = {path: site.tower for path, site in model_sites(loaded(base)).items()}
    moved = {
        tower: [bool(pair.lora_B.any()) for path, pair in read_adapter(tmp_path).pairs.items() if towers[path] == tower]
        for tower in TOWERS
    }
    assert not any(moved["language"]), "B is still zero"
    assert all(moved["vision"])
    assert all(moved["projector"])
    rows = [row for row in logged(tmp_path) if row["learning_rate"]]
    assert [float(row["learning_rate_language"]) for row in rows] == [0, 0, 0]
    for row in rows:
        assert float(row["learning_rate_vision"]) == pytest.approx(float(row["learning_rate"]) / 10)


def test_equal_rates_are_the_common_one_bit_for_bit(bases: Bases, tmp_path: Path) -> None:
    base = bases("smolvlm")
    plain = finetuned(base, tmp_path / "a", None, weight_decay=0.1)
    assert equal(plain, finetuned(base, tmp_path / "b", {"language": 1e-2, "vision": 1e-2}, weight_decay=0.1))
    other = finetuned(base, tmp_path / "c", {"language": 1e-3}, weight_decay=0.1)
    assert not equal(plain, other)
    assert equal(other, finetuned(base, tmp_path / "d", None, weight_decay=0.1, learning_rate=1e-3)), "text alone"


def test_groups_keep_weight_decay_and_the_ratio_of_lora_plus(bases: Bases, tmp_path: Path) -> None:
    model = adapted(bases("smolvlm"), ("language", "vision"), ("projector",))
    towers = {"language": 1e-2, "vision": 2e-3, "projector": 5e-4}
    rates = {tower: rate for tower, rate in towers.items() if tower != "language"}
    prefixes = tower_prefixes(meta_model(str(bases("smolvlm"))))
    for ratio in (None, 16.0):
        trainer = trainer_of(model, tmp_path, rates, loraplus_lr_ratio=ratio, weight_decay=0.1)
        optimizer = trainer.create_optimizer()
        found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                group = found.pop(id(parameter))
                tower = tower_of(name.removeprefix("base_model.model.").split(".lora_")[0], prefixes)
                raised = ratio if ratio and "lora_B" in name else 1.0
                assert group["lr"] == pytest.approx(towers[tower] * raised), name
                assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1)
        assert not found


def test_vectors_in_full_stay_at_the_common_rate_under_lora_plus(bases: Bases, tmp_path: Path) -> None:
    model = adapted(bases("llava"), ("language",), ("projector",))
    optimizer = trainer_of(model, tmp_path, loraplus_lr_ratio=16.0).create_optimizer()
    full = {id(p) for own in full_parameters(model).values() for p in own}
    biases = [p for own in full_parameters(model).values() for p in own if p.dim() == 1]
    assert biases
    for group in optimizer.param_groups:
        if any(id(p) in full for p in group["params"]):
            assert group["lr"] == 1e-2


def test_a_run_with_rates_and_a_tower_in_full_resumes_exactly(
    bases: Bases, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases("smolvlm")
    more = ["--full", "projector", "--projector_lr", "1e-3", "--language_lr", "5e-3", "--max_steps", "4"]
    more += ["--schedule", "projector:3 > language", "--lora_r", "2"]
    assert cli.main(words(base, data, tmp_path / "a", *more)) == 0
    saving = [*more, "--save_strategy", "steps", "--save_steps", "2"]
    assert cli.main(words(base, data, tmp_path / "b", *saving)) == 0
    (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").unlink()
    resume = ["--resume_from_checkpoint", "true"]
    assert cli.main(words(base, data, tmp_path / "b", *saving, *resume)) == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert equal(first, second)
    columns = ("step", "loss", "learning_rate", "learning_rate_language", "learning_rate_projector")
    assert [[r[c] for c in columns] for r in logged(tmp_path / "a")] == [
        [r[c] for c in columns] for r in logged(tmp_path / "b")
    ]
    capsys.readouterr()
    other = [word if word != "1e-3" else "2e-3" for word in saving]
    assert cli.main(words(base, data, tmp_path / "b", *other, *resume)) == 2
    assert "tower_rates" in capsys.readouterr().err
