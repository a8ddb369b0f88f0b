"""What the commands write and what their dry runs print, made anew on tiny models: `tests/data/before` is kept of it.

    OMP_NUM_THREADS=1 python tests/helpers/freeze.py         # only on purpose: it replaces what was frozen

The commands of `LINES` run in one folder, in their order, in this process, seeded, on the CPU. Kept is every file of
ours that is data (`KEPT`; no page, no plot, no weights of a model), under its place in that folder, and per command
`dry/NAME.yaml`. What differs from run to run is replaced by a value of its own kind, so that the files can still be
read: see `RULES`. Floats that were computed differ in their last digits from one processor to the next:
`test_before.py` compares them as numbers, and everything else byte by byte.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bundled
import exported
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE, tiny_llama
from tiny_depth import tiny_estimator
from tiny_vision import drawn_image, tiny_smolvlm

from rankwise import cli
from rankwise.device import bundle
from rankwise.device.handoff.answers import Heard, TokenLogProb
from rankwise.device.handoff.cases import TEXT as TEXT_API
from rankwise.device.handoff.cases import read_cases
from rankwise.device.sweep import ItemOutcome, Tried, choose
from rankwise.files.document import lines_of
from rankwise.gguf.converter import MANIFEST, find_converter
from rankwise.pipeline.table import COMMANDS

BEFORE = Path(__file__).parents[1] / "data" / "before"
DRY, SHIPPED = "dry", "shipped"
SWEPT = {"q4_0": 1, "q8_0": 0, "f16": 0}  # form → how many of eight items it gets wrong
OF_SHIPPED = (
    *("export/export.json", "validation/validation.json", "validation/q8_0/answers.jsonl", "validation/manifest.json"),
    *(f"bundle/{name}.json" for name in ("bundle", "golden/golden", "abstain", "labels", "prompt", "device", "input")),
    "bundle/manifest.json",
)
PLACES = ("The Vaults", "Alimentum", "Cotto", "Zizzi", "Aromi", "Strada")
AREAS = ("riverside", "city centre", "north", "old town")
ELEMENTS = {"water": (30, 90, 180), "wood": (45, 110, 45), "fire": (225, 50, 20)}
TUNED = re.compile(r"(q_proj|down_proj)\.weight$")

TEXT = "--task e2e_nlg --data_path data"
FAST = "--use_cpu --seed 3 --no_plots --per_device_train_batch_size 4 --learning_rate 1e-2 --logging_steps 1"
SAVING = "--save_strategy steps --save_steps 2 --max_steps 4 --eval_strategy steps --eval_steps 2"
SEES = "--data_path talks.json --image_folder pictures --max_seq_length 512"
DEPTH = "--use_depth True --depth_checkpoint_path estimator --depth_input_size 56 --depth_cache maps"
FEW = "--device cpu --max_new_tokens 2 --num_samples 4"
STUDY = "--train_size 12 --dev_size 4 --test_size 4 --budgets uniform:2 --steps 2 --batch_size 4 --first_seeds 2"
PROBE = "--probe_rows 8 --probe_steps 2 --grid_points 2 --grid_growth 1 --tuning_seeds 1 --more_seeds 1 --most_seeds 2"
LADDER = "--steps 8 --batch_size 4 --rates 3e-4,3e-3,3e-2 --ranks 4,1 --placements mlp --delta 0.1 --choose_size 20"
LADDER += " --confirm_size 20"
NET = "--features cache --epochs 2 --rank 4 --device cpu"
ALLOCATOR = "--allocator_init_warmup 1 --allocator_final_warmup 1 --allocator_mask_interval 1"

WRITTEN = f"""\
ranks: base tuned -o ranks --max_rank 8 --min_rank 1 --no_plots --save_delta_weights --emit peft
ranks gain: base tuned -o gain --min_rank 1 --max_rank 8 --no_plots --gain data --task e2e_nlg --num_samples 4
    --budget uniform:2 --probe2 tuned
