"""`rankwise check` runs the model on rows: a cut-down copy finds what does not fit, and never blames the rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pictured import checked, rows
from transformers import (
    Gemma3Config,
    Gemma4Config,
    LlavaConfig,
    MllamaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

from rankwise.data.vision_inputs import Sight
from rankwise.models import cut_down as cutting
from rankwise.models.cut_down import Untried, cut_down, random_model
from rankwise.models.load import load_config

Models = Callable[[str], Path]
FILE = ("one image", "two images", "no image")


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "idefics2", "llava_onevision", "isaac"])
def test_good_rows_pass(family: str, family_models: Models, pictures: Path, tmp_path: Path) -> None:
    code, report = checked(family_models(family), rows(tmp_path, *FILE), pictures)
    assert (code, report["model_run"], report["bad"]["model"]) == (0, {"samples": 3, "notes": []}, 0)


def reversed_rows(whole: Any) -> Any:
    return lambda self, rows: whole(self, rows[::-1])


def another_picture(whole: Any) -> Any:
    def inputs(self: Sight, rows: Sequence[Sequence[str]]) -> Any:
        return {
            name: torch.zeros_like(value) if "pixel" in name else value for name, value in whole(self, rows).items()
        }

    return inputs


def without_placeholders(self: Sight, texts: Sequence[str], names: Sequence[str]) -> list[str]:
    return [text.replace(self.image_token, "x") for text in texts]


@pytest.mark.parametrize(
    ("place", "change", "reason", "bad"),
    [
        ("inputs", reversed_rows, "in a batch", {"one image", "two images"}),
        ("inputs", another_picture, "than of the processor's own inputs", {"one image"}),
        (
            "row_inputs",
            lambda _: lambda self, ids, labels: {"token_type_ids": torch.zeros_like(ids)},
            "own inputs",
            {"one image"},
        ),
        ("expanded", lambda _: without_placeholders, "do not match", {"one image", "two images"}),
    ],
)
def test_what_is_wrong_with_the_products_own_inputs_is_found(
    place: str,
    change: Any,
    reason: str,
    bad: set[str],
    family_models: Models,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the comparison of ids and pixels: the model alone shows it."""
    monkeypatch.setattr(Sight, place, change(getattr(Sight, place)))
    file = rows(tmp_path, *FILE)
    code, report = checked(family_models("gemma3"), file, pictures, "--compare", "0")
    assert code == 3 and report["bad"]["model"] >= 1
    named = (tmp_path / "report" / "bad_samples.jsonl").read_text()
    assert all(f'"sample": "{name}"' in named for name in bad)
    assert reason in named


def test_a_processor_that_does_not_fit_its_model_is_found(
    family_models: Models, pictures: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(family_models("llava"), tmp_path / "llava"))
    config = (folder / "processor_config.json").read_text()
    assert '"patch_size": 8' in config
    (folder / "processor_config.json").write_text(config.replace('"patch_size": 8', '"patch_size": 16'))
    code, report = checked(folder, rows(tmp_path, *FILE), pictures)
    assert code == 3 and report["bad"]["model"] == 2


def test_a_copy_that_does_not_run_is_a_note(
    family_models: Models,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(config: Any) -> Any:
        model = random_model(config)
        model.model.multi_modal_projector.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("shapes"))
        return model

    monkeypatch.setattr("rankwise.data.check.command.random_model", broken)
    code, report = checked(family_models("gemma3"), rows(tmp_path, *FILE), pictures)
    assert code == 0 and report["model_run"]["samples"] == 0
    assert (
        "note: the model was not run: its cut-down copy does not run (RuntimeError: shapes)" in capsys.readouterr().out
    )
    monkeypatch.setattr(
        "rankwise.data.check.command.cut_down", lambda _: (_ for _ in ()).throw(Untried("it has no layers"))
    )
    code, report = checked(family_models("gemma3"), rows(tmp_path, *FILE), pictures)
    assert code == 0 and "it has no layers; --run_model" in report["model_run"]["notes"][0]


def test_the_models_own_weights_run(family_models: Models, pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("rankwise.data.check.command.cut_down", lambda _: pytest.fail("a copy was made"))
    code, report = checked(family_models("qwen3_vl"), rows(tmp_path, *FILE), pictures, "--run_model")
    assert (code, report["model_run"]["samples"]) == (0, 3)


@pytest.mark.parametrize(
    ("config", "text", "vision"),
    [
        (Qwen3VLMoeConfig(), 2, 2),
        (Gemma3Config(), 2, 2),
        (SmolVLMConfig(), 2, 2),
        (LlavaConfig(), 2, 2),
        (MllamaConfig(), 2, 6),  # its projector reads as many layers as the config names
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_a_whole_model_is_cut_down(config: PreTrainedConfig, text: int, vision: int) -> None:
    small = cut_down(config)
    seen = small.vision_config
    assert small.get_text_config().num_hidden_layers == text
    assert getattr(seen, "depth", getattr(seen, "num_hidden_layers", None)) in (vision, vision + 1)
    assert cutting._parameters(small) <= cutting.PARAMETERS < cutting._parameters(config)
    assert small.get_text_config().vocab_size == config.get_text_config().vocab_size


def test_layers_of_every_kind_stay() -> None:
    """Sliding and full attention, cross-attention, layers with a table of their own."""
    assert set(cut_down(Gemma3Config()).text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert cut_down(MllamaConfig()).text_config.cross_attention_layers == [1]
    assert cut_down(Qwen2_5_VLConfig(vision_config={"hidden_size": 1280})).vision_config.fullatt_block_indexes == [1]
    assert set(cut_down(Gemma4Config()).text_config.layer_types) == {"sliding_attention", "full_attention"}


def test_no_weight_is_zero(family_models: Models) -> None:
    """Gates that keep images out of a new model are open, and the head is gone."""
    model = random_model(cut_down(load_config(str(family_models("mllama")))))
    zero = [name for name, value in model.named_parameters() if not name.endswith("bias") and not value.any()]
    assert zero == [] and not any(name.startswith("lm_head") for name, _ in model.named_parameters())
