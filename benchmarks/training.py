"""Training throughput against plain PEFT + transformers' Trainer, and what length grouping and packing gain on top.

    python benchmarks/training.py [--model FOLDER --data E2E_FOLDER] [--out benchmarks/results]

Both train the same random model on the same rows in alternating blocks of one run. Ours measures everything: gradient
norms at every step, guarded steps, the training log. Without --data, lengths are drawn from a log-normal distribution.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from workload import Clock, RandomRows, arguments, command, llama, machine, spread, with_lora

from rankwise.data.dataset import Collator, PackedDataset, RenderedDataset
from rankwise.data.render import Renderer
from rankwise.data.sources.load import load
from rankwise.models.load import load_tokenizer
from rankwise.train.gradients import GradientNorms
from rankwise.train.trainer import RankwiseTrainer

RANK = 8


class Bare(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows as a plain Trainer takes them."""

    def __init__(self, rows: RandomRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.rows[index].items() if name != "sample_index"}


def lengths_of(options: argparse.Namespace) -> tuple[list[int], str]:
    if options.data is None:
        drawn = torch.distributions.LogNormal(4.2, 0.5).sample((2000,)).clamp(16, 256).int().tolist()
        return drawn, "log-normal lengths"
    renderer = Renderer(load_tokenizer(str(options.model)), max_length=options.limit)
    return list(RenderedDataset(load("e2e_nlg", options.data).items[:2000], renderer).lengths), "lengths of E2E NLG"


def seconds(
    trainer_kind: type[Trainer], model: Any, rows: Any, options: argparse.Namespace, **more: Any
) -> list[float]:
    """Seconds of each step."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if trainer_kind is RankwiseTrainer:
            more["gradients"] = GradientNorms(Path(folder))
        settings = {"train_sampling_strategy": more.pop("sampling", "random")}
        batch_size, steps = more.pop("batch_size", options.batch_size), more.pop("steps", options.steps)
        trainer = trainer_kind(
            model=model,
            args=arguments(folder, batch_size, steps, **settings),
            train_dataset=rows,
            data_collator=Collator(0),
            callbacks=[clock],
            **more,
        )
        trainer.train()
    return clock.seconds


def against_plain(options: argparse.Namespace) -> list[float]:
    """plain ÷ ours of each round: above 1 ours is faster."""
    rows = RandomRows([options.length] * options.batch_size * options.steps, options.vocabulary)
    base = llama(options.hidden, options.layers, options.vocabulary)
    peer = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ours = with_lora(llama(options.hidden, options.layers, options.vocabulary), RANK)
    ratios = []
    for number in range(options.rounds):
        turns = {"plain": (Trainer, peer, Bare(rows)), "ours": (RankwiseTrainer, ours, rows)}
        order = list(turns) if number % 2 else list(turns)[::-1]
        times = {name: statistics.median(seconds(*turns[name], options)[1:]) for name in order}
        ratios.append(times["plain"] / times["ours"])
        print(f"round {number + 1}: {ratios[-1]:.3f}, steps of {times['ours']:.2f} s", flush=True)
    return ratios


def padding(options: argparse.Namespace) -> tuple[dict[str, list[float]], str]:
    """Tokens of samples per second over a whole epoch, in each round: random order, like lengths, packed rows."""
    lengths, source = lengths_of(options)
    rows = RandomRows(lengths[: options.samples], options.vocabulary)
    model = with_lora(llama(options.hidden, options.layers, options.vocabulary), RANK)
    packed = PackedDataset(rows, options.limit)  # type: ignore[arg-type]
    alike = max(1, round(options.batch_size * len(packed) / len(rows)))  # rows with as many tokens as an unpacked batch
    forms: dict[str, tuple[Any, dict[str, Any]]] = {
        "random order": (rows, {}),
        "--group_by_length": (rows, {"sampling": "group_by_length"}),
        "--packing": (packed, {"batch_size": alike}),
    }
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(options.epochs + 1):
        for name, (data, settings) in forms.items():
            steps = -(-len(data) // settings.get("batch_size", options.batch_size))
            times = seconds(RankwiseTrainer, model, data, options, steps=steps, **settings)
            if number:  # the first round warms up
                rates[name].append(sum(rows.lengths) / sum(times))
    return rates, source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in (("hidden", 384), ("layers", 6), ("vocabulary", 4000), ("length", 128), ("batch_size", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--samples", type=int, default=160, help="samples of the epoch that padding is measured on")
    parser.add_argument("--limit", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison with the plain Trainer")
    parser.add_argument("--epochs", type=int, default=2, help="rounds of the comparison of orders")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a block; the first is not counted")
    parser.add_argument("--model", type=Path, help="folder of a tokenizer, for --data")
    parser.add_argument("--data", type=Path, help="folder of the E2E files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    ratios = against_plain(options)
    rates, source = padding(options)
    lines = [
        "# Training throughput",
        "",
        f"{date.today()} · {machine()} · random Llama, {options.layers} layers of {options.hidden}, batch "
        f"{options.batch_size}, rank {RANK} · `{command()}`",
        "",
        f"Against plain PEFT + Trainer, same rows, {options.length} tokens each; everything measured at every step: "
        f"**{spread(ratios)}** times its speed over {options.rounds} alternating rounds.",
        "",
        f"Padding ({source}, up to {options.limit} tokens a packed row), tokens of samples per second:",
        "",
        "| order | tokens/s | against random order |",
        "|---|---:|---:|",
    ]
    for name, found in rates.items():
        against = spread([rate / base for rate, base in zip(found, rates["random order"], strict=True)])
        lines.append(f"| {name} | {statistics.median(found):.0f} | {against} |")
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training.md").write_text("\n".join(lines) + "\n")
    raw = {"machine": machine(), "ratios": ratios, "tokens_per_second": rates}
    (options.out / "training.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
