"""Rows as they are in circulation: every form reads alike, other programs' placeholders are places, what was done is
said."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_vision import drawn_image

from rankwise.cli import main
from rankwise.data.example import Examples
from rankwise.data.images import ImageReader
from rankwise.data.sources.load import load
from rankwise.data.sources.table import kind_of
from rankwise.data.template import PATTERN, TABLE, found
from rankwise.errors import DataError, UsageError
from rankwise.options.sections import DataSection

Row = dict[str, Any]


def read(folder: Path, *rows: Any, **how: Any) -> Examples:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return load("conversations", file, how=DataSection(**how))


def shared(*texts: str, **more: Any) -> Row:
    names = ("human", "gpt")
    return {"conversations": [{"from": names[n % 2], "value": text} for n, text in enumerate(texts)], **more}


def texts(row: Any) -> list[str]:
    return [turn.text for turn in row.turns]


# --- forms -------------------------------------------------------------------------------------------------------


def turns(who: str, what: str, **said: str) -> list[Row]:
    return [{who: name, what: text} for name, text in said.items()]


FORMS: dict[str, Row] = {
    "ShareGPT": {"conversations": turns("from", "value", system="Be.", human="a", gpt="b")},
    "messages": {"messages": turns("role", "content", system="Be.", user="a", model="b")},
    "parts": {
        "system": "Be.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", "image": None}]},
            {"role": "assistant", "content": [{"text": "b"}]},
        ],
    },
    "the Cauldron, FineVision": {"system": "Be.", "texts": [{"user": "a", "assistant": "b", "source": "x"}]},
    "Firefly": {"system": "Be.", "conversation": [{"human": "a", "assistant": "b"}]},
    "Dolly": {"system": "Be.", "instruction": "a", "context": "", "response": "b", "category": "open_qa"},
    "OpenOrca": {"id": "niv.1", "system_prompt": "Be.", "question": "a", "response": "b"},
    "prompt and response": {"system": "Be.", "prompt": "a", "response": "b"},
    "system beside the turns and in them": {
        "system_prompt": "Be.",
        "conversations": turns("from", "value", system="Be.", human="a", gpt="b"),
    },
    "XTuner": {"conversation": [{"system": "Be.", "input": "a", "output": "b"}]},
    "swift": {"system": "Be.", "query": "a", "response": "b", "history": []},
    "Alpaca": {"system": "Be.", "instruction": "a", "input": "", "output": "b"},
    "TRL": {"system": "Be.", "prompt": "a", "completion": "b"},
    "TRL messages": {
        "prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    "MiniCPM, Liquid": {
        "conversations": [
            {"role": "system", "content": [{"type": "text", "value": "Be."}]},
            {"role": "user", "content": [{"type": "text", "content": "a"}]},
            {"role": "assistant", "content": "b"},
        ]
    },
    "PaliGemma": {"system": "Be.", "prefix": "a", "suffix": "b"},
    "columns of a merged export": {
        "conversations": None,
        "system": "",
        "messages": turns("role", "content", developer="Be.", User="a", Bot="b"),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_read_alike(tmp_path: Path, form: str) -> None:
    [row] = read(tmp_path, FORMS[form])
    assert [(turn.role, turn.text) for turn in row.turns] == [("system", "Be."), ("user", "a"), ("assistant", "b")]
    assert kind_of(tmp_path / "rows.jsonl") == "conversations" and not row.changes


def test_several_exchanges(tmp_path: Path) -> None:
    swift = {"query": "c", "response": "d", "history": [["a", "b"]]}
    alpaca = {"instruction": "c", "input": "more", "output": "d", "history": [["a", "b"]]}
    xtuner = {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}
    prompted = {"prompt": "c", "response": "d", "history": [["a", "b"]]}
    dolly = {"instruction": "c", "context": "more", "response": "d"}
    cauldron = {"texts": [{"user": "a", "assistant": "b"}, {"user": "c", "assistant": "d"}]}
    found = [texts(row) for row in read(tmp_path, swift, alpaca, xtuner, dolly, cauldron, prompted)]
    four = ["a", "b", "c", "d"]
    assert found == [four, ["a", "b", "c\nmore", "d"], four, ["c\nmore", "d"], four, four]


@pytest.mark.parametrize("name", ["gpt", "assistant", "bot", "model", "chatbot", "ChatGPT", "AI", "function_call"])
def test_who_answers_has_many_names(tmp_path: Path, name: str) -> None:
    [row] = read(tmp_path, {"messages": [{"role": "user", "content": "a"}, {"role": name, "content": "b"}]})
    assert row.turns[-1].role == "assistant"


def test_roles_of_ones_own(tmp_path: Path) -> None:
    row = {"messages": [{"role": "pupil", "content": "a"}, {"role": "Coach", "content": "b"}]}
    with pytest.raises(DataError, match='unknown role "pupil"; --roles says who it is: pupil=assistant'):
        read(tmp_path, row)
    assert texts(read(tmp_path, row, roles=("pupil=user", "coach=assistant"))[0]) == ["a", "b"]
    with pytest.raises(UsageError, match="--roles coach=model"):
        read(tmp_path, row, roles=("coach=model",))
    with pytest.raises(UsageError, match="coach is named user and assistant"):
        read(tmp_path, row, roles=("coach=user", "Coach=assistant"))


def test_a_key_twice_in_a_row_is_refused_as_in_a_list(tmp_path: Path) -> None:
    """json keeps the last one silently, and with it one of two answers."""
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n')
    with pytest.raises(DataError, match=r"line 1.*the key 'content' appears twice in one object"):
        load("conversations", tmp_path / "rows.jsonl")


def test_roles_and_places_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [{"role": "pupil", "content": "a"}, {"role": "coach", "content": "b"}], "images": ["0.png"] * 2}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    drawn_image().save(tmp_path / "0.png")
    argv = ["check", "--data_path", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out"), "--workers", "0"]
    assert main(argv) == 3
    assert main([*argv, "--roles", "pupil=user,coach=assistant"]) == 3
    assert main([*argv, "--roles", "pupil=user,coach=assistant", "--image_first"]) == 0
    assert "1 row: images without a placeholder put before the first question" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "check.json").read_text())["changes"] == {
        "images without a placeholder put before the first question": 1
    }
    assert main([*argv, "--roles", "coach"]) == 2


def test_turns_alone_are_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = turns("role", "content", user="a", assistant="b")
    assert texts(read(tmp_path, alone)[0]) == ["a", "b"]
    monkeypatch.setattr("rankwise.data.sources.load.LARGE", 0)
    assert texts(read(tmp_path, alone)[0]) == ["a", "b"]


def test_xtuners_parts_name_the_images_of_its_placeholders(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": name, "image_wh": [1, 1]}} for name in ("a", "b")]
    row = said(("user", ""), BOT)
    row["messages"][0]["content"] = [*parts, {"type": "text", "text": "<IMG_CONTEXT>\n<IMG_CONTEXT>\nSame?"}]
    [example] = read(tmp_path, row)
    assert (texts(example), example.images) == (["<image>\n<image>\nSame?", "b"], ("a", "b"))


def test_minicpms_images_are_named_by_their_placeholders(tmp_path: Path) -> None:
    images = {"<image_01>": "b", "<image_00>": "a"}
    [example] = read(tmp_path, shared("Is <image_01> in <image_00>?", "b", image=images))
    assert (example.turns[0].text, example.images) == ("Is <image> in <image>?", ("b", "a"))


@pytest.mark.parametrize("large", [False, True])
def test_rows_of_one_id_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """LLaVA names rows by their image, so that three rows are called alike."""
    if large:
        monkeypatch.setattr("rankwise.data.sources.load.LARGE", 0)
    rows = read(tmp_path, *(shared("a", f"b{n}", id="000000442786") for n in range(3)), shared("a", "b", id="other"))
    assert [row.id for row in rows] == ["000000442786", "000000442786~2", "000000442786~3", "other"]
    assert [rows[place].answer for place in (2, 0)] == ["b2", "b0"]
    assert dict(rows.changes) == {"an id that occurred before; named by its number in the file too": 2}


def test_answers_that_were_rated_bad_are_refused(tmp_path: Path) -> None:
    """KTO's rows look like others."""
    assert len(read(tmp_path, shared("a", "b", label=True))) == 1
    with pytest.raises(DataError, match="label is false: its answer was rated as a bad one"):
        read(tmp_path, shared("a", "b", label=False))


