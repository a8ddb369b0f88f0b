"""The device's geometry and its runtime's layout of images: one object for labels, training, evaluation, validation."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vision import drawn_image, tiny_qwen25vl, tiny_smolvlm

from rankwise.core.geometry import letterbox
from rankwise.data.device import DeviceReader, DeviceTarget, device_processor, read_target, resize_for_device
from rankwise.data.example import Example, Turn
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, UsageError
from rankwise.models.load import load_config, load_processor
from rankwise.options.sections import DataSection, ModelSection

SIZES = st.integers(1, 4096)


@given(SIZES, SIZES)
def test_letterbox_is_the_apps_single_precision_arithmetic(width: int, height: int) -> None:
    place = letterbox(width, height, 256)
    scale = min(np.float32(256) / np.float32(width), np.float32(256) / np.float32(height))
    wide, tall = int(np.float32(width) * scale), int(np.float32(height) * scale)
    assert place.width == (256 if width >= height else max(1, wide))
    assert place.height == (256 if height >= width else max(1, tall))
    assert (place.left, place.top) == ((256 - place.width) // 2, (256 - place.height) // 2)


def test_double_precision_would_lose_a_line_on_some_sizes() -> None:
    """Why the longest side is set, and not computed."""
    lost = sum(int(side * (256 / side)) == 255 for side in range(257, 4097))
    assert lost > 0
    assert all(letterbox(side, 100, 256).width == 256 for side in range(257, 1000))


def sampled(pixels: np.ndarray, wide: int, tall: int) -> np.ndarray:
    """Bilinear samples at pixel centres, without a filter: written out, one output pixel at a time."""
    height, width, _ = pixels.shape
    out = np.zeros((tall, wide, 3))
    for row in range(tall):
        for column in range(wide):
            y = min(max((row + 0.5) * height / tall - 0.5, 0), height - 1)
            x = min(max((column + 0.5) * width / wide - 0.5, 0), width - 1)
            top, left = math.floor(y), math.floor(x)
            down, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = pixels[top, left] * (1 - (x - left)) + pixels[top, right] * (x - left)
            below = pixels[down, left] * (1 - (x - left)) + pixels[down, right] * (x - left)
            out[row, column] = above * (1 - (y - top)) + below * (y - top)
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_resize_is_plain_bilinear_on_black(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = np.asarray(resize_for_device(Image.fromarray(pixels), 24)).astype(float)
    place = letterbox(width, height, 24)
    if (width, height) == (24, 24):
        assert np.array_equal(found, pixels)
        return
    wanted = np.zeros((24, 24, 3))
    rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
    wanted[rows, columns] = sampled(pixels.astype(float), place.width, place.height)
    assert np.abs(found - wanted).max() <= 0.5 + 1e-3
    outside = np.ones((24, 24), dtype=bool)
    outside[rows, columns] = False
    assert not found[outside].any()


def test_it_is_none_of_pillows_filters() -> None:
    """Pillow widens its filter when shrinking: on noise the pixels are clearly others."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8))
    own = np.asarray(resize_for_device(noise)).astype(float)
    for filter_ in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        assert np.abs(own - np.asarray(noise.resize((256, 256), filter_))).mean() > 10


def test_a_device_sized_image_is_untouched_and_png_is_exact() -> None:
    image, target = drawn_image(1, (256, 256)), DeviceTarget()
    assert target.resize(image).tobytes() == image.tobytes()
    assert Image.open(io.BytesIO(target.png(image))).tobytes() == image.tobytes()
    seen = Image.open(io.BytesIO(target.jpeg(drawn_image(1, (640, 480)))))
    assert seen.format == "JPEG" and seen.size == (256, 256)


def test_a_target_round_trips_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    target = DeviceTarget(image_size=64, tiling="processor", runtime_build="b1234")
    target.save(tmp_path)
    assert read_target(tmp_path) == target == read_target(tmp_path / "device.json")
    assert read_target(tmp_path / "nothing") is None
    content = json.loads((tmp_path / "device.json").read_text())
    for change in ({"imagesize": 3}, {"format": "rankwise-device/0"}, {"prompt": "loud"}, {"image_size": 0}):
        (tmp_path / "device.json").write_text(json.dumps(content | change))
        with pytest.raises(DataError):
            read_target(tmp_path)


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_smolvlm(tmp_path_factory.mktemp("smolvlm"))


