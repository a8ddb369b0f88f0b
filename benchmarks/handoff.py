"""Does `rankwise validate` tell, from outside, whether what answers is the model that was trained? By another trainer.

    rankwise export --install-converter
    python benchmarks/handoff.py SmolLM2-135M-Instruct --data e2e_nlg --work FOLDER [--threads 2]
    python benchmarks/handoff.py stories260K --data e2e_nlg --work FOLDER --quick --power

A LoRA is trained with PEFT and the Trainer of transformers on E2E rows, nothing of ours in it. Then `validate
--write_cases` runs once, timed, and its cases are put to servers: llama.cpp with the merged model (f16, Q8_0) and with
base + `--lora`, and a loopback server over transformers that is right, or wrong in one way at a time. Kept is the first
line of each verdict with its exit code. Power: the adapter at ever smaller scales, until `cannot tell`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from workload import command, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from handed_off import in_two_bits
from openai_server import Loopback

from rankwise.data.sources.load import load
from rankwise.device.handoff.cases import read_cases
from rankwise.device.handoff.verdict import judge
from rankwise.device.llama.runtime import LlamaServer
from rankwise.files.atomic import read_if_there, write_json, write_text

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE, BATCH = 8, 32, 1e-3, 4
OTHER = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
PLAIN = (  # for a model without a template of its own
    "{% for m in messages %}<s>{{ m['role'] }}:\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:\n{% endif %}"
)
SCALES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
ASKED = "Describe the restaurant in one sentence: {}"


class Rows(Dataset[dict[str, Any]]):
    """Conversations as `apply_chat_template` writes them; only answers are learnt."""

    def __init__(self, tokenizer: Any, rows: list[list[dict[str, str]]]) -> None:
        self.rows = []
        for row in rows:
            before = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
            whole = tokenizer.apply_chat_template(row, return_dict=True)["input_ids"]
            assert whole[: len(before)] == before
            self.rows.append({"input_ids": whole, "labels": [-100] * len(before) + whole[len(before) :]})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    whole = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in whole])
        for name, value in fill.items()
    }


def talks(data: str, split: str, count: int) -> list[list[dict[str, str]]]:
    found = load("e2e_nlg", data, split).items
    seen: dict[str, list[dict[str, str]]] = {}
    for one in found:
        asked = "\n".join(turn.text for turn in one.turns[:-1])
        row = [{"role": "user", "content": ASKED.format(asked)}, {"role": "assistant", "content": one.answer}]
        seen.setdefault(asked, row)
        if len(seen) == count:
            break
    return list(seen.values())


class Bench:
    """Folders of the run and what was measured. seconds: of each stage."""

    def __init__(self, model: Path, data: str, work: Path, threads: int, quick: bool) -> None:
        self.work, self.data, self.threads, self.quick = work, data, threads, quick
        self.times = work / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.times.read_text()) if self.times.is_file() else {}
        self.base, self.adapter, self.merged = work / "base", work / "adapter", work / "merged"
        self.rows, self.cases = work / "rows.jsonl", work / "cases"
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.tokenizer.chat_template = self.tokenizer.chat_template or PLAIN
        if not self.base.is_dir():
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(self.base)
            self.tokenizer.save_pretrained(self.base)
            for file in model.glob("tokenizer.model"):
                (self.base / file.name).write_bytes(file.read_bytes())
        rows = talks(data, "dev", 8 if quick else 24)
        lines = [json.dumps({"id": f"row-{n}", "messages": row}, ensure_ascii=False) for n, row in enumerate(rows)]
        self.rows.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def timed(self, name: str, work: Callable[[], Any]) -> None:
        """Once, also of a run that was stopped and goes on."""
        if name not in self.seconds:
            started = time.perf_counter()
            work()
            self.seconds[name] = time.perf_counter() - started
            self.times.write_text(json.dumps(self.seconds), encoding="utf-8")
            print(f"{name}: {self.seconds[name]:.0f} s", flush=True)

    def train(self) -> None:
        """PEFT and the Trainer, as their documentation has it."""
        if (self.adapter / "adapter_config.json").is_file():
            return
        torch.manual_seed(0)
        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(self.plain(), settings)
        steps = 20 if self.quick else 40
        arguments = TrainingArguments(
            str(self.work / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
        )
        rows = Rows(self.tokenizer, talks(self.data, "train", steps * BATCH))
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=padded).train()
        model.save_pretrained(self.adapter)

    def plain(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def tuned(self, share: Callable[[str], float] = lambda _: 1.0) -> Any:
        """Merged by PEFT; base + share(parameter)·(tuned − base)."""
        model = PeftModel.from_pretrained(self.plain(), self.adapter).merge_and_unload().eval()
        base = dict(self.plain().named_parameters())
        with torch.no_grad():
            for name, one in model.named_parameters():
                if share(name) != 1:
                    one.copy_(base[name] + share(name) * (one - base[name]))
        return model

    def merge(self) -> None:
        if not self.merged.is_dir():
            self.tuned().save_pretrained(self.merged)
            self.tokenizer.save_pretrained(self.merged)
            for file in self.base.glob("tokenizer.model"):
                (self.merged / file.name).write_bytes(file.read_bytes())

    def rankwise(self, *words: str) -> tuple[int, str]:
        """Exit code and output of a command, in a process."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        line = [sys.executable, "-m", "rankwise.cli", *words]
        done = subprocess.run(line, cwd=self.work, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 6, 7), f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.returncode, done.stdout

    def write_cases(self, tuned: Path | None = None, cases: Path | None = None) -> None:
        models = ["--reference", str(tuned or self.adapter), "--base_model", str(self.base)]
        self.rankwise("validate", *models, "--data_path", str(self.rows), "--write_cases", str(cases or self.cases))

    def verdict(self, name: str, url: str) -> dict[str, Any]:
        """Of a server; kept, so that a run that was stopped goes on."""
        kept = self.work / "verdicts" / name / "row.json"
        if kept.is_file():
            return dict(json.loads(kept.read_text(encoding="utf-8")))
        started = time.perf_counter()
        words = [
            "validate",
            "--cases",
            str(self.cases),
            "--server",
            url,
            "-o",
            str(self.work / "verdicts" / name),
        ]
        code, said = self.rankwise(*words)
        line = next(each for each in said.splitlines() if not each.startswith("note"))
        print(f"{name}: exit {code}: {line}", flush=True)
        row = {"served": name, "line": line, "exit": code, "seconds": time.perf_counter() - started}
        kept.write_text(json.dumps(row), encoding="utf-8")
        return row


