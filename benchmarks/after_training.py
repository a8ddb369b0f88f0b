"""What an SVD still buys after training: a rank-32 adapter compressed three ways, and its intruder dimensions scaled.

    python benchmarks/after_training.py --model stories260K --data e2e_nlg --work FOLDER [--adapter DIR]
    python benchmarks/after_training.py --title "SmolLM2-135M × E2E" --model SMOLLM2 --data e2e_nlg --work FOLDER \\
        --rate 1.3e-3 --steps 50 --batch_size 4 --held_out 100
    python benchmarks/after_training.py --stage table [--out benchmarks/results]

Without --adapter a rank-32 one is trained on all linear layers (--steps of --batch_size rows). `rankwise compress`
makes every variant: at equal kept parameters by budget (energy per parameter), by one threshold on σ for all sites, by
one rank for all; then intruders scaled by λ. Held-out rows, one per prompt, drawn with a seed: loss of the answer per
item, KL(base ‖ base + adapter) of answer and prompt tokens apart. Differences are paired by item (95 %, bootstrap).
Every variant × chunk of rows is entered in a ledger below --work, so that a run that was stopped goes on. One thread.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from workload import command, machine

from rankwise import cli
from rankwise.core.site import Site
from rankwise.data.example import one_per_prompt
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.evaluate import bootstrap
from rankwise.evaluate.likelihood import BESIDE, Batch, training_batches
from rankwise.files.adapter import read_adapter
from rankwise.files.atomic import read_if_there, read_object, write_json, write_text
from rankwise.files.ledger import Ledger
from rankwise.models.load import load_config, load_model
from rankwise.models.sites import model_sites
from rankwise.options.sections import DataSection, ModelSection
from rankwise.ranks.gain import moved
from rankwise.ranks.intruders import BaseMatrices, examine

RANK, SHARES, SCALES = 32, (10, 25), (1.0, 0.75, 0.5, 0.25, 0.0)
BASE, FULL = "base", f"rank {RANK}"
WAYS = {
    "budget": ("our budget", ()),
    "sigma": ("one σ threshold", ("--metric", "sigma")),
    "uniform": ("one rank", ("--uniform",)),
}
CHUNK = 8  # rows per entry of the ledger
PARTS = ("loss", "tokens", "kl_answer", "kl_prompt", "prompt_tokens")
SEED = 42


@dataclass
class AfterTraining:
    """One model, one adapter, one data set. `title` names the results."""

    title: str
    model: str
    data: str
    work: Path
    task: str
    rate: float
    steps: int
    batch_size: int
    held_out: int
    given: str | None = None

    @cached_property
    def adapter(self) -> Path:
        """The given one, or one trained by the documented command."""
        if self.given:
            return Path(self.given)
        folder = self.place / "adapter"
        if not (folder / "adapter_model.safetensors").is_file():
            saves, rows = max(1, self.steps // 5), self.steps * self.batch_size
            resumed = "--resume_from_checkpoint true" if any(folder.glob("checkpoint-*")) else ""
            line = (
                f"train --task {self.task} --overlong drop --lora_r {RANK} --lora_dropout 0 --seed {SEED} --use_cpu "
                f"--learning_rate {self.rate:g} --max_steps {self.steps} --max_samples {rows} --val_fraction 0 "
                f"--per_device_train_batch_size {self.batch_size} --save_strategy steps --save_steps {saves} "
                f"--save_total_limit 1 --no_plots {resumed}"
            )
            run(*line.split(), "--model_name", self.model, "--data_path", self.data, "-o", str(folder))
        return folder

    @property
    def place(self) -> Path:
        """Of this adapter and these rows: other settings go elsewhere."""
        how = Path(self.given).name if self.given else f"rate{self.rate:g}-{self.steps}x{self.batch_size}"
        return self.work / f"{Path(self.model).name}-{Path(self.data).name}-{how}"

    @cached_property
    def parameters(self) -> int:
        return sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in read_adapter(self.adapter).pairs.values())

    def variants(self) -> dict[str, Path | None]:
        """Name → adapter folder, each made by `rankwise compress` where it is not there."""
        found: dict[str, Path | None] = {BASE: None, FULL: self.adapter}
        for share in SHARES:
            rank = RANK * share // 100
            budget = ("--budget", str(self.parameters * rank // RANK))
            for way, (_, how) in WAYS.items():
                found[f"{way} {share}"] = self.compressed(f"{way}-{share}", *budget, *how)
        for scale in SCALES:
            found[f"intruders {scale:g}"] = self.compressed(f"intruders-{scale:g}", "--intruders", f"{scale:g}")
        return found

    def compressed(self, name: str, *options: str) -> Path:
        folder = self.place / "variants" / name
        if not (folder / "manifest.json").is_file():
            run("compress", str(self.adapter), *options, "--base_model", self.model, "-o", str(folder))
        return folder

    @cached_property
    def batches(self) -> list[Batch]:
        data = DataSection(task=self.task, data_path=self.data, overlong="drop")
        config = load_config(self.model)
        renderer = renderer_for(data, ModelSection(model_name=self.model), self.model, config, [self.adapter])
        items = one_per_prompt(load(self.task, self.data, "dev", data))
        random.Random(SEED).shuffle(items)
        return training_batches(items[: self.held_out], renderer, CHUNK)

    def key(self, variant: str, chunk: int) -> dict[str, Any]:
        return {"variant": variant, "chunk": chunk, "rows": self.held_out}

    @property
    def trained_by(self) -> dict[str, Any]:
        return {
            "given": self.given and Path(self.given).name,
            "rate": self.rate,
            "steps": self.steps,
            "batch_size": self.batch_size,
        }

    def measure(self) -> dict[str, dict[str, Tensor]]:
        """Variant → per item what PARTS names."""
        ledger, variants = Ledger(self.place), self.variants()
        model = load_model(self.model, torch.float32).eval()
        sites = model_sites(model)
        for chunk, batch in enumerate(self.batches):
            open_ones = [name for name in variants if self.key(name, chunk) not in ledger]
            before = log_probabilities(model, batch) if open_ones else torch.empty(0)
            for name in open_ones:
                with moved(model, moves(variants[name], sites)):
                    found = per_item(before, log_probabilities(model, batch), batch)
                ledger.add([{"key": self.key(name, chunk)}], {part: found[part][None] for part in PARTS})
            print(f"{self.title}: {chunk + 1} of {len(self.batches)} chunks of {len(variants)} variants", flush=True)
        return {
            name: {
                part: torch.cat([ledger.numbers(self.key(name, chunk), part) for chunk in range(len(self.batches))])
                for part in PARTS
            }
            for name in variants
        }

    def intruders(self) -> dict[str, int]:
        """Variant → intruder dimensions of base + that adapter, counted anew; kept."""
        kept = read_if_there(self.place / "intruders.json")
        base = BaseMatrices.open(self.model)
        for name, folder in self.variants().items():
            if folder and name not in kept:
                kept[name] = examine(base, read_adapter(folder).pairs)[0].count
                write_json(self.place / "intruders.json", kept)
        return dict(kept)

    def result(self) -> dict[str, Any]:
        items, counts, variants = self.measure(), self.intruders(), self.variants()
        full = items[FULL]
        rows = {}
        for name, found in items.items():
            folder = variants[name]
            scaled = read_if_there(folder / "intruders.json") if folder else {}
            rows[name] = {
                "parameters": parameters_of(folder),
                "loss": mean(found, "loss", "tokens"),
                "over_full": contrast(found, full, "loss", "tokens"),
                "kl_answer": contrast(found, None, "kl_answer", "tokens"),
                "kl_prompt": contrast(found, None, "kl_prompt", "prompt_tokens"),
                "intruders": counts.get(name),
                "energy_kept": energy_kept(folder, scaled),
            }
        gain = rows[BASE]["loss"] - rows[FULL]["loss"]
        pairs = {
            f"{one} − {other}, {share} %": contrast(
                items[f"{one} {share}"], items[f"{other} {share}"], "loss", "tokens"
            )
            for share in SHARES
            for one, other in (("budget", "uniform"), ("sigma", "uniform"), ("budget", "sigma"))
        }
        return {
            "date": str(date.today()),
            "machine": machine(),
            "command": command(),
            "trained": self.trained_by,
            "items": len(full["loss"]),
            "gain": gain,
            "leading_vectors": 10 * len(model_sites_of(self.model, self.adapter)),
            "variants": rows,
            "pairs": pairs,
        }


def run(*words: str) -> None:
    if code := cli.main(list(words)):
        raise SystemExit(code)


def model_sites_of(model: str, adapter: Path) -> list[Site]:
    return BaseMatrices.open(model).comparable(read_adapter(adapter).pairs)


def parameters_of(folder: Path | None) -> int:
    pairs = read_adapter(folder).pairs.values() if folder else ()
    return sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in pairs)


def energy_kept(folder: Path | None, scaled: Mapping[str, Any]) -> float | None:
    """Of the (scaled) change; the lowest site where the rank limits it."""
    if folder is None or not (folder / "fidelity.json").is_file():
        return None
    lowest = [row["energy_kept"] for row in scaled.get("sites", ()) if row["energy_kept"] is not None]
    return min([float(read_object(folder / "fidelity.json")["energy_kept"]), *lowest])


def moves(folder: Path | None, sites: Mapping[str, Site]) -> dict[Site, Tensor]:
    pairs = read_adapter(folder).pairs if folder else {}
    return {sites[path]: pair.factors().product() for path, pair in pairs.items()}


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, batch: Batch) -> Tensor:
    """(rows, T − 1, vocabulary): of every next token."""
    logits: Tensor = model(**{name: value for name, value in batch.items() if name not in BESIDE}).logits
    return logits[:, :-1].float().log_softmax(-1)


def per_item(before: Tensor, after: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Sums per row (rows,), float64, of what PARTS names."""
    labels, seen = batch["labels"][:, 1:], batch["attention_mask"][:, 1:].bool()
    answer = labels != -100
    prompt = seen & ~answer
    loss = -after.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    kl = (before.exp() * (before - after)).sum(-1)
    sums = {"loss": loss * answer, "tokens": answer, "kl_answer": kl * answer, "kl_prompt": kl * prompt}
    return {name: value.double().sum(-1) for name, value in (sums | {"prompt_tokens": prompt}).items()}


