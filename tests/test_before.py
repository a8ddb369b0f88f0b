"""What was on the disk before is still read, and what is written now is what was written before.

`tests/data/before` holds an artefact of each file format and the output of every dry run; `freeze.py` makes them.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import freeze
import pytest
from exported import once, session_root
from freeze import BEFORE, DRY, SHIPPED, SHIPPING
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load

import rankwise
from rankwise import cli
from rankwise.core.geometry import Grid
from rankwise.data.depth.maps import DepthCache, MapKey
from rankwise.data.device import read_target
from rankwise.data.input_record import read_input
from rankwise.data.label_task import read_task
from rankwise.device.bundle_files import read_bundle
from rankwise.device.handoff import answers as handoff_answers
from rankwise.device.handoff.cases import read_cases, write_cases
from rankwise.device.handoff.page import HANDOFF
from rankwise.device.scores import DOCUMENT as VALIDATION
from rankwise.errors import VerificationError
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.features.cache import open_cache
from rankwise.features.dataset import read_split
from rankwise.features.downstream_page import read_answers
from rankwise.features.page import read_comparison
from rankwise.features.trained import load_factorizer
from rankwise.files.adapter import read_adapter
from rankwise.files.atomic import read_json, write_text
from rankwise.files.document import lines_of
from rankwise.files.ledger import HEAD, Ledger
from rankwise.files.plan import read_plan, write_plan
from rankwise.files.run_folder import RunFolder, read_marks, write_mark
from rankwise.gguf.reading import MMPROJ, TEXT, read_export
from rankwise.labels.dataset import read_rows
from rankwise.labels.teacher.ledger import AnswerLedger
from rankwise.models.depth.encoder import read_depth, write_depth
from rankwise.options.field import flatten, load_file
from rankwise.ranks.fidelity import read_fidelity
from rankwise.ranks.plots import read_gain
from rankwise.report.contents import read_sites
from rankwise.report.report import build_report
from rankwise.study.advice_page import read_advice
from rankwise.study.page import read_study
from rankwise.study.registration import ITEMS, Registration
from rankwise.train.checkpoints import find_damage
from rankwise.train.gradient_table import stored

NUMBER = re.compile(rb"(?<![\w.])-?\d+(?:\.\d+(?:[eE][-+]?\d+)?|[eE][-+]?\d+)(?!\w)")
DIGEST = re.compile(rb"\b[0-9a-f]{64}\b")
OF_FLOATS = re.compile(  # files with digests of weights or of results: those follow the digits of floats
    r"manifest\.json$|^cache/|^depth/depth|final_summary|best_model\.json|^nets/\w+/(split|test_results)|downstream\.json"
    r"|^(cases|handoff)/|^run/(evaluation_results|predictions\.settings)|^study/(runs|test_read)"
)
NEW = (
    "arms",
    "plan",
    "served_model",
    "api",
    "write_cases",
    "cases",
    "answers",
    "imatrix",
    "calibration_samples",
    "calibration_data",
    "base_model",
    "target",
    "target_parameters",
    "model",
    "minutes",
    "assumed_seed_sd",
    "assumed_item_sd",
    "metric",
    "intruders",
)
SINCE = {
    **dict.fromkeys(NEW),
    "yes": False,
    "predictions": [],
    "primary_budgets": [],
}  # options and fields that are new since: at their default, nothing
NOTHING = re.compile(rf"""(?m)^ *["']?({"|".join(SINCE)})["']?: (?:null|false|\[\]),?\n""".encode())
PACKAGE = Path(rankwise.__file__).parent


def contents(folder: Path) -> dict[str, bytes]:
    """Name → content."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


FROZEN = contents(BEFORE)
NAMES = list(FROZEN)
OF_SHIPPED = {name for name in NAMES if name.startswith(f"{SHIPPED}/")} | {f"{DRY}/{name}.yaml" for name in SHIPPING}
TEXTS = [name for name in NAMES if name not in OF_SHIPPED]


# --- written now as before -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Made once for all workers."""
    return contents(once(session_root(tmp_path_factory) / "now", write_now))


def write_now(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        freeze.write(freeze.made(Path(place)), folder)


@pytest.mark.filterwarnings("ignore")  # what tiny data make libraries say is no matter here
def test_the_same_files_are_written(now: dict[str, bytes]) -> None:
    assert sorted(now) == sorted(TEXTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEXTS)
def test_it_is_written_as_before(name: str, now: dict[str, bytes]) -> None:
    before, after = FROZEN[name], now[name]
    if name.endswith(".safetensors"):
        old, new = load(before), load(after)
        assert facts(old) == facts(new)
        assert all(
            new[key].float().numpy() == pytest.approx(old[key].float().numpy(), rel=1e-2, abs=1e-3) for key in old
        )
        return
    assert skeleton(name, after) == skeleton(name, before)
    assert numbers(after) == pytest.approx(numbers(before), rel=1e-2, abs=1e-4)


def facts(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def skeleton(name: str, text: bytes) -> str:
    """All but the digits of floats, the digests of what holds such, and what a dry run says it would do."""
    text = config_alone(text) if name.startswith(f"{DRY}/") else text
    text = NOTHING.sub(b"", text)
    known = DIGEST.sub(b"<digest>", text) if OF_FLOATS.search(name) else text
    return NUMBER.sub(b"<number>", known).decode()


def config_alone(dry_run: bytes) -> bytes:
    """Without what it says it would do."""
    return re.sub(rb"(?m)^#.*\n", b"", dry_run)


def numbers(text: bytes) -> list[float]:
    return [float(one) for one in NUMBER.findall(text)]


@pytest.mark.slow
@pytest.mark.usefixtures("made")
def test_what_is_shipped_is_written_as_before(shipped: Path) -> None:
    """Its models are random and llama.cpp's digits its own: the same keys in the same order, of the same kinds."""
    after = freeze.shipped(shipped)
    before = {name: content for name, content in FROZEN.items() if name in OF_SHIPPED}
    assert sorted(after) == sorted(before)
    assert {name: shape(content) for name, content in after.items()} == {
        name: shape(content) for name, content in before.items()
    }


def shape(text: bytes) -> Any:
    """Of JSON, or of lines of it."""
    if not text.startswith(b"{"):
        return NOTHING.sub(b"", config_alone(text))
    lines = text.decode().splitlines() if text.startswith(b"{") and text.count(b"\n{") else [text.decode()]
    return [kind(json.loads(line)) for line in lines]


def kind(value: Any) -> Any:
    """Keys in their order with the kinds of their values; of a list the kinds that it holds."""
    if isinstance(value, dict):
        return [(key, kind(each)) for key, each in value.items()]
    if isinstance(value, list):
        return sorted({repr(kind(each)) for each in value})
    return type(value).__name__


# --- read, and written back ------------------------------------------------------------------------------------------

Read = Callable[[Path], Any]
Write = Callable[[Any, Path], Any]


def first_map(file: Path) -> Any:
    """A depth map, found under the name that its own header gives it."""
    with safe_open(file, "pt") as content:
        ((_, told),) = content.metadata().items()
    row = json.loads(told)
    grids = tuple(Grid(tuple(box), rows, columns) for *box, rows, columns in row["grids"])
    cache, key = DepthCache(file.parent), MapKey(row["image"], row["source"], grids)
    cache.file(key).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, cache.file(key))
    values = cache.read(key)
    assert values is not None
    return key, values


def rows_of(folder: Path) -> list[Any]:
    ledger = Ledger(folder)
    assert len(ledger)
    return [ledger.numbers(row["key"], name) for row in ledger.rows.values() for name in ("dev",)]


def registered(folder: Path) -> Any:
    registration = Registration(folder)
    assert registration.test_read
    return registration.first


def exported(file: Path) -> Any:
    """With the models that it lists, empty."""
    for files in read_json(file)["files"].values():
        for name in filter(None, (files[kind] for kind in (TEXT, MMPROJ))):
            (file.parent / name).touch()
    return read_export(file.parent)


READ: dict[str, Read] = {
    r"export\.json": exported,
    r"validation\.json": VALIDATION.read,
    r"cases/cases\.json": lambda file: read_cases(file.parent),
    r"told\.jsonl": lambda file: handoff_answers.read_answers(file, read_cases(file.parent / "cases")),
    r"handoff\.json": HANDOFF.read,
    r"lora_rank_config\.json": read_plan,
    r"peft\.json": lambda file: LoraConfig(**read_json(file)),
    r"run/sites\.json": read_sites,
    r"task\.json": lambda file: read_task(file.parent),
    r"device\.json": lambda file: read_target(file.parent),
    r"input\.json": lambda file: read_input(file.parent),
    r"depth\.json": lambda file: read_depth(file.parent),
    r"evaluation_results\.json": EvaluationResult.load,
    r"fidelity\.json": read_fidelity,
    r"gain\.json": read_gain,
    r"study\.json": read_study,
    r"advice\.json": read_advice,
    r"preregistration\.json": lambda file: registered(file.parent),
    r"runs\.jsonl": lambda file: rows_of(file.parent),
    r"runs\.head\.json": HEAD.read,
    r"study/items\.json": ITEMS.read,
    r"labelled/(train|val|labels)\.jsonl": read_rows,
    r"ledger\.jsonl": lambda file: AnswerLedger(file).entries,
    r"gradient_norms\.csv": lambda file: list(stored(file)),
    r"cache/index\.json": lambda file: [open_cache(file.parent)[place] for place in range(4)],
    r"maps/map\.safetensors": first_map,
    r"AdaLoRA/best_model\.json": lambda file: load_factorizer(file.parent),
    r"extracted/adapter_config\.json": lambda file: read_adapter(file.parent),
    r"nets/\w+/split\.json": lambda file: read_split(file, open_cache(BEFORE / "cache")),
    r"nets/comparison\.json": read_comparison,
    r"downstream\.json": read_answers,
    r"done\.json": lambda file: read_marks(file.parents[1]),
    r"manifest\.json": lambda file: RunFolder(file.parent).stages(),
}
WRITE: dict[str, Write] = {
    r"lora_rank_config\.json": lambda plan, folder: write_plan(folder / "lora_rank_config.json", plan),
    r"task\.json": lambda task, folder: task.save(folder),
    r"cases/cases\.json": lambda cases, folder: write_cases(folder / "cases", cases) / "cases.json",
    r"told\.jsonl": lambda told, folder: write_text(folder / "told.jsonl", lines_of(one.as_row() for one in told)),
    r"handoff\.json": lambda content, folder: HANDOFF.write(folder, content),
    r"device\.json": lambda target, folder: target.save(folder),
    r"input\.json": lambda found, folder: found[0].save(folder),
    r"depth\.json": lambda settings, folder: write_depth(folder, settings),
    r"evaluation_results\.json": lambda result, folder: result.save(folder),
}


def test_a_bundle_is_read_up_to_its_files() -> None:
    with pytest.raises(VerificationError, match="missing, and bundle"):
        read_bundle(BEFORE / SHIPPED / "bundle")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """For readers that leave something beside what they read."""
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


@pytest.mark.parametrize("pattern", READ)
def test_it_is_read_and_written_back(pattern: str, copied: Path, tmp_path: Path) -> None:
    names = [name for name in NAMES if re.search(rf"(^|/){pattern}$", name)]
    assert names, f"nothing frozen is {pattern}"
    for name in names:
        content = READ[pattern](copied / name)
        assert content, name
        if pattern in WRITE:
            (tmp_path / "again").mkdir(exist_ok=True)
            file = WRITE[pattern](content, tmp_path / "again")
            assert Path(file).read_bytes() == (BEFORE / name).read_bytes(), name


def test_marks_are_written_back(copied: Path) -> None:
    run = copied / "pipeline"
    for stage, entry in read_marks(run).items():
        write_mark(run, stage, entry)
    assert (run / ".stages" / "done.json").read_bytes() == (BEFORE / "pipeline/.stages/done.json").read_bytes()


def test_lines_of_the_teacher_are_written_back() -> None:
    file = BEFORE / "labelled" / "ledger.jsonl"
    assert lines_of(entry.record() for entry in AnswerLedger(file).entries) == file.read_text(encoding="utf-8")


def test_a_checkpoint_is_not_damaged_but_for_what_is_not_kept() -> None:
    found = [folder for folder in BEFORE.rglob("checkpoint-*") if folder.is_dir()]
    assert found
    assert not any("damaged" in reason for folder in found for reason in find_damage(folder))


def test_the_report_shows_all_of_it(copied: Path) -> None:
    """Which reads every kind of file that has something to show."""
    assert build_report(copied).is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"resolved_config\.json$|^dry/", name)])