ranks diff: ranks gain
extract: base tuned --rank 2 -o extracted --device cpu
compress: extracted --energy 0.9 -o compressed
finetune: --model_name base {TEXT} --use_cpu --max_steps 1 --batch_size 2 --gradient_accumulation 1 -o full
train: --model_name base {TEXT} {FAST} {SAVING} -o run --lora_config ranks --schedule both:2>mlp --log_frequency
    1 --val_fraction 0.2
train allocated: --model_name base {TEXT} {FAST} {SAVING} -o allocated --lora_r 2 --allocator adalora
    --val_fraction 0.2
train depth: --model_name eye {SEES} {FAST} {DEPTH} --max_steps 1 --save_strategy no -o depth --lora_r 2
    --val_fraction 0
train estimate: --model_name base {TEXT} --estimate --gpu 24GB --estimate_out estimate.json -o nowhere
check: --model_name eye {SEES} -o check
label: photos -o labelled --image_size 32 --requests_per_minute 60000 --max_retries 1 --concurrency 1
    --loopback_teacher
label folders: photos --from_folders -o dataset --image_size 32
evaluate: run {TEXT} {FEW} -o run
study: --model_name base {TEXT} {STUDY} {PROBE} --arms uniform,energy -o study --device cpu --resamples 50
advise: --model_name base --task e2e_nlg --data_path more {LADDER} -o advise --device cpu --seed 3 --no_plots
merge: extracted --base_model base -o merged
compare: run allocated -o comparison --no_plots
report: run
card: run
features capture: pictures --model eye -o cache --image_size 56 --shard_size 4 --device cpu
features train: {NET} --results_dir nets --log_dir log
features train allocated: {NET} --results_dir nets2 --log_dir log2 --arch AdaLoRA --use_rank_allocator
    {ALLOCATOR}
features compare: --results_dir nets --features cache --arch ResMLP --device cpu --sweep 2,4 --repeats 1
    --no_plots
features show: --results_dir nets --features cache --channels 2 --device cpu
features downstream: eye --data_path talks.json --image_folder pictures --image_size 56 --arch ResMLP
    --results_dir nets --num_samples 3 --device cpu --no_plots
run: recipe.yaml -o pipeline
batch: recipe.yaml -o batch
tiny: -o tiny --quick
demo: -o demo --quick
doctor: --json
schema: ranks
completion: bash
"""
LINES = {name: line for name, _, line in (one.partition(": ") for one in re.split(r"\n(?=\S)", WRITTEN))}
CASES = f"--reference tuned --base_model base {TEXT} --split dev --write_cases cases --num_samples 4 --max_new_tokens 3"
TOLD = "told.jsonl"  # what a server that is the tuned model tells
SHIPPING = {
    "export": "{model} -o again",
    "validate": "export --task labels --data_path dataset --outtype q8_0 -o validated --threads 1",
    "bundle": "export -o bundled --threads 1",
}
RECIPE = """\
stages:
  - {command: ranks, base: base, tuned: tuned, max_rank: 8, no_plots: true, output_dir: "${run}/ranks"}
