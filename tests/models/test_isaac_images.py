"""Isaac's images and prompts: sizes, pixels, patches, placeholders, chat; each against a small computation."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tiny_isaac import isaac_processor, tiny_isaac
from tiny_vision import drawn_image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from rankwise.core.geometry import scaled_blocks
from rankwise.data.images import ImageReader
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError
from rankwise.models.isaac.configuration import IsaacConfig
from rankwise.models.isaac.processing import IsaacImageProcessor, IsaacProcessor

IMAGE = "<|image_pad|>"
sides = st.integers(1, 4000)


def at_scale(scale: Fraction, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of 32-pixel blocks at an exact scale, rounded up."""
    return math.ceil(scale * height / 32), math.ceil(scale * width / 32)


def searched(height: int, width: int) -> tuple[int, int]:
    """The rule by bisection over exact scales: 64…1536 blocks, which are 256…6144 patches."""
    start = at_scale(Fraction(1), height, width)
    if 64 <= start[0] * start[1] <= 1536:
        return start
    grow = start[0] * start[1] < 64
    low, high = (Fraction(1), Fraction(4096)) if grow else (Fraction(1, 2**24), Fraction(1))
    for _ in range(60):
        middle = (low + high) / 2
        rows, columns = at_scale(middle, height, width)
        if rows * columns >= 64 if grow else rows * columns > 1536:
            high = middle
        else:
            low = middle
    return at_scale(high if grow else low, height, width)


@given(sides, sides)
@example(256, 256)
@example(257, 256)
@example(224, 256)
@example(1, 1)
@example(1536, 1024)
@example(1537, 1024)
@example(1024, 1537)
@example(1, 60_000_000)
@example(7000, 8000)
def test_sizes_are_the_nearest_uniform_scale_that_fits(height: int, width: int) -> None:
    found = scaled_blocks(height, width, 32, 64, 1536)
    assert 64 <= found[0] * found[1] <= 1536
    assert found == searched(height, width)


@given(sides, sides, st.integers(1, 40), st.integers(2, 6))
def test_a_turned_image_has_the_turned_size(height: int, width: int, block: int, most: int) -> None:
    fewest, most = 4, 2**most
    rows, columns = scaled_blocks(height, width, block, fewest, most)
    assert scaled_blocks(width, height, block, fewest, most) == (columns, rows)
    assert 1 <= rows * columns <= max(most, 4)


@pytest.mark.parametrize(
    ("size", "tokens"), [((256, 256), 64), ((640, 480), 300), ((641, 480), 315), ((10, 10), 64), ((4000, 3000), 1530)]
)
def test_tokens_are_pixels_over_1024(size: tuple[int, int], tokens: int) -> None:
    images = IsaacImageProcessor()
    tall, wide = images.target_size(size[1], size[0])
    assert tall % 32 == wide % 32 == 0
    assert tall * wide // 1024 == tokens
    assert images.get_number_of_image_patches(size[1], size[0]) == 4 * tokens


def weights(source: int, target: int) -> np.ndarray:
    """(target, source): the two neighbours of each centre, whatever the scale: no antialias."""
    found = np.zeros((target, source))
    for index in range(target):
        place = min(max((index + 0.5) * source / target - 0.5, 0.0), source - 1.0)
        left = int(place)
        found[index, left] += 1 - (place - left)
        found[index, min(left + 1, source - 1)] += place - left
    return found


