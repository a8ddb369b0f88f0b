"""Time and memory of k adapters trained together on one frozen base, against k runs one after the other.

    python benchmarks/arms.py [--model DIR] [--data e2e_nlg] [--arms 1,4,8] [--tokens 40,400] [--out benchmarks/results]

Without --model: a random Llama of 5 layers, width 64; without --data: random rows of about so many tokens. Three sides,
in the same run: all arms in one batch, the same code arm by arm, and the project's Trainer arm by arm. All get rows
that are already rendered, start from the same factors and take the same rows in the same order; loading the model is
not counted, everything after it is. What runs alone is timed before and after the batches. Seconds are the process's
CPU seconds, on a GPU wall-clock seconds. Memory is what the process (on a GPU: the card) holds at its peak beyond what
it held before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from rankwise.files.monitor import PeakMemory
from rankwise.models.adapt import ADAPTER, adapt, lora_layers
from rankwise.models.load import load_model, load_tokenizer
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, scales, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.train import Arm, TrainedArm, train_together
from rankwise.train.trainer import RankwiseTrainer

Pairs = dict[str, tuple[Tensor, Tensor]]
RATE, MIB = 1e-3, 2**20


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
        order = torch.randint(len(self.rows), (self.settings.rows,), generator=generator).tolist()
        return Arm(start, scales(self.plan), RATE, order)

    @property
    def tokens(self) -> float:
        """Of a row, on average."""
        return statistics.mean(len(row["input_ids"]) for row in self.rows)


@dataclass(frozen=True)
class Cost:
    """seconds, and bytes at the peak beyond those before."""

    seconds: float
    bytes: int


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=4, **sizes))


def random_rows(count: int, tokens: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + tokens // 2 + 1, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row, "sample_index": index} for index, row in enumerate(rows)]


def prepared(options: argparse.Namespace, model: PreTrainedModel, tokens: int) -> Work:
    rows, collator = random_rows(options.rows, tokens), Collator(0)
    if options.data:
        tokenizer = load_tokenizer(options.model)
        renderer = Renderer(tokenizer, positions=model.config.max_position_embeddings, overlong="drop")
        data = RenderedDataset(load(options.task, options.data, "train").items[: options.rows], renderer)
        rows, collator = [data[index] for index in range(len(data))], Collator.of(tokenizer)
    plan = uniform_plan(choose_sites(model_sites(model)), options.rank, None, False, "")
    settings = ArmSettings(options.steps, options.batch_size, "cosine", warmup_steps=5, weight_decay=0.01)
    return Work(model, plan, rows, collator, settings)


def by_the_trainer(work: Work, arm: Arm) -> Pairs:
    """A run by the project's own Trainer on the adapted model, which is unadapted again afterwards."""
    adapted = adapt(work.model, work.plan, LoraSection(lora_dropout=0.0))
    for path, layer in lora_layers(adapted).items():
        for factor, value in zip((layer.lora_A, layer.lora_B), arm.start[path], strict=True):
            factor[ADAPTER].weight.data.copy_(value)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RankwiseTrainer(
            model=adapted,
            args=build_arguments(folder, 1, trainer_settings(work), dtype="float32"),
            train_dataset=Subset(work.rows, arm.order),  # type: ignore[arg-type]
            data_collator=work.collator,
        )
        trainer.train()
    trained = {
        path: (layer.lora_A[ADAPTER].weight.detach().cpu(), layer.lora_B[ADAPTER].weight.detach().cpu())
        for path, layer in lora_layers(adapted).items()
    }
    adapted.unload()
    return trained