"""
ONLY_DRY = ("batch", "tiny", "demo", "doctor", "schema", "completion")
TENSORS = (
    r"extracted/adapter_model|cases/log_probs|maps/.*|cache/.*|study/runs/.*"
    r"|nets2/AdaLoRA/(best_model|checkpoint-14/rank_allocation)"
)
KEPT = re.compile(rf"\.(json|jsonl|csv)$|^({TENSORS})\.safetensors$")
LEFT_OUT = re.compile(  # what we gave, what libraries write, and what is another of what is kept
    r"^(base|tuned|eye|estimator|data|more|pictures|photos)/|^advise/(?!advice\.json)|^talks\.json|tokenizer|^merged/.*config\.json$(?<!resolved_config\.json)|trainer_state"
    r"|safetensors\.index\.json$|checkpoint-(2|7)/|^pipeline/(ranks|logs)/|^nets2/\w+/(history|split|test_|train|res|man)"
    r"|^gain/.*/detailed|^allocated/(grad|split|results|checkpoint)|^dataset/(conv|train|val|task|device|quar)|^log2/|^full/deltas/config"
    r"|^depth/(sites|grad|results|split|train)|^(run|depth)/checkpoint-4/adapter|^study/(probe|ranks)|svd_nn"
)
DATED = re.compile(r"logs_\d{8}_\d{6}")
RULES = {  # what → where, pattern, value
    "place": ("", "{here}", "/here"),
    "time": ("", r"\b20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?", "2026-01-01T00:00:00"),
    "duration": (r"json", r'("(?:\w*seconds(?:_per_\w+)?|time|slowest|fastest)": )[\d.e+-]+', r"\g<1>0.5"),
    "duration in the log": (r"training_log\.csv", r"(?m)^(\d+,(?:[^,]*,){5})[\d.]+", r"\g<1>0.5"),
    "duration in a comparison": (r"comparison\.csv", r"(?m)^(\w+,\d+,\d+,)[\d.]+", r"\g<1>0.5"),
    "size": (r"rankwise_manifest", r'("size": )\d+', r"\g<1>1"),
    "usage": (r"json", r'("(?:peak_\w+|cpu_percent|runs_per_hour)": )[\d.]+', r"\g<1>1"),
    "version": (
        r"json",
        r'("(?:python|rankwise|torch|transformers|peft|sacrebleu|rouge_score|nltk|peft_version)": )"[^"]*"',
        r'\g<1>"0.0.0"',
    ),
}


def world() -> None:
    """Models, data and pictures in the current folder."""
    base = tiny_llama(Path("base"), tokenizer={"chat_template": CHAT_TEMPLATE})
    shutil.copytree(base, "tuned")
    weights = {name: (weight * 1024).round() / 1024 for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for name in filter(TUNED.search, weights):
        steps = torch.arange(weights[name].numel()).reshape(weights[name].shape)
        weights[name] = weights[name] + (steps % 7 - 3) / 64
    save_file(weights, "tuned/model.safetensors", metadata={"format": "pt"})
    tiny_smolvlm(Path("eye"), longest_edge=64)
    tiny_estimator(Path("estimator"))
    rows = [f'"name[{place}], area[{area}]",{place} is in the {area}.' for place in PLACES for area in AREAS]
    Path("data").mkdir()
    for name in ("trainset.csv", "devset.csv"):
        Path("data", name).write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    Path("more").mkdir()
    rows = [f'"name[{place} {number}]",{place} has {number} tables.' for place in PLACES for number in range(12)]
    Path("more", "trainset.csv").write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    talks: list[dict[str, Any]] = []
    Path("pictures").mkdir()
    for number in range(12):
        drawn_image(number, (56, 56)).save(f"pictures/{number}.png")
        said = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "It is red."}]
        talks.append({"id": f"row {number}", "image": f"{number}.png", "conversations": said})
    Path("talks.json").write_text(json.dumps(talks), encoding="utf-8")
    for number in range(12):
        element = list(ELEMENTS)[number % 3]
        image = Image.new("RGB", (40 + number, 30), ELEMENTS[element])
        image.putpixel((0, 0), (number, 255, 255))
        file = Path("photos", element, f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    Path("recipe.yaml").write_text(RECIPE)


def run_all() -> Iterator[tuple[str, str]]:
    """The commands, in the current folder; names and what their dry runs print."""
    seen: set[str] = set()
    for name, line in LINES.items():
        command = next(one for one in sorted(COMMANDS, key=len, reverse=True) if f"{name} ".startswith(f"{one} "))
        words = [*command.split(), *line.split()]
        if command not in seen:
            seen.add(command)
            yield command, said([*words, "--dry-run"])
        if command not in ONLY_DRY:
            said(words)


def hand_off() -> None:
    """Cases, and the verdict on answers that are the tuned model's."""
    said(["validate", *CASES.split(), "--device", "cpu"])
    cases = read_cases(Path("cases"))
    top = [cases.candidates.as_server("tuned", row, 64) for row in range(len(cases.candidates.ids))]
    answers = [
        Heard(case.id, place.forced, TEXT_API, tuple(TokenLogProb(value, id) for id, value in top[place.row].items()))
        for case in cases.cases
        for place in case.places
    ]
    Path(TOLD).write_text(lines_of(one.as_row() for one in answers), encoding="utf-8")
    said(["validate", "--cases", "cases", "--answers", TOLD, "-o", "handoff"])


