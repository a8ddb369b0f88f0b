"""Evaluation with prompts sorted by length against the order of the file: the same texts, less padding.

    python benchmarks/evaluate.py [--model PATH] [--task samsum --data DIR --split dev] [--out benchmarks/results]

Both orders run in turn on the same model, prompts and cores, and the ratio is taken within each pair of runs, so a
machine that slows down meanwhile slows both. Without --model: a random Llama of 1 M parameters, which never ends its
answers, so every answer has the full length. Without --data: made-up texts of 10 to 300 words, log-uniform.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from workload import command

from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.evaluate.tasks import task
from rankwise.models.load import load_model, load_tokenizer
from rankwise.models.tiny import random_llama, save_tokenizer

WORDS = "pub river near food price family centre rating cheap high museum bridge garden station hall park".split()
LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Row:
    """One kind of work in both orders: seconds by run, share of padding among all prompt tokens, and equal answers."""

    work: str
    sorted_seconds: list[float]
    unsorted_seconds: list[float]
    sorted_padding: float
    unsorted_padding: float
    same: float

    @property
    def ratio(self) -> float:
        pairs = zip(self.unsorted_seconds, self.sorted_seconds, strict=True)
        return statistics.median(before / after for before, after in pairs)


def made_up(count: int) -> list[Example]:
    draw = random.Random(0)
    lengths = [int(10 * math.exp(draw.random() * math.log(30))) for _ in range(count)]
    texts = [" ".join(draw.choice(WORDS) for _ in range(length)) for length in lengths]
    turns = [(Turn("user", text, "Dialogue"), Turn("assistant", "x", "Summary")) for text in texts]
    return [Example(f"row-{number}", f"row-{number}", turn) for number, turn in enumerate(turns)]


def examples_of(options: argparse.Namespace) -> list[Example]:
    if not options.data:
        return made_up(options.samples)
    return list(task(options.task).examples(options.data, options.split).items[: options.samples])


def random_model(folder: Path, examples: Sequence[Example]) -> Path:
    texts = [turn.text for example in examples for turn in example.turns]
    random_llama(save_tokenizer(folder, texts, 600), seed=0).save_pretrained(folder)
    return folder


def padding(generator: HFGenerator, examples: Sequence[Example]) -> float:
    """Share of padding in the batches of prompts."""
    prompts = [generator.renderer.prompt_ids(example) for example in examples]
    order, size = generator.decoding.order(prompts), generator.decoding.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    cells = sum(len(batch) * max(len(prompts[position]) for position in batch) for batch in batches)
    return 1 - sum(map(len, prompts)) / cells


def timed(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    started = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, sorted(found, key=lambda each: each.position)


def compared(name: str, generator: HFGenerator, examples: Sequence[Example], repeats: int) -> Row:
    """Both orders in turn, after one batch to warm up."""
    by_length = replace(generator, decoding=replace(generator.decoding, length_sorted=True))
    as_is = replace(generator, decoding=replace(generator.decoding, length_sorted=False))

    def work(engine: HFGenerator, rows: Sequence[Example]) -> list[Any]:
        return list(engine.generate(rows) if name == "generate" else engine.label_scores(rows, LABELS))

    work(by_length, examples[: generator.decoding.batch_size])
    sorted_seconds, unsorted_seconds, same = [], [], 1.0
    for _ in range(repeats):
        seconds, first = timed(lambda: work(by_length, examples))
        sorted_seconds.append(seconds)
        seconds, second = timed(lambda: work(as_is, examples))
        unsorted_seconds.append(seconds)
        same = sum(answer(a) == answer(b) for a, b in zip(first, second, strict=True)) / len(first)
    return Row(name, sorted_seconds, unsorted_seconds, padding(by_length, examples), padding(as_is, examples), same)


def answer(found: Any) -> str:
    """The text, or the likeliest label."""
    scores = getattr(found, "log_likelihoods", None)
    return str(found.text) if scores is None else max(scores, key=scores.get)


def markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    lines = [
        "# Evaluation: prompts sorted by length",
        "",
        f"{facts['date']} · {facts['machine']}, {facts['threads']} threads · torch {facts['torch']} · "
        f"{facts['model']} · {facts['prompts']} prompts ({facts['data']}), batches of {facts['batch_size']}, up to "
        f"{facts['max_new_tokens']} tokens · `{command()}`",
        "",
        "Medians of the runs; the ratio is the median of unsorted ÷ sorted within each pair of runs.",
        "",
        "| work | sorted, s | file order, s | ratio | padding sorted | padding in file order | same answers |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = [statistics.median(values) for values in (row.sorted_seconds, row.unsorted_seconds)]
        lines.append(
            f"| {row.work} | {seconds[0]:.2f} | {seconds[1]:.2f} | {row.ratio:.2f} | {row.sorted_padding:.1%} | "
            f"{row.unsorted_padding:.1%} | {row.same:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="folder or hub id of a model [a random Llama of 1 M parameters]")
    parser.add_argument("--task", default="e2e_nlg")
    parser.add_argument("--data", help="official files of the task [made-up texts]")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    examples = examples_of(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as work:
        path = options.model or str(random_model(Path(work), examples))
        model: Any = load_model(path, dtype)
        renderer = Renderer(
            load_tokenizer(path),
            overlong="truncate_source",
            positions=model.config.get_text_config().max_position_embeddings,
            reserve=options.max_new_tokens,
            generation_eos=model.generation_config.eos_token_id,
        )
        settings = GenerationSettings(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
        generator = HFGenerator(model.to(device).eval(), renderer, settings)
        rows = [compared(name, generator, examples, options.repeats) for name in ("generate", "label scores")]
    facts = {
        "date": str(date.today()),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": Path(options.model).name if options.model else "random Llama, 1 M parameters",
        "data": f"{options.task}, {options.split}" if options.data else "made up",
        "prompts": len(examples),
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
    }
    text = markdown(rows, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "evaluate.md").write_text(text)
    raw = {**facts, "rows": [{**vars(row), "ratio": row.ratio} for row in rows]}
    (options.out / "evaluate.json").write_text(json.dumps(raw, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
