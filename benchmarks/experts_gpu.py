"""Training on a GPU, on layers of real shapes with random weights: memory, speed, one step of experts, the saved file.

    benchmarks/experts_gpu.sh [--tiny] [--out benchmarks/results]

As many layers of Qwen2.5-7B (every linear layer adapted) and of Qwen3-30B-A3B (its experts adapted) as fit with room to
spare, each model in a process of its own. Peak: what torch's allocator has given out at most, against the estimate
without its allowance. Speed: the fastest step after the first of this package's Trainer with all that it records, and
of transformers' with PEFT alone, same model, same rows. On a CPU (`--tiny`) memory is the process's own (RssAnon) and
says little at such sizes. Exit code 1 where an expert that was met has learnt nothing, or a read adapter gives others
logits than the one that was trained.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from estimate import Peak, ProcessorClock
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from workload import Clock, RandomRows, arguments, machine

from rankwise.core.plan import RankPlan
from rankwise.data.dataset import Collator
from rankwise.models.adapt import adapt, lora_pairs
from rankwise.models.adapters import load_adapter, save_adapter
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, plan_fields, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.page.text import memory
from rankwise.train.arguments import frozen_dtype
from rankwise.train.estimate.gpus import memory_available, this_machine
from rankwise.train.estimate.shapes import Hardware, Rows, Shapes, Way, measure_way
from rankwise.train.expert_record import read_experts
from rankwise.train.gradients import GradientNorms
from rankwise.train.trainer import RankwiseTrainer

RANK, STEPS, WARM = 16, 6, 1
FILLED = 0.7  # of the free memory, by the estimate
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen2.5-7B": (
        "qwen2",
        "both",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        "experts",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}


def built(name: str, layers: int, tiny: bool, device: str) -> Any:
    """Random weights, the same ones each time; on `meta` none."""
    kind, _, sizes = MODELS[name]
    sizes = {key: TINY.get(key, value) if tiny else value for key, value in sizes.items()}
    config = AutoConfig.for_model(kind, **sizes, num_hidden_layers=layers, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def planned(name: str, model: Any) -> RankPlan:
    return uniform_plan(choose_sites(model_sites(model), MODELS[name][1]), RANK, None, False, name)


def estimated(name: str, layers: int, options: argparse.Namespace) -> tuple[float, float]:
    """Bytes of the peak without the allowance, and with it."""
    base = built(name, layers, options.tiny, "meta")
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(folder, options.batch, 1)
    autocast = torch.bfloat16 if settings.bf16 else None
    place = Hardware((this_machine(settings.device, autocast),), autocast, frozen_dtype("auto", settings))
    shapes = Shapes(base, planned(name, base), LoraSection(lora_dropout=0.0), (), None)
    rows = Rows(None, 0, None, options.length)
    needs = measure_way(shapes, Way("", "", None, False), place, rows, settings).profile.needs(options.batch)
    return needs.total - needs.fixed.allowance, needs.total


def fitting(name: str, options: argparse.Namespace) -> int:
    """The number of layers whose estimate fits with room to spare."""
    if options.tiny:
        return 2
    free = memory_available(torch.device("cuda"))
    return next((n for n in (8, 4, 2) if estimated(name, n, options)[1] < FILLED * free), 1)


def trained(kind: Any, model: Any, options: argparse.Namespace, folder: Path, **more: Any) -> tuple[Any, float]:
    """The trainer, and seconds of its fastest step."""
    clock = Clock() if torch.cuda.is_available() else ProcessorClock()
    settings = arguments(folder, options.batch, STEPS)
    rows = RandomRows([options.length] * options.batch * STEPS, model.config.vocab_size)
    trainer = kind(model=model, args=settings, train_dataset=rows, data_collator=Collator(0), callbacks=[clock], **more)
    trainer.train()
    return trainer, min(clock.seconds[WARM:])


def case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = fitting(name, options)
    expected, _ = estimated(name, layers, options)
    gc.collect()
    peak = Peak()
    if device == "cpu":
        peak.start()
    base = built(name, layers, options.tiny, device)
    plan = planned(name, base)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = adapt(base, plan, LoraSection(lora_dropout=0.0))
        trainer, ours = trained(RankwiseTrainer, model, options, folder, gradients=GradientNorms(folder, 1))
        measured = torch.cuda.max_memory_allocated() if device == "cuda" else peak.stop()
        met = sum(share > 0 for routing in read_experts(folder).routings for share in routing.seen)
        learnt = trainer.experts.learnt(STEPS)
        moved = sum(bool(pair.lora_B[e].any()) for pair in lora_pairs(model).values() for e in range(pair.experts))
        ids = torch.arange(4, 4 + min(64, options.length), device=device)[None] % model.config.vocab_size
        # saved, and read back onto the same base
        after = logits(model, ids)
        save_adapter(model, folder, name)
        del trainer
        again = load_adapter(model.unload(), folder)
        difference = float((logits(again, ids) - after).abs().max())
        effect = float((after - bare(again, ids)).abs().max())
        plain = again.unload()
        del model, again
        config = LoraConfig(**plan_fields(plan), task_type="CAUSAL_LM")
        _, theirs = trained(Trainer, get_peft_model(plain, config), options, folder / "plain")
    tokens = options.batch * options.length
    return {
        "model": name,
        "layers": layers,
        "estimated": expected,
        "measured": measured,
        "tokens_per_second": tokens / ours,
        "plain_tokens_per_second": tokens / theirs,
        "experts_met": met,
        "experts_learnt": sum(map(len, learnt.values())),
        "experts_moved": moved,
        "difference": difference,
        "effect": effect,
    }


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found.float()


def bare(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model, ids)


def row(found: dict[str, Any]) -> str:
    size, real = found["estimated"], found["measured"]
    ours, theirs = found["tokens_per_second"], found["plain_tokens_per_second"]
    experts = f"{found['experts_learnt']} learnt, {found['experts_moved']} moved" if found["experts_met"] else "–"
    return (
        f"| {found['model']} | {found['layers']} | {memory(size)} | {memory(real)} | {size / real - 1:+.0%} | "
        f"{ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} | {experts} | {found['difference']:.2g} of "
        f"{found['effect']:.2g} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--case", choices=MODELS, help="one model, in this process")
    parser.add_argument("--batch", type=int, help="rows of a step [4; tiny: 2]")
    parser.add_argument("--length", type=int, help="tokens of a row [1024; tiny: 32]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.batch = options.batch or (2 if options.tiny else 4)
    options.length = options.length or (32 if options.tiny else 1024)
    if options.case:
        print(json.dumps(case(options.case, options)))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        print("no GPU here; --tiny runs the same on tiny shapes", file=sys.stderr)
        return 2
    found = []
    for name in MODELS:
        words = [f"--case={name}", f"--batch={options.batch}", f"--length={options.length}"]
        words += ["--tiny"] if options.tiny else []
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    lines = [
        "# Training on a GPU, experts among others",
        "",
        f"{date.today()} · {machine()} · random weights, LoRA of rank {RANK}, {options.batch} rows of "
        f"{options.length:,} tokens a step · `benchmarks/experts_gpu.sh{' --tiny' * options.tiny}`",
        "",
        "| model | layers | estimated | measured | off by | tokens/s | plain PEFT | ratio | experts | logits after "
        "reading the adapter: difference of effect |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|",
        *map(row, found),
    ]
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "experts_gpu.md").write_text("\n".join(lines) + "\n")
    (options.out / "experts_gpu.json").write_text(json.dumps(found, indent=1))
    lost = [each["model"] for each in found if each["experts_moved"] < each["experts_learnt"]]
    others = [each["model"] for each in found if each["difference"] > 1e-2 * each["effect"]]
    for text, names in (("experts have learnt nothing", lost), ("the read adapter is another", others)):
        if names:
            print(f"{', '.join(names)}: {text}", file=sys.stderr)
    return int(bool(lost or others))


if __name__ == "__main__":
    sys.exit(main())
