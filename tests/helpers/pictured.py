"""Conversations about four pictures: as samples, as a file, rendered and batched for a family's tiny model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.cli import main
from rankwise.data.dataset import Collator
from rankwise.data.example import Example, Turn
from rankwise.data.images import ImageReader
from rankwise.data.render import IGNORED, Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.models.load import load_processor

SIZES = ((64, 48), (48, 64), (100, 20), (33, 97))


def talk(*texts: str, images: tuple[int, ...] = (), system: str = "") -> Example:
    """User and assistant in turn."""
    turns = [Turn(role, text) for role, text in zip(("user", "assistant") * 9, texts, strict=False)]
    turns = [Turn("system", system), *turns] if system else turns
    return Example("1", "1", tuple(turns), images=tuple(f"{number}.png" for number in images))


CONVERSATIONS = {
    "one image": talk("<image>\nWhat colour is it?", "It is red.", images=(0,)),
    "image last": talk("What is this? <image>", "A square.", images=(1,)),
    "two images": talk("<image><image>\nWhich is larger?", "The first.", images=(2, 3)),
    "image within": talk("Is <image> the same as <image>?", "No.", images=(0, 2)),
    "turns": talk("<image>\nWhat is it?", "A dog.", "And here?\n<image>", "Two cats.", "Sure?", "Yes.", images=(3, 1)),
    "system": talk("<image>\nWhat is it?", "It is red.", images=(0,), system="Answer in a few words."),
    "no image": talk("What is red?", "A rose."),
}


@cache
def processor_of(folder: Path) -> Any:
    return load_processor(str(folder))


def renderer_of(folder: Path, pictures: Path, **changes: Any) -> Renderer:
    processor = processor_of(folder)
    return Renderer(processor.tokenizer, style="chat", sight=Sight(processor, ImageReader(pictures)), **changes)


def batch_of(renderer: Renderer, examples: list[Example]) -> dict[str, Tensor]:
    rows = [renderer.training(example) for example in examples]
    return Collator.of(renderer.tokenizer, sight=renderer.sight)([vars(row) for row in rows])


def losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of each row's labels."""
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != IGNORED
    picked = logits.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return -(picked * mask).sum(1) / mask.sum(1)


def rows(folder: Path, *names: str) -> Path:
    """Conversations as a file."""
    roles = {"user": "human", "assistant": "gpt", "system": "system"}
    content = [
        {
            "id": name,
            "image": list(CONVERSATIONS[name].images),
            "conversations": [{"from": roles[turn.role], "value": turn.text} for turn in CONVERSATIONS[name].turns],
        }
        for name in names
    ]
    file = folder / "rows.json"
    file.write_text(json.dumps(content))
    return file


def checked(model: Path, file: Path, pictures: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    out = file.parent / "report"
    data = ["--data_path", str(file), "--image_folder", str(pictures), "--task", "conversations"]
    code = main(["check", "--model_name", str(model), *data, "-o", str(out), *flags])
    return code, json.loads((out / "check.json").read_text()) if (out / "check.json").exists() else {}
