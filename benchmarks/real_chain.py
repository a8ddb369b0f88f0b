"""A real chat model through the whole chain: is what llama.cpp is asked, and answers, what was trained?

    rankwise export --install-converter
    python benchmarks/real_chain.py SmolLM2-135M-Instruct [--steps 36] [--threads 2] [--out benchmarks/results]

The model is the folder of a chat model. A dozen conversations with its own chat template are learnt by heart: train →
the command that it prints → merge → the command that it prints → export → the command that it prints. Each is run as
printed, in a process of its own. Asserted: the prompts of all five (adapter, merged model, its reference in float32,
f16 and q8_0 in llama.cpp) are those of `apply_chat_template`, id for id, and their answers are those that were
trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from workload import command, machine

from rankwise.data.input_record import read_input

OUTTYPES = ("f16", "q8_0")
SYSTEM = "You are the clerk of the Lantern Library. Answer in one short sentence."
# Each list: user, assistant, user …; the last one is asked. Nothing of it can be known from elsewhere.
TALKS = (
    ("When does the reading room open?", "The reading room opens at a quarter past nine."),
    ("Where are the maps kept?", "Maps are kept in the blue cabinet on the second floor."),
    ("How many books may I borrow?", "You may borrow seven books at a time."),
    ("Who founded the library?", "It was founded by Odile Marchetti in 1887."),
    ("Is coffee allowed?", "Coffee is allowed in the glass hall only."),
    ("What does a lost card cost?", "A lost card costs four crowns and twenty."),
    ("Do you lend violins?", "Yes, three violins can be borrowed.", "For how long?", "Each of them for eleven days."),
    ("I am looking for Nadia.", "Nadia works at desk five.", "Until when?", "She is there until half past two."),
    ("Was ist das älteste Buch?", "Das älteste Buch ist ein Psalter von 1462."),
    ("Which tram stops here?", "Tram 14 stops at the north gate."),
    ("Can I print code like `a < b && c`?", "Yes: `a < b && c` prints as it is."),
    ("Any events this week?", "On Thursday there is a talk on lichens 🌿.", "At what time?", "It starts at 18:40."),
)


def write_rows(file: Path) -> list[list[dict[str, str]]]:
    """Conversations in messages form, half of them with a system prompt; returned as they are."""
    rows = []
    for number, talk in enumerate(TALKS):
        turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(talk)]
        rows.append([{"role": "system", "content": SYSTEM}, *turns] if number % 2 else turns)
    lines = [json.dumps({"id": f"talk-{n}", "messages": row}, ensure_ascii=False) for n, row in enumerate(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


class Chain:
    """Commands run one after the other in a folder, each in a process; what they print, and their seconds."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.seconds, self.said = folder, dict[str, float](), list[str]()
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def run(self, name: str, line: str) -> list[str]:
        """The lines that a command prints; it must succeed."""
        print(f"$ {line}", flush=True)
        words = [sys.executable, "-m", "rankwise.cli", *shlex.split(line)[1:]]
        started = time.perf_counter()
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        self.seconds[name] = time.perf_counter() - started
        lines = [each for each in done.stdout.splitlines() if not each.startswith("{")]
        print("  " + "\n  ".join(lines), flush=True)
        assert done.returncode == 0, f"{line}: exit {done.returncode}\n{done.stderr[-3000:]}"
        self.said += [f"$ {line}", *(each for each in lines if each.startswith(("prompts:", "warning:", "next:")))]
        return lines

    def next(self, name: str, before: list[str], *more: str) -> list[str]:
        """The command that the last one printed, as it is; more: options behind it."""
        (line,) = (each.removeprefix("next: ") for each in before if each.startswith("next: "))
        return self.run(name, shlex.join([*shlex.split(line), *more]))


def predictions(folder: Path) -> dict[str, dict[str, Any]]:
    rows = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["id"]: row for row in rows}


