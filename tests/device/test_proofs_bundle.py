"""What each check of `bundle` and its replay is for: a file or the product's code damaged, on the command's path.

The replays ask one server, as a phone is asked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rankwise.cli import main
from rankwise.device import bundle as stage
from rankwise.device import bundle_files as parts
from rankwise.device import golden as vectors
from rankwise.device.bundle_files import write_manifest
from rankwise.device.llama.runtime import LlamaServer
from rankwise.files.atomic import read_object, write_json

pytest.importorskip("xllamacpp")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Fault = Callable[[Path], Any]
Said = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def phone(made: Path) -> Iterator[str]:
    with LlamaServer(made / "model-q8_0.gguf", made / "mmproj-model-q8_0.gguf", 512, 1) as runtime:
        yield runtime.talk.url


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def replay(copy: Path, phone: str, capsys: pytest.CaptureFixture[str]) -> Said:
    """Damage the bundle, and with `sealed` enter that in its list of files; replay it."""

    def run(fault: Fault, *, sealed: bool = True) -> tuple[int, str]:
        fault(copy)
        if sealed:
            facts = read_object(copy / "bundle.json")
            write_manifest(copy, {name: value for name, value in facts.items() if name not in ("format", "files")})
        code = main(["bundle", "--replay", str(copy), "--server", phone])
        return code, capsys.readouterr().err

    return run


def test_a_sound_bundle_replays(replay: Said) -> None:
    assert replay(lambda folder: None) == (0, "")


# --- the golden vectors, rung by rung --------------------------------------------------------------------------------


def rows(change: Callable[[dict[str, Any]], Any], pictures: bool = True) -> Fault:
    """A change of every golden vector, or of those without pictures."""

    def fault(folder: Path) -> None:
        file = folder / "golden" / "golden.json"
        content = read_object(file)
        for row in content["cases"]:
            if bool(row["images"]) == pictures or not pictures:
                change(row)
        write_json(file, content)

    return fault


def another_token(row: dict[str, Any]) -> None:
    row["ids"][-2] = row["ids"][-2] + 1


def another_picture(folder: Path) -> None:
    noise = np.random.default_rng(9).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    for file in (folder / "golden").glob("*source.png"):
        Image.fromarray(noise).save(file)


def shifted(row: dict[str, Any]) -> None:
    first = row["top_logprobs"][0]
    first[0][1], first[1][1] = first[0][1] - 1, first[1][1] + 1


def another_answer(row: dict[str, Any]) -> None:
    """The second likeliest token first, and likelier than the first by far."""
    first, second, *rest = row["top_logprobs"][0]
    row["top_logprobs"][0] = [[second[0], first[1]], [first[0], second[1]], *rest]
    row["answer"][0] = second[0]


def ended(row: dict[str, Any]) -> None:
    """After two tokens, of which the second ends an answer."""
    row.update(answer=row["answer"][:2], top_logprobs=row["top_logprobs"][:2], end_ids=[row["answer"][1]])


VECTORS: dict[str, tuple[Fault, str]] = {
    "the pictures": (another_picture, "pixels"),
    "the tokens of a picture": (rows(lambda row: row["image_ids"][0].pop()), "image tokens"),
    "a token of the prompt": (rows(another_token), "token ids"),
    "the chat template": (rows(lambda row: row["template"].update(text="other")), "token ids"),
    "log-probabilities": (rows(shifted), "logprobs"),
    "the end of an answer": (rows(ended, pictures=False), "text"),
    "the likeliest token": (rows(another_answer, pictures=False), "logprobs"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_golden_vectors_that_are_not_what_the_runtime_does(name: str, replay: Said) -> None:
    fault, rung = VECTORS[name]
    code, said = replay(fault)
    assert code == 6 and f"the rung `{rung}` differs" in said


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt.txt", "model-q8_0.gguf", "golden/00-device.png", "labels.gbnf"])
def test_a_file_that_is_another_or_gone(name: str, replay: Said) -> None:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    code, said = replay(flip, sealed=False)
    assert code == 6 and f"{name}: changed since it was bundled" in said
    code, said = replay(lambda folder: (folder / name).unlink(), sealed=False)
    assert code == 6 and f"{name}: missing" in said


def test_device_pixels_that_were_drawn_over(replay: Said) -> None:
    def paint(folder: Path) -> None:
        file = folder / "golden" / "00-device.png"
        pixels = np.array(Image.open(file))
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(file)

    code, said = replay(paint)
    assert code == 3 and "its pixels changed since they were written" in said


# --- what an app builds its requests from ----------------------------------------------------------------------------


def edited(name: str, change: Callable[[str], str]) -> Fault:
    def fault(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert change(text) != text
        (folder / name).write_text(change(text), encoding="utf-8")

    return fault


def first_label(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = read_object(folder / "labels.json")["labels"][0]
    return row


def without_its_first_token(folder: Path) -> None:
    rules = (folder / "labels.gbnf").read_text(encoding="utf-8").splitlines()
    shorter = [re.sub(r"::= <\[\d+\]>", "::=", rule) if rule.startswith("label-") else rule for rule in rules]
    (folder / "labels.gbnf").write_text("\n".join(shorter) + "\n", encoding="utf-8")


def said_in_other_tokens(folder: Path) -> None:
    """The trained model's answer is a label, and labels.json has another way to write it."""
    label = first_label(folder)
    rows(lambda row: row.update(text=" " + label["name"]), pictures=False)(folder)


