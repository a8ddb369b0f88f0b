"""Tiny models with SentencePiece tokenizers, saved and exported on the spot: model folder and GGUF files side by side.

    folder/base ── tuned ──▶ folder/model ── exported, verified ──▶ folder/export: model-f16.gguf …, export.json

The weights are random: for what a trained model answers, train one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from rankwise.data.device import DeviceTarget
from rankwise.errors import UsageError
from rankwise.gguf.converter import Converter, find_converter
from rankwise.gguf.export import write_export
from rankwise.gguf.plan import plan_export
from rankwise.models import tiny
from rankwise.options.commands import ExportConfig

OUTTYPES = ("f32", "f16", "q8_0")
TUNED = ("q_proj", "k_proj", "down_proj")
TEXTS = (
    "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]",
    "The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30.",
    "Alimentum is a family-friendly restaurant in the city centre.",
    "What colour is the round thing left of the square? It is red. Water, land, fire, wood or metal?",
)


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder as `make` fills it: by the first process that asks, for all; nothing writes to it later."""
    with FileLock(f"{folder}.lock"):
        made = Path(f"{folder}.made")
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


def session_root(factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole session, which the workers of pytest-xdist share."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def installed_converter() -> Converter:
    """The converter of this machine; skips the test where there is none."""
    try:
        return find_converter()
    except UsageError as error:
        pytest.skip(str(error))


def text_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama whose tokenizer adds a start token."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.save_tokenizer(folder, TEXTS, 400)
    tiny.random_llama(tokenizer, seed).save_pretrained(folder)
    return folder


def vision_model(folder: Path, seed: int = 0) -> Path:
    """A random SmolVLM and its processor; its chat template writes the start token."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.save_vision_tokenizer(folder, TEXTS, 400)
    tiny.random_smolvlm(tokenizer, seed).save_pretrained(folder)
    tiny.vision_processor(tokenizer).save_pretrained(folder)
    return folder


def tuned_model(base: Path, folder: Path, seed: int = 1) -> Path:
    """The base with a small random change of some matrices of its language tower, as merging an adapter leaves it; its
    card and its config name folders of this machine, as PEFT and older versions of transformers wrote them."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for key, weight in weights.items():
        if key.endswith(tuple(f"{name}.weight" for name in TUNED)) and "vision" not in key:
            weights[key] = weight + 0.02 * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": f"~/{base.name}"}))
    (folder / "README.md").write_text(f"---\nlicense: mit\nbase_model: {base}\ndatasets: [org/data, {base}]\n---\n")
    return folder


def export_model(model: Path, folder: Path, base: Path, target: DeviceTarget | None = None) -> Path:
    """f32, f16 and q8_0 files of a model folder, all proofs made."""
    converter = installed_converter()
    config = ExportConfig(model=str(model), outtype=list(OUTTYPES), base_model=str(base))
    plan = plan_export(config, converter, target=target)
    folder.mkdir(parents=True, exist_ok=True)
    write_export(plan, folder)
    return folder


def exported_text(folder: Path) -> Path:
    """`folder`/export for the text model in `folder`/model."""
    base = text_model(folder / "base")
    return export_model(tuned_model(base, folder / "model"), folder / "export", base)


def exported_vision(folder: Path) -> Path:
    """`folder`/export for the vision model in `folder`/model; its device target has images of the model's own size."""
    target = DeviceTarget(image_size=tiny.SIDE, longest_edge=tiny.SIDE)
    base = vision_model(folder / "base")
    return export_model(tuned_model(base, folder / "model"), folder / "export", base, target)
