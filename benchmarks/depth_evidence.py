"""Does a model learn to use the depth of its image tokens, and is it depth that it uses?

    python benchmarks/depth_evidence.py [--seeds 3] [--frames FOLDER] [--out benchmarks/results]

    scenes whose pictures say nothing about depth (depth_scenes.py)
      ├─ a base that names, places and compares what it sees, and knows no depth (depth_base.py)
      └─ "Which is nearer, the red or the blue one?" ── rankwise train, once per arm and seed ──▶ adapters
                      right answers about new scenes: adapter × what stands in for depth (depth_table.py)

Every arm has the same base, rows, parameters, gate, rates and order of rows; only the values at the image tokens differ
("blind text" has neither images nor a gate). Scenes and seeds are resampled together for the intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from depth_base import Size, make_base, read_rows, run_command, write_data
from depth_frames import draw_tokens, frame_lines
from depth_table import TRUTH, Run, arm_lines, scene_numbers, setting_lines, swap_lines
from safetensors import safe_open
from workload import command, machine

from rankwise.data.example import Example
from rankwise.data.sources.load import load as load_rows
from rankwise.evaluate.engines import add_depth, renderer_of, subject
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.files.adapter import base_and_adapter
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import DepthUseSection, ScoredData

ANSWER = 4  # tokens that an answer may take
BLIND = "blind text"
COMMON = "gate at the common rate"
QUICK = Size(40, 2, 3e-3, 4, train_scenes=12, test_scenes=6, steps=2, batch_size=4)


@dataclass(frozen=True)
class Source:
    """What stands in for depth: a control of `rankwise train`, and for `file` its maps below the data."""

    control: str
    maps: str | None = None


SOURCES = {
    TRUTH: Source("file", "maps"),
    "off": Source("off"),
    "shuffled": Source("file", "shuffled.csv"),
    "constant": Source("constant"),
    "luminance": Source("luminance"),
    "vertical ramp": Source("ramp"),
    "permuted": Source("file", "permuted"),
}
SETTINGS = {
    COMMON: (),
    "gate rate 0.03": ("--depth_lr", "0.03"),
    "gate rate 0.3": ("--depth_lr", "0.3"),
    "no gate": ("--depth_gate", "none"),
    "no gate, alpha 10": ("--depth_gate", "none", "--depth_alpha", "10"),
    "no gate, alpha 1": ("--depth_gate", "none", "--depth_alpha", "1"),
}


@dataclass(frozen=True)
class Job:
    """One adapter: what it is trained with, and everything that it is tested with."""

    arm: str
    seed: int
    tests: tuple[str, ...]
    changed: str = ""

    @property
    def name(self) -> str:
        return f"{self.changed or self.arm}-{self.seed}".replace(" ", "-").replace(",", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=Path, help="folder of RGB-D frames with a table image_path,depth_path")
    parser.add_argument("--picture", type=Path, help="draw picture, depth and token depth of a few scenes here")
    parser.add_argument("--work", type=Path, help="keep data and runs here; a base that lies there is used again")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="adapters trained side by side")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the scores mean nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measure(options, work, QUICK if options.quick else Size())


def measure(options: argparse.Namespace, work: Path, size: Size) -> None:
    """The whole study: data, base, adapters, tables."""
    started = time.monotonic()
    one_thread()
    if not (work / "test.json").is_file():
        write_data(work, size)
    if not (work / "base").is_dir():
        make_base(work, size)
    sight = base_sight(work)
    print(f"base after {time.monotonic() - started:.0f} s, right answers in %: {sight}", flush=True)
    jobs = [*arms(options.seeds), *settings_tried()]
    runs = [trained_and_tested(job, work, size) for job in jobs] if options.workers == 1 else []
    if not runs:
        pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), initializer=one_thread)
        with pool:
            runs = list(pool.map(trained_and_tested, jobs, [work] * len(jobs), [size] * len(jobs)))
    frames = frame_lines(options.frames) if options.frames else []
    minutes = (time.monotonic() - started) / 60
    lines = [*report(options, work, size, sight, runs, minutes), *frames]
    write_results(options.out, lines, {"size": vars(size), "base": sight}, runs)
    if options.picture:
        draw_tokens(work, options.picture)


def one_thread() -> None:
    """Models this small gain nothing from a second thread; a second adapter does."""
    torch.set_num_threads(1)


def arms(seeds: int) -> list[Job]:
    """Ground truth is tested with everything, the others with their own source and with ground truth."""
    tests = {TRUTH: tuple(SOURCES), **{arm: (arm, TRUTH) for arm in SOURCES if arm != TRUTH}, BLIND: (BLIND,)}
    return [Job(arm, seed, tests[arm]) for arm in tests for seed in range(1, seeds + 1)]


def settings_tried() -> list[Job]:
    """Ground truth under other settings, on a seed that no arm uses."""
    return [Job(TRUTH, 0, (TRUTH,), name) for name in SETTINGS]


def trained_and_tested(job: Job, work: Path, size: Size) -> Run:
    started = time.monotonic()
    run = work / "runs" / job.name
    rows = "train-blind.json" if job.arm == BLIND else "train.json"
    told = f"""train --model_path {work / "base"} --data_path {work / rows} --image_folder {work / "images"}
        --output_dir {run} --use_cpu --seed {job.seed} --lora_r {size.rank} --target all --lora_dropout 0
        --lr {size.rate} --warmup_steps 20 --lr_scheduler_type cosine --max_steps {size.steps}
        --per_device_train_batch_size {size.batch_size} --val_fraction 0 --logging_steps 50 --save_strategy no
        --log_frequency 0 --no_plots"""
    run_command([*told.split(), *depth_words(job, work, size)])
    rights = {test: answers(run, work, test) for test in job.tests}
    found = Run(job.arm, job.seed, rights, gate_of(run), time.monotonic() - started, job.changed)
    shares = ", ".join(f"{test} {found.share(test):.1f}" for test in rights)
    print(f"{job.name}: {shares} after {found.seconds:.0f} s", flush=True)
    return found


def depth_words(job: Job, work: Path, size: Size) -> list[str]:
    """The depth options of a run."""
    if job.arm == BLIND:
        return []
    source = SOURCES[job.arm]
    maps = ["--depth_maps", str(work / source.maps)] if source.maps else []
    words = ["--use_depth", "True", "--depth_control", source.control, *maps, "--depth_cache", str(work / "cache")]
    return [*words, *(SETTINGS[job.changed] if job.changed else ("--depth_lr", str(size.gate_rate)))]


def answers(run: Path, work: Path, test: str) -> list[bool]:
    """Which questions about test scenes an adapter answers rightly."""
    if test == BLIND:
        return right(run, work, "test-blind.json", DepthUseSection())
    source = SOURCES[test]
    maps = str(work / source.maps) if source.maps else None
    use = DepthUseSection(depth_control=source.control, depth_maps=maps, depth_cache=str(work / "cache"))
    return right(run, work, "test.json", use)


def right(model: Path, work: Path, rows: str, depth: DepthUseSection) -> list[bool]:
    """Whether each row's answer comes out word for word; loaded, rendered and decoded as `rankwise evaluate` does."""
    data = ScoredData(task="conversations", data_path=str(work / rows), image_folder=str(work / "images"))
    config = EvaluateConfig(model_name=str(model), data=data, depth=depth, device="cpu")
    examples: Sequence[Example] = load_rows("conversations", work / rows).items
    base, adapter = base_and_adapter(str(model), None)
    tested = add_depth(config, subject(config, base, adapter, renderer_of(config, base, adapter)), examples)
    renderer = replace(tested.renderer, reserve=ANSWER)
    generator = HFGenerator(tested.model, renderer, GenerationSettings(ANSWER, batch_size=64))
    found = {one.position: one.text for one in generator.generate(examples)}
    return [found[number] == example.answer for number, example in enumerate(examples)]


