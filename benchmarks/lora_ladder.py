"""Is a base's GGUF with `--lora` the adapter in transformers, and is what is wrong there named? By another trainer.

    rankwise export --install-converter
    python benchmarks/lora_ladder.py SmolLM2-135M-Instruct --data e2e_nlg --work FOLDER [--threads 2]
    python benchmarks/lora_ladder.py smolvlm --work FOLDER          # tiny, random weights, with pictures

A LoRA by PEFT, for a text model trained with the Trainer of transformers, is exported by `rankwise export
--adapter_gguf` and by llama.cpp's own converter. Then `rankwise validate --adapter_gguf` runs on sound files and on
files and servers that are wrong in one way. Kept: the first line of each verdict, the settings of which a rung breaks,
the multiple of the noise floor, exit code and seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from handoff import ALPHA, RANK, TARGETS, Bench
from peft import LoraConfig, get_peft_model
from PIL import Image
from shipbench_gguf import altered
from workload import command, machine

from rankwise import cli
from rankwise.data.device import DeviceTarget
from rankwise.device.llama.runtime import LlamaServer
from rankwise.files.atomic import read_if_there, write_json, write_text
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.converter import find_converter
from rankwise.gguf.lora import HALVES, sites_in
from rankwise.models.load import load_model
from rankwise.models.tiny import SIDE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from exported import TEXTS, vision_model

TINY = "smolvlm"
LARGER = 2.0  # the output head: random weights find all tokens alike otherwise
ITEMS, LONGEST, SHOWN = 8, 12, 240
INSTEAD = re.compile(r"the answers are (.+?) \(mean KL|(neither the base nor .+?) explains")
ROWS = [f"{text[:number]}." for text in TEXTS for number in (20, 34)]


@dataclass(frozen=True)
class Served:
    """A base's GGUF (or a server) and the LoRAs on it. reference: adapters in their order. scale: of the first one as
    the server has loaded it."""

    name: str
    base: Path
    loras: tuple[Path, ...]
    reference: tuple[Path, ...]
    mmproj: Path | None = None
    scale: float | None = None


class Ladders:
    """One model with two adapters, and everything that is served of it."""

    items, longest = ITEMS, LONGEST

    def __init__(self, bench: Bench, task: list[str]) -> None:
        self.bench, self.task = bench, task
        self.other, self.gguf = bench.work / "other", bench.work / "base-gguf"

    def file(self, form: str, kind: str = "base") -> Path:
        return self.gguf / f"{kind}-{form}.gguf"

    def lora(self, adapter: Path) -> Path:
        return next((self.bench.work / f"{adapter.name}-gguf").glob("*.gguf"))

    @property
    def mmproj(self) -> Path | None:
        return next(iter(self.gguf.glob("mmproj-*-f16.gguf")), None)

    def export(self) -> None:
        bench = self.bench
        if not self.gguf.is_dir():
            self.done("export", str(bench.base), "-o", str(self.gguf), "--outtype", "f16,q8_0")
        for adapter in (bench.adapter, self.other):
            if not (bench.work / f"{adapter.name}-gguf").is_dir():
                where = ["--base_model", str(bench.base), "-o", str(bench.work / f"{adapter.name}-gguf")]
                self.done("export", "--adapter_gguf", str(adapter), *where)

    def done(self, *words: str) -> None:
        with redirect_stdout(sys.stderr):
            assert cli.main([*words]) == 0

    def served(self) -> Iterator[Served]:
        work, adapter, f16 = self.bench.work, self.bench.adapter, self.file("f16")
        own, other = self.lora(adapter), self.lora(self.other)
        yield Served("the base in f16", f16, (own,), (adapter,), self.mmproj)
        yield Served("the base in Q8_0", self.file("q8_0"), (own,), (adapter,), self.mmproj)
        theirs = work / "converted.gguf"
        if not theirs.is_file():
            find_converter().convert_adapter(adapter, self.bench.base, theirs, "f16")
        yield Served("a LoRA by llama.cpp's converter, float16", f16, (theirs,), (adapter,), self.mmproj)
        yield Served("two LoRAs", f16, (own, other), (adapter, self.other), self.mmproj)
        yield Served("not applied: loaded at scale 0", f16, (own,), (adapter,), self.mmproj, scale=0.0)
        yield Served("loaded at scale 0.5", f16, (own,), (adapter,), self.mmproj, scale=0.5)
        yield Served("half of the layers are missing", f16, (self.half(own),), (adapter,), self.mmproj)
        yield Served("alpha doubled in the file", f16, (self.doubled(own),), (adapter,), self.mmproj)
        yield Served("another adapter's file", f16, (other,), (adapter,), self.mmproj)
        yield Served("merged into the base as well", self.merged(f16, own), (own,), (adapter,), self.mmproj)

    def half(self, source: Path) -> Path:
        out = self.bench.work / "half.gguf"
        layers = [int(name.split(".")[1]) for name in GGUFFile(source).tensors]
        with altered(source, out) as draft:
            for name in [name for name in draft.tensors if 2 * int(name.split(".")[1]) > max(layers)]:
                del draft.tensors[name]
        return out

    def doubled(self, source: Path) -> Path:
        out = self.bench.work / "doubled.gguf"
        with altered(source, out) as draft:
            draft["adapter.lora.alpha"] = 2 * GGUFFile(source).metadata["adapter.lora.alpha"]
        return out

    def merged(self, base: Path, source: Path) -> Path:
        out, lora = self.bench.work / "merged-f16.gguf", GGUFFile(source)
        if out.is_file():
            return out
        alpha = lora.metadata["adapter.lora.alpha"]
        with altered(base, out) as draft:
            for name in sites_in(lora):
                lora_a, lora_b = (lora.tensor(name + half).numpy() for half in HALVES)
                draft.put(name, draft.floats(name) + alpha / len(lora_a) * lora_b @ lora_a)
        return out

    def row(self, one: Served) -> dict[str, Any]:
        """What is there is not run again, so that a run that was stopped goes on."""
        kept = self.bench.work / "ladders" / f"{one.name}.json"
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(self.run(one)), encoding="utf-8")
        taken = json.loads(kept.read_text(encoding="utf-8"))
        found = json.loads((self.validation(one) / "validation.json").read_text(encoding="utf-8"))
        form, ladder = next(iter(found["parity"].items()))
        settings = [{"setting": "scale 1", **ladder}, *found["adapters"]["settings"][form]]
        rung = next(one for one in ladder["rungs"] if one["name"] == "logprobs")
        instead = INSTEAD.search(rung["why"])
        return {
            "served": one.name,
            "line": found["verdict"][0].replace(f"{self.bench.work}/", ""),
            "instead": next(filter(None, instead.groups())) if instead else "",
            "broken": [one["setting"] for one in settings if one["first_broken"]],
            "settings": len(settings),
            "kl": rung["measured"].get("kl_mean"),
            "floors": rung["measured"].get("floors", {}).get("kl_mean"),
            "effect": found["adapters"]["effect"]["kl_mean"],
            "exit": taken["exit"],
            "seconds": taken["seconds"],
        }

    def validation(self, one: Served) -> Path:
        return self.bench.work / "validations" / one.name

    def run(self, one: Served) -> dict[str, Any]:
        """Exit code and seconds."""
        if one.scale is None:
            return self.validate(one, [str(one.base), *(["--mmproj", str(one.mmproj)] if one.mmproj else [])])
        with LlamaServer(one.base, one.mmproj, 1024, self.bench.threads, loras=one.loras) as runtime:
            runtime.set_scales({0: one.scale})
            return self.validate(one, ["--server", runtime.talk.url, "--outtype", "f16"])

    def validate(self, one: Served, what: list[str]) -> dict[str, Any]:
        started = time.perf_counter()
        given = [*what, "--adapter_gguf", ",".join(map(str, one.loras))]
        given += ["--reference", ",".join(map(str, one.reference)), *self.task, "--threads", str(self.bench.threads)]
        given += f"--num_samples {self.items} --max_new_tokens {self.longest}".split()
        given += ["-o", str(self.validation(one))]
        with redirect_stdout(sys.stderr):
            code = cli.main(["validate", *given])
        assert code in (0, 6, 7), code
        found = {"exit": code, "seconds": time.perf_counter() - started}
        print(f"{one.name}: {found}", flush=True)
        return found


def random_adapter(base: Path, folder: Path, seed: int, targets: list[str], size: float) -> None:
    """A LoRA of random factors, as PEFT saves it."""
    if folder.is_dir():
        return
    model: Any = load_model(str(base), torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)


def of_text(model: Path, data: str, work: Path, threads: int) -> Ladders:
    """E2E rows; the adapter is trained on them."""
    bench = Bench(model, data, work, threads, quick=False)
    bench.timed("train", bench.train)
    random_adapter(bench.base, work / "other", 1, TARGETS, 0.02)
    return Ladders(bench, ["--task", "conversations", "--prompt", "chat", "--data_path", str(bench.rows)])


class TinyBench(Bench):
    """A tiny vision-language model with random weights, and rows with pictures."""

    def __init__(self, work: Path, threads: int) -> None:
        self.work, self.threads, self.seconds = work, threads, {}
        self.base, self.adapter, self.rows = work / "base", work / "adapter", work / "rows.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        if not self.base.is_dir():
            vision_model(self.base)
            model: Any = load_model(str(self.base), torch.float32)
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(LARGER)
                model.get_output_embeddings().weight[2] = 0  # </s>, at which llama.cpp ends every model's answers
            model.save_pretrained(self.base)
            for folder in (self.base, work):  # for the export, and for the rows
                DeviceTarget(image_size=SIDE, longest_edge=SIDE, max_new_tokens=LONGEST).save(folder)
        rows = []
        for number, text in enumerate(ROWS[:ITEMS]):
            noise = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
            Image.fromarray(noise).resize((56, 56), Image.Resampling.NEAREST).save(work / f"{number}.png")
            said = [{"role": "user", "content": f"<image>\n{text}"}, {"role": "assistant", "content": "It is red."}]
            rows.append(json.dumps({"id": f"row-{number}", "images": [f"{number}.png"], "messages": said}))
        self.rows.write_text("\n".join(rows) + "\n", encoding="utf-8")


def of_tiny(work: Path, threads: int) -> Ladders:
    bench = TinyBench(work, threads)
    # the text model's sites: a LoRA of llama.cpp acts on no other
    targets = r".*(language_model|text_model).*\.(q_proj|v_proj|up_proj|down_proj)"
    for seed, folder in enumerate((bench.adapter, work / "other")):
        random_adapter(bench.base, folder, seed, targets, 0.1)  # type: ignore[arg-type]
    return Ladders(bench, ["--task", "conversations", "--data_path", str(bench.rows)])


def report(name: str, found: dict[str, Any]) -> list[str]:
    def floors(row: dict[str, Any]) -> str:
        return "" if row["floors"] is None else f"{row['floors']:.2g}"

    def shortened(line: str) -> str:
        return line if len(line) <= SHOWN else f"{line[:SHOWN].rpartition(' ')[0]} …"

    rows = [
        f"| {one['served']} | {shortened(one['line'])} | {', '.join(one['broken']) or 'none'} of {one['settings']} | "
        f"{one['instead']} | {one['kl']:.1e} | {floors(one)} | {one['exit']} | {one['seconds']:.0f} |"
        for one in found["rows"]
    ]
    return [
        f"## {name}",
        "",
        f"{found['date']} · {found['machine']} · `{found['command']}`",
        "",
        f"LoRA of rank {found['rank']} by PEFT; mean KL to the base {found['rows'][0]['effect']:.2g}.",
        "",
        "| served | first line of `rankwise validate` | broken settings | at scale 1 the answers are | KL | floors "
        "| exit code | seconds |",
        "|---|---|---|---|---:|---:|---:|---:|",
        *rows,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a text model's folder, or {TINY}")
    parser.add_argument("--data", help="folder of E2E NLG, for a text model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=ITEMS)
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens of an answer")
    parser.add_argument("--only", nargs="+", help="names of what is served [all]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = given.work.resolve()
    if given.model == TINY:
        name, ladders = f"tiny {TINY}", of_tiny(work, given.threads)
    else:
        model = Path(given.model).resolve()
        name, ladders = Path(given.model).name, of_text(model, str(Path(given.data).resolve()), work, given.threads)
    ladders.items, ladders.longest = given.items, given.longest
    ladders.export()
    rows = [ladders.row(one) for one in ladders.served() if not given.only or one.name in given.only]
    rank = json.loads((ladders.bench.adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    found = {"rank": rank, "machine": machine(), "date": str(date.today()), "command": command(), "rows": rows}
    place = given.out / "lora_ladder.json"
    models = read_if_there(place) | {name: found}
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(place, models)
    sections = [line for each, one in models.items() for line in report(each, one)]
    write_text(given.out / "lora_ladder.md", "\n".join(["# A base's GGUF with `--lora`", "", *sections]))
    print("\n".join(report(name, found)))


if __name__ == "__main__":
    main()
