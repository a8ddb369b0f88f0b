"""The tiny mixtures of `experts.py`, tuned and converted by llama.cpp's own converter, all in one process of it.

    folder/gpt_oss/base ── tuned ──▶ folder/gpt_oss/model ── converted ──▶ folder/gpt_oss/export/model-f32.gguf …

Their tokenizer is byte-level: a copy of the converter is told, as its maintainers tell it, which pre-tokenizer it has.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import experts
import torch
from exported import installed_converter
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE
from transformers import AutoTokenizer

from rankwise.gguf.converter import DRIVER, Converter, own_converter
from rankwise.gguf.plan import plan_export
from rankwise.gguf.view import model_view
from rankwise.options.commands import ExportConfig

OUTTYPES = ("f32", "f16", "q8_0")
# What llama.cpp takes for granted: OLMoE's norm of all keys, where Llama 4's experts and its full attention are.
SETTINGS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},
    "llama4_text": {
        "num_hidden_layers": 4,
        "moe_layers": [1, 3],
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8192,
    },
}
MORE = {
    "qwen2_moe": lambda inner: experts.qwen3_moe(inner) | {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 96,
        "head_dim": 16,
    },
    "granitemoeshared": lambda inner: experts.granitemoe(inner) | {"shared_intermediate_size": 40},
}  # fmt: skip
SQUARE = {"gpt_oss": "gpt_oss, 2I = H", "llama4_text": "llama4_text, 2I = H"}  # shapes do not tell what is transposed

UNDECIDED = "mixtral, near ties"


def exported_mixtures(folder: Path) -> None:
    """Every family, and with 2I = H those that store (in, out)."""
    folder.mkdir(parents=True)
    for family in (*experts.FAMILIES, *MORE):
        mixture(family, folder / family)
    for family, name in SQUARE.items():
        mixture(family, folder / name, inner=experts.HIDDEN // 2)
    undecided(mixture("mixtral", folder / UNDECIDED))
    places = sorted(place for place in folder.iterdir() if place.is_dir())
    converter = taught(installed_converter(), places[0] / "model", folder / "converter")
    with ExitStack() as views:
        lines, files = [], []
        for place in places:
            plan = plan_export(ExportConfig(model=str(place / "model"), outtype=list(OUTTYPES)), converter)
            view = views.enter_context(model_view(plan.model, plan.changes, plan.name))
            (place / "export").mkdir()
            for form in OUTTYPES:
                files.append(place / "export" / plan.file(form))
                lines.append([str(view), "--model-name", "model", "--outtype", form, "--outfile", str(files[-1])])
        converter._run(["-c", DRIVER, json.dumps(lines)], files, str(folder))


def mixture(family: str, folder: Path, **settings: Any) -> Path:
    """`folder`/base, and `folder`/model with a small change of some experts' matrices and of the queries'."""
    settings = SETTINGS.get(family, {}) | settings
    with patch.dict(experts.FAMILIES, MORE):
        base = experts.saved(family, folder / "base", tokenizer={"chat_template": CHAT_TEMPLATE}, **settings)
    model = Path(shutil.copytree(base, folder / "model"))
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key, weight in weights.items():
        if "q_proj" in key or ("experts" in key and weight.dim() > 1) or "input_linear" in key or "correction" in key:
            weights[key] = weight + 0.01 * torch.randn(weight.shape, generator=generator)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def undecided(model: Path) -> None:
    """Two experts of the last layer have the same router row, up to float32's rounding: which of them a token that
    wants one goes to is anybody's choice."""
    weights = load_file(model / "model.safetensors")
    row = weights[f"model.layers.{experts.LAYERS - 1}.block_sparse_moe.gate.weight"]
    row[1] = row[0] * (1 + 2**-23)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def taught(converter: Converter, model: Path, folder: Path) -> Converter:
    """A copy of the converter that knows the byte-level tokenizer of `model`."""
    shutil.copytree(converter.folder, folder)
    file = folder / "conversion" / "base.py"
    source = file.read_text(encoding="utf-8")
    asked = re.search(r"chktxt = ('.*')\n", source)
    assert asked
    ids = AutoTokenizer.from_pretrained(model).encode(eval(asked[1]))  # the converter's own probing text
    known = hashlib.sha256(str(ids).encode()).hexdigest()
    told = f'        res = None\n        if chkhsh == "{known}":\n            res = "gpt-2"\n'
    file.write_text(source.replace("        res = None\n", told, 1), encoding="utf-8")
    return own_converter(folder, "the test's")
