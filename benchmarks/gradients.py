"""What measuring gradient norms at every step costs: training with the table, without it, and the naive way.

    python benchmarks/gradients.py [--rounds 12] [--block 3] [--out benchmarks/results]

One training run of a Llama-shaped random model with LoRA on every linear module. Its steps are dealt in blocks to three
arms, in random order within each round, so that a machine that slows down slows all of them:

    without    RankwiseTrainer, which fetches loss and gradient norm once a step anyway
    table      the same, and GradientNorms at every step (norms, ‖BA‖, three files)
    naive      the same, and `parameter.grad.norm().item()` for each parameter, one file; no ‖BA‖

The ratio of a round is an arm's time over that of `without` in the same round. Goal: at most 1.02 at steps ≥ 0.5 s.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from rankwise.models.adapt import adapt
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.gradients import GradientNorms
from rankwise.train.trainer import RankwiseTrainer

ARMS = ("without", "table", "naive")
LEAST_SECONDS = 0.5
GOAL = 1.02
SIZES = {  # layers, hidden, intermediate, batch, tokens a sample
    "cpu": (22, 384, 1024, 2, 128),
    "cuda": (22, 2048, 5632, 8, 1024),
}


class Tokens(Dataset[dict[str, Tensor]]):
    """Random rows."""

    def __init__(self, count: int, length: int) -> None:
        self.ids = torch.randint(4, 1000, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Dealer(TrainerCallback):
    """Gives each block of steps to an arm and takes its time."""

    def __init__(self, block: int, rounds: int) -> None:
        generator = random.Random(0)
        self.block = block
        order = [arm for _ in range(rounds + 1) for arm in generator.sample(ARMS, len(ARMS))]
        self.order = order  # the first round warms up and is not counted
        self.seconds: list[float] = []
        self.arm = ""
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.block == 0:
            settle()
            self.arm = self.order[state.global_step // self.block]
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.block == 0:
            settle()
            self.seconds.append((time.perf_counter() - self.started) / self.block)

    def rounds(self) -> list[dict[str, float]]:
        """Arm → seconds a step, of every round but the first."""
        found = list(zip(self.order, self.seconds, strict=True))
        return [dict(found[i : i + len(ARMS)]) for i in range(len(ARMS), len(found), len(ARMS))]


class Dealt(GradientNorms):
    """The table, in its own arm's steps only, with a clock of its own: seconds of host time in `values` and `record`.

    On a CPU that is all it costs; it is far steadier than a difference of whole steps.
    """

    def __init__(self, output_dir: Path, dealer: Dealer) -> None:
        super().__init__(output_dir)
        self.dealer = dealer
        self.clock: list[float] = []

    def values(self, step: int) -> Tensor:
        started = time.perf_counter()
        found = super().values(step)
        self.clock.append(time.perf_counter() - started)
        return found

    def record(self, *given: Any) -> None:
        started = time.perf_counter()
        super().record(*given)
        self.clock[-1] += time.perf_counter() - started

    def wanted(self, step: int) -> bool:
        return self.dealer.arm == "table"


class Naive(TrainerCallback):
    """One synchronisation per parameter."""

    def __init__(self, path: Path, dealer: Dealer) -> None:
        self.path, self.dealer = path, dealer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if self.dealer.arm != "naive":
            return
        norms = {name: value.grad.norm().item() for name, value in model.named_parameters() if value.grad is not None}
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows((state.global_step, name, norm) for name, norm in norms.items())


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def adapted_model(sizes: Sequence[int], rank: int, device: str) -> nn.Module:
    layers, hidden, intermediate, _, length = sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    plan = uniform_plan(choose_sites(model_sites(model)), rank, None, False, "random")
    return adapt(model, plan, LoraSection(lora_dropout=0.0))


def train(options: argparse.Namespace, device: str, folder: Path) -> tuple[Dealt, int]:
    sizes = SIZES[device]
    dealer = Dealer(options.block, options.rounds)
    steps = options.block * len(dealer.order)
    model = adapted_model(sizes, options.rank, device)
    arguments = build_arguments(
        folder,
        1,
        {
            "use_cpu": device == "cpu",
            "bf16": device == "cuda",
            "per_device_train_batch_size": sizes[3],
            "max_steps": steps,
            "logging_steps": 10**6,
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
        },
    )
    table = Dealt(folder, dealer)
    RankwiseTrainer(
        model=model,
        args=arguments,
        train_dataset=Tokens(64, sizes[4]),
        gradients=table,
        callbacks=[dealer, Naive(folder / "naive.csv", dealer)],
    ).train()
    return table, sum(value.requires_grad for value in model.parameters())


def measured(rounds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Arm → seconds a step (median), and of its ratio to `without` the median and the quartiles over the rounds."""
    found = {}
    for arm in ARMS:
        ratios = [one[arm] / one["without"] for one in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[arm] = {
            "seconds": statistics.median(one[arm] for one in rounds),
            "ratio": middle,
            "quartile_low": low,
            "quartile_high": high,
        }
    return found


def page(result: dict[str, Any]) -> str:
    layers, hidden, intermediate, batch, length = result["sizes"]
    lines = [
        "# Gradient norms at every step",
        "",
        f"{result['date']} · {result['machine']} · torch {result['torch']} · `python benchmarks/gradients.py`",
        "",
        f"Random Llama, {layers} layers, {hidden} and {intermediate} wide, {batch} × {length} tokens a step, LoRA of "
        f"rank {result['rank']} on every linear module: {result['parameters']} trainable tensors. {result['rounds']} "
        f"rounds of {result['block']} steps per arm, interleaved.",
        "",
        "| arm | s a step, median | ratio to `without`, median | quartiles |",
        "|---|---:|---:|---:|",
    ]
    for arm, row in result["arms"].items():
        spread = f"{row['quartile_low']:.4f} to {row['quartile_high']:.4f}"
        lines.append(f"| {arm} | {row['seconds']:.3f} | {row['ratio']:.4f} | {spread} |")
    seconds, ratio = result["arms"]["without"]["seconds"], result["arms"]["table"]["ratio"]
    short = (
        "" if seconds >= LEAST_SECONDS else f" Steps are shorter than {LEAST_SECONDS} s, for which the goal is stated."
    )
    verdict = "met" if ratio <= GOAL else "missed"
    host = (
        f"Host time in measuring and writing, by its own clock: {1e3 * result['host_seconds']:.1f} ms a step, median."
    )
    return "\n".join([*lines, "", host, f"Goal: at most {GOAL} for `table`: {verdict}.{short}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=3, help="steps an arm has in a round")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        table, parameters = train(options, device, Path(folder))
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result = {
        "date": str(date.today()),
        "machine": torch.cuda.get_device_name() if device == "cuda" else threads,
        "torch": torch.__version__,
        "sizes": SIZES[device],
        "rank": options.rank,
        "parameters": parameters,
        "rounds": options.rounds,
        "block": options.block,
        "arms": measured(table.dealer.rounds()),
        "host_seconds": statistics.median(table.clock),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gradients.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "gradients.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
