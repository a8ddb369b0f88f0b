"""Laws of golden vectors by shape: wide, tall, turned and transparent sources are there, whatever the data set has."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from parity_models import Scene, scene_in
from PIL import Image

from rankwise.data.device import changes, resize_for_device
from rankwise.device.parity.cases import Case, case_of, decoded
from rankwise.device.parity.pixels import apart
from rankwise.device.shapes import SHAPES, shapes_of, with_all_shapes

FULL = {"wide", "tall", "turned", "transparent"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_in(tmp_path_factory.mktemp("shapes"))


def squares(scene: Scene) -> list[Case]:
    """A data set whose pictures have the device's size: any resizer passes them on."""
    side = scene.target.image_size
    folder = scene.folder / "photos"
    found = []
    for example in scene.examples[:2]:
        name = f"device-{example.id}.png"
        resize_for_device(Image.open(folder / example.images[0]), side).save(folder / name)
        found.append(case_of(replace(example, images=(name,)), scene.renderer))
    return found


def test_a_picture_file_is_of_these_shapes() -> None:
    picture = Image.new("RGB", (64, 64), "red")
    assert {name: shapes_of(make(picture)) for name, make in SHAPES.items()} == {
        "wide": {"wide"},
        "tall": {"tall"},
        "turned": {"tall", "turned"},
        "transparent": {"tall", "transparent"},
    }


def test_every_shape_is_made_where_the_data_set_has_none(scene: Scene) -> None:
    cases = squares(scene)
    found = with_all_shapes(cases, scene.renderer)
    assert found[:2] == cases and len({case.id for case in found}) == 6
    made = {case.id.split(", ")[1]: case for case in found[2:]}
    assert set(made) == FULL
    side = scene.target.image_size
    for shape, case in made.items():
        content, expected = case.sources[0].content, scene.reference.expected(case)
        assert shape in shapes_of(content) and changes(content, side)
        assert "tall" in case.stratum or "wide" in case.stratum
        assert apart(np.asarray(decoded(case.images[0])), expected.pixels[0]) is not None
        assert np.array_equal(np.asarray(decoded(case.images[0])), expected.pixels[0])
        stored = Image.open(io.BytesIO(content)).convert("RGB")  # as one who ignores EXIF and transparency sees it
        stored.thumbnail((side, side), Image.Resampling.LANCZOS)
        square = Image.new("RGB", (side, side))
        square.paste(stored, ((side - stored.width) // 2, (side - stored.height) // 2))
        wrong = apart(np.asarray(square), expected.pixels[0])
        assert wrong and wrong.most > 20, shape
    assert made["turned"].stratum == "wide RGB turned" and "RGBA" in made["transparent"].stratum


def test_shapes_that_are_there_are_not_made_again(scene: Scene) -> None:
    found = with_all_shapes(scene.cases, scene.renderer)
    assert [case.id.split(", ")[1] for case in found[len(scene.cases) :]] == ["transparent"]


def test_texts_have_no_shapes(scene: Scene) -> None:
    blind = [case for case in scene.cases if not case.images]
    assert blind and with_all_shapes(blind, scene.renderer) == blind


def test_a_picture_inside_a_row_may_be_long(scene: Scene) -> None:
    """A data URL is no file name, which has at most 255 characters."""
    case = with_all_shapes(squares(scene), scene.renderer)[-1]
    assert len(case.example.images[0]) > 10_000
    assert case_of(case.example, scene.renderer).stratum == "unknown"
