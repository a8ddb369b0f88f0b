"""What `rankwise demo --vision` makes before its recipe runs: pictures that it draws, and a base that has seen some.

pictures ── pretrain (Eye) ──────▶ vision tower   it tells what is in each quarter of a picture
captions ── pretrain ────────────▶ base/          it says what is where, and has never been asked anything
questions about other pictures ──▶ data/          train.json, and heldout.json about pairs that train.json lacks
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.device import DeviceReader, DeviceTarget, device_processor
from rankwise.data.example import Example
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.sources import load
from rankwise.data.template import without_images
from rankwise.data.vision_inputs import Sight
from rankwise.demo.drawing_talk import captioned, seen, write_conversations
from rankwise.demo.drawings import FEATURES, contents
from rankwise.demo.pretrain import pretrain
from rankwise.files.atomic import atomic_folder
from rankwise.models.tiny_vision import SIDE, Eye, processor_of, random_smolvlm, save_tokenizer
from rankwise.page.text import amount, duration

TRAIN, HELD_OUT = "train.json", "heldout.json"


@dataclass(frozen=True)
class World:
    """How large everything is. The defaults take about four minutes on two cores."""

    pictures: int = 6000
    vocabulary: int = 400
    eye_steps: int = 180
    eye_batch_size: int = 32
    steps: int = 1400
    batch_size: int = 16
    learning_rate: float = 3e-3
    train_rows: int = 800
    turns: int = 3
    held_out_rows: int = 200


QUICK = World(pictures=60, vocabulary=340, eye_steps=2, steps=4, train_rows=24, held_out_rows=10)


def make(folder: Path, world: World, seed: int) -> None:
    """`data` and `base` below the run folder, each where it is not there yet."""
    make_data(folder / "data", world, seed)
    make_base(folder / "base", folder / "data", world, seed)


def make_data(folder: Path, world: World, seed: int) -> None:
    """Conversations in LLaVA form with their pictures; held-out (colour, shape) pairs never met in training."""
    if folder.is_dir():
        return
    generator = random.Random(seed)
    with atomic_folder(folder) as made:
        write_conversations(made / TRAIN, generator, count=world.train_rows, turns=world.turns, held_out=False)
        write_conversations(made / HELD_OUT, generator, count=world.held_out_rows, turns=1, held_out=True)


def make_base(folder: Path, data: Path, world: World, seed: int) -> None:
    """A SmolVLM of a million parameters that has learnt to describe pictures, and has never been asked a question."""
    if folder.is_dir():
        return
    started = time.monotonic()
    generator = random.Random(seed)
    pictures = seen(generator, world.pictures)
    examples = captioned(pictures, generator)
    asked = list(load("conversations", data / TRAIN))
    with atomic_folder(folder) as made:
        tokenizer = save_tokenizer(made, spoken([*asked, *examples[:2000]]), world.vocabulary)
        processor = processor_of(tokenizer)
        processor.save_pretrained(made)
        model = random_smolvlm(tokenizer, seed)
        what = f"a SmolVLM of {amount(model.num_parameters())} parameters sees {world.pictures:,} pictures"
        print(f"base: {what}", flush=True)
        target, reader = DeviceTarget(image_size=SIDE), ImageReader(data)
        target.save(made)  # from here on everything sees pictures as llama.cpp will show them
        sight = Sight(device_processor(processor, target), DeviceReader(reader, target), target=target)
        renderer = Renderer(tokenizer, style="chat", sight=sight)
        lesson = [{"url": url, "contents": contents(scene)} for scene, url in pictures]
        pretrain(
            Eye(model, [1 + len(names) for names in FEATURES.values()]),
            lesson,
            partial(eye_batch, Sight(processor, reader)),
            steps=world.eye_steps,
            batch_size=world.eye_batch_size,
            learning_rate=world.learning_rate,
            seed=seed,
        )
        loss = pretrain(
            model,
            RenderedDataset(examples, renderer),
            Collator.of(tokenizer, sight=sight),
            steps=world.steps,
            batch_size=world.batch_size,
            learning_rate=world.learning_rate,
            seed=seed,
        )
        model.save_pretrained(made)
    print(f"base: loss {loss:.2f} nats per token after {duration(time.monotonic() - started)}", flush=True)


def eye_batch(sight: Sight, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pictures as the processor makes them, (pictures, 3, side, side), and what is in their quarters."""
    pixels = sight.inputs([[row["url"]] for row in rows])["pixel_values"]
    return {"pixel_values": pixels.flatten(0, 1), "labels": torch.tensor([row["contents"] for row in rows])}


def spoken(examples: list[Example]) -> list[str]:
    """What the vocabulary should have words for: all turns, as the chat template opens them."""
    turns = [turn for example in examples for turn in without_images(example).turns]
    return [f"{turn.role.capitalize()}: {turn.text}" for turn in turns]