PARTS: dict[str, tuple[Fault, str]] = {
    "another question": (
        edited("prompt.txt", lambda text: text.replace("Element", "element") + " "),
        "prompt.txt: differs from the prompt of the golden vectors",
    ),
    "labels cut otherwise": (without_its_first_token, "labels.gbnf: the runtime answers"),
    "a label in other tokens": (said_in_other_tokens, "and the trained model says it as"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_not_what_was_trained(name: str, replay: Said) -> None:
    fault, said = PARTS[name]
    code, error = replay(fault)
    assert code == 6 and said in error


def test_a_start_token_that_would_stand_twice(
    text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime puts it before every prompt of this model, and prompt.txt has it as well."""
    table = [f'"name[{name}], area[north]","{name} is in the north."' for name in "ABC"]
    for file in ("trainset.csv", "devset.csv"):
        (tmp_path / file).write_text("\n".join(["mr,ref", *table]) + "\n", encoding="utf-8")
    own = stage.prompt_of
    monkeypatch.setattr(stage, "prompt_of", lambda *given: replace(found := own(*given), text=found.begin + found.text))
    words = ["bundle", str(text_export), "--task", "e2e_nlg", "--data_path", str(tmp_path), "--allow_unverified"]
    assert main([*words, "--num_golden", "1", "--top", "16", "--threads", "1", "-o", str(tmp_path / "out")]) == 6
    assert "which the runtime adds a second time" in capsys.readouterr().err


# --- making one ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run the command on the shipped model, or on a copy of its folders."""

    def run(*more: str, of: Path = shipped) -> tuple[int, str]:
        words = ["bundle", str(of / "export"), "--validation", str(of / "validation"), "-o", str(tmp_path / "out")]
        code = main([*words, "--num_golden", "3", "--top", "16", "--threads", "1", *more])
        assert code == 0 or not (tmp_path / "out" / "bundle.json").exists(), "nothing unproven bears the name"
        return code, capsys.readouterr().err

    return run


def test_vectors_that_the_runtime_does_not_confirm(bundle: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    own = vectors.rounded
    monkeypatch.setattr(vectors, "rounded", lambda value: own(value) - 0.05)
    code, said = bundle()
    assert code == 6 and "golden vectors: the rung `logprobs` differs" in said


def test_a_copy_that_is_not_the_original(bundle: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1])

    monkeypatch.setattr(parts.shutil, "copyfile", cut)
    code, said = bundle()
    assert code == 6 and "model-q8_0.gguf: the copy differs from " in said


def test_labels_of_the_same_tokens(bundle: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "answer_ids", lambda *_: [7, 2])
    code, said = bundle()
    assert code == 6 and "two labels have the same token ids" in said


def with_json(file: Path, **changes: Any) -> None:
    write_json(file, read_object(file) | changes)


def failing(folder: Path) -> None:
    with_json(folder / "validation" / "validation.json", failures=["q8_0: the rung `pixels` is broken: so it is"])


def longer(folder: Path) -> None:
    with (folder / "export" / "model-q8_0.gguf").open("ab") as file:
        file.write(b"more")


DOUBTS: dict[str, tuple[Fault, str]] = {
    "no validation": (lambda folder: shutil.rmtree(folder / "validation"), "there is no validation in"),
    "a failure found": (failing, "validation found: q8_0: the rung `pixels` is broken"),
    "no ladder": (
        lambda f: with_json(f / "validation" / "validation.json", parity={}),
        "was never on the parity ladder",
    ),
    "another form": (
        lambda f: with_json(f / "validation" / "validation.json", by_outtype={"f16": {}}),
        "q8_0 was not validated, only f16",
    ),
    "another file": (longer, "is not the file that was exported (its sha256 differs); model-q8_0.gguf is not the file"),
    "no proof": (lambda f: with_json(f / "export" / "export.json", verification=None), "the export was not verified"),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_what_was_not_proven_before(name: str, shipped: Path, tmp_path: Path, bundle: Said) -> None:
    fault, said = DOUBTS[name]
    for part in ("export", "validation"):
        shutil.copytree(shipped / part, tmp_path / "copy" / part)
    fault(tmp_path / "copy")
    code, error = bundle(of=tmp_path / "copy")
    assert code == 6 and said in error and json.dumps(error).endswith('it anyway\\n"')
