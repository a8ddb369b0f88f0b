"""How far is the memory that `rankwise advise` expects of a short run from what one takes?

    python benchmarks/footprint.py MODEL|mixture [MODEL …] [--lengths 64,192 --batches 1,4 --learnt 0.25,1 --rank 16]

Each case trains one run alone, as `advise` does first: rows of one length of random ids, of which the last ones are
learnt. `mixture` and `mixture-2-layers`: Mixtrals of random weights (46 and 45 million parameters, 8 and 24 experts)
made on the spot, whose run trains as `advise` trains it, by the Trainer. Measured is what the process holds (RssAnon;
on a GPU what torch's allocator has given out) at its highest, above what it held with the model loaded; estimated are
adapter, optimizer and activations. Below the table stand the constants that fit all cases best, by relative error.
Models of earlier runs keep their rows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from estimate import ALLOCATOR, Peak
from transformers import MixtralConfig
from workload import command, machine

from rankwise.data.dataset import Collator
from rankwise.data.render import IGNORED
from rankwise.models.load import load_model, load_structure, new_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites
from rankwise.options.sections import ModelSection
from rankwise.study import footprint
from rankwise.train.together.alone import train_alone
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.starts import SCALE, random_start, row_order
from rankwise.train.together.train import Arm, train_together

MIB = 2**20
NAMES = ("kept", "logits")  # parts of the activations, and the constants that they are proportional to


def rows_of(count: int, length: int, learnt: int, vocabulary: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": [IGNORED] * (length - learnt) + row[length - learnt :]} for row in ids]


MIXTURES = {
    "mixture": {"num_hidden_layers": 6, "num_local_experts": 8},
    "mixture-2-layers": {"num_hidden_layers": 2, "num_local_experts": 24},
}


def place_of(name: str, folder: Path) -> str:
    """The folder of a model; a mixture is made there."""
    if name not in MIXTURES:
        return name
    sizes = {"hidden_size": 384, "intermediate_size": 768, "vocab_size": 2048, "num_experts_per_tok": 2}
    config = MixtralConfig(num_attention_heads=6, num_key_value_heads=6, **sizes, **MIXTURES[name])
    torch.manual_seed(0)
    new_model(config, dtype=torch.float32).save_pretrained(folder / name)
    return str(folder / name)


def measured(name: str, rank: int, cases: Sequence[Sequence[int]], steps: int) -> list[int]:
    """One run of each case in this process: bytes at its highest above what the process held with the model loaded."""
    model = load_model(name, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.requires_grad_(False)
    sites = choose_sites(model_sites(model)).values()
    start = random_start({site: min(rank, site.largest_rank) for site in sites}, 0, rank)
    vocabulary = model.config.get_text_config().vocab_size

    def run(length: int, batch: int, learnt: int) -> None:
        arm = Arm(start, dict.fromkeys(start, SCALE), 1e-3, row_order(batch, steps * batch, 0))
        rows = rows_of(batch, length, learnt, vocabulary)
        if any(site.experts for site in sites):
            train_alone(model, arm, None, rows, Collator(0), ArmSettings(steps, batch))
        else:
            train_together(model, [arm], rows, Collator(0), ArmSettings(steps, batch), at_once=1)

    run(8, 1, 4)  # imports and pools are not the run's
    peaks = []
    for case in cases:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:  # or what earlier cases have freed would hide what this one takes
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        peak = Peak()
        peak.start()
        run(*case)
        peaks.append(peak.stop())
    return peaks


def child(name: str, options: argparse.Namespace, cases: Sequence[Sequence[int]]) -> list[int]:
    words = [name, "--rank", str(options.rank), "--steps", str(options.steps), "--cases", json.dumps(cases)]
    line = [sys.executable, __file__, *words]
    done = subprocess.run(line, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def compared(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    skeleton = load_structure(ModelSection(model_name=name), name)
    text, sites = skeleton.config.get_text_config(), choose_sites(model_sites(skeleton)).values()
    grid = product(options.lengths, options.batches, options.learnt)
    cases = [(length, batch, max(1, int(length * share))) for length, batch, share in grid]
    found, place = [], Path(name)
    called = place.parent.name if place.name == "hf_converted" else place.name
    for (length, batch, learnt), peak in zip(cases, child(name, options, cases), strict=True):
        whole = any(site.experts for site in sites)
        told = length if whole else learnt  # a run by itself computes the logits of all tokens
        needs = footprint.footprint(skeleton, sites, options.rank, torch.float32, [length], told, batch)
        logits = footprint.LOGITS * footprint.FLOAT32 * batch * told * text.vocab_size
        row = {"model": called, "length": length, "batch": batch, "learnt": learnt, "arm": needs.arm}
        row |= {"logits": logits, "kept": needs.activations - logits, "estimated": needs.run, "measured": peak}
        found.append(row)
        print(line_of(row), flush=True)
    return found


def line_of(row: dict[str, Any]) -> str:
    sizes = (
        f"{row['estimated'] / MIB:,.1f} | {row['measured'] / MIB:,.1f} | {row['estimated'] / row['measured'] - 1:+.0%}"
    )
    return f"| {row['model']} | {row['length']} | {row['batch']} | {row['learnt']} | {sizes} |"


def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Constants that bring the estimates nearest to what was measured."""
    now = np.array([footprint.KEPT, footprint.LOGITS])
    parts = np.array([[row[name] / row["measured"] for name in NAMES] for row in rows])
    rest = np.array([1 - row["arm"] / row["measured"] for row in rows])
    factors = np.linalg.lstsq(parts, rest, rcond=None)[0]
    return dict(zip(NAMES, (now * factors).tolist(), strict=True))


def main() -> None:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", help="folders or hub ids")
    parser.add_argument("--lengths", type=numbers(int), default=[64, 192], help="tokens of a row")
    parser.add_argument("--batches", type=numbers(int), default=[1, 4], help="rows of a step")
    parser.add_argument("--learnt", type=numbers(float), default=[0.25, 1.0], help="shares of a row that are learnt")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cases", type=json.loads, help="[[length, batch, learnt], …], in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.cases:
        print(json.dumps(measured(options.models[0], options.rank, options.cases, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in options.models for row in compared(place_of(name, Path(folder)), options)]
    table, made = options.out / "footprint.json", {row["model"] for row in rows}
    before = json.loads(table.read_text()) if table.is_file() else []
    rows = [row for row in before if row["model"] not in made] + rows
    off = [row["estimated"] / row["measured"] - 1 for row in rows]
    best = fitted(rows)
    lines = [
        "# Memory of a short run of advise",
        "",
        f"{date.today()} · {machine()} · rank {options.rank} at every matrix, float32 · `{command()}`",
        "",
        "| model | tokens | rows | learnt | estimated MiB | measured MiB | off by |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *map(line_of, rows),
        "",
        f"Off by {min(off):+.0%} to {max(off):+.0%}, median {np.median(off):+.0%}. Constants: {footprint.KEPT} bytes,"
        f" {footprint.LOGITS} copies of the logits; these cases fit {best['kept']:.0f} and {best['logits']:.1f} best.",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "footprint.md").write_text("\n".join(lines) + "\n")
    table.write_text(json.dumps(rows, indent=1))
    print("\n".join(lines[-1:]))


if __name__ == "__main__":
    main()
