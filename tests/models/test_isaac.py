"""Laws of our Isaac: positions, rotary, vision tower, batches, cache, checkpoints."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_isaac import VISION, isaac_config, isaac_tokenizer, tiny_isaac
from tiny_vision import drawn_image
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from rankwise.models.isaac.configuration import IsaacConfig
from rankwise.models.isaac.modeling import IsaacForConditionalGeneration, Rotary, position_ids
from rankwise.models.isaac.processing import IsaacProcessor
from rankwise.models.isaac.vision import IsaacVisionTower, VisionEmbedding, pixel_shuffle, resize_positions
from rankwise.models.load import load_model, load_processor, meta_model
from rankwise.scripts import depth_isaac

IMAGE = "<|image_pad|>"
PROMPTS = (f"{IMAGE}What is it?", f"Left {IMAGE}{IMAGE} and right, which one is red?", "No picture at all.")
SIZES = ((64, 48), (96, 64), (40, 33))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac(tmp_path_factory.mktemp("isaac"))


@pytest.fixture(scope="module")
def model(folder: Path) -> IsaacForConditionalGeneration:
    return IsaacForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> IsaacProcessor:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(autouse=True)
def fresh(model: IsaacForConditionalGeneration) -> None:
    model.model.rope_deltas = None
    model.eval()


def inputs(processor: IsaacProcessor, *texts: str, side: str = "left", first: int = 0) -> dict[str, Tensor]:
    """A batch; its pictures are numbered from `first`."""
    count = sum(text.count(IMAGE) for text in texts)
    images = [drawn_image(number, SIZES[number]) for number in range(first, first + count)]
    return dict(
        processor(text=list(texts), images=images or None, padding=True, padding_side=side, return_tensors="pt")
    )


# Positions


def test_text_steps_and_an_image_takes_one_step() -> None:
    images = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    positions, shifts = position_ids(images, torch.tensor([[2, 3]]), torch.ones(1, 10).bool())
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 3, 4],
        [0, 1, 0, 0, 0, 1, 1, 1, 3, 4],
        [0, 1, 0, 1, 2, 0, 1, 2, 3, 4],
    ]
    assert shifts.tolist() == [[-5]]


Part = int | tuple[int, int]
sequences = st.lists(st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 3))), max_size=5)


def walked(parts: list[Part]) -> list[tuple[int, int, int]]:
    """The rule, said token by token. A number: words; a pair: an image."""
    found, time = [], 0
    for part in parts:
        if isinstance(part, int):
            found += [(time + step,) * 3 for step in range(part)]
            time += part
        else:
            found += [(time, row, column) for row in range(part[0]) for column in range(part[1])]
            time += 1
    return found


@given(st.lists(sequences, min_size=1, max_size=3), st.booleans())
def test_positions_follow_the_rule_in_every_batch_with_padding_on_either_side(
    batch: list[list[Part]], left: bool
) -> None:
    walks = [walked(parts) for parts in batch]
    length = max(map(len, walks)) + 1
    images = torch.zeros(len(batch), length).bool()
    attended = torch.zeros_like(images)
    for row, (parts, walk) in enumerate(zip(batch, walks, strict=True)):
        start = length - len(walk) if left else 0
        attended[row, start : start + len(walk)] = True
        kinds = [not isinstance(p, int) for p in parts for _ in range(p if isinstance(p, int) else p[0] * p[1])]
        images[row, start : start + len(walk)] = torch.tensor(kinds, dtype=torch.bool)
    grids = [part for parts in batch for part in parts if not isinstance(part, int)]
    positions, shifts = position_ids(images, torch.tensor(grids or [[0, 0]])[: len(grids)], attended)
    for row, (parts, walk) in enumerate(zip(batch, walks, strict=True)):
        assert positions[:, row, attended[row]].T.tolist() == [list(place) for place in walk]
        assert (positions[:, row, ~attended[row]] == 0).all()
        steps = sum(part if isinstance(part, int) else 1 for part in parts)
        assert shifts[row].item() == steps - len(walk)


def test_images_that_do_not_fit_the_text_are_refused() -> None:
    images = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    with pytest.raises(ValueError, match="4 image tokens in the text, but the images have 2"):
        position_ids(images, torch.tensor([[1, 2]]), torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="run from one sequence into the next"):
        position_ids(images, torch.tensor([[1, 1], [1, 3]]), torch.ones(2, 3).bool())


def test_the_halves_are_split_in_blocks_as_released() -> None:
    rotary = Rotary(128, 1e6)
    assert rotary.axes() == [0] * 32 + [1] * 16 + [2] * 16
    positions = torch.tensor([[[5]], [[7]], [[11]]])
    cos, sin = rotary(torch.zeros(1), positions)
    for half, place in ((0, 5), (31, 5), (32, 7), (47, 7), (48, 11), (63, 11)):
        angle = torch.tensor(place * 1e6 ** (-half / 64), dtype=torch.float64)
        for index in (half, half + 64):
            torch.testing.assert_close(cos[0, 0, index].double(), angle.cos(), atol=1e-6, rtol=0)
            torch.testing.assert_close(sin[0, 0, index].double(), angle.sin(), atol=1e-6, rtol=0)


def test_where_the_three_are_equal_the_angles_are_qwen3s() -> None:
    config = Qwen3Config(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    plain = torch.arange(16384)[None]
    like = torch.zeros(1, dtype=torch.bfloat16)
    ours = Rotary(128, 1e6)(like, plain.expand(3, -1, -1))
    theirs = Qwen3RotaryEmbedding(config)(like, plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Config


def test_both_forms_of_the_rotary_base_are_read_and_sections_ignored() -> None:
    old = IsaacConfig(
        rope_theta=5e5, rope_scaling={"rope_type": "default", "mrope_section": None, "mrope_interleaved": True}
    )
    new = IsaacConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2]})
    assert old.rope_parameters == new.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert IsaacConfig().rope_parameters["rope_theta"] == 1e6
    assert IsaacForConditionalGeneration._from_config(tiny_config(rope_theta=5e5)).model.rotary_emb.theta == 5e5


def tiny_config(**changes: Any) -> IsaacConfig:
    return isaac_config(isaac_tokenizer(), **changes)


def test_what_isaac_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="unscaled"):
        IsaacConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0})
    with pytest.raises(ValueError, match="sliding"):
        IsaacConfig(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="multiple of 8"):
        IsaacConfig(head_dim=12)


# Vision tower


def test_pixel_shuffle_puts_a_block_in_one_token_row_by_row() -> None:
    sizes = [(2, 4), (4, 2)]
    labels = [
        (image, row, column)
        for image, (rows, columns) in enumerate(sizes)
        for row in range(rows)
        for column in range(columns)
    ]
    patches = torch.tensor([[100 * i + 10 * r + c, -(100 * i + 10 * r + c)] for i, r, c in labels])
    expected = []
    for image, (rows, columns) in enumerate(sizes):
        for row in range(0, rows, 2):
            for column in range(0, columns, 2):
                block = [100 * image + 10 * (row + i) + column + j for i in (0, 1) for j in (0, 1)]
                expected.append([sign * value for value in block for sign in (1, -1)])
    assert pixel_shuffle(patches, sizes, 2).tolist() == expected


def triangle(source: int, target: int) -> Tensor:
    """(target, source) weights of a bilinear filter that averages when it shrinks."""
    scale = source / target
    reach = max(scale, 1.0)
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(source, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / reach
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 9), (7, 2)])
def test_positions_are_resized_with_antialias(grid: tuple[int, int]) -> None:
    table = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    square = table.double().view(4, 4, 3)
    expected = torch.einsum("ri,cj,ijk->rck", triangle(4, grid[0]), triangle(4, grid[1]), square).reshape(-1, 3)
    torch.testing.assert_close(resize_positions(table, *grid).double(), expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def tower() -> IsaacVisionTower:
    torch.manual_seed(3)
    tower = VisionEmbedding(tiny_config())[0]
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


PATCH_SIZES = [(2, 4), (4, 6), (2, 2)]


def packed_patches(seed: int = 0) -> Tensor:
    count = sum(rows * columns for rows, columns in PATCH_SIZES)
    return torch.randn(count, 768, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_tower_is_siglip2(tower: IsaacVisionTower) -> None:
    """transformers' own model with the same weights, one image at a time."""
    oracle = Siglip2VisionModel(Siglip2VisionConfig(**VISION, vision_use_head=False)).eval()
    names = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    own = oracle.state_dict().keys()
    oracle.load_state_dict(names if set(names) == set(own) else tower.state_dict())
    ours = tower(packed_patches(), PATCH_SIZES).split([2, 6, 1])
    start = 0
    for (rows, columns), features in zip(PATCH_SIZES, ours, strict=True):
        patches = packed_patches()[None, start : start + rows * columns]
        mask = torch.ones(1, rows * columns, dtype=torch.long)
        theirs = oracle(patches, mask, spatial_shapes=torch.tensor([[rows, columns]])).last_hidden_state[0]
        torch.testing.assert_close(features, pixel_shuffle(theirs, [(rows, columns)], 2), atol=1e-5, rtol=1e-4)
        start += rows * columns


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_image_sees_only_itself(tower: IsaacVisionTower, attention: str) -> None:
    tower.config._attn_implementation = attention
    packed = tower(packed_patches(), PATCH_SIZES)
    parts = packed_patches().split([rows * columns for rows, columns in PATCH_SIZES])
    alone = torch.cat([tower(part, [size]) for part, size in zip(parts, PATCH_SIZES, strict=True)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    other = torch.cat([parts[0], packed_patches(1)[8:32], parts[2]])
    changed = tower(other, PATCH_SIZES)
    assert torch.equal(changed[:2], packed[:2]) and torch.equal(changed[8:], packed[8:])
    assert not torch.allclose(changed[2:8], packed[2:8])
    tower.config._attn_implementation = "sdpa"


@torch.no_grad()
def test_image_features_come_per_image(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    batch = inputs(processor, *PROMPTS)
    features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 4]]
    assert [tuple(part.shape) for part in features.pooler_output] == [(4, 32), (6, 32), (4, 32)]
    tower, first, _, second = model.model.vision_embedding
    expected = second(functional.silu(first(tower(batch["pixel_values"], [(4, 4), (4, 6), (4, 4)]))))
    assert torch.equal(torch.cat(features.pooler_output), expected)


# The whole model


@torch.no_grad()
def test_text_alone_is_qwen3_exactly(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    shared = {key: value for key, value in model.config.to_dict().items() if key in Qwen3Config().to_dict()}
    qwen = Qwen3ForCausalLM(Qwen3Config(**{**shared, "model_type": "qwen3", "architectures": None})).eval()
    weights = {name: value for name, value in model.state_dict().items() if "vision" not in name}
    qwen.load_state_dict(weights)
    for side in ("left", "right"):
        batch = inputs(processor, "A short one", "and a text that is quite a bit longer.", side=side)
        real = batch["attention_mask"].bool()
        counted = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # Qwen3 itself counts padding
        assert torch.equal(model(**batch).logits[real], qwen(**batch, position_ids=counted).logits[real])
    batch = inputs(processor, "A short one", "and a text that is quite a bit longer.")
    ours, theirs = (one(**batch, output_hidden_states=True).hidden_states for one in (model, qwen))
    assert len(ours) == len(theirs) == 3
    generated = [one.generate(**batch, max_new_tokens=5, do_sample=False) for one in (model, qwen)]
    assert torch.equal(*generated)


@torch.no_grad()
def test_a_batch_is_its_samples_and_padding_may_be_on_either_side(
    model: IsaacForConditionalGeneration, processor: IsaacProcessor
) -> None:
    first, alone = 0, []
    for prompt in PROMPTS:
        one = inputs(processor, prompt, first=first)
        alone.append(model(**one).logits[0])
        first += prompt.count(IMAGE)
    for side in ("left", "right"):
        batch = inputs(processor, *PROMPTS, side=side)
        logits = model(**batch).logits
        for row, expected in enumerate(alone):
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][real], expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_picture_and_its_place_matter(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    one, other = (inputs(processor, PROMPTS[0], first=number) for number in (0, 2))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert (model(**one).logits - model(**other).logits)[:, -1].abs().max() > 1e-2
    wide, tall = (dict(one, image_grid_thw=torch.tensor([[1, *grid]])) for grid in ((2, 8), (8, 2)))
    assert not torch.allclose(model(**wide).logits, model(**tall).logits, atol=1e-3)


def greedy_without_cache(model: IsaacForConditionalGeneration, batch: dict[str, Tensor], steps: int) -> Tensor:
    batch = dict(batch)
    for _ in range(steps):
        following = model(**batch, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], following], 1)
        batch["attention_mask"] = functional.pad(batch["attention_mask"], (0, 1), value=1)
    return batch["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation_is_the_full_forward_again_and_again(
    model: IsaacForConditionalGeneration, processor: IsaacProcessor, how: dict[str, Any]
) -> None:
    batch = inputs(processor, *PROMPTS)
    expected = greedy_without_cache(model, batch, 6)
    never = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
    assert torch.equal(model.generate(**batch, **never, **how), expected)