def base_sight(work: Path) -> dict[str, float]:
    """What the base gets right about scenes that it has not seen, by the kind of question, in per cent."""
    rights = right(work / "base", work, "sight.json", DepthUseSection())
    kinds: dict[str, list[bool]] = {}
    for one, good in zip(read_rows(work, "sight"), rights, strict=True):
        asked = one["conversations"][0]["value"].removeprefix("<image>\n")
        if "," in asked:
            kinds.setdefault(asked.partition(",")[0], []).append(good)
    return {kind: round(100 * sum(values) / len(values), 1) for kind, values in sorted(kinds.items())}


def gate_of(run: Path) -> float | None:
    """The trained gate; None where there is none."""
    with safe_open(run / "adapter_model.safetensors", "pt") as file:
        gates = [file.get_tensor(name).item() for name in file.keys() if "depth_preproc" in name]  # noqa: SIM118
    return gates[0] if gates else None


def report(
    options: argparse.Namespace, work: Path, size: Size, sight: dict[str, float], runs: Sequence[Run], minutes: float
) -> list[str]:
    scenes = scene_numbers(load_rows("conversations", work / "test.json").items)
    known = "; ".join(f"“{kind} …” {value:g} %" for kind, value in sight.items())
    about = (
        f"{size.train_scenes:,} scenes to train on, {scenes.max() + 1:,} others with {len(scenes):,} questions to test "
        f"on, {options.seeds} seeds; {size.steps} steps of {size.batch_size} rows, LoRA of rank {size.rank} in the "
        f"language tower, rate {size.rate:g}, alpha 100, a learned gate at its own rate {size.gate_rate:g}; "
        f"{options.workers} adapters side by side. Size, place, colour, brightness and covering are drawn apart from "
        "depth; the nearer thing is the higher one in half of the pairs. What the base gets right of scenes it has "
        f"not seen: {known}. An answer counts when it is the right word and nothing else. Every map is stretched to "
        "[0, 1] by itself: this is about order within a picture."
    )
    lines = ["# Depth: does the mechanism work?", ""]
    lines += [f"{date.today()} · {machine()} · {minutes:.0f} minutes · `{command()}`", "", about, ""]
    lines += arm_lines(runs, scenes)
    lines += ["## Trained with one thing, tested with another", "", *swap_lines(runs, scenes)]
    return [*lines, "## Settings, with ground truth", "", *setting_lines(runs)]


def write_results(out: Path, lines: Sequence[str], facts: dict[str, Any], runs: Sequence[Run]) -> None:
    content = {"machine": machine(), "command": command(), **facts, "runs": [run.record() for run in runs]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "depth_evidence.md").write_text("\n".join(lines).rstrip() + "\n")
    (out / "depth_evidence.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
