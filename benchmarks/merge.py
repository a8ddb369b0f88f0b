"""Merging an adapter: time and peak memory of `rankwise merge` against PEFT's merge_and_unload + save_pretrained.

    python benchmarks/merge.py [--layers 20] [--repeats 3] [--out benchmarks/results]

A random Llama (bfloat16, about 0.4 B parameters at 20 layers) in several shards, and a random adapter at all seven
projections. Every contender runs in a process of its own, by turns; peak RssAnon (anonymous memory: mapped weight files
do not count) is polled. The rows of imports are processes that import the same libraries and end: what they take is in
every figure of their side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from workload import command, machine

from rankwise.files.adapter import LoraAdapter, LoraPair, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.files.checkpoint import Checkpoint, open_checkpoint

HIDDEN, MLP, VOCABULARY, RANK = 1024, 4096, 32_000, 16
SHARD = "200MB"
PROJECTIONS = {
    **dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (MLP, HIDDEN)),
    "mlp.down_proj": (HIDDEN, MLP),
}


def write_base(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    return folder


def write_factors(folder: Path, base: Path, layers: int) -> Path:
    """Factors whose change is a few percent of the weights, as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    pairs = {
        f"model.layers.{layer}.{name}": LoraPair(
            0.02 * torch.randn(RANK, shape[1], generator=generator),
            0.02 * torch.randn(shape[0], RANK, generator=generator),
            2.0,
        )
        for layer in range(layers)
        for name, shape in PROJECTIONS.items()
    }
    folder.mkdir()
    write_adapter(folder, LoraAdapter(lora_config(str(base), dropout=0.0), pairs))
    return folder


def by_peft(base: str, adapter: str, out: str, dtype: torch.dtype) -> None:
    """What a script does: load, merge, save; in float32, rounded to the base's precision at the end."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(out, max_shard_size=SHARD)


CONTENDERS: dict[str, Callable[[str, str, str], Any]] = {
    "imports, PEFT": lambda *_: None,
    "PEFT, bfloat16": lambda base, adapter, out: by_peft(base, adapter, out, torch.bfloat16),
    "PEFT, float32": lambda base, adapter, out: by_peft(base, adapter, out, torch.float32),
}
OURS = {
    "rankwise merge --no_verify": ["--no_verify"],
    "rankwise merge": [],
    "rankwise merge, layer by layer": ["--max_memory", "300MB"],
}
IMPORTS, OWN_IMPORTS = "imports, PEFT", "imports, rankwise"


def words(name: str, base: Path, adapter: Path, out: Path) -> list[str]:
    if name == OWN_IMPORTS:
        return [sys.executable, "-c", "import rankwise.cli, rankwise.merge.command"]
    if name in OURS:
        more = ["--max_shard_size", SHARD, *OURS[name]]
        return [
            sys.executable,
            "-m",
            "rankwise.cli",
            "merge",
            str(adapter),
            "--base_model",
            str(base),
            "-o",
            str(out),
            *more,
        ]
    return [sys.executable, __file__, "--contender", name, str(base), str(adapter), str(out)]


def measured(line: list[str]) -> tuple[float, float]:
    """(seconds, peak RssAnon in MiB) of a process."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(row.split()[1]) for row in status.splitlines() if row.startswith("RssAnon"))])
        time.sleep(0.005)
    assert process.wait() == 0, line
    return time.perf_counter() - started, peak / 1024


def distance(one: Checkpoint, other: Checkpoint, base: Checkpoint) -> float:
    """‖difference‖ / ‖change‖ of two merged models, over all their weights."""
    apart = sum(float((one.tensor(key).float() - other.tensor(key).float()).square().sum()) for key in base)
    change = sum(float((other.tensor(key).float() - base.tensor(key).float()).square().sum()) for key in base)
    return (apart / change) ** 0.5


def bench(folder: Path, layers: int, repeats: int) -> dict[str, Any]:
    base = write_base(folder / "base", layers)
    adapter = write_factors(folder / "adapter", base, layers)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*CONTENDERS, OWN_IMPORTS, *OURS)}
    for _ in range(repeats):
        for name in runs:
            runs[name].append(measured(words(name, base, adapter, folder / name.replace(" ", "_"))))
            print(f"{name}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1]:.0f} MiB", flush=True)
    start = open_checkpoint(base)
    largest = max(file.stat().st_size for file in start.files) / 2**20
    ours = open_checkpoint(folder / "rankwise_merge_--no_verify")
    return {
        "parameters": sum(torch.Size(start.shape(key)).numel() for key in start),
        "largest_shard_MiB": largest,
        "adapter_MiB": (adapter / "adapter_model.safetensors").stat().st_size / 2**20,
        "contenders": {
            name: {"seconds": statistics.median(s for s, _ in found), "MiB": statistics.median(m for _, m in found)}
            for name, found in runs.items()
        },
        "off": {
            name: distance(ours, open_checkpoint(folder / name.replace(" ", "_")), start)
            for name in ("PEFT, bfloat16", "PEFT, float32")
        },
    }


def report(found: dict[str, Any], repeats: int) -> str:
    rows = found["contenders"]
    above = {
        name: row["MiB"] - rows[OWN_IMPORTS if "rankwise" in name else IMPORTS]["MiB"] for name, row in rows.items()
    }
    own = "rankwise merge --no_verify"
    lines = [
        "# Merging an adapter",
        "",
        f"{date.today()} · {machine()} · random Llama of {found['parameters'] / 1e6:.0f} M parameters in bfloat16, "
        f"shards of at most {found['largest_shard_MiB']:.0f} MiB, adapter of {found['adapter_MiB']:.0f} MiB · "
        f"medians of {repeats} · `{command()}`",
        "",
        "| | s | peak RssAnon, MiB | above imports, MiB | time ÷ ours | memory above imports ÷ ours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        ratio, share = row["seconds"] / rows[own]["seconds"], above[name] / max(1.0, above[own])
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {row['MiB']:.0f} | {above[name]:.0f} | {ratio:.2f} | {share:.2f} |"
        )
    limit = found["largest_shard_MiB"] + found["adapter_MiB"]
    apart = ", ".join(f"{name}: {value:.1e}" for name, value in found["off"].items())
    lines += [
        "",
        "Ours is `rankwise merge --no_verify`, which does what PEFT's rows do; the rows below it also prove the "
        f"result. Its limit, the largest shard and the adapter, is {limit:.0f} MiB above the imports.",
        "",
        f"Distance of PEFT's merged weights from ours, as a share of what the adapter changes: {apart}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--contender", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, *places = options.contender
        CONTENDERS[name](*places)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = bench(Path(folder), options.layers, options.repeats)
    text = report(found, options.repeats)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "merge.md").write_text(text)
    (options.out / "merge.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