@torch.no_grad()
def test_a_cached_step_continues_the_prompt(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    """By hand, without position ids: the shift of the prompt's images is remembered."""
    batch = inputs(processor, *PROMPTS)
    prompt = model(**batch, use_cache=True)
    following = prompt.logits[:, -1:].argmax(-1)
    mask = functional.pad(batch["attention_mask"], (0, 1), value=1)
    step = model(input_ids=following, attention_mask=mask, past_key_values=prompt.past_key_values)
    whole = dict(batch, input_ids=torch.cat([batch["input_ids"], following], 1), attention_mask=mask)
    torch.testing.assert_close(step.logits[:, -1], model(**whole).logits[:, -1], atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="pass the whole sequence"):
        model(**inputs(processor, *PROMPTS), past_key_values=prompt.past_key_values)


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    batch = inputs(processor, *PROMPTS)
    how = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}
    first = model.generate(**batch, **how, return_dict_in_generate=True)
    more = processor.tokenizer(["And now?"] * 3, return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, more], 1)
    mask = functional.pad(batch["attention_mask"], (0, ids.shape[1] - batch["input_ids"].shape[1]), value=1)
    expected = model.generate(**dict(batch, input_ids=ids, attention_mask=mask), **how)
    model.generate(**batch, **how)  # what was remembered is this batch's again
    found = model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **how)
    assert torch.equal(found, expected)
    picture = inputs(processor, PROMPTS[0], PROMPTS[0], PROMPTS[0])["input_ids"]
    mask = functional.pad(mask, (0, found.shape[1] - mask.shape[1] + picture.shape[1]), value=1)
    with pytest.raises(ValueError, match="pass the whole sequence"):
        model.generate(
            input_ids=torch.cat([found, picture], 1),
            attention_mask=mask,
            past_key_values=first.past_key_values,
            **how,
        )


