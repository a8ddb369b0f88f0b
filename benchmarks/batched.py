"""Runs per hour: N adapters trained together on one frozen base against the same runs by the Trainer, one by one.

    python benchmarks/batched.py [--model DIR] [--data e2e_nlg] [--arms 1,4,8,16,32] [--out benchmarks/results]

Without --model: a random Llama of 5 layers, width 64; without --data: random rows of 20 to 60 tokens. Both sides get
rows that are already rendered, start from the same factors and take the same rows in the same order; loading the
model is not counted, everything after it is. The sequential runs are done before and after the batched ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from workload import command

from rankwise.core.plan import RankPlan
from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.render import Renderer
from rankwise.data.sources.load import load
from rankwise.models.adapt import ADAPTER, adapt, lora_layers
from rankwise.models.load import load_model, load_tokenizer
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, scales, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.together.stacked import ArmSettings
from rankwise.train.together.train import Arm, TrainedArm, train_together
from rankwise.train.trainer import RankwiseTrainer

Pairs = dict[str, tuple[Tensor, Tensor]]
RATE = 1e-3


@dataclass(frozen=True)
class Work:
    """What is trained, and how."""

    model: PreTrainedModel
    plan: RankPlan
    rows: Sequence[dict[str, Any]]
    collator: Collator
    settings: ArmSettings

    def arm(self, seed: int) -> Arm:
        generator = torch.Generator().manual_seed(seed)
        start = {
            path: (torch.randn(site_rank, n, generator=generator) / n**0.5, torch.zeros(m, site_rank))
            for path, site_rank in self.plan.ranks.items()
            for m, n in [self.plan.adapted[path].shape]
        }
        needed = self.settings.steps * self.settings.batch_size
        order = torch.randint(len(self.rows), (needed,), generator=generator).tolist()
        return Arm(start, scales(self.plan), RATE, order)


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=4, **sizes))


def random_rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 61, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row, "sample_index": index} for index, row in enumerate(rows)]


def prepared(options: argparse.Namespace) -> Work:
    model = load_model(options.model, torch.float32) if options.model else random_model()
    rows, collator = random_rows(options.rows), Collator(0)
    if options.data:
        tokenizer = load_tokenizer(options.model)
        renderer = Renderer(tokenizer, positions=model.config.max_position_embeddings, overlong="drop")
        examples = load(options.task, options.data, "train").items[: options.rows]
        data = RenderedDataset(examples, renderer)
        rows, collator = [data[index] for index in range(len(data))], Collator.of(tokenizer)
    plan = uniform_plan(choose_sites(model_sites(model)), options.rank, None, False, "")
    settings = ArmSettings(options.steps, options.batch_size, "cosine", warmup_steps=5, weight_decay=0.01)
    return Work(model, plan, rows, collator, settings)


def one_by_one(work: Work, arm: Arm) -> Pairs:
    """A run by the project's own Trainer on the adapted model, which is unadapted again afterwards."""
    adapted = adapt(work.model, work.plan, LoraSection(lora_dropout=0.0))
    for path, layer in lora_layers(adapted).items():
        for factor, value in zip((layer.lora_A, layer.lora_B), arm.start[path], strict=True):
            factor[ADAPTER].weight.data.copy_(value)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RankwiseTrainer(
            model=adapted,
            args=build_arguments(folder, 1, trainer_settings(work.settings)),
            train_dataset=Subset(work.rows, arm.order),  # type: ignore[arg-type]
            data_collator=work.collator,
        )
        trainer.train()
    trained = {
        path: (layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach())
        for path, layer in lora_layers(adapted).items()
    }
    adapted.unload()
    return trained


def trainer_settings(settings: ArmSettings) -> dict[str, Any]:
    return {
        "use_cpu": True,
        "optim": "adamw_torch",
        "per_device_train_batch_size": settings.batch_size,
        "max_steps": settings.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "train_sampling_strategy": "sequential",
        "logging_steps": settings.steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def timed_alone(work: Work, arms: Sequence[Arm]) -> tuple[list[float], list[Pairs]]:
    times, results = [], []
    for arm in arms:
        started = time.perf_counter()
        results.append(one_by_one(work, arm))
        times.append(time.perf_counter() - started)
    return times, results


def timed_together(work: Work, arms: Sequence[Arm]) -> tuple[float, list[TrainedArm]]:
    started = time.perf_counter()
    trained = train_together(work.model, arms, work.rows, work.collator, work.settings)
    return time.perf_counter() - started, trained


def distance(first: Pairs, second: Pairs) -> float:
    pairs = [(one, other) for path in first for one, other in zip(first[path], second[path], strict=True)]
    return max(float((one - other).abs().max()) for one, other in pairs)


def measured(work: Work, counts: Sequence[int], alone: int) -> dict[str, Any]:
    arms = [work.arm(seed) for seed in range(max(*counts, alone))]
    timed_alone(work, arms[:1])  # the first call of everything is slow
    timed_together(work, arms[:1])
    before, expected = timed_alone(work, arms[:alone])
    rows = []
    for count in counts:
        taken, trained = timed_together(work, arms[:count])
        known = list(zip(trained, expected, strict=False))
        rows.append(
            {"arms": count, "seconds": taken, "same_to": max(distance(one.pairs, other) for one, other in known)}
        )
        print(f"{count} together: {taken:.1f} s", file=sys.stderr, flush=True)
    after, _ = timed_alone(work, arms[:alone])
    single = statistics.median(before + after)
    for row in rows:
        row["runs_per_hour"] = 3600 * row["arms"] / row["seconds"]
        row["ratio"] = row["arms"] * single / row["seconds"]
    return {"alone_seconds": before + after, "alone_runs_per_hour": 3600 / single, "together": rows}


def text(result: dict[str, Any], work: Work, options: argparse.Namespace) -> str:
    settings = work.settings
    what = Path(options.model).name if options.model else "a random Llama (5 layers, width 64)"
    size = sum(parameter.numel() for parameter in work.model.parameters())
    length = statistics.mean(len(row["input_ids"]) for row in work.rows)
    spread = result["alone_seconds"]
    lines = [
        "# Adapters trained together",
        "",
        f"{date.today()} · {platform.machine()}, {torch.get_num_threads()} threads · torch {torch.__version__} · "
        f"{what}, {size:,} parameters, rank {options.rank} at {len(work.plan.ranks)} sites · {settings.steps} steps of "
        f"{settings.batch_size} rows of {length:.0f} tokens · `{command()}`",
        "",
        f"One by one with the Trainer: {result['alone_runs_per_hour']:.0f} runs per hour "
        f"({min(spread):.2f} to {max(spread):.2f} s a run).",
        "",
        "| arms together | seconds | runs per hour | ratio to one by one | same factors to |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['arms']} | {row['seconds']:.1f} | {row['runs_per_hour']:.0f} | {row['ratio']:.2f} | "
        f"{row['same_to']:.0e} |"
        for row in result["together"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model")
    parser.add_argument("--data", help="folder of the official files; needs --model")
    parser.add_argument("--task", default="e2e_nlg")
    parser.add_argument("--arms", default="1,4,8,16,32")
    parser.add_argument("--alone", type=int, default=2, help="runs one by one, before and again after")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.data and not options.model:
        parser.error("--data is rendered with a model's tokenizer: give --model too")
    work = prepared(options)
    result = measured(work, [int(count) for count in options.arms.split(",")], options.alone)
    written = text(result, work, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "batched.md").write_text(written)
    (options.out / "batched.json").write_text(json.dumps(result, indent=1))
    print(written)


if __name__ == "__main__":
    main()
