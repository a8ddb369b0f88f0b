"""Base models of one to three million parameters, trained from scratch: with or without experts, with or without eyes.

images ── pretrain (Eye) ──▶ vision tower     it tells what is in each quarter of an image
captions ── pretrain ──────▶ the whole        it says what is where, and has never been asked anything

Trained, because with random weights a mistake in conversion or geometry changes nothing that one could see.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaTokenizer, PreTrainedModel

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.device import DeviceReader, DeviceTarget, device_processor
from rankwise.data.example import Example
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.template import without_images
from rankwise.data.vision_inputs import Sight
from rankwise.models.tiny import (
    SIDE,
    Eye,
    random_smolvlm,
    save_tokenizer,
    save_vision_tokenizer,
    vision_processor,
)
from rankwise.page.text import amount, duration
from rankwise.train.arguments import build_arguments
from rankwise.train.trainer import RankwiseTrainer

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
Rows = Sequence[dict[str, Any]] | Dataset[dict[str, Any]]


@dataclass(frozen=True)
class BaseTraining:
    """Training data of a base: samples (pages or captioned images), words of its vocabulary, optimizer steps."""

    samples: int
    vocabulary: int
    steps: int
    batch_size: int = 16
    eye_steps: int = 0
    eye_batch_size: int = 32
    learning_rate: float = 3e-3


def train_text_base(
    folder: Path,
    pages: list[str],
    more: list[str],
    course: BaseTraining,
    seed: int,
    made: Callable[[LlamaTokenizer, int], PreTrainedModel],
) -> None:
    """A model that has read the pages, saved with its tokenizer. more: texts that the vocabulary has words for, too.
    made: the untrained one, of a tokenizer and a seed."""
    started = time.monotonic()
    tokenizer = save_tokenizer(folder, [*pages[:2000], *more], course.vocabulary)
    model = made(tokenizer, seed)
    family = model.config.model_type.capitalize()
    print(f"base: a {family} of {amount(model.num_parameters())} parameters reads {course.samples:,} pages", flush=True)
    # every page is one sample with an end token, every token a label
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(pages)["input_ids"]]
    rows = [{"input_ids": ids, "labels": ids, "sample_index": index} for index, ids in enumerate(encoded)]
    finish(model, rows, Collator.of(tokenizer), course, seed, folder, started)


def train_vision_base(
    folder: Path,
    texts: list[str],
    examples: list[Example],
    contents: Sequence[Sequence[Sequence[int]]],
    classes: Sequence[int],
    course: BaseTraining,
    seed: int,
) -> None:
    """A SmolVLM that describes images, saved with its processor. texts: what the vocabulary has words for.

    contents: (examples, quarters, features), the class of each feature in each quarter of an example's image;
    classes: how many each feature has.
    """
    started = time.monotonic()
    tokenizer = save_vision_tokenizer(folder, texts, course.vocabulary)
    processor, reader = vision_processor(tokenizer), ImageReader(folder)
    processor.save_pretrained(folder)
    model = random_smolvlm(tokenizer, seed)
    print(f"base: a SmolVLM of {amount(model.num_parameters())} parameters sees {course.samples:,} images", flush=True)
    seen = [{"url": one.images[0], "contents": each} for one, each in zip(examples, contents, strict=True)]
    looks = replace(course, steps=course.eye_steps, batch_size=course.eye_batch_size)
    pretrain(Eye(model, classes), seen, partial(eye_batch, Sight(processor, reader)), looks, seed)
    sight = device_sight(processor, reader)
    rows = RenderedDataset(examples, Renderer(tokenizer, style="chat", sight=sight))
    finish(model, rows, Collator.of(tokenizer, sight=sight), course, seed, folder, started)


def finish(
    model: Any, rows: Rows, collate: Collate, course: BaseTraining, seed: int, folder: Path, started: float
) -> None:
    """Train the whole model on its samples and save it."""
    loss = pretrain(model, rows, collate, course, seed)
    model.save_pretrained(folder)
    print(f"base: loss {loss:.2f} nats per token after {duration(time.monotonic() - started)}", flush=True)


def device_sight(processor: object, reader: ImageReader) -> Sight:
    """As the phone's runtime lays images out: the released models have seen tiles before anyone fine-tunes them."""
    target = DeviceTarget(image_size=SIDE)
    return Sight(device_processor(processor, target), DeviceReader(reader, target), target=target)


def eye_batch(sight: Sight, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Images as the processor makes them, (images, 3, side, side), and what is in their quarters."""
    pixels = sight.inputs([[row["url"]] for row in rows])["pixel_values"]
    return {"pixel_values": pixels.flatten(0, 1), "labels": torch.tensor([row["contents"] for row in rows])}


def spoken(examples: list[Example]) -> list[str]:
    """All turns, as the chat template opens them: what the vocabulary should have words for."""
    turns = [turn for example in examples for turn in without_images(example).turns]
    return [f"{turn.role.capitalize()}: {turn.text}" for turn in turns]


def pretrain(model: nn.Module, rows: Rows, collate: Collate, course: BaseTraining, seed: int) -> float:
    """Train all weights in place on samples as the collator takes them; returns the last logged loss in nats."""
    settings = {
        "max_steps": course.steps,
        "per_device_train_batch_size": course.batch_size,
        "learning_rate": course.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(50, course.steps),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": max(1, course.steps // 20),
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = build_arguments(folder, seed, settings)
        trainer = RankwiseTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
    return float(next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row))
