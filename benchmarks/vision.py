"""Vision-language training: against plain PEFT + Trainer, batches against single samples, and memory by setting.

    python benchmarks/vision.py [--shape 3b] [--out benchmarks/results]

A random Qwen2.5-VL (`--shape tiny`, `small`, or the sizes of the released `3b` and `7b` for a GPU) is trained with LoRA
on conversations about drawn pictures: decoding, resizing and tokenising are inside every figure. Both sides of a
comparison alternate in one run. `benchmarks/depth.py` measures what depth costs on top.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from vision_workload import SHAPES, model, renderer, rows_of, write_rows
from workload import Clock, arguments, command, machine, spread, with_lora

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.render import Renderer
from rankwise.train.gradients import GradientNorms
from rankwise.train.trainer import RankwiseTrainer

RANK = 16
LANGUAGE = r"model\.language_model\..*_proj"


class Plain:
    """A notebook's data set and collator: the processor is called on whole texts, and everything but padding learns."""

    def __init__(self, rows: RenderedDataset, seeing: Renderer) -> None:
        assert seeing.sight is not None
        self.rows, self.reader, self.processor = rows, seeing.sight.reader, seeing.sight.processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.rows.examples[index]
        asked = [{"type": "image"}, {"type": "text", "text": "What stands where?"}]
        answer = [{"type": "text", "text": example.answer}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        text = self.processor.apply_chat_template(messages)
        return {"text": text, "image": self.reader.open(example.images[0])}

    def collate(self, samples: list[dict[str, Any]]) -> Any:
        texts, images = [row["text"] for row in samples], [row["image"] for row in samples]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def place() -> tuple[torch.device, torch.dtype]:
    return (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)


def step_seconds(trainer_kind: type[Trainer], adapted: Any, rows: Any, collate: Any, **settings: Any) -> list[float]:
    """Seconds of each optimizer step after the first."""
    clock, steps, batch_size = Clock(), settings.pop("steps"), settings.pop("batch_size")
    with tempfile.TemporaryDirectory() as folder:
        more = {"gradients": GradientNorms(Path(folder))} if trainer_kind is RankwiseTrainer else {}
        trainer = trainer_kind(
            model=adapted,
            args=arguments(folder, batch_size, steps, **settings),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock],
            **more,
        )
        trainer.train()
    return clock.seconds[1:]


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def against_plain(options: argparse.Namespace, path: Path, checkpointing: bool) -> dict[str, Any]:
    """Ours and a plain Trainer in alternating blocks: plain ÷ ours in time, and on a GPU both peaks.

    With checkpointing the plain Trainer's backward passes through the frozen vision tower, and ours does not.
    """
    seeing = renderer(path.parent, options.max_pixels)
    rows = rows_of(path, seeing)
    plain = Plain(rows, seeing)
    device, dtype = place()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LANGUAGE, task_type="CAUSAL_LM")
    settings = {"steps": options.steps, "batch_size": options.batch_size}
    settings |= {"activation_checkpointing": checkpointing, "dataloader_num_workers": options.workers}
    turns = {"plain": (Trainer, plain, plain.collate), "ours": (RankwiseTrainer, rows, collator(seeing))}
    ratios, peaks, rates = [], dict.fromkeys(turns, 0.0), []
    for number in range(options.rounds):
        times = {}
        for name in list(turns) if number % 2 else list(turns)[::-1]:
            base = model(options.shape, device, dtype)
            adapted = get_peft_model(base, config) if name == "plain" else with_lora(base, RANK)
            kind, data, collate = turns[name]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name] = statistics.median(step_seconds(kind, adapted, data, collate, **settings))
            if device.type == "cuda":
                peaks[name] = peak_gib()
            del base, adapted
        ratios.append(times["plain"] / times["ours"])
        rates.append(options.batch_size * statistics.mean(rows.lengths) / times["ours"])
        print(f"round {number + 1}: {ratios[-1]:.3f}, steps of {times['ours']:.2f} s", flush=True)
    return {"ratios": ratios, "tokens_per_second": rates, "peak_gib": peaks, "tokens": statistics.mean(rows.lengths)}


def collator(seeing: Renderer) -> Collator:
    return Collator.of(seeing.tokenizer, sight=seeing.sight)


