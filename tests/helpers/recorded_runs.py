"""Tiny trained artefacts for the tests of input.json, made by the commands; and what any command asks a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, tiny_llama

from rankwise import cli
from rankwise.data.example import Example
from rankwise.data.render import Rendered, Renderer
from rankwise.files.adapter import INPUT as FILE
from rankwise.files.atomic import read_object, write_json

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<|", "[").replace("|>", "]")
THINKING = "{{ strftime_now('%d %m %Y') }}" + CHAT_TEMPLATE.replace(
    "<|assistant|>\n{% endif %}", "<|assistant|>\n{% if not thinking %}(no){% endif %}{% endif %}"
)
FAST = "--use_cpu --max_steps 2 --val_fraction 0 --no_plots --log_frequency 0 --save_strategy no".split()
ASK = "--device cpu --max_new_tokens 2 --num_samples 2".split()


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


def train(base: Path, out: Path, *more: Any) -> Path:
    assert run("train", "--model_name", base, "-o", out, *FAST, *more) == 0
    return out


def evaluate(model: Path, *more: Any) -> int:
    return run("evaluate", model, *ASK, *more)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(number: int, system: str | None = None, length: int = 1) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    asked = {"role": "user", "content": f"near[{number}]? " + "pub " * length}
    return {"id": f"c{number}", "messages": [*turns, asked, {"role": "assistant", "content": f"Café {number}"}]}


def talks(path: Path, count: int = 6, **how: Any) -> Path:
    return jsonl(path, [conversation(number, **how) for number in range(count)])


def chat_base(folder: Path) -> Path:
    """A model with a chat template, wide enough that what it is asked decides what it says."""
    return tiny_llama(folder, tokenizer={"chat_template": CHAT_TEMPLATE}, initializer_range=0.3)


def overheard(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Sample → the ids that it was asked with last, whichever command asked."""
    found: dict[str, list[int]] = {}
    own = Renderer.prompt

    def prompt(self: Renderer, example: Example) -> Rendered:
        rendered = own(self, example)
        found[example.id] = rendered.input_ids
        return rendered

    monkeypatch.setattr(Renderer, "prompt", prompt)
    return found


def trained_prompts(renderer: Renderer, examples: Any) -> dict[str, list[int]]:
    """Ids before the answer of whole training samples."""
    found = {}
    for example in examples:
        whole = renderer.training(example)
        found[example.id] = whole.input_ids[: max(place for place, label in enumerate(whole.labels) if label < 0) + 1]
    return found


def edited(folder: Path, **changes: Any) -> Path:
    write_json(folder / FILE, read_object(folder / FILE) | changes)
    return folder


def exported_by_hand(merged: Path, folder: Path) -> Path:
    """An export folder without a converter: what `validate` reads of one before it starts llama.cpp."""
    folder.mkdir()
    (folder / "model-f16.gguf").write_bytes(b"GGUF")
    files = {"f16": {"text": "model-f16.gguf", "mmproj": None}}
    write_json(folder / "export.json", {"format": "rankwise-export/1", "files": files, "model": {"path": str(merged)}})
    shutil.copyfile(merged / FILE, folder / FILE)
    return folder
