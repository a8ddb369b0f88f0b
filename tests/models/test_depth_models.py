"""Depth in the families' models: the right value at the right token, in training, generation, PEFT and merging."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from tiny_isaac import tiny_isaac
from tiny_vision import FAMILIES, drawn_image
from torch import Tensor
from transformers import AutoProcessor

from rankwise.data.depth.maps import Grid, image_grids
from rankwise.errors import DataError, UsageError
from rankwise.models.adapt import quiet_peft
from rankwise.models.depth.encoder import DepthEncoder, DepthSettings, attach_depth, encoder_of, read_depth, write_depth
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites

MAKERS = {name: FAMILIES[name] for name in ("qwen25vl", "qwen2vl", "smolvlm", "idefics3", "llava")} | {
    "isaac": tiny_isaac
}
GATE = 0.3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MAKERS.items()}


def plain(folder: Path) -> Any:
    return load_model(str(folder), torch.float32).eval()


def with_depth(folder: Path, gate: float = GATE, **settings: Any) -> Any:
    model = attach_depth(plain(folder), DepthSettings(**settings))
    set_gate(model, gate)
    return model


def set_gate(model: Any, value: float) -> None:
    with torch.no_grad():
        encoder_of(model).gate.fill_(value)


SIZES = [(64, 48), (40, 90)]


def batch_of(folder: Path, sizes: list[tuple[int, int]] = SIZES) -> tuple[dict[str, Tensor], Tensor]:
    """One prompt with an image of each size, and random depth for its tokens."""
    processor = AutoProcessor.from_pretrained(folder)
    images = [drawn_image(index, size) for index, size in enumerate(sizes)]
    text = "Look: " + " and ".join([processor.image_token] * len(images)) + " What is left?"
    inputs = dict(processor(text=[text], images=images, return_tensors="pt"))
    tokens = sum(grid.tokens for size in sizes for grid in image_grids(processor, *size))
    return inputs, torch.rand(tokens, generator=torch.Generator().manual_seed(5)).half().float()


def features_of(model: Any, inputs: dict[str, Tensor], depth: Tensor | None = None) -> Tensor:
    """(image tokens, width) of `get_image_features`, as they are merged with the text."""
    names = ("pixel_values", "image_grid_thw", "pixel_attention_mask")
    given = {name: inputs[name] for name in names if name in inputs}
    if "vision_feature_layer" in vars(model.config):
        given["vision_feature_layer"] = model.config.vision_feature_layer
    extra = {} if depth is None else {"depth": depth}
    with torch.no_grad():
        found = model.get_image_features(**given, **extra, return_dict=True).pooler_output
    return torch.cat([part.flatten(0, -2) for part in found])


# the encoding itself


def test_encoding_is_the_documented_formula() -> None:
    encoder = DepthEncoder(8, DepthSettings(alpha=100.0))
    depth = torch.tensor([0.0, 0.37, 1.0])
    found = encoder.encoding(depth)
    for token, value in enumerate(depth.double().tolist()):
        omega = [10000 ** (-2 * k / 8) for k in range(4)]
        expected = [math.sin(100 * value * w) for w in omega] + [math.cos(100 * value * w) for w in omega]
        assert found[token].tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(found.norm(dim=1), torch.full((3,), math.sqrt(8 / 2)))


def test_interleaved_is_the_same_numbers_by_turns() -> None:
    depth = torch.rand(5)
    split = DepthEncoder(12, DepthSettings(layout="split")).encoding(depth)
    turns = DepthEncoder(12, DepthSettings(layout="interleaved")).encoding(depth)
    assert torch.equal(turns[:, 0::2], split[:, :6])
    assert torch.equal(turns[:, 1::2], split[:, 6:])


def test_gate_and_control() -> None:
    features, depth = [torch.zeros(3, 8)], torch.rand(3)
    ungated = DepthEncoder(8, DepthSettings(gate="none"))
    assert torch.equal(ungated(features, depth)[0], ungated.encoding(depth))
    assert not list(ungated.parameters())
    gated = DepthEncoder(8, DepthSettings())
    assert not gated(features, depth)[0].any()
    assert [name for name, _ in gated.named_parameters()] == ["gate"]
    off = DepthEncoder(8, DepthSettings(control="off", gate="none"))
    assert not off(features, depth)[0].any()
    for count in (2, 4):
        with pytest.raises(DataError, match=f"{count} depth values for 3 image tokens"):
            gated(features, torch.rand(count))


def test_a_control_that_is_off_learns_nothing() -> None:
    encoder = DepthEncoder(8, DepthSettings(control="off"))
    encoder([torch.zeros(3, 8)], torch.rand(3))[0].sum().backward()
    assert encoder.gate is not None and encoder.gate.grad == 0


# in the families


@pytest.mark.parametrize("family", MAKERS)
def test_a_closed_gate_changes_no_bit_and_an_open_one_does(folders: dict[str, Path], family: str) -> None:
    inputs, depth = batch_of(folders[family])
    with torch.no_grad():
        before = plain(folders[family])(**inputs).logits
        model = with_depth(folders[family], gate=0.0)
        assert torch.equal(model(**inputs, depth=depth).logits, before)
        set_gate(model, GATE)
        after = model(**inputs, depth=depth).logits
        assert (after - before).abs().max() > 1e-2
        assert not torch.equal(model(**inputs, depth=1 - depth).logits, after)


@pytest.mark.parametrize("family", MAKERS)
def test_what_is_added_is_the_encoding_of_each_token(folders: dict[str, Path], family: str) -> None:
    inputs, depth = batch_of(folders[family])
    before = features_of(plain(folders[family]), inputs)
    model = with_depth(folders[family])
    encoding = encoder_of(model).encoding(depth)
    assert torch.allclose(features_of(model, inputs, depth), before + GATE * encoding, atol=1e-5)


@pytest.mark.parametrize("family", MAKERS)
def test_one_cell_of_the_map_moves_one_token(folders: dict[str, Path], family: str) -> None:
    inputs, depth = batch_of(folders[family])
    model = with_depth(folders[family])
    before = features_of(model, inputs, depth)
    for cell in (0, 3, len(depth) - 1):
        changed = depth.clone()
        changed[cell] = 1 - changed[cell]
        moved = (features_of(model, inputs, changed) != before).any(1)
        assert moved.nonzero().flatten().tolist() == [cell]


@pytest.mark.parametrize("family", MAKERS)
def test_tokens_lie_where_the_grids_say(folders: dict[str, Path], family: str) -> None:
    """A spot painted into one cell of the image moves that cell's token, more than spots elsewhere do: the order of
    the features is the order of the grid. Window order in Qwen2.5-VL would show here."""
    processor = AutoProcessor.from_pretrained(folders[family])
    model = plain(folders[family])
    size = (128, 128) if family == "isaac" else (64, 64)
    if family.startswith("qwen"):  # two windows beside each other, each of 4×4 tokens
        size = (224, 112)
        processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 224 * 112}
    first, *_ = grids = image_grids(processor, *size)
    quiet = drawn_image(2, size)

    def seen(image: Any) -> Tensor:
        inputs = processor(text=[processor.image_token], images=[image], return_tensors="pt")
        return features_of(model, dict(inputs))

    before = seen(quiet)
    assert sum(grid.tokens for grid in grids) == len(before)
    moved = []
    for row in range(first.rows):
        for column in range(first.columns):
            spotted = quiet.copy()
            spotted.paste((255, 0, 255), cell_of(first, row, column, size))
            moved.append((seen(spotted) - before).norm(dim=1)[: first.tokens])
    # Attention moves some tokens whatever is painted; what counts is where each token moves most.
    table = torch.stack(moved)
    table = table - table.mean(0) - table.mean(1, keepdim=True)
    right = (table.argmax(0) == torch.arange(first.tokens)).float().mean()
    assert right > 0.8, f"{right:.0%} of the tokens lie where the grid says"


def cell_of(grid: Grid, row: int, column: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """One token's box in pixels."""
    left, top, right, bottom = grid.box
    tall, wide = (bottom - top) / grid.rows, (right - left) / grid.columns
    x, y = left + wide * column, top + tall * row
    return tuple(round(value * size[index % 2]) for index, value in enumerate((x, y, x + wide, y + tall)))


