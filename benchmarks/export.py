"""Exporting to GGUF: time and memory of `rankwise export`, verified and not, against llama.cpp's bare converter.

    rankwise export --install-converter
    python benchmarks/export.py [--layers 12] [--repeats 3] [--out benchmarks/results]

A random Llama (bfloat16, about 0.1 B parameters at 12 layers) and a base that differs from it in two projections of
every layer. Every contender writes f16 and q8_0, in processes of its own, by turns. The bare converter runs twice, as
a script would have it; peak memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
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
from transformers import LlamaConfig, LlamaForCausalLM
from workload import command, machine

from rankwise.gguf.converter import Converter, converter_environment, find_converter
from rankwise.gguf.reading import read_export
from rankwise.models.tiny import save_tokenizer

TEXTS = ("The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30.", "Alimentum is in the city.")
OUTTYPES = ("f16", "q8_0")
VOCABULARY = 32_000
BARE, PLAIN, PROVEN = "convert_hf_to_gguf.py, twice", "rankwise export --no_verify", "rankwise export"
Run = tuple[float, float]  # seconds, peak resident MiB


def write_models(folder: Path, layers: int) -> tuple[Path, Path]:
    """(base, tuned)."""
    base, tuned = folder / "base", folder / "tuned"
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 12}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, tie_word_embeddings=True)).bfloat16()
    for place in (base, tuned):
        model.save_pretrained(place)
        save_tokenizer(place, TEXTS, 360)
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
                weight.data += 0.01 * torch.randn_like(weight)
    return base, tuned


def measured(line: list[str], environment: dict[str, str]) -> Run:
    """Of a process and those that it started."""
    started = time.perf_counter()
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max([peak, *(resident(pid) for pid in family(process.pid))])
        time.sleep(0.02)
    assert process.returncode == 0, line
    return time.perf_counter() - started, peak / 1024


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(int(child) for child in children)]


def resident(pid: int) -> int:
    """KiB of anonymous memory: mapped weight files do not count."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in status.splitlines() if row.startswith("RssAnon")), 0)


def bare(converter: Converter, tuned: Path, out: Path) -> Run:
    runs = []
    out.mkdir(exist_ok=True)
    for outtype in OUTTYPES:
        options = [str(tuned), "--outtype", outtype, "--outfile", str(out / f"{outtype}.gguf")]
        script = [sys.executable, str(converter.folder / "convert_hf_to_gguf.py"), *options]
        runs.append(measured(script, converter_environment(converter.folder)))
    return sum(seconds for seconds, _ in runs), max(peak for _, peak in runs)


def ours(base: Path, tuned: Path, out: Path, *more: str) -> Run:
    words = ["export", str(tuned), "-o", str(out), "--outtype", ",".join(OUTTYPES), "--base_model", str(base), *more]
    return measured([sys.executable, "-m", "rankwise.cli", *words], dict(os.environ))


def bench(folder: Path, layers: int, repeats: int) -> dict[str, Any]:
    converter, (base, tuned) = find_converter(), write_models(folder, layers)
    contenders: dict[str, Callable[[], Run]] = {
        BARE: lambda: bare(converter, tuned, folder / "bare"),
        PLAIN: lambda: ours(base, tuned, folder / "plain", "--no_verify"),
        PROVEN: lambda: ours(base, tuned, folder / "proven"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            runs[name].append(run())
            print(f"{name}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1]:.0f} MiB", flush=True)
    content = read_export(folder / "proven").content
    proof = content["verification"]
    return {
        "parameters": sum(weight.numel() for weight in LlamaForCausalLM.from_pretrained(tuned).parameters()),
        "converter": content["converter"],
        "bytes": {outtype: content["files"][outtype]["bytes"]["text"] for outtype in OUTTYPES},
        "tensors": sum(proof["checkpoint"]["tensors"].values()),
        "largest_rms": {outtype: proof["errors"][outtype]["text"]["largest_rms"] for outtype in OUTTYPES},
        "least_tuning_kept": {name: one["least_kept"] for name, one in proof["tuned"].items()},
        "contenders": {
            name: {"seconds": statistics.median(s for s, _ in found), "MiB": statistics.median(m for _, m in found)}
            for name, found in runs.items()
        },
    }


def report(found: dict[str, Any], repeats: int) -> str:
    rows = found["contenders"]
    sizes = ", ".join(f"{outtype} {size / 1e6:.0f} MB" for outtype, size in found["bytes"].items())
    errors = ", ".join(f"{outtype} {error:.1e}" for outtype, error in found["largest_rms"].items())
    kept = ", ".join(f"{name} {least:.2%}" for name, least in found["least_tuning_kept"].items())
    lines = [
        "# Exporting to GGUF",
        "",
        f"{date.today()} · {machine()} · converter of llama-cpp-python {found['converter']['version']} · random Llama "
        f"of {found['parameters'] / 1e6:.0f} M parameters in bfloat16 ({sizes}) · medians of {repeats} · `{command()}`",
        "",
        "| f16 and q8_0 | s | peak RssAnon, MiB | time ÷ bare |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {row['seconds']:.1f} | {row['MiB']:.0f} | {row['seconds'] / rows[BARE]['seconds']:.2f} |"
            for name, row in rows.items()
        ),
        "",
        "`rankwise export` converts a third file, float32, and compares every tensor of the other two with it and it "
        "with the checkpoint; all files come from one process of the converter.",
        "",
        f"{found['tensors']} tensors. Largest relative rms error of a tensor: {errors}. Least share of a tensor's "
        f"tuning that is kept: {kept}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = bench(Path(folder), given.layers, given.repeats)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "export.json").write_text(json.dumps(found, indent=2) + "\n")
    (given.out / "export.md").write_text(report(found, given.repeats))
    print(report(found, given.repeats))


if __name__ == "__main__":
    main()
