"""A tiny vision model shipped as the commands leave it: export, labelled data, validation, bundle.

folder/export ── validated ──▶ folder/validation ── bundled ──▶ folder/bundle
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rankwise.cli import main
from rankwise.data.input_record import InputRecord
from rankwise.data.label_task import task_from
from rankwise.data.renderer_for import renderer_for
from rankwise.gguf.reading import read_export
from rankwise.models.load import load_config
from rankwise.options.commands import BundleConfig
from rankwise.options.sections import DataSection, ModelSection

TASK = task_from({"classes": {"water": "wet", "fire": "hot", "wood": ""}, "field": "element"}, "the test", "elements")


def dataset(folder: Path) -> Path:
    """Six pictures of three shapes, labelled."""
    (folder / "images").mkdir(parents=True)
    noise, kept = np.random.default_rng(0), []
    for number in range(6):
        width, height = ((90, 40), (40, 80), (64, 64))[number % 3]
        name = f"images/{number}.png"
        Image.fromarray(noise.integers(1, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        kept.append({"image_id": str(number), "image_path": name, "element": TASK.labels[number % 3]})
    for file in ("train.jsonl", "val.jsonl"):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    TASK.save(folder)
    return folder


def shipped_in(folder: Path, vision_export: Path) -> Path:
    """`folder` with export/, dataset/ and validation/."""
    shutil.copytree(vision_export, folder / "export")
    TASK.save(folder / "export")
    data, model = dataset(folder / "dataset"), str(read_export(folder / "export").content["model"]["path"])
    section = DataSection(task="labels", data_path=str(data), device_target=str(folder / "export"))
    renderer = renderer_for(section, ModelSection(), model, load_config(model))
    InputRecord.of(renderer).save(folder / "export")
    arguments = ["--task", "labels", "--data_path", str(data), "--outtype", "q8_0", "--parity_samples", "3"]
    out = ["--max_new_tokens", "6", "--threads", "1", "-o", str(folder / "validation")]
    assert main(["validate", str(folder / "export"), *arguments, *out]) == 0
    return folder


def asked(shipped: Path, **how: Any) -> BundleConfig:
    config = BundleConfig(
        export=str(shipped / "export"),
        validation=str(shipped / "validation"),
        output_dir=str(shipped / "bundle"),
        num_golden=3,
        top=16,
        threads=1,
    )
    return replace(config, **how)
