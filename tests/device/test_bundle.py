"""Laws of `bundle`: what an app is given answers as the trained model does, and whoever replays it learns where not."""

from __future__ import annotations

import getpass
import json
import os
import random
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import TASK, asked
from go_template import executed
from PIL import Image
from test_clients import constants

from rankwise.cli import main
from rankwise.data.device import MARKER, read_target
from rankwise.data.example import Example, Turn
from rankwise.data.input_record import read_input
from rankwise.data.label_task import LabelClass, LabelTask
from rankwise.device import bundle
from rankwise.device.bundle import source_of
from rankwise.device.bundle_files import INPUT, LabelAnswer, grammar, label_answers, read_bundle
from rankwise.device.golden import read_golden
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity.ladder import climb
from rankwise.device.scores import abstention, fewest, lower_bound
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.gguf import GGUFFile
from rankwise.options.commands import BundleConfig
from rankwise.options.sections import ScoredData

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


# --- when to say unsure ----------------------------------------------------------------------------------------------


def rows(*pairs: tuple[float, bool]) -> list[dict[str, Any]]:
    return [{"confidence": confidence, "correct": right} for confidence, right in pairs]


def test_the_least_number_of_items_is_the_textbooks() -> None:
    """All right: the lower bound is α^(1/n), so 29 items show 90 % and 59 show 95 %."""
    assert (fewest(0.9, wrong=0), fewest(0.95, wrong=0)) == (29, 59)
    assert lower_bound(29, 29) == pytest.approx(0.05 ** (1 / 29))
    assert fewest(0.9, wrong=1) == 46


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no validated answer is right or wrong"),
        (rows(*[(0.9, True)] * 20), "20 validated items are too few"),
        (rows(*[(0.9, True)] * 20, *[(0.8, False)] * 30), "50 validated"),
        ([{"confidence": None, "correct": True}, {"confidence": 0.5, "correct": None}], "no validated answer"),
    ],
)
def test_where_nothing_is_shown_there_is_no_threshold(given: list[dict[str, Any]], said: str) -> None:
    found = abstention(given, 0.9)
    assert found.threshold is None
    assert found.why
    if said != "50 validated":
        assert said in found.why


def test_sure_answers_are_answered_and_wrong_ones_are_not() -> None:
    given = rows(*[(0.5 + n / 200, True) for n in range(80)], *[(n / 100, False) for n in range(40)])
    random.Random(0).shuffle(given)
    found = abstention(given, 0.9)
    assert found.threshold is not None and found.low is not None
    assert 0.3 < found.threshold <= 0.5
    assert found.low >= 0.9
    assert found.answered == sum(row["confidence"] >= found.threshold for row in given)
    assert found.right == sum(row["confidence"] >= found.threshold and row["correct"] for row in given)


def test_what_has_no_confidence_counts_as_unsure() -> None:
    given = [*rows(*[(0.9, True)] * 50), *[{"confidence": None, "correct": True}] * 50]
    found = abstention(given, 0.9)
    assert (found.answered, found.n, found.coverage) == (50, 100, 0.5)


def test_items_of_one_confidence_are_not_parted() -> None:
    """All alike: either all are answered or none is."""
    assert abstention(rows(*[(0.7, True)] * 60), 0.9).answered == 60
    assert abstention(rows(*[(0.7, n % 3 > 0) for n in range(60)]), 0.9).threshold is None


def test_the_promise_is_kept_19_times_of_20() -> None:
    """Confidence c is right with probability c² + 0.1: what is promised above a threshold must hold for new items."""
    state, broken, known = np.random.default_rng(0), 0, 0
    for _ in range(100):
        confidence = state.random(150)
        right = state.random(150) < np.minimum(1, confidence**2 + 0.1)
        found = abstention(rows(*zip(confidence.tolist(), right.tolist(), strict=True)), 0.8)
        if found.threshold is None:
            continue
        above = np.linspace(found.threshold, 1, 2000)
        known += 1
        broken += float(np.minimum(1, above**2 + 0.1).mean()) < 0.8
    assert known > 30
    assert broken <= 0.05 * 100 + 4 * (0.05 * 0.95 * 100) ** 0.5


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_grammar_has_each_label_once_without_its_end() -> None:
    rules = grammar([LabelAnswer("a", "", (4, 9, 2)), LabelAnswer("b", "", (7, 2))], end_ids=(2,))
    assert rules.splitlines()[0] == "root ::= label-0 | label-1"
    assert [line.split(" ::= ")[1] for line in rules.splitlines() if line.startswith("label-")] == [
        "<[4]> <[9]>",
        "<[7]>",
    ]