def trainer_settings(work: Work) -> dict[str, Any]:
    settings = work.settings
    return {
        "use_cpu": work.model.device.type == "cpu",
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


def together(work: Work, arms: Sequence[Arm]) -> list[TrainedArm]:
    return train_together(work.model, arms, work.rows, work.collator, work.settings)


def measured(run: Callable[[], Any], device: torch.device) -> tuple[Cost, Any]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, started = torch.cuda.memory_allocated(device), time.perf_counter()
        found = run()
        seconds = time.perf_counter() - started
        return Cost(seconds, torch.cuda.max_memory_allocated(device) - before), found
    if sys.platform == "linux":  # or what earlier runs have freed would hide what this one takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with PeakMemory() as memory:
        start, started = memory.bytes, time.process_time()
        found = run()
        return Cost(time.process_time() - started, memory.bytes - start), found


def compared(work: Work, counts: Sequence[int], alone: int) -> dict[str, Any]:
    """All sides on one workload; what runs alone, `alone` times before and as often after."""
    arms, device = [work.arm(seed) for seed in range(max(*counts, alone))], work.model.device
    by_the_trainer(work, arms[0])  # the first call of everything is slow
    together(work, arms[:1])
    before = [timed_alone(work, arm) for arm in arms[:alone]]
    rows = [row_of(work, arms[:count], [pairs for *_, pairs in before], device) for count in counts]
    after = [timed_alone(work, arm) for arm in arms[:alone]]
    trainer, single, _ = zip(*before, *after, strict=True)
    one, own = (statistics.median(cost.seconds for cost in costs) for costs in (trainer, single))
    for row in rows:
        row |= {"to_trainer": row["arms"] * one / row["seconds"], "to_single": row["arms"] * own / row["seconds"]}
    return {
        "tokens": work.tokens,
        "trainer_seconds": [cost.seconds for cost in trainer],
        "single_seconds": [cost.seconds for cost in single],
        "trainer_bytes": max(cost.bytes for cost in trainer),
        "together": rows,
    }


def timed_alone(work: Work, arm: Arm) -> tuple[Cost, Cost, Pairs]:
    """By the Trainer, by the code of the batches, and what the Trainer makes of it."""
    trainer, pairs = measured(lambda: by_the_trainer(work, arm), work.model.device)
    single, _ = measured(lambda: together(work, [arm]), work.model.device)
    return trainer, single, pairs


def row_of(work: Work, arms: Sequence[Arm], expected: Sequence[Pairs], device: torch.device) -> dict[str, Any]:
    cost, trained = measured(lambda: together(work, arms), device)
    known = list(zip(trained, expected, strict=False))
    print(f"{len(arms)} together: {cost.seconds:.1f} s", file=sys.stderr, flush=True)
    same = max(distance(one.pairs, other) for one, other in known)
    return {"arms": len(arms), "seconds": cost.seconds, "bytes": cost.bytes, "same_to": same}


def distance(first: Pairs, second: Pairs) -> float:
    pairs = [(one, other) for path in first for one, other in zip(first[path], second[path], strict=True)]
    return max(float((one - other).abs().max()) for one, other in pairs)


def text(results: Sequence[dict[str, Any]], work: Work, options: argparse.Namespace) -> str:
    settings, device = work.settings, work.model.device
    what = Path(options.model).name if options.model else "a random Llama (5 layers, width 64)"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    lines = [
        "# Adapters trained together",
        "",
        f"{date.today()} · {platform.machine()}, {where} · torch {torch.__version__} · "
        f"{what}, {sum(each.numel() for each in work.model.parameters()):,} parameters, rank {options.rank} at "
        f"{len(work.plan.ranks)} sites · {settings.steps} steps of {settings.batch_size} rows · `{command()}`",
    ]
    for result in results:
        spread, held = result["trainer_seconds"], max(1, result["trainer_bytes"])
        lines += [
            "",
            f"Rows of {result['tokens']:.0f} tokens. A run alone by the Trainer: {min(spread):.2f} to "
            f"{max(spread):.2f} s, {held / MIB:,.0f} MiB.",
            "",
            "| arms together | seconds | × the Trainer's speed | × arm by arm | memory | × one Trainer's | same to |",
            "|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in result["together"]:
            speed = f"{row['seconds']:.1f} | {row['to_trainer']:.2f} | {row['to_single']:.2f}"
            memory = f"{row['bytes'] / MIB:,.0f} MiB | {row['bytes'] / held:.1f}"
            lines.append(f"| {row['arms']} | {speed} | {memory} | {row['same_to']:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model")
    parser.add_argument("--data", help="folder of the official files; needs --model")
    parser.add_argument("--task", default="e2e_nlg")
    parser.add_argument("--arms", default="1,4,8")
    parser.add_argument("--tokens", default="40,400", help="lengths of random rows")
    parser.add_argument("--alone", type=int, default=2, help="runs one by one, before and again after")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.data and not options.model:
        parser.error("--data is rendered with a model's tokenizer: give --model too")
    model = load_model(options.model, torch.float32) if options.model else random_model()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    counts = [int(count) for count in options.arms.split(",")]
    lengths = [0] if options.data else [int(tokens) for tokens in options.tokens.split(",")]
    works = [prepared(options, model, max(2, tokens)) for tokens in lengths]
    results = [compared(work, counts, options.alone) for work in works]
    written = text(results, works[0], options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "arms.md").write_text(written)
    (options.out / "arms.json").write_text(json.dumps(results, indent=1))
    print(written)


if __name__ == "__main__":
    main()
