"""What the documents' command lines find where they run: models and data under the documented names, all tiny.

made(folder) builds it once; `shrunk(line)` is the line with steps, epochs and lengths for a test, nothing else changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported
import torch
from documented import Line
from PIL import Image
from test_input_law import e2e, samsum
from tiny import tiny_llama
from tiny_depth import tiny_estimator
from tiny_isaac import tiny_isaac
from tiny_vision import tiny_qwen25vl

from rankwise.demo.restaurants import write_task

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
ELEMENTS = {"water": (30, 90, 180), "wood": (45, 110, 45), "fire": (225, 50, 20)}
GUIDE = {  # the config file of the depth guide, as it stands there
    "model_path": "./isaac_model",
    "data_path": "./data/train.json",
    "image_folder": "./data/images",
    "output_dir": "./checkpoints/isaac-lora",
    "use_depth": True,
    "depth_checkpoint_path": "./depth_anything_v2_vitl.pth",
    "lora_r": 128,
    "lora_alpha": 256,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-4,
    "fp16": True,
    "save_steps": 500,
    "logging_steps": 10,
}


def made(folder: Path) -> Path:
    tiny_llama(folder / TINYLLAMA)
    tiny_llama(folder / "runs" / "demo" / "base")
    demo = folder / "runs" / "demo" / "data"
    demo.mkdir()
    for name, count in (("trainset", 120), ("devset", 30)):
        drawn = random.Random(count)
        write_task(demo / f"{name}.csv", drawn, count=count, references=1, held_out=name == "devset")
    tiny_llama(folder / "tiny")
    for name in ("Qwen2.5-VL-7B", "Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct"):
        tiny_qwen25vl(folder / "Qwen" / name)
    for name in ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "runs/quickstart/tiny/base"):
        exported.vision_model(folder / name)
    tiny_isaac(folder / "isaac_model")
    tiny_estimator(folder / "depth_anything_v2_vitl.pth")  # a folder does as well as the file
    for name, rows in {"e2e_nlg": e2e, "samsum": samsum, "wikisql": wikisql}.items():
        (folder / "data" / name).mkdir(parents=True)
        rows(folder / "data" / name)
    questions(folder / "data")
    coco(folder / "coco")
    for number in range(12):
        name = list(ELEMENTS)[number % 3]
        picture(folder / "photos" / name / f"{number}.png", number)
        picture(folder / "images" / f"{number}.png", number)
    (folder / "config.json").write_text(json.dumps(GUIDE))
    return folder


def wikisql(folder: Path) -> None:
    """A question about each of six tables: rows of one table stay together in a split."""
    sql = {"sel": 0, "agg": 0, "conds": [[1, 0, "Ely"]]}
    for part in ("train", "dev"):
        rows = [{"table_id": f"t{number}", "question": f"Who {number}?", "sql": sql} for number in range(6)]
        tables = [
            {"id": f"t{number}", "header": ["Name", "Town"], "types": ["text", "text"], "rows": [["Vaults", "Ely"]]}
            for number in range(6)
        ]
        for name, content in ((part, rows), (f"{part}.tables", tables)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def picture(file: Path, number: int) -> None:
    """Of one element's colour, none like another."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 48), list(ELEMENTS.values())[number % 3])
    image.putpixel((0, 0), (number, 255, 255))
    image.save(file)


def questions(folder: Path) -> None:
    """CoTA rows that are conversations too: the documents have one `train.json` for both."""
    rows: list[dict[str, Any]] = []
    for number in range(8):
        for place in (folder, folder / "images"):
            picture(place / f"{number}.png", number)
        rows.append(
            {
                "id": str(number),
                "task_type": "colour",
                "image": f"{number}.png",
                "question": "What is near[Café Adriatic]?",
                "chain_of_thought": ["A pub."],
                "actions": [{"action": "look", "params": {}}],
                "answer": "The Vaults",
            }
        )
    turns = [{"from": "human", "value": "<image>\nWhich pub?"}, {"from": "gpt", "value": "The Vaults."}]
    for name in ("cota_train", "cota_test"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "train.json").write_text(json.dumps([row | {"conversations": turns} for row in rows]))


def coco(folder: Path) -> None:
    """COCO val2017 in its official layout, with twelve images."""
    for number in range(1, 13):
        picture(folder / "val2017" / f"{number:012d}.jpg", number)
    listed = {
        "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(1, 13)],
        "annotations": [{"image_id": number, "category_id": 1, "area": 9.0} for number in range(1, 13)],
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(listed))


# --- the lines, shorter ----------------------------------------------------------------------------------------------


def shrunk(line: Line) -> tuple[list[str], dict[str, str]]:
    """(words, variables). Flags that come last count."""
    words, command = list(line.words), line.words[0]
    more = SHORTER.get(command, lambda _: [])(words)
    short = {"MAX_NEW_TOKENS": "4", "MAX_STEPS": "3"} if command in ("run", "batch") else {}
    return [*words, *more], line.variables | short


def shorter_advice(_: list[str]) -> list[str]:
    return "--minutes 0.01 --steps 8 --batch_size 4 --choose_size 20 --confirm_size 20 --no_plots".split()


def shorter_training(words: list[str]) -> list[str]:
    more = ["--no_plots"] + ["--max_steps", "3"] * ("finetune_smolvlm.yaml" not in words)
    if "--phase1_end" in words:
        more += ["--phase1_end", "1", "--phase2_end", "2"]
    if "--schedule" in words:
        more += ["--schedule", "layers 0-0:1 > layers 1-1"]  # of two layers
    return more if torch.cuda.is_available() else [*more, "--fp16", "false"]


def shorter_recipes(words: list[str]) -> list[str]:
    """Of the presets: evaluations and phases within three steps."""
    presets = [word for word in words if word.startswith(("e2e_", "samsum_"))]
    settings = ["train.eval_steps=3", "train.save_steps=3", "train.batch_size=2", "train.no_plots=true"]
    settings += ["evaluate.max_new_tokens=4"]
    if "samsum_phased" in presets:
        settings += ["train.phase1_end=1", "train.phase2_end=2"]
    if "isaac_depth" in words and not torch.cuda.is_available():
        settings = ["train.fp16=false"]
    if "recipes/svd_ranks.yaml" in words:
        settings = [
            "finetune.subset_ratio=1",
            "finetune.gradient_accumulation=1",
            "ranks.no_plots=true",
            "train.no_plots=true",
        ]
    if words[0] == "batch":
        settings.append("train.max_steps=3")
    chosen = settings if presets or {"isaac_depth", "recipes/svd_ranks.yaml"} & set(words) else []
    return [word for setting in chosen for word in ("--set", setting)]


def shorter_features(words: list[str]) -> list[str]:
    if words[1] == "train":
        allocator = ["--allocator_init_warmup", "1", "--allocator_final_warmup", "1", "--allocator_mask_interval", "1"]
        return ["--epochs", "2", "--rank", "4", *(allocator if "--use_rank_allocator" in words else [])]
    return ["--rank", "4"] if words[1] in ("compare", "show") else []


SHORTER: dict[str, Callable[[list[str]], list[str]]] = {
    "advise": shorter_advice,
    "finetune": lambda _: ["--subset_ratio", "1", "--gradient_accumulation", "1"],  # more updates than that of rate 0
    "train": shorter_training,
    "run": shorter_recipes,
    "batch": shorter_recipes,
    "features": shorter_features,
    "evaluate": lambda _: ["--max_new_tokens", "4"],
    "ranks": lambda _: ["--no-plots"],
    "validate": lambda _: ["--parity_samples", "4", "--threads", "1"],
}