def mean(found: Mapping[str, Tensor], part: str, tokens: str) -> float:
    return float(found[part].sum() / found[tokens].sum())


def contrast(one: Mapping[str, Tensor], other: Mapping[str, Tensor] | None, part: str, tokens: str) -> list[float]:
    """Mean per token of one, less the other's, with its 95 % interval over items."""
    difference = (one[part] - (other[part] if other else 0)).numpy()
    count = one[tokens].numpy()

    def statistic(at: Any) -> Any:
        return (difference[at].sum(-1) / count[at].sum(-1))[None]

    spread = bootstrap.intervals(statistic, len(count), seed=SEED)
    assert spread is not None, "two items or more"
    return [float(difference.sum() / np.sum(count)), *spread[0]]


# --- the page --------------------------------------------------------------------------------------------------------


def interval(found: Sequence[float], digits: int = 4) -> str:
    return f"{found[0]:+.{digits}f} [{found[1]:+.{digits}f}, {found[2]:+.{digits}f}]"


def verdict(found: Sequence[float]) -> str:
    if found[1] > 0:
        return "worse"
    return "better" if found[2] < 0 else "not distinguishable"


def section(title: str, result: Mapping[str, Any]) -> Iterator[str]:
    rows, trained = result["variants"], result["trained"]
    whole = rows[FULL]["parameters"]
    how = f"rank {RANK}, {trained['steps']} steps of {trained['batch_size']} rows, rate {trained['rate']:g}"
    yield f"## {title}\n"
    yield f"Adapter: {trained['given'] or how}; {result['items']} held-out items. Loss in nats per answer token: "
    yield f"base {rows[BASE]['loss']:.4f}, adapter {rows[FULL]['loss']:.4f} (gain {result['gain']:.4f}).\n"
    yield "| kept | way | parameters | energy kept | loss | over the whole adapter | share of the gain lost |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for share in SHARES:
        for way, (name, _) in WAYS.items():
            row = rows[f"{way} {share}"]
            lost = row["over_full"][0] / result["gain"]
            yield (
                f"| {row['parameters'] / whole:.1%} | {name} | {row['parameters']:,} | {row['energy_kept']:.1%} | "
                f"{row['loss']:.4f} | {interval(row['over_full'])} | {lost:.1%} |"
            )
    yield "\nPaired differences of loss at equal parameters:\n"
    for name, found in result["pairs"].items():
        yield f"- {name}: {interval(found)}: {verdict(found)}"
    yield "\n| intruders × | intruders counted | loss | over the whole adapter | KL, answer | KL, prompt |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for scale in SCALES:
        row = rows[f"intruders {scale:g}"]
        kl = [interval(row[part]).lstrip("+") for part in ("kl_answer", "kl_prompt")]
        yield (
            f"| {scale:g} | {row['intruders']} of {result['leading_vectors']:,} | {row['loss']:.4f} | "
            f"{interval(row['over_full'])} | {kl[0]} | {kl[1]} |"
        )
    yield f"\n{result['date']} · {result['machine']} · `{result['command']}`\n"