def batches(options: argparse.Namespace, path: Path) -> dict[int, list[float]]:
    """Samples per second by batch size, each round over the same number of samples."""
    seeing = renderer(path.parent, options.max_pixels)
    rows, (device, dtype) = rows_of(path, seeing), place()
    adapted = with_lora(model(options.shape, device, dtype), RANK)
    rates: dict[int, list[float]] = {size: [] for size in options.batch_sizes}
    for number in range(options.rounds + 1):
        for size in options.batch_sizes:
            steps = max(3, 1 + options.samples // size)
            settings = {"steps": steps, "batch_size": size, "dataloader_num_workers": options.workers}
            settings["train_sampling_strategy"] = "group_by_length"
            times = step_seconds(RankwiseTrainer, adapted, rows, collator(seeing), **settings)
            if number:  # the first round warms up
                rates[size].append(size * len(times) / sum(times))
    return rates


MEMORY = {
    "batch 4": {"batch_size": 4},
    "batch 1, accumulate 4": {"batch_size": 1, "gradient_accumulation_steps": 4},
    "batch 4, checkpointing": {"batch_size": 4, "activation_checkpointing": True},
    "batch 1, accumulate 4, checkpointing": {
        "batch_size": 1,
        "gradient_accumulation_steps": 4,
        "activation_checkpointing": True,
    },
}


def anonymous_gib() -> float:
    """Anonymous resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20


@contextmanager
def sampled(every: float = 0.002) -> Iterator[list[float]]:
    """Anonymous memory, looked at again and again by a thread while the block runs."""
    samples, done = [anonymous_gib()], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            samples.append(anonymous_gib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def memory_child(options: argparse.Namespace, path: Path, settings: dict[str, Any], found: Any) -> None:
    """Peak above the loaded model, in a process of its own: sampled on a CPU, counted by the allocator on a GPU."""
    seeing, (device, dtype) = renderer(path.parent, options.max_pixels), place()
    rows = rows_of(path, seeing)
    adapted = with_lora(model(options.shape, device, dtype), RANK)
    before = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else anonymous_gib()
    with sampled() as samples:
        times = step_seconds(RankwiseTrainer, adapted, rows, collator(seeing), steps=3, **settings)
    highest = peak_gib() if device.type == "cuda" else max(samples)
    found.put((highest - before, statistics.median(times)))


def memory(options: argparse.Namespace, path: Path) -> dict[str, tuple[float, float]]:
    """Setting → (peak above the model in GiB, seconds of an optimizer step of four samples)."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for name, settings in MEMORY.items():
        found = context.Queue()
        child = context.Process(target=memory_child, args=(options, path, settings, found))
        child.start()
        results[name] = found.get()
        child.join()
        print(f"{name}: {results[name][0]:.2f} GiB, {results[name][1]:.2f} s", flush=True)
    return results


def peer_row(kept: bool, peer: dict[str, Any]) -> str:
    peaks = peer["peak_gib"]
    held = f"; peak {peaks['ours']:.1f} GiB against {peaks['plain']:.1f}" if peaks["ours"] else ""
    rate = statistics.median(peer["tokens_per_second"])
    return f"| {'kept' if kept else 'checkpointed'}{held} | {spread(peer['ratios'])} | {rate:.0f} |"


def page(
    options: argparse.Namespace, peers: dict[bool, dict[str, Any]], rates: dict[int, list[float]], peaks: Any
) -> str:
    single = rates[options.batch_sizes[0]]
    lines = [
        "# Vision-language training",
        "",
        f"{date.today()} · {machine()} · random Qwen2.5-VL, shape `{options.shape}`, LoRA of rank {RANK} on the "
        f"language tower, {peers[True]['tokens']:.0f} tokens a sample on average · `{command()}`",
        "",
        f"Against plain PEFT + Trainer on the same pictures, batch {options.batch_size}, gradient norms measured at "
        f"every step, {options.rounds} alternating rounds:",
        "",
        "| activations | times its speed | tokens per second |",
        "|---|---:|---:|",
        *(peer_row(kept, peer) for kept, peer in peers.items()),
        "",
        "| batch | samples per second | against batch 1 |",
        "|---:|---:|---:|",
    ]
    for size, found in rates.items():
        against = spread([rate / base for rate, base in zip(found, single, strict=True)])
        lines.append(f"| {size} | {statistics.median(found):.2f} | {against} |")
    lines += ["", "| setting, four samples a step | peak above the model, GiB | seconds a step |", "|---|---:|---:|"]
    lines += [f"| {name} | {peak:.2f} | {seconds:.2f} |" for name, (peak, seconds) in peaks.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batch_size", type=int, default=4, help="of the comparison with the plain Trainer")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--samples", type=int, default=32, help="samples of a block, for each batch size")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a block; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--sides", type=int, nargs=2, default=(120, 360), help="pixels of the pictures' sides")
    parser.add_argument("--max_pixels", type=int, default=512 * 512)
    parser.add_argument("--answer_words", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder), 64, tuple(options.sides), options.answer_words)
        peers = {kept: against_plain(options, path, not kept) for kept in (True, False)}
        rates = batches(options, path)
        peaks = memory(options, path)
    text = page(options, peers, rates, peaks)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "vision.md").write_text(text)
    found = {"kept": peers[True], "checkpointed": peers[False]}
    raw = {"machine": machine(), "against_plain": found, "samples_per_second": rates, "memory": peaks}
    (options.out / "vision.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