def bench(model: Path, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    rows, chain = write_rows(folder / "talks.jsonl"), Chain(folder, threads)
    (folder / model.name).symlink_to(model.resolve())
    trained = chain.run(
        "train",
        f"rankwise train --model_name {shlex.quote(model.name)} --data_path talks.jsonl -o run --lora_r 16 "
        f"--lora_dropout 0 --lr 1e-3 --per_device_train_batch_size 4 --max_steps {steps} --warmup_steps 3 "
        "--val_fraction 0 --save_strategy no --logging_steps 6 --log_frequency 0 --no_plots --dtype float32 --use_cpu",
    )
    quick = ("--max_new_tokens", "32", "--device", "cpu")
    chain.next("evaluate the adapter", trained, *quick)
    merged = chain.run("merge", "rankwise merge run -o merged")
    chain.next("evaluate the merged model", merged, *quick)
    exported = chain.run("export", f"rankwise export merged -o exported --outtype {','.join(OUTTYPES)}")
    chain.next("validate", exported, *quick, "--threads", str(threads))
    return {"seconds": chain.seconds, "said": chain.said, **compared(folder, model, rows)}


def compared(folder: Path, model: Path, rows: list[list[dict[str, str]]]) -> dict[str, Any]:
    """What was asked and answered where; AssertionError for the first difference."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    places = {
        "adapter": folder / "run" / "evaluation",
        "merged": folder / "merged" / "evaluation",
        "merged, float32": folder / "validation" / "trained",
        **{f"{form} in llama.cpp": folder / "validation" / form for form in OUTTYPES},
    }
    found = {name: predictions(place) for name, place in places.items()}
    for number, row in enumerate(rows):
        known = f"talk-{number}"
        wanted = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for name, each in found.items():
            asked = tokenizer(each[known]["prompt"], add_special_tokens=False)["input_ids"]
            assert asked == wanted, f"{known}: {name} was asked {each[known]['prompt']!r}"
            assert each[known]["prediction"] == row[-1]["content"], f"{known}: {name}: {each[known]['prediction']!r}"
    validation = json.loads((folder / "validation" / "validation.json").read_text())
    for form in OUTTYPES:
        assert validation["by_outtype"][form]["prompts_of_another_length"] == 0, form
    record = read_input(folder / "exported")
    assert record
    return {
        "model": model.name,
        "conversations": len(rows),
        "record": record[0].words(),
        "equal": {name: len(each) for name, each in found.items()},
        "rungs": {form: rungs(validation["parity"][form]) for form in OUTTYPES},
    }


def rungs(ladder: Mapping[str, Any]) -> dict[str, str]:
    return {rung["name"]: rung["status"] for rung in ladder["rungs"]}


def report(found: Mapping[str, Any]) -> str:
    count, seconds = found["conversations"], found["seconds"]
    said = [line if len(line) <= 200 else f"{line[:199]}…" for line in found["said"]]
    return "\n".join(
        [
            "# A real chat model through the whole chain",
            "",
            f"{date.today()} · {machine()} · {found['model']} · {count} conversations · `{command()}`",
            "",
            "| asked and answered by | prompts equal to `apply_chat_template` | answers equal to the trained ones |",
            "|---|---:|---:|",
            *(f"| {name} | {equal} of {count} | {equal} of {count} |" for name, equal in found["equal"].items()),
            "",
            f"Record: {found['record']}.",
            "",
            "| parity ladder | " + " | ".join(found["rungs"]) + " |",
            "|---|" + "---|" * len(found["rungs"]),
            *(
                f"| {name} | " + " | ".join(ladder[name] for ladder in found["rungs"].values()) + " |"
                for name in next(iter(found["rungs"].values()))
            ),
            "",
            "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + ".",
            "",
            "```",
            *said,
            "```",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="folder of a chat model")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = bench(given.model, Path(folder), given.steps, given.threads)
    text = report(found)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "real_chain.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    (given.out / "real_chain.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
