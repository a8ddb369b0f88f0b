"""Where depth values stand, what they are, and that the cache gives back exactly what was put in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_isaac import tiny_isaac
from tiny_vision import FAMILIES, drawn_image
from transformers import AutoProcessor, ViTImageProcessor

from rankwise.core.geometry import WHOLE, Grid, derangement, normalised, on_grids, permuted, pooled, ramp
from rankwise.data.depth.maps import (
    BrokenMap,
    DepthCache,
    DepthFiles,
    DepthMaps,
    MapKey,
    at_tokens,
    image_grids,
    inverse_depth,
    luminance,
    source_name,
)
from rankwise.data.images import ImageReader
from rankwise.errors import DataError, UsageError

MAKERS = {**FAMILIES, "isaac": tiny_isaac}
SIZES = [(64, 48), (48, 64), (65, 65), (333, 97), (31, 200), (640, 480), (57, 61), (10, 9), (1000, 30), (129, 128)]


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    return {name: AutoProcessor.from_pretrained(make(folder / name)) for name, make in MAKERS.items()}


@pytest.mark.parametrize("family", MAKERS)
def test_grids_are_those_of_the_processor(processors: dict[str, Any], family: str) -> None:
    """Number of tokens, rows and columns, number of tiles: as the processor itself makes them."""
    processor = processors[family]
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    generator = random.Random(0)
    sizes = SIZES + [(generator.randrange(20, 700), generator.randrange(20, 700)) for _ in range(10)]
    for width, height in sizes:
        images = [drawn_image(0, (width, height))]
        found = processor(text=[processor.image_token], images=images, return_tensors="pt")
        grids = image_grids(processor, width, height)
        assert sum(grid.tokens for grid in grids) == int((found["input_ids"] == token).sum()), (width, height)
        if "image_grid_thw" in found:
            assert [1, 2 * grids[0].rows, 2 * grids[0].columns] == found["image_grid_thw"][0].tolist()
        elif found["pixel_values"].dim() == 5:
            assert len(grids) == found["pixel_values"].shape[1]


def test_tiles_are_row_major_and_the_whole_image_comes_last(processors: dict[str, Any]) -> None:
    grids = image_grids(processors["smolvlm"], 64, 20)
    assert [grid.box for grid in grids] == [(0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)]
    tall = image_grids(processors["idefics3"], 40, 64)
    assert [grid.box for grid in tall[:-1]] == [
        (column / 2, row / 2, (column + 1) / 2, (row + 1) / 2) for row in range(2) for column in range(2)
    ]


def test_llava_sees_the_middle(processors: dict[str, Any]) -> None:
    assert image_grids(processors["llava"], 64, 32) == (Grid((0.25, 0, 0.75, 1), 4, 4),)


def test_unknown_processors_are_refused_by_name(processors: dict[str, Any]) -> None:
    class Other:
        image_processor = ViTImageProcessor()

    with pytest.raises(UsageError, match="Other with ViTImageProcessor"):
        image_grids(Other(), 64, 64)  # type: ignore[arg-type]


def test_pooling_is_the_mean_of_each_cell() -> None:
    values = torch.arange(24.0).view(4, 6)
    found = pooled(values, Grid(WHOLE, 2, 3))
    expected = [
        values[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean() for row in (0, 1) for column in (0, 1, 2)
    ]
    assert found.tolist() == [float(value) for value in expected]


def test_a_tile_takes_its_crop_of_the_whole_map() -> None:
    values = torch.arange(51.0 * 6).view(51, 6)
    third = pooled(values, Grid((0, 1 / 3, 0.5, 2 / 3), 1, 1))
    assert third.item() == pytest.approx(float(values[17:34, :3].mean()))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), st.integers(1, 7))
def test_tiles_together_say_what_the_image_says(height: int, width: int, rows: int, columns: int) -> None:
    """The mean over tiles of equal pixels is the mean of the image; sizes that divide are exact."""
    values = torch.rand(height * rows, width * columns, generator=torch.Generator().manual_seed(height))
    boxes = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]
    tiles = torch.cat([pooled(values, Grid(box, 1, 1)) for box in boxes])
    assert torch.allclose(tiles.view(rows, columns), pooled(values, Grid(WHOLE, rows, columns)).view(rows, columns))


def test_normalised() -> None:
    depth = torch.tensor([[2.0, 6.0], [4.0, 2.0]])
    assert normalised(depth).tolist() == [[0, 1], [0.5, 0]]
    assert normalised(torch.full((2, 2), 7.0)).tolist() == [[0, 0], [0, 0]]
    assert torch.equal(normalised(depth), normalised(8 * depth + 16)), "only the order within an image is left"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failed_map_names_its_image(value: float) -> None:
    depth = torch.ones(3, 3)
    depth[1, 1] = value
    with pytest.raises(DataError, match=r"image street\.jpg: its depth estimate failed"):
        at_tokens(depth, (Grid(WHOLE, 1, 1),), "street.jpg")


def test_controls_without_information() -> None:
    grids = (Grid((0, 0, 0.5, 0.5), 2, 2), Grid(WHOLE, 4, 1))
    found = on_grids(ramp(), grids)
    assert found.dtype == torch.float16
    assert found[:4].tolist() == pytest.approx([0.125, 0.125, 0.375, 0.375], abs=2e-3)
    assert found[4:].tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=2e-3)
    values = torch.rand(8, generator=torch.Generator().manual_seed(0)).half()
    mixed = permuted(values, grids, 42)
    assert mixed.tolist() != values.tolist()
    assert sorted(mixed[:4].tolist()) == sorted(values[:4].tolist())
    assert sorted(mixed[4:].tolist()) == sorted(values[4:].tolist())
    assert torch.equal(mixed, permuted(values, grids, 42))
    assert not torch.equal(mixed, permuted(values, grids, 43))


@given(st.integers(2, 60), st.integers(0, 99))
def test_a_derangement_moves_everything(count: int, seed: int) -> None:
    order = derangement(count, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(count))
    assert all(index != other for index, other in enumerate(order))


def cache_and_key(folder: Path, tokens: int = 6) -> tuple[DepthCache, MapKey]:
    return DepthCache(folder), MapKey("image", source_name("weights", 518), (Grid(WHOLE, 2, tokens // 2),))


def test_the_cache_gives_back_the_same_bits(tmp_path: Path) -> None:
    cache, key = cache_and_key(tmp_path)
    assert cache.read(key) is None
    values = torch.rand(6).half()
    cache.write(key, values)
    assert torch.equal(cache.read(key), values)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [cache.file(key).name]


@pytest.mark.parametrize(
    "other",
    [
        MapKey("image2", source_name("weights", 518), (Grid(WHOLE, 2, 3),)),
        MapKey("image", source_name("weights2", 518), (Grid(WHOLE, 2, 3),)),
        MapKey("image", source_name("weights", 252), (Grid(WHOLE, 2, 3),)),
        MapKey("image", source_name("weights", 518), (Grid(WHOLE, 3, 2),)),
        MapKey("image", source_name("weights", 518), (Grid((0, 0, 0.5, 1), 2, 3),)),
    ],
)
def test_whatever_a_map_depends_on_is_in_its_key(tmp_path: Path, other: MapKey) -> None:
    cache, key = cache_and_key(tmp_path)
    cache.write(key, torch.rand(6).half())
    assert cache.read(other) is None


def test_broken_cache_files_are_never_used(tmp_path: Path) -> None:
    cache, key = cache_and_key(tmp_path)
    cache.write(key, torch.rand(6).half())
    file = cache.file(key)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(BrokenMap, match="not a sound depth map"):
        cache.read(key)
    file.write_bytes(b"")
    with pytest.raises(BrokenMap, match="not a sound depth map"):
        cache.read(key)
    foreign = MapKey("another", key.source, key.grids)
    cache.write(foreign, torch.rand(6).half())
    file.write_bytes(cache.file(foreign).read_bytes())
    with pytest.raises(BrokenMap, match="not the depth map that its name says"):
        cache.read(key)
    file.write_bytes(whole[:-2] + b"\xff\xff")  # a NaN in the last value
    with pytest.raises(BrokenMap, match="not the depth map that its name says"):
        cache.read(key)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate([(64, 48), (40, 90), (64, 48)]):
        drawn_image(index, size).save(folder / f"{index}.png")
    return folder


def maps_of(pictures: Path, processor: Any, **how: Any) -> DepthMaps:
    cache = DepthCache(pictures.parent / "cache")
    return DepthMaps(ImageReader(pictures), processor, cache, source_name("weights", 518), **how)


NAMES = ["0.png", "1.png", "2.png"]


def test_fill_then_read(pictures: Path, processors: dict[str, Any]) -> None:
    maps = maps_of(pictures, processors["smolvlm"])
    with pytest.raises(DataError, match=r"0\.png: its depth map is not in"):
        maps.for_image("0.png")
    missing, broken = maps.missing([*NAMES, "0.png"])
    assert [task.maker for task in missing] == NAMES and not broken
    depth = torch.rand(30, 40)
    maps.store(missing[0], depth)
    grids = image_grids(processors["smolvlm"], 64, 48)
    assert torch.equal(maps.for_image("0.png"), on_grids(normalised(depth), grids))
    missing, broken = maps.missing(NAMES)
    assert [task.maker for task in missing] == NAMES[1:] and not broken


def test_a_broken_map_is_made_again_and_named(pictures: Path, processors: dict[str, Any]) -> None:
    maps = maps_of(pictures, processors["qwen25vl"])
    maps.store(maps.task("0.png"), torch.rand(4, 4))
    file = maps.cache.file(maps.task("0.png").key)
    file.write_bytes(file.read_bytes()[:20])
    missing, broken = maps.missing(["0.png"])
    assert [task.maker for task in missing] == ["0.png"]
    assert len(broken) == 1 and str(file) in broken[0]
    with pytest.raises(BrokenMap):
        maps.for_image("0.png")


def test_shuffled_maps_are_another_images_at_this_images_tokens(pictures: Path, processors: dict[str, Any]) -> None:
    processor = processors["qwen25vl"]
    maps = maps_of(pictures, processor).shuffled(NAMES)
    depths = {name: torch.rand(20, 20, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}
    missing, _ = maps.missing(NAMES)
    for task in missing:
        maps.store(task, depths[task.maker])
    donors = [maps.task(name).maker for name in NAMES]
    assert sorted(donors) == NAMES
    for name, donor in zip(NAMES, donors, strict=True):
        assert donor != name
        width, height = maps.reader.size(name)
        assert torch.equal(
            maps.for_image(name), on_grids(normalised(depths[donor]), image_grids(processor, width, height))
        )
    again = maps_of(pictures, processor).shuffled(reversed(NAMES))
    assert [again.task(name).maker for name in NAMES] == donors, "the order of the rows does not matter"
    with pytest.raises(UsageError, match="at least two different images"):
        maps_of(pictures, processor).shuffled(["0.png", "0.png"])


def test_controls_give_as_many_values_as_there_are_tokens(pictures: Path, processors: dict[str, Any]) -> None:
    tokens = sum(grid.tokens for grid in image_grids(processors["smolvlm"], 64, 48))
    for control in ("off", "constant", "ramp"):
        maps = maps_of(pictures, processors["smolvlm"], control=control)
        assert maps.missing(NAMES) == ([], [])
        found = maps.for_image("0.png")
        assert found.shape == (tokens,) and found.dtype == torch.float16


def test_luminance_is_brightness(pictures: Path, processors: dict[str, Any]) -> None:
    half = Image.new("RGB", (8, 4), "black")
    half.paste((255, 255, 255), (4, 0, 8, 4))
    assert luminance(half)[0].tolist() == [0, 0, 0, 0, 255, 255, 255, 255]
    maps = maps_of(pictures, processors["qwen25vl"], control="luminance")
    (task,), _ = maps.missing(["0.png"])
    maps.store(task, maps.own_map("0.png"))
    picture = ImageReader(pictures).open("0.png")
    grids = image_grids(processors["qwen25vl"], 64, 48)
    assert torch.equal(maps.for_image("0.png"), at_tokens(luminance(picture), grids, "0.png"))


def test_measured_depth_is_turned_round(tmp_path: Path) -> None:
    distance = np.array([[1000, 2000], [4000, 0]], dtype=np.uint16)
    Image.fromarray(distance).save(tmp_path / "a.png")
    found = inverse_depth(tmp_path / "a.png")
    assert torch.allclose(found, torch.tensor([[1 / 1000, 1 / 2000], [1 / 4000, 1 / 4000]]))
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png: no measured pixels"):
        inverse_depth(tmp_path / "b.png")
    drawn_image().save(tmp_path / "c.png")
    with pytest.raises(DataError, match="16-bit grey PNG; this is RGB"):
        inverse_depth(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"d\.png"):
        inverse_depth(tmp_path / "d.png")


def test_depth_files_by_name_and_by_table(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    for name in ("room/1.png", "depth_1.png"):
        Image.fromarray(np.ones((2, 2), dtype=np.uint16)).save(tmp_path / name)
    assert DepthFiles.at(tmp_path).file("room/1.jpg") == tmp_path / "room/1.png"
    with pytest.raises(DataError, match=r"image room/2\.jpg: no depth map at .*room/2\.png"):
        DepthFiles.at(tmp_path).file("room/2.jpg")
    with pytest.raises(DataError, match="no depth map"):
        DepthFiles.at(tmp_path / "room").file("../depth_1.png")
    table = tmp_path / "pairs.csv"
    table.write_text("image_path,depth_path\nx.jpg,depth_1.png\ny.jpg,nothing.png\n")
    assert DepthFiles.at(table).file("x.jpg") == tmp_path / "depth_1.png"
    for name in ("y.jpg", "z.jpg"):
        with pytest.raises(DataError, match=f"image {name}: no depth map in the table"):
            DepthFiles.at(table).file(name)
    table.write_text("image,depth\n")
    with pytest.raises(DataError, match="line 1"):
        DepthFiles.at(table)
    with pytest.raises(DataError, match="no such folder or table"):
        DepthFiles.at(tmp_path / "none")


def test_real_frames_with_measured_depth(shared_data: Path, tmp_path: Path, processors: dict[str, Any]) -> None:
    frames = shared_data / "nyu2_mini"
    files = DepthFiles.at(frames / "nyu2_mini_test.csv")
    processor = processors["qwen25vl"]
    maps = DepthMaps(ImageReader(frames), processor, DepthCache(tmp_path), control="file", files=files)
    names = [f"image_{index}.png" for index in range(10)]
    missing, _ = maps.missing(names)
    assert len(missing) == 10
    for task in missing:
        maps.store(task, maps.own_map(task.maker))
    for index, name in enumerate(names):
        values = maps.for_image(name).float()
        (grid,) = image_grids(processor, *maps.reader.size(name))
        assert values.shape == (grid.tokens,) and 0 <= values.min() < values.max() <= 1
        # The nearest token by our values is the one whose measured pixels are nearest, in harmonic mean.
        raw = np.asarray(Image.open(frames / f"depth_{index}.png")).astype(np.float64)
        inverse = torch.from_numpy(1 / raw)
        cells = torch.nn.functional.adaptive_avg_pool2d(inverse[None], (grid.rows, grid.columns)).flatten()
        assert int(values.argmax()) == int(cells.argmax())


def test_a_key_names_its_parts(tmp_path: Path) -> None:
    _, key = cache_and_key(tmp_path)
    content = json.loads(key.text)
    assert content["image"] == "image" and content["source"] == "weights@518"
    assert content["grids"] == [[0.0, 0.0, 1.0, 1.0, 2, 3]]
