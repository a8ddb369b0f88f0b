"""Laws of `bundle --replay --answers`: an app's own lines are held to the golden vectors, rung by rung.

The app of these tests asks llama.cpp as a phone would, with pictures that it makes itself.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity_models import exported_pair
from PIL import Image

from rankwise.cli import main
from rankwise.data.device import MARKER, encoded, read_target
from rankwise.data.example import Example, Turn
from rankwise.device.app_answers import PICTURE, TokenTexts, identified, laid_out, observed, parsed, read_answers
from rankwise.device.clients import STATIC
from rankwise.device.golden import read_golden
from rankwise.device.llama.client import ServerRuntime
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity.cases import Case
from rankwise.device.parity.reference import Expected
from rankwise.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Line = dict[str, Any]


# --- lines -----------------------------------------------------------------------------------------------------------


def case(name: str) -> Case:
    return Case(name, Example(name, name, (Turn("user", "?"), Turn("assistant", "a"))), (), "?")


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "phone.jsonl"
    rows = ['{"case": "a", "text": "x"}', "{half", '{"case": "z", "text": "x"}', '{"case": "a", "text": "y"}', "[1]"]
    file.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_answers(file, [case("a"), case("b")])
    said = str(error.value)
    assert said.startswith(f"{file}: line 2: not an answer: ")
    for part in (
        "line 3: the case 'z' is not among the golden vectors",
        "line 4: a second answer to 'a'; the first is in line 1",
        "line 5: not an answer: expected an object",
        "no line for the case 'b'",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"case": "a"}, "text: missing"),
        ({"case": "a", "text": 3}, "text: 3 is not str"),
        ({"case": "a", "text": "x", "promptids": [1]}, "promptids: unknown"),
        ({"case": "a", "text": "x", "ms": -1}, "ms: -1 is no time"),
        ({"case": "a", "text": "x", "png": "!"}, "png"),
        ({"case": "a", "text": "x", "png": "aGVsbG8="}, "png: no PNG in base64"),
        ({"case": "a", "text": "x", "top_logprobs": [[["x", 0.5]]]}, "top_logprobs, place 0"),
        ({"case": "a", "text": "x", "top_logprobs": [[["x", -0.5]], []]}, "top_logprobs, place 1"),
        ({"case": "a", "text": "x", "top_logprobs": [[["x", None]]]}, "top_logprobs, place 0"),
        ({"case": "a", "text": "x", "prompt_ids": [1.5]}, "prompt_ids"),
    ],
)
def test_parts_that_are_not_what_they_should_be(row: Line, said: str, tmp_path: Path) -> None:
    (tmp_path / "phone.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match="line 1: not an answer") as error:
        read_answers(tmp_path / "phone.jsonl", [case("a")])
    assert said in str(error.value)


def test_a_file_of_another_encoding_is_named_and_a_mark_at_its_beginning_is_none(tmp_path: Path) -> None:
    file = tmp_path / "phone.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"case": "a", "text": "x\xe2\x80\xa8y"}\r\n\r\n')
    assert read_answers(file, [case("a")])["a"].text == "x\u2028y"
    file.write_bytes('{"case": "a", "text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_answers(file, [case("a")])


# --- tokens ----------------------------------------------------------------------------------------------------------


def vocabulary(model: str, **tokens: int) -> Any:
    metadata = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": [*tokens]}
    return SimpleNamespace(path="m", metadata=metadata | {"tokenizer.ggml.token_type": [*tokens.values()]})


def test_texts_of_tokens_are_llama_cpps() -> None:
    spm = TokenTexts.of(vocabulary("llama", **{"<s>": 3, "▁wa": 1, "ter": 1, "<0xE6>": 6, "<0xB0>": 6, "<0xB4>": 6}))
    assert spm.detokenize([0, 1, 2]) == "<s> water" and spm.detokenize([3, 4, 5]) == "水"
    assert spm.ids(" wa") == [1] and spm.ids("byte: \\xe6") == [3] and not spm.ids("\ufffd")
    bpe = TokenTexts.of(vocabulary("gpt2", **{"Ġwater": 1, "æ°": 1, "´": 1, "<|im_end|>": 3, "Ġ": 4}))
    assert bpe.detokenize([0, 1, 2, 3]) == " water水<|im_end|>" and bpe.ids("Ġ") == [4]
    with pytest.raises(DataError, match="'t5'"):
        TokenTexts.of(vocabulary("t5", a=1))


TEXTS = TokenTexts([b"<s>", b"<end>", b" red", b" blue", b" a", b"?", b" a"])
EXPECTED = Expected(
    ids=(0, 5, 9, 9, 9, 5),
    answer=(2, 3, 1),
    log_probs=torch.log_softmax(torch.eye(10)[[2, 3, 1]] * 9, -1),
    text="red blue",
    end_ids=(1,),
    expansions=((7, 9, 9, 9, 8),),
    image_id=9,
)


def told(**how: Any) -> Any:
    return observed(EXPECTED, case("a"), parsed(json.dumps({"case": "a", "text": "red blue", **how})), TEXTS)


def test_a_picture_is_its_embeddings_or_all_its_places() -> None:
    whole = (0, 5, *EXPECTED.expansions[0], 5)
    assert laid_out([0, 5, 7, PICTURE, PICTURE, PICTURE, 8, 5], EXPECTED) == whole
    assert laid_out([0, 5, *[PICTURE] * 5, 5], EXPECTED) == whole
    assert laid_out([0, 5, PICTURE, PICTURE, 5], EXPECTED) == (0, 5, 9, 9, 5)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("red blue", (2, 3, 1)),
        (" red blue<end>", (2, 3, 1)),
        ("red", (2,)),
        ("red a", (2, PICTURE)),
        ("blue", (PICTURE,)),
        ("red blue red", (2, 3, PICTURE)),
        ("", ()),
    ],
)
def test_an_answer_without_tokens_is_known_by_its_text(text: str, tokens: tuple[int, ...]) -> None:
    seen = told(text=text)
    assert seen.free.tokens == tokens and seen.tops == () and not seen.tells_prompt


def test_tokens_by_text_are_those_that_the_reference_names() -> None:
    seen = told(top_logprobs=[[[" red", -0.1], [" a", -3], ["never", -4]], [[3, -0.1], [" red", -2]]])
    assert seen.free.tokens == (2, 3, 1)  # the end token is not told
    assert [dict(top) for top in seen.tops] == [{2: -0.1, 4: -3, -4: -4}, {3: -0.1, 2: -2}]


def test_of_tokens_that_are_written_alike_the_likelier_comes_first() -> None:
    """ " a" is 4 and 6, as a letter and its byte are; the reference finds 6 likelier at the second place."""
    rows = EXPECTED.log_probs.clone()
    rows[1, 6] = -2.0
    expected = replace(EXPECTED, log_probs=rows)
    line = {"case": "a", "text": "red blue", "top_logprobs": [[["?", -1]], [[" a", -2.1], [" a", -9]]]}
    assert identified(parsed(json.dumps(line)).tops, expected, TEXTS)[1] == {6: -2.1, 4: -9}


def test_what_is_said_counts_where_the_likeliest_tokens_are_others() -> None:
    """An app that draws at random: its text is not what its model finds likeliest."""
    seen = told(text="blue", top_logprobs=[[[2, -0.1], [3, -2.0]], [[4, -0.1]]])
    assert seen.free.tokens == (PICTURE,) and len(seen.tops) == 1


# --- an app ----------------------------------------------------------------------------------------------------------


def shown(source: Path, device: Path) -> bytes:
    return device.read_bytes()


def lanczos(source: Path, device: Path) -> bytes:
    """A picture as one thumbnails it, and not as the device does."""
    with Image.open(device) as picture:
        side = picture.width
    square = Image.new("RGB", (side, side))
    with Image.open(source) as picture:
        small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return encoded(square, "PNG")


def app(
    bundle: Path, runtime: ServerRuntime, picture: Callable[[Path, Path], bytes] = shown, ending: str = ""
) -> list[Line]:
    """One line of each golden vector. ending: what this app puts behind the question."""
    golden, lines = read_golden(bundle, read_target(bundle)), []
    stored = json.loads((bundle / "golden" / "golden.json").read_text())["cases"]
    for one, row in zip(golden.cases, stored, strict=True):
        pngs = [picture(*(bundle / "golden" / each[kind] for kind in ("source", "device"))) for each in row["images"]]
        prompt = one.prompt.replace("\nAssistant", f"{ending}\nAssistant") if ending else one.prompt
        assert (prompt != one.prompt) is bool(ending)
        found = runtime.complete(prompt, pngs, max_new_tokens=len(row["answer"]), top=16)
        bare = prompt.removeprefix(runtime.info.begin_text)
        parts = [runtime.tokenize(part, add_special=not place) for place, part in enumerate(bare.split(MARKER))]
        ids = parts[0]
        for part in parts[1:]:
            places = found.prompt_tokens - sum(map(len, parts))
            ids = [*ids, *[PICTURE] * (places // len(pngs)), *part]
        lines.append(
            {
                "case": one.id,
                "png": [base64.b64encode(png).decode() for png in pngs],
                "prompt_ids": ids,
                "text": found.text,
                **({"top_logprobs": [[*map(list, top.items())] for top in found.top]} if found.top else {}),
                "ms": 1000 * found.seconds,
                "build": "b10257-22dc605c4 (llama.node)",
            }
        )
    return lines


@pytest.fixture(scope="module")
def phone(made: Path) -> Iterator[ServerRuntime]:
    with LlamaServer(made / "model-q8_0.gguf", made / "mmproj-model-q8_0.gguf", 512, 1) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def sound(made: Path, phone: ServerRuntime) -> list[Line]:
    return app(made, phone)


class Replayed:
    """`rankwise bundle --replay BUNDLE --answers FILE`: exit code, and what was printed."""

    def __init__(self, bundle: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.bundle, self.file, self.capsys = bundle, file, capsys

    def __call__(self, lines: list[Line]) -> tuple[int, str]:
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        code = main(["bundle", "--replay", str(self.bundle), "--answers", str(self.file)])
        printed = self.capsys.readouterr()
        return code, printed.out + printed.err


@pytest.fixture
def replay(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Replayed:
    return Replayed(made, tmp_path / "phone.jsonl", capsys)


def status(printed: str, rung: str) -> str:
    """Of the terminal's table."""
    line = next(line for line in printed.splitlines() if line.strip().startswith(f"{rung} "))
    return line.strip().removeprefix(rung).strip()


