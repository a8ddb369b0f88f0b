"""What a phase saves: step times of phases against training everything, interleaved in one run.

    python benchmarks/phases.py [--hidden 768] [--layers 12] [--out benchmarks/results]

The schedule itself interleaves: both, early, late, mlp, attention for a few steps each, and again. The first step of
each turn is dropped. The arithmetic limit of the late half is 4/3 without gradient checkpointing: forward 1, backward 1
(frozen weights need no gradient), of which half the layers' backward falls away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path

from workload import Clock, RandomRows, arguments, command, llama, machine, spread, with_lora

from rankwise.core.phase import bind
from rankwise.core.schedule import parse_schedule
from rankwise.data.dataset import Collator
from rankwise.models.sites import model_sites
from rankwise.train.phases import PhaseKeeper
from rankwise.train.trainer import RankwiseTrainer

TURN = ("both", "early", "late", "mlp", "attention")
STRATEGIES = {
    "early-late": ("early", "late"),
    "both-mlp-attn": ("both", "mlp", "attention"),
    "attn-mlp-both": ("attention", "mlp", "both"),
}


def step_times(options: argparse.Namespace, checkpointing: bool) -> list[dict[str, float]]:
    """Median seconds per step of every phase, one entry per turn."""
    model = llama(options.hidden, options.layers, options.vocabulary)
    sites = model_sites(model)
    steps = options.turns * len(TURN) * options.steps
    text = " > ".join([*(f"{name}:{options.steps}" for _ in range(options.turns) for name in TURN), "both"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        keeper = PhaseKeeper(bind(parse_schedule(text), sites, 1), Path(folder))
        trainer = RankwiseTrainer(
            model=with_lora(model, 8),
            args=arguments(folder, options.batch_size, steps, activation_checkpointing=checkpointing),
            train_dataset=RandomRows([options.length] * options.batch_size * steps, options.vocabulary),
            data_collator=Collator(0),
            phases=keeper,
            callbacks=[clock],
        )
        trainer.train()
    blocks = [clock.seconds[start + 1 : start + options.steps] for start in range(0, steps, options.steps)]
    medians = [statistics.median(block) for block in blocks]
    return [
        dict(zip(TURN, medians[start : start + len(TURN)], strict=True)) for start in range(0, len(medians), len(TURN))
    ]


def table(turns: list[dict[str, float]], checkpointing: bool) -> list[str]:
    base = statistics.median(turn["both"] for turn in turns)
    lines = [
        f"{'With' if checkpointing else 'Without'} gradient checkpointing; one step of both takes {base:.2f} s.",
        "",
    ]
    lines += ["| phase | times faster than both (range over turns) |", "|---|---:|"]
    lines += [f"| {name} | {spread([turn['both'] / turn[name] for turn in turns])} |" for name in TURN[1:]]
    lines += ["", "| strategy in equal parts | times faster than static |", "|---|---:|"]
    for name, phases in STRATEGIES.items():
        ratios = [turn["both"] * len(phases) / sum(turn[phase] for phase in phases) for turn in turns]
        lines.append(f"| {name} | {spread(ratios)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in (("hidden", 768), ("layers", 12), ("vocabulary", 8000), ("length", 128), ("batch_size", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="steps of a phase in one turn")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    size = f"random Llama, {options.layers} layers of {options.hidden}, {options.batch_size} × {options.length} tokens"
    lines = ["# What a phase saves", "", f"{date.today()} · {machine()} · {size} · `{command()}`", ""]
    raw = {}
    for checkpointing in (False, True):
        turns = step_times(options, checkpointing)
        raw["checkpointing" if checkpointing else "plain"] = turns
        lines += table(turns, checkpointing)
        print("\n".join(lines), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "phases.md").write_text("\n".join(lines))
    (options.out / "phases.json").write_text(json.dumps({"machine": machine(), "model": size, "turns": raw}, indent=1))


if __name__ == "__main__":
    main()
