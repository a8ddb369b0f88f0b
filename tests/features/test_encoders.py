"""`rankwise features capture` of plain vision encoders: their patch tokens, row-major, without what stands in front."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny_vision import drawn_image
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from rankwise import cli
from rankwise.features.cache import FeatureCache, open_cache
from rankwise.files.atomic import read_object

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 16}
RAW = {"do_resize": False, "do_center_crop": False}


@dataclass(frozen=True)
class Family:
    """A tiny encoder. front: tokens before the patches. half: where a model of two towers has the one that sees."""

    model: str
    config: dict[str, Any]
    processor: str
    front: int
    half: str = ""


FAMILIES = {
    "DINOv2": Family("Dinov2Model", {**VISION, "mlp_ratio": 2}, "BitImageProcessor", 1),
    "DINOv2 with registers": Family(
        "Dinov2WithRegistersModel", {**VISION, "mlp_ratio": 2, "num_register_tokens": 4}, "BitImageProcessor", 5
    ),
    "DINOv3": Family("DINOv3ViTModel", {**VISION, "num_register_tokens": 4}, "DINOv3ViTImageProcessor", 5),
    "ViT": Family("ViTModel", VISION, "ViTImageProcessor", 1),
    "ViT that classifies": Family("ViTForImageClassification", VISION, "ViTImageProcessor", 1, "vit"),
    "CLIP, the tower": Family("CLIPVisionModel", VISION, "CLIPImageProcessor", 1),
    "SigLIP, the tower": Family("SiglipVisionModel", VISION, "SiglipImageProcessor", 0),
    "CLIP": Family(
        "CLIPModel", {"vision_config": VISION, "text_config": TEXT}, "CLIPImageProcessor", 1, "vision_model"
    ),
    "SigLIP": Family(
        "SiglipModel", {"vision_config": VISION, "text_config": TEXT}, "SiglipImageProcessor", 0, "vision_model"
    ),
}


def saved(family: Family, folder: Path) -> PreTrainedModel:
    kind = getattr(transformers, family.model)
    torch.manual_seed(0)
    model: PreTrainedModel = kind(kind.config_class(**family.config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    size = {"shortest_edge": 36} if family.processor in ("BitImageProcessor", "CLIPImageProcessor") else side
    crop = {"crop_size": side} if "shortest_edge" in size else {}
    getattr(transformers, family.processor)(size=size, **crop).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(64, 48), (40, 80), (56, 56)]):
        drawn_image(number, size).save(folder / f"{number}.png")
    return folder


Capture = Callable[..., FeatureCache]


def capture(photos: Path, model: Path, out: Path, *more: str, code: int = 0) -> FeatureCache | None:
    words = ["features", "capture", str(photos), "--model", str(model), "-o", str(out), "--device", "cpu", *more]
    assert cli.main(words) == code
    return open_cache(out) if code == 0 else None


def expected(model: PreTrainedModel, family: Family, folder: Path, image: Image.Image, **how: Any) -> Tensor:
    """By the whole model's own tower, on the pixels of its own processor."""
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt", **how)["pixel_values"]
    tower = model.get_submodule(family.half)
    interpolated = {} if family.model.startswith(("Dinov2", "DINOv3")) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        hidden: Tensor = tower(pixels, **interpolated).last_hidden_state
    return hidden[0, family.front :]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoders_patches(name: str, photos: Path, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = saved(family, tmp_path / "model")
    cache = capture(photos, tmp_path / "model", tmp_path / "c", "--batch_size", "2")
    assert cache and (cache.tokens, cache.channels, cache.grid) == (16, 32, (4, 4)), "the processor's own 32 pixels"
    larger = capture(photos, tmp_path / "model", tmp_path / "l", "--image_size", "48")
    assert larger and (larger.tokens, larger.grid) == (36, (6, 6))
    for found, side in ((cache, 32), (larger, 48)):
        image = Image.open(photos / "1.png").resize((side, side), Image.Resampling.BICUBIC)
        wanted = expected(model, family, tmp_path / "model", image, **RAW)
        assert torch.allclose(found[1], wanted, atol=1e-5) and wanted.std() > 0.01
    assert read_object(tmp_path / "c" / "index.json")["settings"]["stretched_to"] == 32


def test_a_picture_as_it_is_goes_through_the_encoders_own_processor(photos: Path, tmp_path: Path) -> None:
    family = FAMILIES["CLIP"]
    model = saved(family, tmp_path / "model")
    cache = capture(photos, tmp_path / "model", tmp_path / "c", "--native")
    assert cache and cache.grid == (4, 4)
    assert torch.allclose(
        cache[1], expected(model, family, tmp_path / "model", Image.open(photos / "1.png")), atol=1e-5
    )


def test_siglip_2_lays_its_patches_out_itself(photos: Path, tmp_path: Path) -> None:
    vision = {**SIZES, "patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2VisionConfig(**vision)
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    processor.save_pretrained(tmp_path / "model")
    cache = capture(photos, tmp_path / "model", tmp_path / "c", "--image_size", "32")
    assert cache and (cache.tokens, cache.channels, cache.grid) == (16, 32, (4, 4))
    image = Image.open(photos / "2.png").resize((32, 32), Image.Resampling.BICUBIC)
    with torch.no_grad():
        wanted = model(**processor(image, return_tensors="pt")).last_hidden_state[0]
    assert torch.allclose(cache[2], wanted, atol=1e-5)


def test_an_encoder_whose_tokens_are_no_grid_of_patches_is_refused(photos: Path, tmp_path: Path, capsys: Any) -> None:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    capture(photos, tmp_path / "model", tmp_path / "c", code=2)
    assert "SwinModel gives (16, 16) for 8 × 8 patches" in capsys.readouterr().err


def test_what_takes_no_pictures_is_refused_by_name(photos: Path, tmp_path: Path, capsys: Any) -> None:
    config = transformers.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=64)
    config.save_pretrained(tmp_path / "whisper")
    transformers.BertConfig(**{**SIZES, "vocab_size": 64}).save_pretrained(tmp_path / "bert")
    for name, said in (("whisper", "takes input_features, not pictures"), ("bert", "is a text model")):
        capture(photos, tmp_path / name, tmp_path / "c", code=2)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_an_encoder_is_not_taken_for_a_text_model(tmp_path: Path, capsys: Any) -> None:
    saved(FAMILIES["DINOv2"], tmp_path / "model")
    row = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    words = ["--model_name", str(tmp_path / "model"), "--data_path", str(tmp_path / "rows.json")]
    for command in ("train", "check"):
        assert cli.main([command, *words, "-o", str(tmp_path / command)]) == 2
        assert "which takes no text; use it with `rankwise features capture`" in capsys.readouterr().err


def test_an_encoder_without_its_processor_or_weights_is_named(photos: Path, tmp_path: Path, capsys: Any) -> None:
    family = FAMILIES["ViT"]
    model = saved(family, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    capture(photos, tmp_path / "model", tmp_path / "c", code=3)
    assert "preprocessor_config.json of the model" in capsys.readouterr().err
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "model")
    state = {key: value for key, value in model.state_dict().items() if "layernorm" not in key.removeprefix("encoder.")}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    capture(photos, tmp_path / "model", tmp_path / "c", code=3)
    assert "the files lack" in capsys.readouterr().err