def test_a_config_is_read_by_its_command(name: str) -> None:
    content = load_file(BEFORE / name)
    command = name.removeprefix(f"{DRY}/").removesuffix(".yaml").replace("_", " ")
    if not name.startswith(DRY):
        (command, *_) = RunFolder((BEFORE / name).parent).stages()
    if not cli.COMMANDS[command].takes_file:
        pytest.skip("takes no file")
    config, _ = cli.resolve(command, [str(BEFORE / name)])
    assert flatten(config) == {name: SINCE[name] for name in flatten(config) if name in SINCE} | content


# --- the list is complete --------------------------------------------------------------------------------------------


def test_every_format_is_frozen() -> None:
    """Each version string that the package names, in a frozen file."""
    named = {
        found[1]
        for file in PACKAGE.rglob("*.py")
        for found in re.finditer(r'"(rankwise-[a-z-]+/\d+)"', file.read_text(encoding="utf-8"))
    }
    held = b"\n".join(FROZEN.values()).decode(errors="replace")
    assert named - set(ELSEWHERE) - {one for one in named if one in held} == set()


ELSEWHERE = {
    "rankwise-rank-plan/1": "read only, in test_plan.py",
    "rankwise-arm/1": "written and read in test_arms.py",
    "rankwise-arms/1": "written and read in test_arms.py",
    "rankwise-expert-changes/1": "written and read in test_expert_spectra.py",
    "rankwise-doctor/1": "printed and read in test_doctor.py",
    "rankwise-experts/1": "written and read in test_adapt_experts.py",
    "rankwise-intruders/1": "written and read in test_intruders.py",
}


def test_every_dry_run_is_frozen() -> None:
    assert {f"{DRY}/{name.replace(' ', '_')}.yaml" for name in cli.COMMANDS} == {n for n in NAMES if n.startswith(DRY)}