@pytest.mark.slow
def test_a_sound_app_passes_with_its_own_pixels(replay: Replayed, sound: list[Line]) -> None:
    code, printed = replay(sound)
    assert code == 0, printed
    assert status(printed, "pixels") == "ok (app)"
    for rung in ("image tokens", "token ids", "logprobs", "text"):
        assert status(printed, rung).startswith("ok"), rung
    assert "latency in the app: median 0." in printed and "95th percentile" in printed
    assert "answered by b10257-22dc605c4 (llama.node), validated on xllamacpp" in printed


@pytest.mark.slow
def test_what_an_app_does_not_tell_is_not_measured(replay: Replayed, sound: list[Line]) -> None:
    code, printed = replay([{"case": line["case"], "text": line["text"]} for line in sound])
    assert code == 0, printed
    for rung in ("pixels", "image tokens", "token ids", "logprobs"):
        assert status(printed, rung) == "not measured", rung
    assert "sha256_rgb" in printed and "prompt_ids" in printed and "latency" not in printed
    assert status(printed, "text").startswith("ok") and "build that answered is unknown" in printed


@pytest.mark.slow
def test_hashes_are_the_devices_or_androids_canvas(replay: Replayed, made: Path, sound: list[Line]) -> None:
    stored = json.loads((made / "golden" / "golden.json").read_text())["cases"]
    for name in ("sha256_rgb", "sha256_android_canvas"):
        lines = [
            {name_: value for name_, value in line.items() if name_ != "png"}
            | {"sha256_rgb": [each[name] for each in row["images"]]}
            for line, row in zip(sound, stored, strict=True)
        ]
        code, printed = replay(lines)
        assert code == 0 and status(printed, "pixels") == "ok (app)", printed
    lines[0]["sha256_rgb"] = ["0" * 64]
    code, printed = replay(lines)
    assert code == 6 and "the rung `pixels` differs" in printed


