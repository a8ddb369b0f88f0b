"""`rankwise tiny`: photos whose labels a teacher of colours finds, and a base that has learnt to tell them apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from rankwise import cli
from rankwise.data.device import resize_for_device
from rankwise.data.example import Example
from rankwise.data.images import ImageReader
from rankwise.data.label_task import load_task
from rankwise.data.render import Renderer
from rankwise.demo.base import device_sight
from rankwise.demo.scenes import SHADES, SIZES, paint, photos
from rankwise.demo.tiny import captioned, seen
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.labels.teacher.loopback import shares


def told(picture: Image.Image) -> str:
    return shares(resize_for_device(picture), list(SHADES)).most_common(1)[0][0]


def test_the_elements_are_those_of_the_task() -> None:
    assert tuple(SHADES) == load_task("elements").labels


@pytest.mark.parametrize("element", SHADES)
def test_a_scene_is_told_by_its_colours_whatever_its_size(element: str) -> None:
    generator = random.Random(7)
    scenes = [paint(element, *SIZES[number % len(SIZES)], generator) for number in range(12)]
    assert [scene.size for scene in scenes[: len(SIZES)]] == list(SIZES)
    assert {told(scene) for scene in scenes} == {element}
    assert len({scene.tobytes() for scene in scenes}) == 12


def test_photos_have_what_real_folders_have(tmp_path: Path) -> None:
    written = photos(tmp_path, random.Random(3))
    assert len(written) == 11
    assert written[-1].read_bytes() == written[0].read_bytes(), "one twice"
    assert len({path.read_bytes() for path in written}) == 10
    reader = ImageReader(tmp_path)
    for path in written[:-1]:
        assert told(reader.open(path.name)) == path.name.split("_")[0]
    turned = written[-2]
    with Image.open(turned) as stored:
        assert reader.open(turned.name).size == stored.size[::-1], "the note turns it upright"
    assert sum(reader.size(path.name)[0] != reader.size(path.name)[1] for path in written) >= 6


def test_the_command_makes_each_part_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny"
    assert cli.main(["tiny", "--quick", "-o", str(out)]) == 0
    assert "loss" in capsys.readouterr().out
    weights = (out / "base" / "model.safetensors").stat().st_mtime_ns
    (out / "photos" / "again.jpg").unlink()
    assert cli.main(["tiny", "--quick", "-o", str(out)]) == 0
    assert "loss" not in capsys.readouterr().out
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == weights
    assert AutoModelForImageTextToText.from_pretrained(out / "base").config.model_type == "smolvlm"


@pytest.mark.slow
def test_the_base_names_the_element_of_scenes_that_it_has_not_seen(trained_base: Path) -> None:
    generator = random.Random("others")
    scenes = [seen(element, generator) for element in SHADES for _ in range(6)]
    answers = captions(trained_base, [captioned(scene, generator) for scene in scenes])
    right = sum(scene.element in answer for scene, answer in zip(scenes, answers, strict=True))
    assert right >= 27, answers


def captions(base: Path, examples: Sequence[Example]) -> list[str]:
    model, processor = AutoModelForImageTextToText.from_pretrained(base).eval(), AutoProcessor.from_pretrained(base)
    renderer = Renderer(processor.tokenizer, style="chat", sight=device_sight(processor, ImageReader(base)))
    with torch.no_grad():
        found = HFGenerator(model, renderer, GenerationSettings(max_new_tokens=32)).generate(examples)
        return [one.text for one in sorted(found, key=lambda one: one.position)]