def loopbacks(bench: Bench) -> Iterator[tuple[str, Callable[[], Any], dict[str, Any]]]:
    """Name, the model that is served, and how."""
    layers = bench.plain().config.num_hidden_layers

    def half(name: str) -> float:
        return float(any(f"layers.{number}." in name for number in range((layers + 1) // 2)))

    bos = bench.tokenizer.bos_token_id
    yield "tuned, float32", bench.tuned, {}
    yield "tuned, bfloat16, top 5", lambda: bench.tuned().to(torch.bfloat16), {"most": 5}
    yield "base", lambda: bench.plain().eval(), {}
    yield "half of the layers", lambda: bench.tuned(half), {}
    yield "attention alone", lambda: bench.tuned(lambda name: float("self_attn" in name)), {}
    yield "half the scale", lambda: bench.tuned(lambda _: 0.5), {}
    yield "alpha left out", lambda: bench.tuned(lambda _: RANK / ALPHA), {}
    yield "another template", bench.tuned, {"template": OTHER}
    yield "another template, chat alone", bench.tuned, {"template": OTHER, "apis": ["chat"]}
    yield "a second BOS", bench.tuned, {"begin": bos}
    yield "a context of 48 tokens", bench.tuned, {"keep": 48}
    yield "weights of two bits", lambda: in_two_bits(bench.tuned()), {}


class Remembering(Loopback):
    """The same prompt by another API is not computed again."""

    def distribution(self, ids: Any, inputs: Any) -> torch.Tensor:
        known = self.__dict__.setdefault("known", {})
        if tuple(ids) not in known:
            known[tuple(ids)] = super().distribution(ids, inputs)
        return known[tuple(ids)]


def of_loopbacks(bench: Bench) -> Iterator[dict[str, Any]]:
    for name, model, how in loopbacks(bench):
        with Remembering(model(), bench.tokenizer, **how) as server:
            yield {"by": "transformers, loopback", **bench.verdict(name, server.url)}


def of_llama(bench: Bench) -> Iterator[dict[str, Any]]:
    """llama.cpp's own OpenAI API."""
    for name, files in {"merged": bench.merged, "base": bench.base}.items():
        if not (bench.work / f"{name}-gguf").is_dir():
            code, said = bench.rankwise(
                "export", str(files), "-o", str(bench.work / f"{name}-gguf"), "--outtype", "f16,q8_0"
            )
            assert code == 0, said
    lora = bench.work / "lora-gguf"
    if not lora.is_dir():
        words = ["--adapter_gguf", str(bench.adapter), "--base_model", str(bench.base), "-o", str(lora)]
        code, said = bench.rankwise("export", *words)
        assert code == 0, said
    merged, base = bench.work / "merged-gguf", bench.work / "base-gguf" / "base-f16.gguf"
    served = {
        "merged, f16": (merged / "merged-f16.gguf", ()),
        "merged, Q8_0": (merged / "merged-q8_0.gguf", ()),
        "base, f16, with --lora": (base, (next(lora.glob("*.gguf")),)),
        "base, f16": (base, ()),
    }
    for name, (file, loras) in served.items():
        with LlamaServer(file, context=1024, threads=bench.threads, loras=loras) as runtime:
            yield {"by": "llama.cpp", **bench.verdict(name, f"{runtime.talk.url}/v1")}


def power(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ever weaker adapters: where answers of the tuned model in bfloat16, and of the base, cannot be told apart any
    more. By the cases alone, without a server."""
    for scale in SCALES:
        folder, written = bench.work / f"weak-{scale}", bench.work / f"cases-{scale}"
        if not written.is_dir():
            bench.tuned(lambda _, scale=scale: scale).save_pretrained(folder)
            bench.tokenizer.save_pretrained(folder)
            bench.write_cases(folder, written)
            shutil.rmtree(folder)
        candidates = read_cases(written).candidates
        found = {}
        for served in ("bfloat16", "base"):
            told = {place: candidates.as_server(served, place, 20) for place in range(len(candidates.ids))}
            found[served] = judge("ids", candidates, told, 10.0)
        row = {"scale": scale, "apart": found["bfloat16"].apart, "limit": found["bfloat16"].limit}
        row |= {served: one.kind for served, one in found.items()}
        print(row, flush=True)
        yield row


def bench_all(model: Path, data: str, work: Path, threads: int, quick: bool, weaker: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    bench = Bench(model, data, work, threads, quick)
    bench.timed("train", bench.train)
    bench.timed("merge", bench.merge)
    bench.timed("write the cases", bench.write_cases)
    size = sum(file.stat().st_size for file in bench.cases.rglob("*") if file.is_file())
    rows = [] if quick else list(of_llama(bench))
    rows += of_loopbacks(bench)
    return {
        "model": model.name,
        "machine": machine(),
        "quick": quick,
        "seconds": bench.seconds,
        "case_bytes": size,
        "verdicts": rows,
        "power": list(power(bench)) if weaker else [],
        "date": str(date.today()),
        "command": command(),
    }


def report(found: dict[str, Any]) -> list[str]:
    """The section of one model."""
    rows = [
        f"| {one['by']} | {one['served']} | {one['line']} | {one['exit']} | {one['seconds']:.0f} |"
        for one in found["verdicts"]
    ]
    weak = [
        f"| {one['scale']:g} | {one['apart']:.1e} | {one['limit']:.1e} | {one['bfloat16']} | {one['base']} |"
        for one in found["power"]
    ]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in found["seconds"].items())
    lines = [
        f"## {found['model']}",
        "",
        f"{found['date']} · {found['machine']} · `{found['command']}`",
        "",
        f"LoRA of rank {RANK} by PEFT and the Trainer. Seconds: {seconds}. Cases: {found['case_bytes'] / 1e6:.2f} MB.",
        "",
        "| server | what it serves | first line of `rankwise validate` | exit code | seconds |",
        "|---|---|---|---:|---:|",
        *rows,
        "",
    ]
    if not weak:
        return lines
    return [
        *lines,
        "Power: the adapter at a smaller scale is the tuned model; top 20 of it in bfloat16 and of the base.",
        "",
        "| scale | KL, base to tuned | rounding (10 floors), KL | tuned served | base served |",
        "|---:|---:|---:|---|---|",
        *weak,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="folder of E2E NLG")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="8 rows, 20 steps, no llama.cpp")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--power", action="store_true", help="also ever weaker adapters, six more times the cases")
    given = parser.parse_args()
    work, data = given.work.resolve(), str(Path(given.data).resolve())
    found = bench_all(given.model.resolve(), data, work, given.threads, given.quick, given.power)
    place = given.out / "handoff.json"
    models = read_if_there(place) | {found["model"]: found}
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(place, models)
    sections = [line for one in models.values() for line in report(one)]
    write_text(given.out / "handoff.md", "\n".join(["# Is what answers the model that was trained?", "", *sections]))
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