def page(results: Mapping[str, Any]) -> str:
    lines = ["# After training: what an SVD still buys", ""]
    lines += [
        "Compressed by `rankwise compress` to equal parameters: our budget (energy kept per parameter), one threshold "
        "on σ for all sites (`--metric sigma`), one rank for all (`--uniform`). Intruders: leading singular vectors of "
        "W + Δ (ten per matrix) without a counterpart in W, scaled by `compress --intruders`, counted again after. "
        "KL: base against base + adapter, nats per token. Brackets: 95 %, bootstrap over items, paired.",
        "",
    ]
    return "\n".join([*lines, *(line for title, result in results.items() for line in section(title, result))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--title", default="stories260K × E2E")
    parser.add_argument("--model", help="folder of the base")
    parser.add_argument("--data")
    parser.add_argument("--task", default="e2e_nlg")
    parser.add_argument("--adapter", help="a rank-32 adapter of that base [trained]")
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=200, help="items")
    parser.add_argument("--work", type=Path, help="adapter, variants and ledger are kept here")
    parser.add_argument("--stage", choices=("all", "table"), default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = read_if_there(options.out / "after_training.json")
    if options.stage == "all":
        names = ("title", "model", "data", "work", "task", "rate", "steps", "batch_size", "held_out")
        bench = AfterTraining(**{name: getattr(options, name) for name in names}, given=options.adapter)
        results[options.title] = bench.result()
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "after_training.json", results)
    write_text(options.out / "after_training.md", page(results) + "\n")
    print(page(results))


if __name__ == "__main__":
    main()