# --- what is done to a row, and said -------------------------------------------------------------------------------


def said(*turns: tuple[str, str], **more: Any) -> Row:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


USER, BOT = ("user", "a"), ("assistant", "b")
CHANGED: dict[str, tuple[Row, list[tuple[str, str, bool]], str]] = {
    "questions in a row": (
        said(USER, ("user", "c"), BOT),
        [("user", "a\nc", True), ("assistant", "b", True)],
        "joined",
    ),
    "answers in a row": (said(USER, BOT, BOT), [("user", "a", True), ("assistant", "b\nb", True)], "joined"),
    "a greeting": (
        said(BOT, USER, BOT),
        [("assistant", "b", False), ("user", "a", True), ("assistant", "b", True)],
        "begins with the assistant, whose first turn is context and not learnt",
    ),
    "no answer at the end": (said(USER, BOT, USER), [("user", "a", True), ("assistant", "b", True)], "left out"),
    "a tool": (
        said(USER, BOT, ("tool", "3"), BOT),
        [("user", "a", True), ("assistant", "b", True), ("user", "3", True), ("assistant", "b", True)],
        "what tool returns is taken as the user's turn",
    ),
    "an image without a place": (
        said(("system", "Be."), USER, BOT, image="x"),
        [("system", "Be.", True), ("user", "<image>\na", True), ("assistant", "b", True)],
        "images without a placeholder put before the first question",
    ),
    "a marker that stands for nothing": (
        said(("user", "What is [IMG]?"), BOT),
        [("user", "What is [IMG]?", True), ("assistant", "b", True)],
        "[IMG] in a row without images is text",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_done_to_a_row_is_said(tmp_path: Path, name: str) -> None:
    row, wanted, change = CHANGED[name]
    rows = read(tmp_path, row, said(USER, BOT))
    assert [(turn.role, turn.text, turn.trained) for turn in rows[0].turns] == wanted
    assert [change in each for each in rows[0].changes] == [True]
    assert [f"note: 1 row: {rows[0].changes[0]}"] == rows.notes(sees_images=True)


def test_answers_in_a_row_of_which_one_is_not_learnt_are_refused(tmp_path: Path) -> None:
    row = said(USER, BOT, BOT)
    row["messages"][1]["loss"] = False
    with pytest.raises(DataError, match="answers in a row of which one is learnt and another is not"):
        read(tmp_path, row)


# --- placeholders of other programs --------------------------------------------------------------------------------

PLACES = {
    "<IMG_CONTEXT>": ["a"],
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>": ["a"],
    "<Img><ImageHere></Img>": ["a"],
    "<ImageHere>": ["a"],
    "[IMG]": ["a"],
    "[IMG][IMG][IMG_BREAK][IMG][IMG][IMG_END]": ["a"],
    "<|image_pad|>": ["a"],
    "<|vision_start|><|image_pad|><|vision_end|>": ["a"],
    "<start_of_image>": ["a"],
    "<image_soft_token>": ["a"],
    "<|image|>": ["a"],
    "<|begin_of_image|><|image|><|end_of_image|>": ["a"],
    "(<image>./</image>)": ["a"],
    "<img>": ["a"],
    "<img></img>": ["a"],
    "<image_placeholder>": ["a"],
    "<|image_2|> and <|image_1|>": ["b", "a"],
    "<image_01> <image_00>": ["b", "a"],
    "<image 1>, <image 2>": ["a", "b"],
    "Picture 1: <img>c d.jpg</img>\n": ["c d.jpg"],
    "<img>https://host/x.png</img> and <image>": ["https://host/x.png", "a"],
}


@pytest.mark.parametrize("marker", PLACES)
def test_another_programs_placeholder_is_the_place_of_an_image(tmp_path: Path, marker: str) -> None:
    wanted = PLACES[marker]
    listed = [name for name in "ab" if name in wanted]
    [row] = read(tmp_path, shared(f"See {marker}?", "b", images=listed))
    assert list(row.images) == wanted and row.turns[0].text.count("<image>") == len(wanted)
    assert not [each for each in found(row.turns[0].text) if not each.own]
    assert [change.split(" taken")[1] for change in row.changes] == [" as the place of an image"]


REFUSED = {
    "<image> [IMG]": (["a"], r"2 placeholders \(<image>, \[IMG\]\) for 1 image"),
    "<IMG_CONTEXT><IMG_CONTEXT>": (["a"], r"2 placeholders \(<IMG_CONTEXT>\) for 1 image"),
    "<|image_1|> <|image_3|>": (["a", "b"], "placeholders are numbered 1, 3 for 2 images"),
    "<|image_1|> <|image_1|>": (["a"], r"numbered 1, 1 for 1 image; .*--repeat-image"),
    "<|image_1|> <image>": (["a", "b"], "some of its placeholders .* have a number"),
    "<video> <image>": (["a"], "a placeholder <video>: video cannot be trained on"),
    "<|vision_start|><|video_pad|><|vision_end|>": (["a"], r"placeholder <\|vision_start\|><\|video_pad\|>.*: video"),
    "<audio>": (["a"], "audio cannot"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_place_is_refused_with_its_marker(tmp_path: Path, text: str) -> None:
    images, reason = REFUSED[text]
    with pytest.raises(DataError, match=f"line 1: sample rows-1: .*{reason}"):
        read(tmp_path, shared(text, "b", images=images))


@pytest.mark.parametrize("name", ["video", "videos", "audios", "rejected_response", "objects"])
def test_fields_that_would_have_no_effect_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"cannot use '{name}'"):
        read(tmp_path, shared("a", "b", **{name: ["x"]}))
    assert len(read(tmp_path, shared("a", "b", **{name: []}))) == 1


def test_one_numbered_image_twice_on_request(tmp_path: Path) -> None:
    row = shared("<|image_1|> <|image_2|> <|image_1|>", "b", images=["a", "b"])
    assert read(tmp_path, row, repeat_image=True)[0].images == ("a", "b", "a")


def test_every_row_of_the_table_is_tried() -> None:
    tried = {marker.name for text in (*PLACES, *REFUSED) for marker in found(text)}
    assert {name for name, *_ in TABLE} - tried == {"<image_pad>", "<|IMAGE|>"}


def test_placeholders_are_looked_for_where_they_can_begin() -> None:
    """Also where one opens inside another, or what opens is none."""
    text = "".join(f"({text}< [[{text[1:]} <image{text}" for text in (*PLACES, *REFUSED))
    places = [match.span() for match in PATTERN.finditer(text)]
    assert len(places) > len(TABLE)
    assert [(marker.start, marker.end) for marker in found(text)] == places


# --- images as `datasets` exports them -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "bytes", "numbers", "part", "path in bytes"])
def test_images_as_datasets_exports_them(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    drawn_image().save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    coded = base64.b64encode(buffer.getvalue()).decode()
    image = {
        "path": {"path": "a.png", "bytes": None},
        "bytes": {"bytes": coded, "path": None},
        "numbers": {"bytes": list(buffer.getvalue())},
        "part": {"bytes": coded, "path": "elsewhere.png"},
        "path in bytes": {"bytes": "", "path": "a.png"},
    }[form]
    row = shared("<image>a", "b", images=[image])
    if form == "part":
        part = {"type": "image", "text": None, "image": image}
        row = {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "a", "image": None}]},
                {"role": "assistant", "content": "b"},
            ]
        }
    [example] = read(tmp_path, row)
    assert ImageReader(tmp_path).open(example.images[0]).tobytes() == drawn_image().tobytes()


