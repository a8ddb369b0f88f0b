"""How far is `rankwise train --estimate` from what a run takes? Peak memory and seconds of a step, measured.

    python benchmarks/estimate.py [--hidden 768 --layers 12 --length 256] [--out benchmarks/results]

Each case trains a random Llama with LoRA in a process of its own. On a CPU, memory is what the process holds (RssAnon)
at its highest, above what it held before the model was made; on a GPU what torch's allocator has given out. The
estimate's allowance is left out on both sides. Seconds come from a second process, which nothing watches: those of the
fastest step after the first, on a CPU of processor time by thread, because the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from workload import Clock, RandomRows, arguments, command, llama, machine, with_lora

from rankwise.data.dataset import Collator
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import frozen_dtype
from rankwise.train.estimate.cost import Speed
from rankwise.train.estimate.gpus import this_machine
from rankwise.train.estimate.shapes import Hardware, Rows, Shapes, Way, measure_way
from rankwise.train.trainer import RankwiseTrainer

RANK = 16
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory goes back at once


class ProcessorClock(Clock):
    """Processor time instead, shared out among the threads."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        at = time.process_time()
        self.seconds.append((at - self._last) / torch.get_num_threads())
        self._last = at


class Peak(threading.Thread):
    """The most anonymous memory that this process holds while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.highest = held()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.001):
            self.highest = max(self.highest, held())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.highest - self.base


def held() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(rows["RssAnon"].split()[0])


def train(model: Any, options: argparse.Namespace, batch: int, length: int, vocabulary: int, steps: int) -> list[float]:
    clock = Clock() if torch.cuda.is_available() else ProcessorClock()
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(folder, batch, steps, activation_checkpointing=options.checkpointing)
        rows = RandomRows([length] * batch * steps, vocabulary)
        trainer = RankwiseTrainer(
            model=model, args=settings, train_dataset=rows, data_collator=Collator(0), callbacks=[clock]
        )
        trainer.train()
    return clock.seconds


def one(options: argparse.Namespace) -> None:
    """A case, measured in this process; prints bytes and seconds."""
    train(with_lora(llama(64, 1, 100), RANK), options, 1, 8, 100, 1)  # imports and pools are not the model's
    peak = Peak()
    if not options.timed:
        peak.start()
    model = with_lora(llama(options.hidden, options.layers, options.vocabulary), RANK)
    if torch.cuda.is_available():
        model.base_model.to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    seconds = train(model, options, options.batch, options.length, options.vocabulary, options.steps)
    found = {"seconds": min(seconds[1:])} if options.timed else {"bytes": peak.stop()}
    print(json.dumps(found))


def child(options: argparse.Namespace, batch: int, checkpointing: bool) -> dict[str, float]:
    return one_way(options, batch, checkpointing, ALLOCATOR) | one_way(options, batch, checkpointing, {}, "--timed")


def one_way(
    options: argparse.Namespace, batch: int, checkpointing: bool, more: dict[str, str], *extra: str
) -> dict[str, float]:
    words = [f"--{name}={getattr(options, name)}" for name in ("hidden", "layers", "length", "vocabulary", "steps")]
    words += [f"--batch={batch}", *(["--checkpointing"] if checkpointing else []), *extra]
    done = subprocess.run(
        [sys.executable, __file__, *words], env=os.environ | more, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def estimates(options: argparse.Namespace) -> dict[tuple[bool, int], tuple[float, float]]:
    """(checkpointing, batch) → bytes without the allowance, seconds of a step."""
    with torch.device("meta"):
        base = llama(options.hidden, options.layers, options.vocabulary)
    plan = uniform_plan(choose_sites(model_sites(base)), RANK, None, False, "random")
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(folder, 1, 1)
    autocast = torch.bfloat16 if settings.bf16 else None
    place = Hardware((this_machine(settings.device, autocast),), autocast, frozen_dtype("auto", settings))
    speed = Speed.of(place.card, autocast)
    shapes = Shapes(base, plan, LoraSection(lora_dropout=0.0), (), None)
    found = {}
    for checkpointing in (False, True):
        way = Way("", "", None, checkpointing)
        taken = measure_way(shapes, way, place, Rows(None, 0, None, options.length), settings)
        for batch in options.batches:
            needs = taken.profile.needs(batch)
            seconds = taken.work.seconds(batch, options.length, speed)
            found[checkpointing, batch] = (needs.total - needs.fixed.allowance, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in (("hidden", 768), ("layers", 12), ("vocabulary", 16000), ("length", 256), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, help="one case, in this process")
    parser.add_argument("--checkpointing", action="store_true", help="of that case")
    parser.add_argument("--timed", action="store_true", help="its seconds instead of its memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.batch:
        return one(options)
    started, expected = time.monotonic(), estimates(options)
    taken = time.monotonic() - started
    lines = [
        "# Estimates against measurements",
        "",
        f"{date.today()} · {machine()} · random Llama, {options.layers} layers of {options.hidden}, vocabulary "
        f"{options.vocabulary:,}, LoRA of rank {RANK} at every site, rows of {options.length} tokens · `{command()}`",
        "",
        "| checkpointing | batch | estimated MiB | measured MiB | off by | estimated s | measured s | off by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    raw = []
    for (checkpointing, batch), (size, seconds) in expected.items():
        real = child(options, batch, checkpointing)
        raw.append(
            {"checkpointing": checkpointing, "batch": batch, "bytes": size, "seconds": seconds, "measured": real}
        )
        lines.append(
            f"| {'yes' if checkpointing else 'no'} | {batch} | {size / 2**20:.0f} | {real['bytes'] / 2**20:.0f} | "
            f"{size / real['bytes'] - 1:+.0%} | {seconds:.2f} | {real['seconds']:.2f} | "
            f"{seconds / real['seconds'] - 1:+.0%} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"All estimates together, the machine's rates measured included, took {taken:.0f} s."]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "estimate.md").write_text("\n".join(lines) + "\n")
    (options.out / "estimate.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