@torch.no_grad()
def test_beams_of_a_batch_are_beams_of_its_samples(
    model: IsaacForConditionalGeneration, processor: IsaacProcessor
) -> None:
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = model.generate(**inputs(processor, *PROMPTS), **how)[:, -5:]
    first, alone = 0, []
    for prompt in PROMPTS:
        alone.append(model.generate(**inputs(processor, prompt, first=first), **how)[:, -5:])
        first += prompt.count(IMAGE)
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_embeddings_may_take_the_place_of_ids(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    batch = inputs(processor, *PROMPTS)
    expected = model(**batch).logits
    ids = batch.pop("input_ids")
    logits = model(**batch, inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(logits, expected)


def test_the_loss_is_the_mean_over_labels(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    batch = inputs(processor, *PROMPTS, side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    outputs = model(**batch, labels=labels)
    kept = labels[:, 1:] != -100
    expected = functional.cross_entropy(outputs.logits[:, :-1][kept], labels[:, 1:][kept])
    torch.testing.assert_close(outputs.loss, expected)
    several = model(**batch, labels=labels, num_items_in_batch=torch.tensor(10.0)).loss
    torch.testing.assert_close(several, expected * kept.sum() / 10)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD in kinds, "how the Trainer tells that num_items_in_batch is taken"


def gradients(model: IsaacForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_checkpointed_gradients_are_the_same(folder: Path, processor: IsaacProcessor) -> None:
    model = IsaacForConditionalGeneration.from_pretrained(folder).train()
    batch = inputs(processor, *PROMPTS, side="right")
    expected = gradients(model, batch)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    model.activation_checkpointing_enable()
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("layers.0"):
            module.mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    found = gradients(model, batch)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert len(calls) == 4, "both towers' layers ran twice"


def test_older_documented_name() -> None:
    assert depth_isaac.IsaacForConditionalGeneration is IsaacForConditionalGeneration


def test_limits_and_missing_images_are_said(model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    with pytest.raises(ValueError, match="1025 tokens: Isaac takes at most 1024"):
        model(input_ids=torch.ones(1, 1025, dtype=torch.long))
    batch = inputs(processor, PROMPTS[0])
    with pytest.raises(ValueError, match="4 image tokens in the text, but the images have 0"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="exactly one"):
        model()


# Checkpoints


def test_saving_and_loading_changes_nothing(
    model: IsaacForConditionalGeneration, processor: IsaacProcessor, folder: Path, tmp_path: Path
) -> None:
    fresh_model = IsaacForConditionalGeneration(tiny_config())
    assert not list(fresh_model.buffers()), "nothing that a file does not hold, so nothing is left uninitialised"
    fresh_model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == fresh_model.state_dict().keys()
    assert "model.vision_embedding.0.encoder.layers.1.self_attn.out_proj.bias" in written
    loaded = IsaacForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = inputs(processor, *PROMPTS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, fresh_model.eval()(**batch).logits)


@torch.no_grad()
def test_auto_classes_find_it(folder: Path, model: IsaacForConditionalGeneration, processor: IsaacProcessor) -> None:
    batch = inputs(processor, PROMPTS[0])
    expected = model(**batch).logits
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        found = auto.from_pretrained(folder).eval()
        assert isinstance(found, IsaacForConditionalGeneration)
        assert torch.equal(found(**batch).logits, expected)
    assert torch.equal(load_model(str(folder), torch.float32).eval()(**batch).logits, expected)
    assert type(AutoConfig.from_pretrained(folder)) is IsaacConfig
    assert type(load_processor(str(folder))) is IsaacProcessor
    config = AutoConfig.from_pretrained(folder)
    assert config.get_text_config() is config and config.get_text_config().hidden_size == 32


@torch.no_grad()
def test_half_precision_and_eager_attention(
    folder: Path, model: IsaacForConditionalGeneration, processor: IsaacProcessor
) -> None:
    batch = inputs(processor, *PROMPTS)
    real, expected = batch["attention_mask"].bool(), model(**batch).logits
    eager = IsaacForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    assert eager.model.vision_embedding[0].config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**batch).logits[real], expected[real], atol=2e-4, rtol=1e-4)
    half = IsaacForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    logits = half(**batch).logits
    assert logits.dtype == torch.bfloat16
    assert functional.cosine_similarity(logits[real].float(), expected[real], dim=-1).min() > 0.99


@torch.no_grad()
def test_tied_embeddings(tmp_path: Path, processor: IsaacProcessor) -> None:
    tiny_isaac(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = IsaacForConditionalGeneration.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = IsaacForConditionalGeneration(tiny_config())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_new_weights_have_the_configs_spread() -> None:
    with torch.device("meta"):
        model = IsaacForConditionalGeneration(tiny_config())
    model.to_empty(device="cpu")
    model.init_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 500:
            assert 0.015 < parameter.std() < 0.025, name
        elif "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name


@pytest.fixture
def released(shared_data: Path, tmp_path: Path) -> Path:
    """The released files: config, index and tokenizer, in one folder as on the hub."""
    source = shared_data / "model_configs" / "Isaac-0.1"
    for file in [*source.glob("*.json"), *(source / "tokenizer").iterdir()]:
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def test_the_released_files_load_without_their_code(released: Path) -> None:
    model = meta_model(str(released))
    index = json.loads((released / "model.safetensors.index.json").read_text())
    assert isinstance(model, IsaacForConditionalGeneration)
    assert set(model.state_dict()) == set(index["weight_map"])
    assert sum(parameter.numel() for parameter in model.parameters()) == index["metadata"]["total_parameters"]
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert model.model.rotary_emb.axes() == [0] * 32 + [1] * 16 + [2] * 16


def test_the_released_tokenizer_makes_our_processor(released: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    processor = AutoProcessor.from_pretrained(released)
    assert type(processor) is IsaacProcessor and processor.image_token_id == IsaacConfig().image_token_id
    for size, tokens in (((256, 256), 64), ((640, 480), 300)):
        found = processor(text=[IMAGE], images=[drawn_image(0, size)], return_tensors="pt")
        assert found["input_ids"].tolist() == [[processor.image_token_id] * tokens]
    shown = processor.apply_chat_template([{"role": "user", "content": "<image> Hi"}], add_generation_prompt=True)
    assert "think" not in shown, "not the released template"
    again = tmp_path_factory.mktemp("again")
    processor.save_pretrained(again)
    assert AutoProcessor.from_pretrained(again).chat_template == processor.chat_template


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.booleans())
def test_packed_plain_positions_keep_texts_apart(seed: int, image: bool) -> None:
    """Two texts in one row, positions from 0 each, as the packing of text rows gives them."""
    generator = torch.Generator().manual_seed(seed)
    model = PACKED
    ids = torch.randint(10, 200, (1, 9), generator=generator)
    cut = int(torch.randint(1, 9, (1,), generator=generator))
    positions = torch.cat([torch.arange(cut), torch.arange(9 - cut)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=part).logits for part in (ids[:, :cut], ids[:, cut:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)


torch.manual_seed(0)
PACKED = IsaacForConditionalGeneration(tiny_config()).eval()