def test_one_tile_is_laid_out_as_llama_cpp_does(smolvlm: Path) -> None:
    processor = load_processor(str(smolvlm))
    tile = processor.image_processor.max_image_size["longest_edge"]
    changed = device_processor(processor, DeviceTarget())
    found = changed(text="<image>", images=[drawn_image(0, (256, 256))], return_tensors="pt")
    side = processor.image_seq_len
    text = changed.tokenizer.decode(found["input_ids"][0])
    fake, images = "<fake_token_around_image>", "<image>" * side
    assert text == f"{fake}<row_1_col_1>{images}\n\n{fake}<global-img>{images}{fake}"
    frames = found["pixel_values"][0]
    assert frames.shape == (2, 3, tile, tile) and torch.equal(frames[0], frames[1])
    as_it_was = processor(text="<image>", images=[drawn_image(0, (256, 256))], return_tensors="pt")
    assert as_it_was["pixel_values"].shape[1] != 2, "the processor itself is not changed"


def test_larger_images_keep_transformers_tiles(smolvlm: Path) -> None:
    processor = load_processor(str(smolvlm))
    tile = processor.image_processor.max_image_size["longest_edge"]
    image = drawn_image(0, (256, 256))
    pair = [
        device_processor(processor, DeviceTarget(longest_edge=2 * tile, tiling=tiling))(
            text="<image>", images=[image], return_tensors="pt"
        )
        for tiling in ("runtime", "processor")
    ]
    assert pair[0]["pixel_values"].shape[1] == 5
    assert torch.equal(pair[0]["pixel_values"], pair[1]["pixel_values"])
    assert torch.equal(pair[0]["input_ids"], pair[1]["input_ids"])


def test_families_without_tiles_stay_as_they_are(tmp_path: Path) -> None:
    processor = load_processor(str(tiny_qwen25vl(tmp_path)))
    assert device_processor(processor, DeviceTarget()) is processor
    with pytest.raises(UsageError, match="longest_edge"):
        device_processor(processor, DeviceTarget(longest_edge=512))


def example(prompt: str = "<image>\nWhat is it?\nElement:") -> Example:
    return Example("one", "one", (Turn("user", prompt), Turn("assistant", "fire")), images=("photo.png",))


def test_a_raw_prompt_is_the_text_alone(smolvlm: Path, tmp_path: Path) -> None:
    drawn_image(0, (640, 300)).save(tmp_path / "photo.png")
    target = DeviceTarget(prompt="raw")
    processor = device_processor(load_processor(str(smolvlm)), target)
    sight = Sight(processor, DeviceReader(ImageReader(tmp_path), target), target=target)
    renderer = Renderer(processor.tokenizer, style="raw", sight=sight)
    whole = renderer.training(example())
    text = renderer.text(whole.input_ids)
    assert text.endswith("\nWhat is it?\nElement: fire<end_of_utterance>")
    learnt = [token for token in whole.labels if token != -100]
    assert renderer.text(learnt).strip() == "fire<end_of_utterance>"
    assert renderer.prompt_ids(example()) == whole.input_ids[: -len(learnt)]
    assert "<__media__>" not in text


def test_the_target_travels_with_data_model_and_adapter(smolvlm: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    drawn_image(0, (640, 300)).save(data / "photo.png")
    (data / "rows.json").write_text("[]")
    section = DataSection(task="conversations", data_path=str(data / "rows.json"))
    config, model = load_config(str(smolvlm)), ModelSection(model_name=str(smolvlm))

    def tokens(section: DataSection = section, adapter: Path | None = None) -> int:
        renderer = renderer_for(section, model, str(smolvlm), config, [adapter] if adapter else [])
        assert renderer.sight is not None
        return renderer.prompt_ids(example()).count(renderer.sight.placeholder_id)

    plain = tokens()
    DeviceTarget(tiling="processor").save(data)
    one = tokens()
    assert one != plain
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    DeviceTarget().save(adapter)
    with pytest.raises(DataError, match="different devices"):
        tokens(adapter=adapter)
    asked = DataSection(task="conversations", data_path=section.data_path, device_target=str(adapter))
    assert tokens(asked, adapter) == 2 * one
    (data / "device.json").unlink()
    assert tokens(adapter=adapter) == 2 * one
    none = DataSection(task="conversations", data_path=section.data_path, device_target="off")
    assert tokens(none, adapter) == plain
