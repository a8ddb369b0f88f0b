"""A tiny SmolVLM with pictures of several kinds, on the device's terms: what the tests of parity compare.

scene = scene_in(folder)      # scene.model, scene.renderer, scene.examples, scene.cases, scene.reference
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import installed_converter, once, session_root, vision_model
from PIL import Image

from rankwise.data.device import DeviceReader, DeviceTarget, device_processor
from rankwise.data.example import Example, Turn
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.device.parity.cases import Case, blind, case_of
from rankwise.device.parity.reference import HFReference
from rankwise.gguf.export import write_export
from rankwise.gguf.plan import plan_export
from rankwise.models import tiny
from rankwise.models.load import load_model, load_processor
from rankwise.options.commands import ExportConfig

SIZES = {"wide": (96, 48), "tall": (40, 80), "square": (64, 64), "large": (130, 190)}
LONGEST = 5
TARGET = DeviceTarget(image_size=tiny.SIDE, longest_edge=tiny.SIDE, max_new_tokens=LONGEST)
GIVEN = "It is red."  # random weights write pieces of characters, of which llama.cpp tells no log-probabilities


@dataclass(frozen=True)
class Scene:
    """folder/model, folder/photos and what is made of them."""

    folder: Path
    target: DeviceTarget
    model: Any
    renderer: Renderer
    examples: list[Example]
    cases: list[Case]
    reference: HFReference


def exported_pair(factory: pytest.TempPathFactory) -> Path:
    """Two models that differ in every weight, exported: once for all test files, since the converter takes its time."""
    return once(session_root(factory) / "parity-ship", export_pair)


def export_pair(ship: Path) -> None:
    for name, seed, forms in (("tuned", 0, ("f16", "q8_0")), ("base", 1, ("f16",))):
        folder = ship / name
        model, converter = vision_model(folder / "model", seed), installed_converter()
        draw(folder / "photos")
        config = ExportConfig(model=str(model), outtype=list(forms), no_verify=True)
        plan = plan_export(config, converter, target=TARGET)
        (folder / "export").mkdir()
        write_export(plan, folder / "export")


def scene_in(folder: Path, seed: int = 0) -> Scene:
    if not (folder / "model").is_dir():
        vision_model(folder / "model", seed)
    target = TARGET
    examples = draw(folder / "photos")
    renderer = renderer_of(folder / "model", folder / "photos", target)
    model = load_model(str(folder / "model"), torch.float32).eval()
    cases = [case_of(one, renderer) for one in examples] + [blind(one, renderer) for one in examples[:2]]
    cases += [replace(case, id=f"{case.id}, given", answer=GIVEN) for case in cases]
    return Scene(folder, target, model, renderer, examples, cases, HFReference(model, renderer, LONGEST))


def renderer_of(model: Path, photos: Path, target: DeviceTarget) -> Renderer:
    processor = load_processor(str(model))
    reader = DeviceReader(ImageReader(photos), target)
    sight = Sight(device_processor(processor, target), reader, target=target)
    return Renderer(processor.tokenizer, style="chat", max_length=512, sight=sight)


def draw(folder: Path) -> list[Example]:
    """Coarse noise, a picture for each size, one of them grey and one turned by EXIF."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        blocks = noise.integers(1, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        path = folder / f"{name}.png"
        if path.exists():
            continue
        image = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "tall" else 1
        (image.convert("L") if name == "square" else image).save(path, exif=exif)
    question = Turn("user", "<image>\nWhat colour is the round thing?")
    return [Example(name, name, (question, Turn("assistant", "red")), images=(f"{name}.png",)) for name in SIZES]
