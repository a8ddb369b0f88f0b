"""Every command × what a command line can be: help, a missing file, a place that takes no output, a wrong type, an
unknown flag, a missing extra, a terminal that is not UTF-8, a dry run: one sentence, the exit code, nothing left."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factor_folders import make_cache, make_run, matrices
from installs import hide_modules, missing
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_llama

from rankwise import cli
from rankwise.cli import COMMANDS
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import describe
from rankwise.demo.restaurants import write_task
from rankwise.errors import UsageError
from rankwise.files.plan import write_plan
from rankwise.options.field import Option, options_of
from rankwise.page import terminal
from rankwise.pipeline.table import command_options

ROWS = "--task e2e_nlg --data_path @/rows.csv"
# Command → a line that works on the folder `@`, and how its dry run ends there.
LINES = {
    "ranks": ("@/base @/tuned", 0),
    "ranks diff": ("@/plan.json @/plan.json", 0),
    "extract": ("@/base @/tuned --rank 2", 0),
    "compress": ("@/lora --energy 0.9", 0),
    "finetune": (f"--model_name @/base {ROWS}", 0),
    "train": (f"--model_name @/base {ROWS}", 0),
    "check": (f"{ROWS} --model_name @/base", 0),
    "label": ("@/photos --from_folders", 0),
    "evaluate": (f"@/base {ROWS}", 0),
    "advise": (f"@/base {ROWS}", 3),
    "study": (f"--model_name @/base {ROWS} --train_size 4 --dev_size 2 --test_size 2", 0),
    "compare": ("@/run @/run2 --no_plots", 0),
    "report": ("@/run", 0),
    "merge": ("@/lora --base_model @/base", 0),
    "export": ("@/base --outtype f16", None),  # as the converter is there or not
    "validate": (f"@/export {ROWS}", 3),
    "bundle": ("@/export", 3),
    "card": ("@/run", 3),
    "features capture": ("--synthetic 4 --tokens 8 --channels 32", 0),
    "features train": ("--features @/cache --arch MLP --rank 2", 0),
    "features compare": ("--results_dir @/results --no_plots", 0),
    "features show": ("--results_dir @/results --arch MLP", 0),
    "features downstream": ("@/base --data_path @/rows.csv --no_plots", None),
    "run": ("@/own.yaml", 0),
    "batch": ("@/own.yaml", 0),
    "schema": ("ranks", 0),
    "completion": ("bash", 0),
    "tiny": ("", 0),
    "demo": ("", 0),
    "doctor": ("", 0),
}
NO_OUTPUT = ("doctor", "ranks diff", "features show", "features downstream", "features compare")
NOT_OURS = {"option", "help", "dry_run"}


def test_the_table_is_whole() -> None:
    assert list(LINES) == list(COMMANDS) or set(LINES) == set(COMMANDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small thing of each kind that commands take."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny_llama(folder / "base", num_hidden_layers=1)
    shutil.copytree(base, folder / "tuned")
    site = "model.layers.0.self_attn.q_proj"
    for name, rank in (("plan", 4), ("plan2", 2)):
        write_plan(folder / f"{name}.json", RankPlan((PlannedSite(describe(site, (8, 4)), rank),)))
    (folder / "lora").mkdir()
    key = f"base_model.model.{site}.lora_"
    wide = json.loads((base / "config.json").read_text())["hidden_size"]
    pair = {f"{key}A.weight": torch.ones(2, wide), f"{key}B.weight": torch.ones(wide, 2)}
    save_file(pair, folder / "lora" / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}'
    (folder / "lora" / "adapter_config.json").write_text(config)
    write_task(folder / "rows.csv", random.Random(0), count=12, references=1, held_out=False)
    for element in ("fire", "water"):
        for place in range(2):
            picture = folder / "photos" / element / f"{place}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (place * 90, 0, 90)).save(picture)
    for run in ("run", "run2"):
        (folder / run).mkdir()
        (folder / run / "training_log.csv").write_text("step,loss\n1,2.5\n2,2.0\n")
    cache = make_cache(folder / "cache", matrices(20))
    make_run(folder / "results", cache, "MLP")
    for name in ("export", "empty"):
        (folder / name).mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "wrong.csv").write_text("a,b\n1,2\n")
    (folder / "wrong.yaml").write_text(f"stages: [{{command: report, run: {folder / 'nowhere'}}}]")
    (folder / "own.yaml").write_text(f"stages: [{{command: report, run: {folder / 'run'}}}]")
    (folder / "file").write_text("")
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; at the end neither it nor the world holds more than before."""
    monkeypatch.chdir(tmp_path)
    before = sorted(world.rglob("*"))
    yield tmp_path
    assert sorted(world.rglob("*")) == before
    assert list(tmp_path.rglob("*")) == []


