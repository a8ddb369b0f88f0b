"""The data and the base model of the depth evidence: rows and maps on disk, and a small SmolVLM that sees well.

write_data ──▶ images/ maps/ permuted/ shuffled.csv, base.json sight.json train.json test.json
make_base ───▶ base/: it names things with their places and compares what is visible, and knows no depth
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from depth_scenes import Question, Scene, caption, distances, draw, nearer, pairs, picture, visible
from numpy.typing import NDArray
from PIL import Image
from transformers import SmolVLMForConditionalGeneration

from rankwise import cli
from rankwise.core.geometry import derangement
from rankwise.models.tiny import random_smolvlm, save_vision_tokenizer, vision_processor

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
RANGE = {"initializer_range": 0.08}
VOCABULARY = 360
CAPTIONS = 0.4  # share of the base's scenes that are described, not asked about: colours and places are learnt there


@dataclass(frozen=True)
class Size:
    """How much is drawn and trained. The defaults took 20 minutes on two cores with other work beside."""

    base_scenes: int = 8000
    base_steps: int = 1000
    base_rate: float = 3e-3
    base_batch: int = 24
    train_scenes: int = 2000
    test_scenes: int = 400
    steps: int = 300
    batch_size: int = 16
    rate: float = 3e-3
    gate_rate: float = 0.1
    rank: int = 16


QUICK = Size(base_scenes=40, base_steps=2, base_batch=4, train_scenes=12, test_scenes=6, steps=2, batch_size=4)


def write_data(work: Path, size: Size) -> None:
    """Pictures, rows, and maps: the scenes' own, another scene's, and with their tokens' places mixed."""
    state = random.Random(0)
    for folder in ("images", "maps", "permuted"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    shown = [draw(state, turn) for turn in range(size.base_scenes)]
    save_pictures(work, "base", shown)
    rows = [row(f"base-{at}", f"base-{at}", shown_questions(scene, state)) for at, scene in enumerate(shown)]
    held_out = size.base_scenes // 20
    write_rows(work / "base.json", rows[held_out:])
    write_rows(work / "sight.json", [one for whole in rows[:held_out] for one in single(whole)])
    pairs_of_maps = [
        pair
        for split, count in (("train", size.train_scenes), ("test", size.test_scenes))
        for pair in write_split(work, split, [draw(state, turn) for turn in range(count)], state)
    ]
    lines = ["image_path,depth_path", *(f"{image},maps/{other}" for image, other in pairs_of_maps)]
    (work / "shuffled.csv").write_text("\n".join(lines) + "\n")


def write_split(work: Path, split: str, scenes: Sequence[Scene], state: random.Random) -> list[tuple[str, str]]:
    """Pictures, maps and questions about depth; which image gets which other one's map where they are shuffled."""
    save_pictures(work, split, scenes)
    names = [f"{split}-{number}" for number in range(len(scenes))]
    rows = []
    for name, scene in zip(names, scenes, strict=True):
        values = distances(scene)
        Image.fromarray(values).save(work / "maps" / f"{name}.png")
        Image.fromarray(mixed(values, state)).save(work / "permuted" / f"{name}.png")
        asked = [nearer(*pair) for pair in pairs(scene, state)]
        rows += [row(f"{name}-{which}", name, [question]) for which, question in enumerate(asked)]
    write_rows(work / f"{split}.json", rows)
    write_rows(work / f"{split}-blind.json", [without_image(one) for one in rows])
    others = derangement(len(names), torch.Generator().manual_seed(0))
    return [(f"{name}.png", f"{names[other]}.png") for name, other in zip(names, others, strict=True)]


def save_pictures(work: Path, split: str, scenes: Iterable[Scene]) -> None:
    for number, scene in enumerate(scenes):
        picture(scene).save(work / "images" / f"{split}-{number}.png")


def shown_questions(scene: Scene, state: random.Random) -> list[Question]:
    """What the base learns of a scene: nothing of depth."""
    if state.random() < CAPTIONS:
        return [caption(scene, state)]
    asked = [question for pair in pairs(scene, state) for question in visible(*pair)]
    return state.sample(asked, min(4, len(asked)))


def mixed(values: NDArray[np.uint16], state: random.Random) -> NDArray[np.uint16]:
    """The tokens' parts of a map in another order: 4 × 4 squares."""
    side = len(values) // 4
    squares = values.reshape(4, side, 4, side).swapaxes(1, 2).reshape(16, side, side)
    order = state.sample(range(16), 16)
    return squares[order].reshape(4, 4, side, side).swapaxes(1, 2).reshape(values.shape)


def row(name: str, image: str, asked: Sequence[Question]) -> dict[str, Any]:
    """One picture and what is asked about it, as a conversation."""
    turns = [
        turn
        for question in asked
        for turn in ({"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer})
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": name, "image": f"{image}.png", "conversations": turns}


def single(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation's questions one by one, each as the first."""
    said = [turn["value"].removeprefix("<image>\n") for turn in whole["conversations"]]
    image = whole["image"].removesuffix(".png")
    asked = [Question(text, answer) for text, answer in zip(said[::2], said[1::2], strict=True)]
    return [row(f"{whole['id']}-{number}", image, [question]) for number, question in enumerate(asked)]


def without_image(one: dict[str, Any]) -> dict[str, Any]:
    question, answer = one["conversations"]
    text = {**question, "value": question["value"].removeprefix("<image>\n")}
    return {"id": one["id"], "conversations": [text, answer]}


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text(json.dumps(rows))


def make_base(work: Path, size: Size) -> None:
    """A small SmolVLM, trained in full by `rankwise finetune` on what pictures show."""
    random_folder = work / "random"
    random_folder.mkdir(exist_ok=True)
    read = [one for name in ("base", "train") for one in read_rows(work, name)[:1500]]
    texts = [turn["value"].removeprefix("<image>\n") for one in read for turn in one["conversations"]]
    tokenizer = save_vision_tokenizer(random_folder, texts, VOCABULARY)
    model = smaller(random_smolvlm(tokenizer, 0))
    model.save_pretrained(random_folder)
    vision_processor(tokenizer).save_pretrained(random_folder)
    told = f"""finetune --model_name {random_folder} --data_path {work / "base.json"} --image_folder {work / "images"}
        --subset_ratio 1 --max_samples 1000000 --full language,vision,projector --save checkpoints
        --learning_rate {size.base_rate} --batch_size {size.base_batch} --gradient_accumulation 1 --use_cpu
        --max_steps {size.base_steps} --lr_scheduler_type cosine --warmup_steps 50 --logging_steps 100
        --save_strategy no -o {work / "finetune"}"""
    run_command(told.split())
    vision_processor(tokenizer).save_pretrained(work / "finetune" / "finetuned")
    (work / "finetune" / "finetuned").rename(work / "base")


def read_rows(work: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((work / f"{name}.json").read_text())
    return rows


def smaller(model: SmolVLMForConditionalGeneration) -> SmolVLMForConditionalGeneration:
    """The vision demo's model at a fifth of its size."""
    config, generation = model.config, model.generation_config
    for part, sizes in ((config.text_config, TEXT), (config.vision_config, VISION)):
        for name, value in {**sizes, **RANGE}.items():
            setattr(part, name, value)
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(config)
    model.generation_config = generation
    return model


def run_command(words: Sequence[str]) -> None:
    """A command of rankwise in this process; what it says is shown only if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(list(words))
    if code:
        sys.exit(f"{said.getvalue()}\nrankwise {' '.join(words)}: exit {code}")
