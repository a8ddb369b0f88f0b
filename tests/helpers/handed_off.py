"""A tuned model of another trainer, its base, rows, and the cases of a hand-off: for the tests of the verdict.

scene = text_scene(folder)    # base/ (a Llama), tuned/ (an adapter by PEFT), rows.jsonl, cases/
scene = vision_scene(folder)  # the same of a SmolVLM that was tuned on both sides
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exported import TEXTS as SAID
from exported import vision_model
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tiny import CHAT_TEMPLATE, TEXTS, tiny_llama
from torch import nn

from rankwise.cli import main
from rankwise.models.adapt import quiet_peft
from rankwise.models.load import load_model, load_processor, load_tokenizer

PLACES = ("The Vaults", "Alimentum", "Cotto", "Zizzi", "Aromi", "Strada", "Bibimbap", "Clowns", "Giraffe", "Loch Fyne")
ROWS, LAYERS, RANK, ALPHA = 10, 4, 4, 16
SYSTEM = "You describe restaurants."
TEMPLATE = (  # with a system text of its own, as Qwen2.5's and SmolLM2's
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|>\n" + SYSTEM + "{{ eos_token }}\n{% endif %}"
) + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")


@dataclass(frozen=True)
class HandedOff:
    """base, tuned: folders; cases: as `--write_cases` leaves them."""

    folder: Path
    base: Path
    tuned: Path
    cases: Path
    tokenizer: Any
    processor: Any = None

    def line(self, *more: str) -> list[str]:
        words = f"validate --reference {self.tuned} --base_model {self.base} --data_path {self.folder}/rows.jsonl"
        return [*words.split(), "--device", "cpu", *more]

    def model(self, dtype: torch.dtype = torch.float32, *, base: bool = False) -> Any:
        """Tuned and merged by PEFT itself, or the base."""
        model: Any = load_model(str(self.base), torch.float32)
        if not base:
            with quiet_peft():
                model = PeftModel.from_pretrained(model, str(self.tuned)).merge_and_unload()
        return model.to(dtype).eval()

    def mixed(self, share: Callable[[str], float]) -> Any:
        """base + share(parameter)·(tuned − base)."""
        tuned, base = self.model(), dict(self.model(base=True).named_parameters())
        with torch.no_grad():
            for name, one in tuned.named_parameters():
                one.copy_(base[name] + share(name) * (one - base[name]))
        return tuned


def text_scene(folder: Path, *, add_bos: bool = False) -> HandedOff:
    """add_bos: the tokenizer puts a BOS before every text, beside the template's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {"chat_template": TEMPLATE, "vocab_size": 420, "add_bos": add_bos}
    base = tiny_llama(folder / "base", (*TEXTS, SYSTEM), num_hidden_layers=LAYERS, tokenizer=tokenizer)
    model = sharpened(load_model(str(base), torch.float32))
    model.save_pretrained(base)
    adapt(model, folder / "tuned", ["q_proj", "v_proj", "up_proj", "down_proj"])
    rows = []
    for number in range(ROWS):
        asked = f"name[{PLACES[number]}], eatType[pub], near[Café Adriatic], area[city centre {number}]"
        said = f"{PLACES[number]} is a family-friendly pub near Café Adriatic."
        rows.append([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    write_rows(folder, [{"id": f"r{number}", "messages": row} for number, row in enumerate(rows)])
    return written(HandedOff(folder, base, folder / "tuned", folder / "cases", load_tokenizer(str(base))))


def vision_scene(folder: Path) -> HandedOff:
    base = vision_model(folder / "base")
    model = sharpened(load_model(str(base), torch.float32), 2.0)
    model.save_pretrained(base)
    adapt(model, folder / "tuned", ["q_proj", "v_proj", "fc1", "down_proj"], size=0.2)
    (folder / "pictures").mkdir()
    rows = []
    for number in range(ROWS):
        picture = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
        Image.fromarray(picture).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"pictures/{number}.png")
        asked = {"role": "user", "content": f"<image>\n{SAID[3][: 38 - number]}"}
        said = {"role": "assistant", "content": "It is red."}
        rows.append({"id": f"r{number}", "images": [f"pictures/{number}.png"], "messages": [asked, said]})
    write_rows(folder, rows)
    processor = load_processor(str(base))
    return written(HandedOff(folder, base, folder / "tuned", folder / "cases", processor.tokenizer, processor))


def written(scene: HandedOff) -> HandedOff:
    assert main(scene.line("--write_cases", str(scene.cases))) == 0
    return scene


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def sharpened(model: Any, by: float = 30.0) -> Any:
    """Random weights find all tokens alike; a larger head makes some likely."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(by)
    return model


def adapt(model: Any, folder: Path, targets: list[str], seed: int = 0, size: float = 0.04) -> None:
    """An adapter as PEFT's own users save one, moved off its start."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type=None)
    with quiet_peft():
        adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)


def in_two_bits(model: nn.Module) -> nn.Module:
    """Four levels between the least and the largest of 16 neighbours: as GPTQ's format has it, not as ours."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.shape[-1] % 16 == 0:
                blocks = parameter.reshape(*parameter.shape[:-1], -1, 16)
                low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
                step = (high - low).clamp_min(1e-12) / 3
                parameter.copy_((((blocks - low) / step).round() * step + low).reshape(parameter.shape))
    return model