@pytest.mark.slow
def test_pixels_of_lanczos(replay: Replayed, made: Path, phone: ServerRuntime) -> None:
    code, printed = replay(app(made, phone, lanczos))
    assert code == 6 and "the rung `pixels` differs" in printed and "what the app sends differs" in printed


@pytest.mark.slow
def test_a_prompt_with_a_token_more(replay: Replayed, made: Path, phone: ServerRuntime) -> None:
    code, printed = replay(app(made, phone, ending=" ?"))
    assert code == 6 and "the rung `token ids` differs" in printed, printed
    assert status(printed, "pixels") == "ok (app)" and status(printed, "image tokens") == "ok"


@pytest.mark.slow
def test_a_picture_in_other_tiles(replay: Replayed, sound: list[Line]) -> None:
    def more(ids: list[int]) -> list[int]:
        return [*ids[: ids.index(PICTURE)], *[PICTURE] * 7, *ids[ids.index(PICTURE) :]]

    code, printed = replay([line | {"prompt_ids": more(line["prompt_ids"])} if line["png"] else line for line in sound])
    assert code == 6 and "the rung `image tokens` differs" in printed


@pytest.mark.slow
def test_answers_of_another_model(replay: Replayed, made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the same tokenizer: an app that ships the base's file."""
    base = exported_pair(tmp_path_factory) / "base" / "export" / "model-f16.gguf"
    with LlamaServer(base, made / "mmproj-model-q8_0.gguf", 512, 1) as runtime:
        code, printed = replay(app(made, runtime))
    assert code == 6 and "the rung `logprobs` differs" in printed, printed


@pytest.mark.slow
def test_another_answer_is_another_text(replay: Replayed, sound: list[Line]) -> None:
    code, printed = replay([line | {"text": "It is something else"} for line in sound])
    assert code == 6 and "differs" in printed


@pytest.mark.slow
def test_answers_need_a_bundle_and_nobody_else(
    replay: Replayed, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay.file.touch()
    given = ["--answers", str(replay.file)]
    for words, said in (
        ([str(made), *given], "add --replay BUNDLE"),
        (["--replay", str(made), "--server", "http://phone:1", *given], "leave --server out"),
        (["--replay", str(made), "--app_pixels", str(made), *given], "leave --app_pixels out"),
    ):
        assert main(["bundle", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["bundle", "--replay", str(made), *given]) == 3
    assert "no line for the case" in capsys.readouterr().err


# --- the code that is shipped ----------------------------------------------------------------------------------------


def node_modules() -> Path:
    modules = os.environ.get("RANKWISE_NODE_MODULES")
    if not modules or not shutil.which("node"):
        pytest.skip("needs node, and RANKWISE_NODE_MODULES: a node_modules folder that has @fugood/llama.node")
    return Path(modules).resolve()


@pytest.fixture(scope="module")
def installed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle where an app's developer has it: with npm's package beside."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(node_modules())
    return Path(shutil.copytree(made, folder / "bundle"))


def by_node(bundle: Path, *words: str) -> str:
    done = subprocess.run(["node", str(bundle / "clients" / words[0]), *words[1:]], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-1000:]
    return done.stdout.decode()


@pytest.mark.slow
def test_the_code_for_node_passes_with_what_it_wrote(replay: Replayed, installed: Path) -> None:
    by_node(installed, "golden.mjs", str(replay.file))
    lines = [json.loads(line) for line in replay.file.read_text(encoding="utf-8").splitlines()]
    code, printed = replay(lines)
    assert code == 0, printed
    assert status(printed, "pixels") == "ok (app)" and "(llama.node), validated on xllamacpp" in printed
    for rung in ("image tokens", "token ids", "logprobs", "text"):
        assert status(printed, rung).startswith("ok"), rung


@pytest.mark.slow
def test_the_code_for_node_with_an_apps_own_pictures(replay: Replayed, installed: Path, tmp_path: Path) -> None:
    """Which are wrong."""
    (tmp_path / "mine").mkdir()
    for device in (installed / "golden").glob("*-device.png"):
        source = next((installed / "golden").glob(device.name.replace("-device.png", "-source.*")))
        (tmp_path / "mine" / device.name).write_bytes(lanczos(source, device))
    by_node(installed, "golden.mjs", str(replay.file), str(tmp_path / "mine"))
    code, printed = replay([json.loads(line) for line in replay.file.read_text(encoding="utf-8").splitlines()])
    assert code == 6 and "the rung `pixels` differs" in printed


@pytest.mark.slow
def test_the_code_for_node_answers_with_a_label(installed: Path) -> None:
    labels = {row["name"] for row in json.loads((installed / "labels.json").read_text())["labels"]}
    said = by_node(installed, "llama.node.mjs", str(installed / "golden" / "00-device.png"))
    assert said.splitlines()[-1] in labels


ANDROID = Path(__file__).parents[1] / "helpers" / "android"
JSON_JAR = Path("/usr/share/java/com.android.json.jar")


@pytest.fixture(scope="module")
def on_a_jvm(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The bundle's Kotlin compiled with what it needs of Android, as a command."""
    if not all(shutil.which(name) for name in ("kotlinc", "javac")) or not JSON_JAR.is_file():
        pytest.skip("needs kotlinc, javac and Android's org.json: apt-get install kotlin libandroid-json-java")
    out = tmp_path_factory.mktemp("kotlin")
    android, kotlin = sorted(ANDROID.rglob("*.java")), sorted((made / "clients").glob("*.kt"))
    classes = f"{JSON_JAR}:{out}"
    for command in (
        ["javac", "-d", out, *(file for file in android if file.name != "Phone.java")],
        ["kotlinc", "-classpath", classes, "-d", out, *kotlin],
        ["javac", "-classpath", classes, "-d", out, ANDROID / "Phone.java"],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    runtime = Path(str(shutil.which("kotlinc"))).resolve().parents[1] / "lib" / "kotlin-stdlib.jar"
    return ["java", "-classpath", f"{classes}:{runtime}", "Phone"]


@pytest.mark.slow
def test_the_code_for_android_passes_with_what_it_wrote(
    replay: Replayed, made: Path, phone: ServerRuntime, on_a_jvm: list[str]
) -> None:
    """It scales the sources itself, wide, tall, turned and transparent ones among them."""
    command = [*on_a_jvm, str(made), str(replay.file), phone.talk.url]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    code, printed = replay([json.loads(line) for line in replay.file.read_text(encoding="utf-8").splitlines()])
    assert code == 0, printed
    assert status(printed, "pixels") == "ok (app)"
    for rung in ("image tokens", "token ids", "logprobs", "text"):
        assert status(printed, rung).startswith("ok"), rung


def test_shipped_files_say_how_far_they_were_run() -> None:
    for file in STATIC.iterdir():
        head = file.read_text(encoding="utf-8").split("import ")[0]
        assert ("Not run by Rankwise on a device." in head) is (file.suffix == ".kt")