def words(name: str, world: Path, *more: str) -> list[str]:
    return [*name.split(), *LINES[name][0].replace("@", str(world)).split(), *more]


def called(line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, what stands on the error stream beside notes); flags in it are the command's own."""
    code = cli.main(line)
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    noise = ("note", "warning")
    lines = [text for text in said.err.splitlines() if text and not text.lower().startswith(noise)]
    if code:
        assert len([text for text in lines if text.startswith("rankwise: ")]) == 1, said.err
        (sentence,) = [text for text in lines if text.startswith("rankwise: ")]
        flags_are_own(line, sentence)
        return code, sentence
    return code, said.out


def flags_are_own(line: list[str], sentence: str) -> None:
    name, _ = cli.split_command(line)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in line if word.startswith("--")}
    known = {one for item in command_options(COMMANDS[name]) for one in (item.name, *item.aliases)}
    plain = re.sub(r"`[^`]*`|pip install \S+|rankwise [a-z].*", "", sentence.removeprefix("rankwise: "))
    named = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", plain)}
    assert named <= known | given | NOT_OURS, (name, sentence)


@pytest.mark.parametrize("name", LINES)
def test_help(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = called([*name.split(), "--help"], capsys)
    assert code == 0 and said.startswith(f"usage: rankwise {name}")


@pytest.mark.parametrize("name", [name for name, row in COMMANDS.items() if hasattr(row.config, "device")])
def test_a_device_that_is_not_there(name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("tpu", "cuda:99"):
        code, said = called([*words(name, world), "--device", device], capsys)
        assert code in (2, 3), (device, said)
        assert code == 3 or ("--device" in said and device in said)


@pytest.mark.parametrize("name", [name for name, (line, _) in LINES.items() if "@" in line])
def test_a_missing_file(name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each path of the line in turn; with and without --dry-run."""
    line = words(name, world)
    for place in [place for place, word in enumerate(line) if word.startswith(str(world))]:
        missing = [*line[:place], "no/such/place", *line[place + 1 :]]
        for more in ([], ["--dry-run"]):
            code, said = called([*missing, *more], capsys)
            assert code in (2, 3) and "no/such/place" in said, (missing, said)


@pytest.mark.parametrize("name", [name for name in LINES if name not in NO_OUTPUT])
def test_a_place_that_takes_no_output(name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below a file: root ignores permission bits."""
    for more in ([], ["--dry-run"]):
        code, said = called(words(name, world, "-o", f"{world}/file/below.html", *more), capsys)
        assert code == 2 and f"{world}/file" in said, said


@pytest.mark.parametrize("name", [name for name, (line, _) in LINES.items() if "@" in line or name not in NO_OUTPUT])
def test_a_name_that_is_too_long(name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As each path of the line in turn, and as the output."""
    line, long = words(name, world), "x" * 300
    places = [place for place, word in enumerate(line) if word.startswith(str(world))]
    lines = [[*line[:place], long, *line[place + 1 :]] for place in places]
    for tried in (*lines, *([] if name in NO_OUTPUT else [[*line, "-o", long]])):
        code, said = called(tried, capsys)
        assert code in (2, 3) and said, tried


def test_below_a_folder_in_which_nothing_can_be_made(world: Path, here: Path, capsys: Any) -> None:
    code, said = called(words("report", world, "-o", "/proc/page.html"), capsys)
    assert code == 2 and "/proc" in said


@pytest.mark.parametrize("name", LINES)
def test_a_wrong_type(name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [item for item in command_options(COMMANDS[name]) if item.annotation in (int, float, bool)]
    if typed:
        code, said = called(words(name, world, f"--{typed[0].name}=many"), capsys)
        assert code == 2 and "expected " in said and typed[0].name in said


def outside(item: Option) -> list[tuple[float, str]]:
    """Numbers a step outside each bound of an option, and what is said of them."""
    bounds, step = item.range, 1 if "int" in str(item.annotation) else 1e-6
    below = [bound - step for bound in (bounds.least,) if bound is not None] + [bounds.above]
    over = [bound + step for bound in (bounds.most,) if bound is not None] + [bounds.below]
    kind = int if step == 1 else float
    return [(kind(one), f"is {kind(one)}; give a number {bounds}") for one in (*below, *over) if one is not None]


@pytest.mark.parametrize("name", LINES)
def test_a_number_outside_its_range(
    name: str, world: Path, here: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """By flag, and where the command takes a file, by file: one form of message, before anything is read or made."""
    file = tmp_path_factory.mktemp("config") / "own.yaml"
    for item in command_options(COMMANDS[name]):
        for number, said in outside(item):
            wanted = (2, f"rankwise: --{item.name} {said}")
            assert called(words(name, world, f"--{item.name}={number}"), capsys) == wanted
            if COMMANDS[name].takes_file:
                file.write_text(f"{item.name}: {number}")
                wanted = (2, f"rankwise: {file}: {item.name} {said}")
                assert called([*name.split(), str(file)], capsys) == wanted


def parts(defaults: Any) -> Iterator[tuple[Any, Option]]:
    """Every option of a command, with the dataclass that it is a field of: the command's own, or a section."""
    own = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    for default in filter(dataclasses.is_dataclass, own.values()):
        yield from parts(default)
    for item in options_of(defaults):
        if item.name in own and not dataclasses.is_dataclass(own[item.name]):
            yield defaults, item


@pytest.mark.parametrize("name", LINES)
def test_a_number_outside_its_range_in_python(name: str) -> None:
    found = list(parts(COMMANDS[name].config))
    assert {item.name for _, item in found} == {item.name for item in options_of(COMMANDS[name].config)}
    for part, item in found:
        for number, said in outside(item):
            with pytest.raises(UsageError, match=re.escape(f"--{item.name} {said}")):
                dataclasses.replace(part, **{item.name: [number] if item.is_list else number})


@pytest.mark.parametrize("name", LINES)
def test_a_word_that_is_no_choice_in_python(
    name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of the command line; what is a choice, or may be unset, is taken."""
    for part, item in parts(COMMANDS[name].config):
        if not item.choices:
            continue
        near = f"{item.choices[-1]}_"
        code, said = called(words(name, world, f"--{item.name}={near}"), capsys)
        assert code == 2 and said.startswith(f"rankwise: --{item.name} takes {', '.join(item.choices)}; got '{near}'")
        for wrong in [[item.choices[0], near]] if item.is_list else [near, None][: 2 - item.nullable]:
            with pytest.raises(UsageError, match=re.escape(said.removeprefix("rankwise: ") if wrong else "got None")):
                dataclasses.replace(part, **{item.name: wrong})
        for right in [*item.choices, *[None][: int(item.nullable)]]:
            dataclasses.replace(part, **{item.name: [right] if item.is_list and right else right})


def test_a_number_outside_its_range_in_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in ("nan", "inf", "2"):
        code, said = called(["run", "demo", "--set", f"ranks.svd_threshold={number}"], capsys)
        assert code == 2 and f"svd_threshold is {float(number)}; give a number above 0 and at most 1" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LINES)
def test_an_unknown_flag(name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = called(words(name, world, "--no_such_flag", "1"), capsys)
    assert code == 2 and "unknown option 'no_such_flag'" in said


@pytest.mark.parametrize("name", LINES)
def test_a_missing_extra(
    name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the base install a command works, or names the extra that it needs; with those that it names it works."""
    extras: list[str] = []
    while True:
        with monkeypatch.context() as patch:
            hide_modules(patch, missing(extras))
            code, said = called(words(name, world, "--dry-run"), capsys)
        lacking = re.search(r"it comes with: pip install 'rankwise\[(\w+)\]'", said) if code == 2 else None
        if lacking is None:
            break
        assert lacking[1] not in extras, said
        extras.append(lacking[1])
    assert LINES[name][1] in (code, None), said


@pytest.mark.parametrize("name", LINES)
def test_a_terminal_that_is_not_utf8(name: str, world: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ([*name.split(), "--help"], words(name, world, "--no_such_flag_\u03c3", "\u2713")):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        assert cli.main(line) == (0 if "--help" in line else 2)
        for stream in streams:
            stream.flush()
            stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LINES)
def test_a_dry_run(name: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = called(words(name, world, "--dry-run"), capsys)
    assert LINES[name][1] in (code, None), said
    if code == 0:
        assert "# would " in said and isinstance(yaml.safe_load(said), dict)


ON_BASE = "--model_name @/base --task e2e_nlg"
# Command → lines on the folder `@` that are refused once options have been read: by what is in the files.
REFUSED = {
    "ranks": ("@/base @/empty", "--deltas @/empty", "--adapter @/base", "@/empty --adapter @/lora"),
    "ranks diff": ("@/plan.json @/rows.csv",),
    "extract": ("@/base @/tuned --plan @/rows.csv", "--deltas @/empty --rank 2"),
    "compress": (
        "@/base --energy 0.9",
        "@/lora --budget 1",
        "@/lora --energy 0.9 --metric sigma",
        "@/lora --intruders 0.5 --base_model @/empty",
    ),
    "finetune": (
        f"{ON_BASE} --data_path @/wrong.csv",
        f"{ON_BASE} --data_path @/rows.csv --max_seq_length 4",
        f'{ON_BASE} --data_path @/rows.csv --chat_template_kwargs {{"a":1}}',
    ),
    "train": (
        f"{ON_BASE} --data_path @/wrong.csv",
        f"{ON_BASE} --data_path @/rows.csv --max_seq_length 4",
        f'{ON_BASE} --data_path @/rows.csv --chat_template_kwargs {{"a":1}}',
        f"{ON_BASE} --data_path @/rows.csv --lora_config @/rows.csv",
    ),
    "check": (
        f"{ON_BASE} --data_path @/wrong.csv",
        f'{ON_BASE} --data_path @/rows.csv --chat_template_kwargs {{"a":1}}',
    ),
    "label": ("@/empty --from_folders", "@/photos --labels_file @/wrong.csv", "@/empty --loopback_teacher"),
    "evaluate": (
        "@/base --task e2e_nlg --data_path @/wrong.csv",
        "@/base --forget @/empty.txt",
        f"@/lora --base_model_id @/empty {ROWS}",
    ),
    "advise": (f"@/base {ROWS}", "@/base @/wrong.csv", f"@/base {ROWS} --ranks 4", f"@/empty {ROWS}"),
    "study": (f"{ON_BASE} --data_path @/wrong.csv", f"{ON_BASE} --data_path @/rows.csv"),
    "compare": ("@/run @/empty --no_plots",),
    "report": ("@/empty",),
    "merge": ("@/lora --base_model @/empty", "@/lora", "@/base --base_model @/base"),
    "export": ("@/lora", "@/base --llama_cpp_dir @/empty"),
    "validate": (
        f"@/export {ROWS}",
        f"@/export --adapter_gguf @/lora {ROWS}",
        f"--reference @/lora --write_cases cases {ROWS}",
        f"--reference @/lora --write_cases cases -o out {ROWS}",
        f"--reference @/base --server http://127.0.0.1:9/v1 {ROWS}",
        "--cases @/empty --answers @/rows.csv",
        "--cases @/empty",
        f"@/export --served_model mine {ROWS}",
        f"--reference @/base --base_model @/base --write_cases cases --mmproj @/rows.csv {ROWS}",
        f"@/export {ROWS} --sweep iq2_xs",
        f"@/export {ROWS} --sweep q4_0 --imatrix @/rows.csv --calibration_samples 2",
    ),
    "bundle": (
        "@/export",
        "--replay @/empty",
        "@/export --answers @/rows.csv",
        "--replay @/empty --answers @/rows.csv --server http://phone:1",
        "--replay @/empty --answers @/none.jsonl",
    ),
    "card": ("@/run",),
    "features capture": (
        "@/photos --model @/base",
        "--synthetic 4 --tokens 8 --channels 32 -o @/cache",
    ),
    "features train": (
        "--features @/cache --arch MLP --rank 999",
        "--features @/cache --arch MLP --rank 2 --resume",
    ),
    "features compare": ("--results_dir @/empty --no_plots", "--results_dir @/results --features @/empty --no_plots"),
    "features show": ("--results_dir @/results --arch MLP --image_idx 99", "--results_dir @/empty --arch MLP"),
    "features downstream": ("@/base --data_path @/wrong.csv --no_plots",),
    "run": ("@/wrong.yaml", "@/rows.csv"),
    "batch": ("@/own.yaml @/wrong.yaml",),
    "schema": ("rank",),
    "completion": ("",),
    "tiny": ("-o @/file/below",),
    "demo": ("-o @/file/below", "--vision --experts"),
    "doctor": ("--json=maybe",),
}


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in REFUSED.items() for line in lines])
def test_a_dry_run_refuses_what_the_command_would(
    name: str, line: str, world: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first write, word for word."""
    given = [*name.split(), *line.replace("@", str(world)).split()]
    found = [called([*given, *dry], capsys) for dry in ((), ("--dry-run",))]
    assert found[0] == found[1] and found[0][0] in (2, 3), found


def test_every_command_is_refused_something() -> None:
    assert set(REFUSED) == set(COMMANDS)


@pytest.mark.parametrize(
    ("line", "environment", "code"),
    [
        (["ranks", "diff", "no/such/\u03c3", "{world}/plan.json"], {"PYTHONIOENCODING": "cp1252"}, 3),
        (["ranks", "diff", "{world}/plan.json", "{world}/plan2.json"], {"PYTHONIOENCODING": "ascii"}, 0),
    ],
)
def test_as_a_process(line: list[str], environment: dict[str, str], code: int, world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rankwise", *(word.format(world=world) for word in line)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True)
    said = (done.stdout + done.stderr).decode(environment["PYTHONIOENCODING"])
    assert (done.returncode, "Traceback" in said) == (code, False), said
    assert ("4 -> 2" if not code else "no/such/sigma: no such file") in said
    assert list(tmp_path.iterdir()) == []


def test_no_error_handler_is_left_out() -> None:
    assert "\u2713".encode("ascii", terminal.ERRORS) == b"ok"