def test_labels_of_the_same_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.device.bundle_files.answer_ids", lambda *_: [1, 2])
    task = LabelTask("t", "kind", (LabelClass("a"), LabelClass("b")), "a b", "a b Kind:")
    example = Example("x", "x", (Turn("user", "?"), Turn("assistant", "a")))
    with pytest.raises(VerificationError, match="same token ids"):
        label_answers(task, example, None)  # type: ignore[arg-type]


# --- what is refused before anything is read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "bundle needs an export"),
        ({"export": "e", "server": "http://phone:1"}, "--replay"),
        ({"export": "e", "min_precision": 90.0}, "--min_precision is 90.0; give a number above 0 and below 1"),
        ({"export": "e", "num_golden": 0}, "--num_golden"),
        ({"export": "e", "tolerance": 0.0}, "--tolerance"),
    ],
)
def test_what_cannot_work_is_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        bundle.check(replace(BundleConfig(), **how))


def test_dry_run_says_what_would_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert "golden vectors" in "\n".join(bundle.describe(BundleConfig(export="exported")))
    assert main(["bundle", "exported", "-o", "b", "--dry-run"]) == 3
    assert "exported: no such file or folder" in capsys.readouterr().err


# --- a real one ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "bundle")
    return tmp_path / "bundle"


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.slow
def test_a_bundle_has_what_an_app_needs(made: Path, shipped: Path) -> None:
    content = read_bundle(made)
    assert {
        "model-q8_0.gguf",
        "mmproj-model-q8_0.gguf",
        "labels.gbnf",
        "device.json",
        "input.json",
        "README.md",
    } <= set(content["files"])
    listed = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert listed == {*content["files"], "bundle.json"}
    prompt = (made / "prompt.txt").read_text(encoding="utf-8")
    assert prompt.count(MARKER) == 1
    assert prompt.endswith("Assistant:")
    assert TASK.student_prompt in prompt
    assert json.loads((made / "prompt.json").read_text())["input"] is None
    labels = json.loads((made / "labels.json").read_text())["labels"]
    assert [(row["name"], row["definition"]) for row in labels] == [(one.name, one.definition) for one in TASK.classes]
    target = read_target(made)
    assert target and target.runtime_build and target.runtime_build.startswith("xllamacpp")
    unsure = json.loads((made / "abstain.json").read_text())
    assert unsure["threshold"] is None
    assert "items are too few" in unsure["why"]
    assert unsure["n"] == 6
    assert "too few" in (made / "README.md").read_text(encoding="utf-8")
    assert content["not_verified"] == []
    assert content["validated_on"] == content["replayed_on"] == target.runtime_build