@pytest.mark.parametrize("family", MAKERS)
def test_a_batch_is_its_samples(folders: dict[str, Path], family: str) -> None:
    """Two samples of one image each, against each alone."""
    folder = folders[family]
    processor = AutoProcessor.from_pretrained(folder)
    model = with_depth(folder)
    images = [drawn_image(index, size) for index, size in enumerate(SIZES)]
    depths = [
        torch.rand(
            sum(grid.tokens for grid in image_grids(processor, *size)), generator=torch.Generator().manual_seed(1)
        )
        for size in SIZES
    ]
    texts = [processor.image_token + " here", processor.image_token + " and some longer text there"]
    nested = [[image] for image in images] if family in ("smolvlm", "idefics3") else images
    together = processor(text=texts, images=nested, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        logits = model(**together, depth=torch.cat(depths)).logits
        for index, (text, image, depth) in enumerate(zip(texts, images, depths, strict=True)):
            alone = processor(text=[text], images=[image], return_tensors="pt")
            expected = model(**alone, depth=depth).logits[0]
            assert torch.allclose(logits[index, : len(expected)], expected, atol=2e-4)


@pytest.mark.parametrize("family", MAKERS)
def test_generation_uses_depth_in_the_prompt_only(folders: dict[str, Path], family: str) -> None:
    """With a cache, without one, and by hand: the same tokens. Beams run."""
    inputs, depth = batch_of(folders[family])
    model = with_depth(folders[family])
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, depth=depth, **how)
    assert torch.equal(model.generate(**inputs, depth=depth, use_cache=False, **how), cached)
    assert model.generate(**inputs, depth=depth, num_beams=3, **how).shape == cached.shape
    with torch.no_grad():
        grown = dict(inputs)
        for _ in range(4):
            choice = model(**grown, depth=depth).logits[:, -1].argmax(-1, keepdim=True)
            grown["input_ids"] = torch.cat([grown["input_ids"], choice], 1)
            grown["attention_mask"] = torch.cat([grown["attention_mask"], torch.ones_like(choice)], 1)
            if "mm_token_type_ids" in grown:
                grown["mm_token_type_ids"] = torch.cat([grown["mm_token_type_ids"], torch.zeros_like(choice)], 1)
    assert torch.equal(cached, grown["input_ids"])