@pytest.mark.parametrize("size", [(50, 70), (64, 32), (300, 500), (9, 4)])
def test_pixels_are_bilinear_without_antialias_and_patches_row_column_channel(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    images = isaac_processor().image_processor
    found = images(Image.fromarray(noise), return_tensors="pt")
    _, rows, columns = found["image_grid_thw"][0].tolist()
    tall, wide = rows * 16, columns * 16
    expected = np.einsum(
        "yi,xj,ijc->yxc", weights(size[0], tall), weights(size[1], wide), noise.astype(float), optimize=True
    )
    expected = (expected / 255 - 0.5) / 0.5
    for number in range(rows * columns):
        top, left = number // columns * 16, number % columns * 16
        patch = found["pixel_values"][number].view(16, 16, 3).numpy()
        difference = np.abs(patch - expected[top : top + 16, left : left + 16])
        assert difference.max() <= 1 / 255 + 1e-5, "rounded to whole bytes"


def test_what_needs_no_resizing_stays_exact() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    found = isaac_processor().image_processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    back = found.view(4, 6, 16, 16, 3).permute(0, 2, 1, 3, 4).reshape(64, 96, 3)
    assert torch.equal(((back + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(noise))


def test_images_of_different_sizes_are_packed_in_order() -> None:
    images = isaac_processor().image_processor
    pictures = [drawn_image(number, size) for number, size in enumerate([(64, 48), (96, 64), (33, 32)])]
    together = images(pictures, return_tensors="pt")
    assert together["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6], [1, 2, 4]]
    alone = [images(picture, return_tensors="pt")["pixel_values"] for picture in pictures]
    assert torch.equal(together["pixel_values"], torch.cat(alone))
    assert together["pixel_values"].shape == (48, 768)
    grey = images(drawn_image(0).convert("L"), return_tensors="pt")["pixel_values"].view(-1, 3)
    assert torch.equal(grey[:, 0], grey[:, 2])
    array = images(np.array(pictures[0]), return_tensors="pt")["pixel_values"]
    assert torch.equal(array, alone[0])


def test_too_many_pixels_are_refused() -> None:
    images = isaac_processor(max_pixels=64 * 64).image_processor
    assert len(images(drawn_image(0, (64, 64)))["pixel_values"]) == 16
    for picture in (drawn_image(0, (65, 64)), np.zeros((64, 65, 3), dtype=np.uint8)):
        with pytest.raises(DataError, match="65×64 pixels: Isaac takes at most 4,096"):
            images(picture)
    assert IsaacImageProcessor().max_pixels == 60_000_000


# Processor


def test_a_prompt_gets_one_placeholder_per_image_token() -> None:
    processor = isaac_processor()
    pictures = [drawn_image(0, (64, 48)), drawn_image(1, (96, 64)), drawn_image(2, (64, 32))]
    texts = [f"{IMAGE}What?", "None.", f"{IMAGE} or {IMAGE}"]
    found = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    counts = (found["input_ids"] == processor.image_token_id).sum(1)
    assert counts.tolist() == [4, 0, 6 + 2]
    assert set(found) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
    plain = processor.tokenizer("What?")["input_ids"]
    assert found["input_ids"][0, 4 : 4 + len(plain)].tolist() == plain
    with pytest.raises(ValueError, match="number of images"):
        processor(text=[f"{IMAGE}{IMAGE}"], images=pictures[:1])


def test_what_people_write_for_an_image_is_only_text() -> None:
    processor = isaac_processor()
    assert processor.image_token_id not in processor.tokenizer("<image>")["input_ids"]
    assert processor.image_token != IsaacConfig().vision_token == "<image>"


CHAT = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Is "},
            {"type": "image"},
            {"type": "text", "text": " red?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
]


def test_the_chat_template_is_plain_chatml() -> None:
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nIs {IMAGE} red?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    processor = isaac_processor()
    assert processor.apply_chat_template(CHAT, tokenize=False) == expected
    asked = processor.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert expected.startswith(asked) and asked.endswith("<|im_start|>assistant\n")


def test_a_chat_with_its_image_becomes_a_models_inputs() -> None:
    processor = isaac_processor()
    chat = [{"role": "user", "content": [{"type": "image", "image": drawn_image(0)}, {"type": "text", "text": "?"}]}]
    found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert (found["input_ids"] == processor.image_token_id).sum() == 4
    assert found["pixel_values"].shape == (16, 768)


def test_settings_survive_saving(tmp_path: Path) -> None:
    processor = isaac_processor(max_num_patches=32)
    processor.chat_template = "{{ messages[0]['content'] }}"
    processor.save_pretrained(tmp_path)
    found = AutoProcessor.from_pretrained(tmp_path)
    assert type(found) is IsaacProcessor
    assert found.image_processor.max_num_patches == 32
    assert found.chat_template == processor.chat_template
    images = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(images) is IsaacImageProcessor and images.min_num_patches == 4
    alone = tmp_path / "alone"
    images.save_pretrained(alone)
    assert (alone / "preprocessor_config.json").is_file()
    assert AutoImageProcessor.from_pretrained(alone).to_dict() == images.to_dict()


def test_a_folder_without_a_processor_is_read_by_its_config(tmp_path: Path) -> None:
    """As the released one: tokenizer and config.json, and a chat template that is not to be used."""
    folder = tiny_isaac(tmp_path)
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ 'think' }}")
    found = AutoProcessor.from_pretrained(folder)
    assert type(found) is IsaacProcessor
    assert (found.image_processor.min_num_patches, found.image_processor.max_num_patches) == (4, 64)
    assert "think" not in found.apply_chat_template(CHAT, tokenize=False)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == found.tokenizer.get_vocab()
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="of an Isaac"):
        IsaacImageProcessor.from_pretrained(folder)


def test_the_data_layer_sees_it_as_any_family(tmp_path: Path) -> None:
    drawn_image(0, (64, 48)).save(tmp_path / "a.png")
    drawn_image(1, (96, 64)).save(tmp_path / "b.png")
    sight = Sight(isaac_processor(), ImageReader(tmp_path))
    assert sight.expansions(["b.png"]) == (IMAGE * 6,)
    tensors: dict[str, Tensor] = sight.inputs([["a.png"], ["b.png"]])
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "pixel_values": (40, 768),
        "image_grid_thw": (2, 3),
    }