@pytest.mark.slow
def test_a_bundle_names_nothing_of_this_machine(made: Path, shipped: Path) -> None:
    """Its sources lie in temporary folders of pytest's; the converter saw the model in another one."""
    name, home = getpass.getuser(), str(Path.home())
    private = [
        tempfile.gettempdir() + os.sep,
        home + os.sep,
        socket.gethostname(),
        "rankwise-view",
        ".tmp",
        f"/{name}/",
    ]
    private += [*shipped.parts[1:-1], *([name] if name != "root" else [])]
    files = [path for path in made.rglob("*") if path.is_file() and path.suffix not in (".gguf", ".png", ".jpeg")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    for path in made.glob("*.gguf"):
        stated = GGUFFile(path).metadata
        texts[path] = json.dumps(
            {key: value for key, value in stated.items() if key.startswith("general.")}, default=str
        )
    assert len(texts) > 12
    found = [
        (path.name, word) for path, text in texts.items() for word in private if word in text.replace("root ::=", "")
    ]
    assert not found
    manifest = json.loads((made / "manifest.json").read_text())["stages"]["bundle"]["inputs"]
    assert (manifest["export"]["name"], manifest["model"]["name"]) == ("export", "model")
    assert manifest["model"]["fingerprint"] == read_bundle(made)["made_from"]["fingerprint"]
    general = GGUFFile(made / "model-q8_0.gguf").metadata
    assert general["general.name"] == "model" and general["general.license"] == "mit"
    assert not any("base_model" in key for key in general) and general["general.dataset.0.name"] == "Data"


@pytest.mark.slow
def test_ollama_and_clients_ask_what_the_bundle_asks(made: Path) -> None:
    prompt, record = (made / "prompt.txt").read_text(encoding="utf-8"), read_input(made)
    assert record
    file = (made / "Modelfile").read_text(encoding="utf-8")
    template = file.split('TEMPLATE """')[1].split('"""')[0]
    message = json.loads(next(line for line in file.splitlines() if "bundle's prompt" in line).split(": ", 1)[1])
    assert executed(template, prompt=message["content"]).replace("[img]", MARKER) == prompt
    assert re.findall(r'^PARAMETER stop "(.*)"$', file, re.MULTILINE) == list(record[0].end_tokens)
    assert re.findall(r"^FROM \./(.*)$", file, re.MULTILINE) == ["model-q8_0.gguf", "mmproj-model-q8_0.gguf"]
    for client in (made / "clients" / name for name in ("llama.node.mjs", "llama.rn.ts", "Ask.kt")):
        assert constants(client.name, client.read_text(encoding="utf-8")) == (prompt, list(record[0].end_tokens))
    readme = (made / "README.md").read_text(encoding="utf-8")
    assert f"```text\n{prompt}\n```" in readme and "The raw text begins with a space" in readme


@pytest.mark.slow
def test_golden_pictures_are_the_devices(made: Path) -> None:
    """An independent look: the stored pixels are what the target makes of the stored source."""
    target, facts = read_target(made), json.loads((made / "golden" / "golden.json").read_text())
    # Three with pictures, the same three without, and the shapes that none of these has.
    assert target and [row["id"] for row in facts["cases"][6:]] == ["2, turned", "0, transparent"]
    for row in [row for row in facts["cases"] if row["images"]]:
        picture = row["images"][0]
        with Image.open(made / "golden" / picture["source"]) as source:
            again = np.asarray(target.resize(source))
        assert np.array_equal(again, np.asarray(Image.open(made / "golden" / picture["device"])))
        assert len(row["top_logprobs"]) == len(row["answer"])
        assert sum(np.exp([value for _, value in row["top_logprobs"][0]])) <= 1 + 1e-5


@pytest.fixture(scope="module")
def altered() -> Iterator[Any]:
    """The benchmark's editor of GGUF files."""
    sys.path.insert(0, str(BENCHMARKS))
    from shipbench_gguf import altered

    yield altered
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_a_sound_server_agrees_and_another_model_does_not(
    made: Path, altered: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a phone would be asked: by its address."""
    model, mmproj = made / "model-q8_0.gguf", made / "mmproj-model-q8_0.gguf"
    with LlamaServer(model, mmproj, 512, 1) as runtime:
        assert main(["bundle", "--replay", str(made), "--server", runtime.talk.url]) == 0
        assert "the llama.cpp build that answered is unknown" in capsys.readouterr().out  # xllamacpp's tells none
        smaller = replace(read_target(made), image_size=48)  # an app that scales to another size
        golden = read_golden(made, smaller)
        first = climb(golden, runtime, golden.cases, golden.thresholds, golden.top).first_broken
        assert first and first.name == "pixels"
    with altered(model, tmp_path / "other.gguf") as draft:
        draft.put("output_norm.weight", 3 * draft.floats("output_norm.weight"))
    with LlamaServer(tmp_path / "other.gguf", mmproj, 512, 1) as runtime:
        assert main(["bundle", "--replay", str(made), "--server", runtime.talk.url]) == 6
    assert "the rung `logprobs` differs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt.txt", "model-q8_0.gguf", "golden/00-device.png"])
def test_a_file_that_is_not_the_bundled_one_is_named(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(VerificationError, match=name):
        read_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(VerificationError, match="missing"):
        bundle.run(BundleConfig(replay=str(copy)))


@pytest.mark.slow
def test_golden_pixels_that_were_altered_are_an_error(copy: Path) -> None:
    file = copy / "golden" / "00-device.png"
    pixels = np.array(Image.open(file))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(file)
    with pytest.raises(DataError, match="sha256"):
        read_golden(copy, read_target(copy))


@pytest.mark.slow
def test_nothing_that_is_printed_names_the_folder_in_the_making(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.run(asked(shipped, output_dir=str(tmp_path / "bundle")))
    printed = capsys.readouterr()
    assert ".tmp" not in printed.out + printed.err and str(tmp_path / "bundle") in printed.out
    assert main(["bundle", "--replay", str(tmp_path / "bundle"), "--threads", "1"]) == 0
    assert f"from {tmp_path / 'bundle' / 'input.json'}" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_not_proven_is_not_bundled(shipped: Path, tmp_path: Path) -> None:
    """No validation; one that found something; one of another form; files that changed since; an export unverified."""
    with pytest.raises(VerificationError, match="no validation"):
        source_of(asked(shipped, validation=str(tmp_path)))
    with pytest.raises(VerificationError, match="f16 was not validated"):
        source_of(asked(shipped, outtype="f16"))
    broken = shutil.copytree(shipped / "validation", tmp_path / "validation")
    content = json.loads((broken / "validation.json").read_text())
    content["failures"] = ["q8_0: the rung `pixels` is broken: so it is"]
    (broken / "validation.json").write_text(json.dumps(content))
    with pytest.raises(VerificationError, match="rung `pixels` is broken"):
        source_of(asked(shipped, validation=str(broken)))
    export = shutil.copytree(shipped / "export", tmp_path / "export")
    with (export / "model-q8_0.gguf").open("ab") as file:
        file.write(b"more")
    with pytest.raises(VerificationError, match=r"that was exported.*that was validated"):
        source_of(asked(shipped, export=str(export)))
    facts = json.loads((shipped / "export" / "export.json").read_text())
    (export / "export.json").write_text(json.dumps(facts | {"verification": None}))
    allowed = source_of(asked(shipped, export=str(export), allow_unverified=True))
    assert any("not verified" in doubt for doubt in allowed.doubts)
    assert any("not the file that was validated" in doubt for doubt in allowed.doubts)


@pytest.mark.slow
def test_another_folders_content_is_not_replaced(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="other files"):
        bundle.run(asked(shipped, output_dir=str(tmp_path)))
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_text_model_is_bundled_with_a_place_for_its_input(text_export: Path, tmp_path: Path) -> None:
    """No pictures, no labels, no validation: and its golden vectors hold."""
    pytest.importorskip("xllamacpp")
    facts = "name[Alimentum], area[city centre], familyFriendly[yes]"
    table = [f'"{facts}","Alimentum is a family-friendly restaurant."'] * 3
    lines = ["mr,ref", *(row.replace("Alimentum", name) for row, name in zip(table, "ABC", strict=True))]
    for file in ("trainset.csv", "devset.csv"):
        (tmp_path / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = BundleConfig(
        export=str(text_export),
        validation=None,
        data=ScoredData(task="e2e_nlg", data_path=str(tmp_path)),
        output_dir=str(tmp_path / "bundle"),
        num_golden=2,
        top=16,
        threads=1,
        allow_unverified=True,
    )
    content = bundle.run(config)
    assert isinstance(content, dict) and content["not_verified"]
    made = tmp_path / "bundle"
    files = set(read_bundle(made)["files"])
    assert not files & {"labels.gbnf", "labels.json", "device.json"}
    prompt = json.loads((made / "prompt.json").read_text())
    assert prompt["prompt"].count(INPUT) == 1
    assert prompt["start_token"]["put_by"] == "the runtime"  # its GGUF says so; the text must not have it too
    assert not prompt["prompt"].startswith(prompt["start_token"]["text"])
    assert "Not verified" in (made / "README.md").read_text(encoding="utf-8")