@pytest.mark.parametrize("family", ["qwen25vl", "smolvlm", "isaac"])
def test_images_without_depth_are_refused(folders: dict[str, Path], family: str) -> None:
    inputs, depth = batch_of(folders[family])
    model = with_depth(folders[family])
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=1), model.model):
        with pytest.raises(DataError, match="trained with depth"):
            call(**inputs)
    with pytest.raises(DataError, match=f"{len(depth) - 1} depth values for {len(depth)} image tokens"):
        model(**inputs, depth=depth[1:])
    text = {name: inputs[name][:, :2] for name in ("input_ids", "attention_mask")}
    assert model(**text).logits.shape[1] == 2
    with pytest.raises(DataError, match="without images"):
        model(**text, depth=depth)


def test_text_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image features"):
        attach_depth(plain(tiny_llama(tmp_path)), DepthSettings())


@pytest.mark.parametrize("family", ["qwen25vl", "smolvlm", "isaac"])
def test_the_model_stays_what_it_was(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Same class name, same sites, same files but for the gate; a copy is a model of its own."""
    before, after = plain(folders[family]), with_depth(folders[family])
    assert type(after).__name__ == type(before).__name__ and isinstance(after, type(before))
    assert model_sites(before) == model_sites(after)
    assert set(after.state_dict()) - set(before.state_dict()) == {"model.depth_preproc.gate"}
    for name, model in (("before", before), ("after", after)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "after/config.json").read_text() == (tmp_path / "before/config.json").read_text()
    other = copy.deepcopy(after)
    set_gate(other, 0.0)
    assert encoder_of(after).gate.item() == pytest.approx(GATE)
    inputs, depth = batch_of(folders[family])
    assert not torch.equal(other(**inputs, depth=depth).logits, after(**inputs, depth=depth).logits)


def adapted(folder: Path) -> PeftModel:
    config = LoraConfig(
        r=2, target_modules=r".*\.(q_proj|v_proj)", modules_to_save=["depth_preproc"], task_type="CAUSAL_LM"
    )
    with quiet_peft():
        return get_peft_model(with_depth(folder, gate=0.0), config)


@pytest.mark.parametrize("family", ["qwen25vl", "smolvlm", "isaac"])
def test_the_gate_trains_is_saved_restored_and_merged(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    inputs, depth = batch_of(folders[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = adapted(folders[family])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    for _ in range(3):
        model(**inputs, depth=depth, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gate = encoder_of(model).gate.item()
    assert gate != 0
    model.eval()
    with torch.no_grad():
        expected = model(**inputs, depth=depth).logits
    generated = model.generate(**inputs, depth=depth, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)

    base = with_depth(folders[family], gate=0.0)
    with quiet_peft():
        again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs, depth=depth).logits, expected)
        with pytest.raises(DataError, match="trained with depth"):
            again(**inputs)
        assert torch.equal(again.generate(**inputs, depth=depth, max_new_tokens=3, do_sample=False), generated)
        merged = again.merge_and_unload()
        assert encoder_of(merged).gate.item() == gate
        assert torch.allclose(merged(**inputs, depth=depth).logits, expected, atol=1e-4)
        with pytest.raises(DataError, match="trained with depth"):
            merged(**inputs)


# what travels


def test_settings_travel(tmp_path: Path) -> None:
    settings = DepthSettings(alpha=50.0, layout="interleaved", estimator="x/y", estimator_hash="ab", gate_value=0.25)
    write_depth(tmp_path, settings)
    assert read_depth(tmp_path) == settings
    assert read_depth(tmp_path / "checkpoint-7") == settings, "a checkpoint's are those of its run folder"
    assert read_depth(tmp_path / "other") is None
    assert DepthEncoder(8, settings).gate.item() == 0.25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "rankwise-depth/2"}, "not depth settings of this version .*rankwise-depth/2"),
        ({"beta": 1}, r"not depth settings of this version \(beta: unknown\)"),
        ({"alpha": -1.0}, "above 0"),
        ({"layout": "diagonal"}, "layout takes"),
        ({"control": "guess"}, "control takes"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    import json

    file = write_depth(tmp_path, DepthSettings())
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DataError, match=rf"depth\.json.*{said}"):
        read_depth(tmp_path)