def test_a_parquet_file_reads_like_lines(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    drawn_image().save(buffer, "PNG")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": f"b{n}"}],
            "images": [{"bytes": buffer.getvalue(), "path": None}],
        }
        for n in range(3)
    ]
    parquet.write_table(arrow.Table.from_pylist([*rows, {"messages": [], "images": []}]), tmp_path / "x.parquet")
    assert kind_of(tmp_path / "x.parquet") == "conversations"
    read_rows = load("conversations", tmp_path / "x.parquet", how=DataSection(skip_bad=True))
    assert [row.answer for row in read_rows] == ["b0", "b1", "b2"] and [row.line for row in read_rows.skipped] == [4]
    assert ImageReader(tmp_path).open(read_rows[0].images[0]).tobytes() == drawn_image().tobytes()
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a valid parquet file"):
        load("conversations", tmp_path / "y.parquet")


# --- what would be learnt without a part of it ---------------------------------------------------------------------

UNREAD: dict[str, tuple[Row, str]] = {
    "LLaVA with a path of another name": (shared("a", "b", image_path="0.png"), "'image_path' is not read"),
    "several": (said(USER, BOT, img=["0.png"]), "'img' is not read"),
    "GQA": ({"imageId": "n16", "question": "Is the sky dark?", "answer": "yes"}, "'imageId' is not read"),
    "PixMo": ({"image_url": "https://h/a.jpg", "question": "a", "answer": "b"}, "'image_url' is not read"),
    "MMMU": ({"question": "<image 1>?", "image_1": {"bytes": "AA"}, "answer": "B"}, "'image_1' is not read"),
    "imagefolder": (shared("a", "b", file_name="train/0.jpg"), "'file_name' is not read"),
    "bytes of any name": (shared("a", "b", scan={"bytes": "AA", "path": None}), "'scan' is not read"),
    "Ollama": (
        {"messages": [{"role": "user", "content": "a", "images": ["0.png"]}, {"role": "assistant", "content": "b"}]},
        "'images' is not read.*beside the turns",
    ),
    "ScienceQA": ({"question": "Where?", "choices": ["x", "y"], "answer": 0, "image": "0.png"}, "'choices' beside it"),
    "AI2D": ({"question": "Where?", "options": ["x", "y"], "answer": "1"}, "'options' beside it"),
    "text to SQL": ({"question": "How many?", "context": "CREATE TABLE …", "answer": "SELECT 1"}, "'context' beside"),
    "Alpaca with a context": ({"instruction": "a", "input": "c", "context": "d", "output": "b"}, "'context' beside"),
    "TRL with a context": ({"prompt": "a", "context": "d", "completion": "b"}, "'context' beside"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_rows_that_would_be_learnt_without_a_part_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures or choices in a column that is not read: the answer would be learnt from the question alone."""
    row, reason = UNREAD[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    argv = ["check", "--data_path", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out"), "--workers", "0"]
    assert main(argv) == 3
    [bad] = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad["kind"] == "row" and re.search(reason, bad["reason"])


def test_questions_with_an_answer_alone_are_told_to_be_cota(tmp_path: Path) -> None:
    """VQA, GSM8K: what is put around them is said."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "How many?", "answer": "3", "image": "0.png"}))
    rows = load(kind_of(tmp_path / "rows.jsonl") or "", tmp_path / "rows.jsonl")
    assert rows.notes(sees_images=True) == [
        "note: 1 row: without a chain of thought, read as CoTA: an instruction before it, 'Answer:' learnt too"
    ]


def test_columns_that_name_no_image_of_theirs_are_left_alone(tmp_path: Path) -> None:
    plain = shared("a", "logo.png", source="coco/0.jpg", avatarUrl="https://h/a.png", image_path=None, path="x.json")
    named = shared("<image>", "b", image="0.png", image_url="https://h/a.jpg", image_id=5)
    assert len(read(tmp_path, plain, named)) == 2


def test_parts_say_which_of_the_listed_images_they_are(tmp_path: Path) -> None:
    parts = [{"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0, "text": None}]
    row = said(("user", ""), BOT, images=["a", "b"])
    row["messages"][0]["content"] = [*parts, {"type": "text", "text": "Same?", "index": None}]
    assert read(tmp_path, row)[0].images == ("b", "a")


def test_anthropics_parts(tmp_path: Path) -> None:
    row = said(("user", ""), BOT)
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    row["messages"][0]["content"] = [{"type": "image", "source": source}, {"type": "text", "text": "a"}]
    [example] = read(tmp_path, row)
    assert example.images == ("data:image/unknown;base64,AAAA",)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", "instruction,output\na,b\n", r"unsupported file type \.csv; give .json"),
        ("rows.jsonl", '[{"messages": []}]', "a list of samples belongs in a file named .json"),
        ("rows.jsonl", '{"messages": [{"role": "gpt", "content": "b"}]}', "no question comes before one"),
    ],
)
def test_files_and_rows_that_are_refused_say_why(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        load("conversations", tmp_path / name)