def said(words: list[str]) -> str:
    """What a command line prints. It must succeed."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = cli.main(words)
    assert code == 0, f"rankwise {' '.join(words)}: exit {code}\n{errors.getvalue()}"
    return out.getvalue()


def made(folder: Path) -> dict[str, bytes]:
    """Name → normalised content: all that `BEFORE` keeps, made in this empty folder."""
    before = Path.cwd()
    try:
        os.chdir(folder)
        with mock.patch.dict(os.environ), mock.patch.object(os, "fsync"):  # the disk is not waited for
            world()
            dry = {f"{DRY}/{name.replace(' ', '_')}.yaml": text.encode() for name, text in run_all()}
            hand_off()
        files = {kept_name(file): file.read_bytes() for file in kept(Path())}
    finally:
        os.chdir(before)
    return {name: normal(name, content, folder) for name, content in (dry | files).items()}


def kept(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and KEPT.search(file.as_posix()) and not LEFT_OUT.search(file.as_posix()):
            yield file


def kept_name(file: Path) -> str:
    """Without the time in a log folder's name; of the depth maps one, for their names follow from weights."""
    name = DATED.sub("logs_20260101_000000", file.as_posix())
    return "maps/map.safetensors" if name.startswith("maps/") else name


def normal(name: str, content: bytes, folder: Path) -> bytes:
    if name.endswith(".safetensors"):
        return content
    text = content.decode()
    for where, pattern, value in RULES.values():
        if re.search(where, name):
            text = re.sub(pattern.replace("{here}", re.escape(str(folder.resolve()))), value, text)
    return text.encode()


def shipped(folder: Path) -> dict[str, bytes]:
    """The same of what `bundled.py` leaves in a folder, and a sweep of ours."""
    items = {
        form: {f"i{place}": ItemOutcome(place >= wrong, 0.5) for place in range(8)} for form, wrong in SWEPT.items()
    }
    tried = [Tried(form, size, items[form], 1000) for size, form in enumerate(items, 1)]
    sweep = choose(tried).save(folder).read_bytes()
    files = {f"{SHIPPED}/{name}": (folder / name).read_bytes() for name in OF_SHIPPED}
    files |= {
        f"{SHIPPED}/sweep.json": sweep,
        f"{SHIPPED}/converter.json": (find_converter().folder / MANIFEST.name).read_bytes(),
    }
    model = json.loads(files[f"{SHIPPED}/export/export.json"])["model"]["path"]
    with contextlib.chdir(folder):
        for command, line in SHIPPING.items():
            told = said([command, *line.format(model=model).split(), "--dry-run"])
            files[f"{DRY}/{command}.yaml"] = told.replace(model, "/model").encode()
    return {name: normal(name, content, folder) for name, content in files.items()}


def write(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        contents = made(Path(place))
    with tempfile.TemporaryDirectory() as place, mock.patch.object(os, "fsync"):
        export = exported.exported_vision(Path(place) / "vision")
        bundle.run(bundled.asked(bundled.shipped_in(Path(place) / "shipped", export)))
        contents |= shipped(Path(place) / "shipped")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else BEFORE
    shutil.rmtree(target, ignore_errors=True)
    write(contents, target)
