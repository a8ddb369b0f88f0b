"""Rows of every form, damaged at random: fields dropped, doubled, garbled, of wrong types; roles, markers, images,
control tokens, empty and huge texts.

    @given(mutated_rows(count=10))
    def test(rows: list[Any]) -> None: …

`pictures(folder)` draws the images that they name: sound ones and broken ones.
"""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tiny_vision import drawn_image

Place = tuple[Any, Any]  # a list or an object, and an index or a key of it


def coded() -> str:
    buffer = io.BytesIO()
    drawn_image(3, (48, 64)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pictures(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(2):
        drawn_image(number, (64, 48)).save(folder / f"{number}.png")
    drawn_image(2).resize((1, 1)).save(folder / "dot.png")
    drawn_image(2, (2000, 4)).save(folder / "thread.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "empty.png").write_bytes(b"")
    return folder


IMAGES: list[Any] = [
    *(
        "0.png",
        "1.png",
        "dot.png",
        "thread.png",
        "cut.png",
        "empty.png",
        "gone.png",
        "../rows.jsonl",
        ".",
        "http://h/x.png",
    ),
    *(["0.png"], ["0.png", "1.png"], ["0.png", "0.png"], [["0.png"]], [None], ["", "0.png"]),
    *({"path": "0.png"}, [{"path": "1.png", "bytes": None}], {"bytes": coded()}, {"bytes": "no base64"}, {"bytes": 5}),
    *("data:image/png;base64," + coded(), "data:image/png;base64,AAAA", "data:,x", "0.png\x00", "a" * 5000),
]
TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<pad>", "<end_of_utterance>", "<fake_token_around_image>"),
    *(
        "<image>",
        "<IMAGE>",
        "<__media__>",
        "<img>0.png</img>",
        "<img></img>",
        "<|image_1|>",
        "<|image_2|>",
        "<image_0>",
    ),
    *("[IMG]", "<IMG_CONTEXT>", "<ImageHere>", "<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "<video>"),
    *("<start_of_image>", "<row_1_col_1>", "<global-img>", "<think>", "</think>", "### User:", "\n\n### Output:\n"),
]
TEXTS: list[Any] = [
    *(
        "",
        " ",
        "\n",
        "\r\n\t",
        "\x00",
        "\u202e",
        "\u2028",
        "🔥",
        "e\u0301",
        "\ufeffa",
        "水",
        "\ue000answer\ue001",
        "\U000f0000",
    ),
    *("word " * 2000, "x" * 3000, "[]", "null", "{{ 7 * 7 }}", "{% raw %}", "%s", "a\\", '"', "\u200b", "\xa0"),
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1.5,
    10**30,
    [],
    {},
    ["x"],
    [[]],
    {"a": 1},
    [{}],
    [None],
    *TEXTS,
    *TOKENS,
]
NAMES = [
    *(
        "from",
        "value",
        "role",
        "content",
        "text",
        "type",
        "image",
        "images",
        "url",
        "path",
        "bytes",
        "loss",
        "weight",
        "label",
    ),
    *("system", "system_prompt", "tools", "reasoning_content", "videos", "history", "id", "task_type", "messages"),
    *(
        "conversations",
        "query",
        "response",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "question",
        "answer",
    ),
]
SPEAKERS = [
    *(
        "system",
        "user",
        "human",
        "assistant",
        "gpt",
        "bot",
        "tool",
        "observation",
        "function_call",
        "robot",
        "",
        "User ",
    ),
]


def talk(*texts: str, who: tuple[str, str] = ("human", "gpt"), form: tuple[str, str] = ("from", "value")) -> list[Any]:
    return [{form[0]: who[place % 2], form[1]: text} for place, text in enumerate(texts)]


OPENAI = {"who": ("user", "assistant"), "form": ("role", "content")}
FORMS: list[Any] = [
    {"conversations": talk("What colour is it?", "It is red.")},
    {"image": "0.png", "conversations": talk("<image>\nWhat colour?", "It is red.")},
    {"messages": talk("Name two.", "A dog and a cat.", "And now?", "A bird.", **OPENAI), "system": "Be brief."},  # type: ignore[arg-type]
    {"images": ["0.png", "1.png"], "messages": talk("<image> or <image>?", "The first.", "Why?", "Red.", **OPENAI)},  # type: ignore[arg-type]
    {
        "messages": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A square."}], "weight": 1},
        ]
    },
    {"query": "And?", "response": "Blue.", "history": [["Who?", "Me."]], "images": []},
    {"instruction": "Describe.", "input": "name[A]", "output": "A is here."},
    {"conversation": [{"system": "Be.", "input": "Who?", "output": "Me."}, {"input": "Why?", "output": "So."}]},
    {"prompt": "Say red.", "completion": "Red."},
    {"image": "1.png", "prefix": "What?", "suffix": "Red."},
    {
        "image": {"<image_00>": "0.png", "<image_01>": "1.png"},
        "messages": talk("<image_01>, <image_00>?", "No.", **OPENAI),
    },  # type: ignore[arg-type]
    talk("A list?", "Yes.", **OPENAI),  # type: ignore[arg-type]
    {"conversations": talk("Picture 1: <img>0.png</img>\nWhat?", "Red.", who=("user", "assistant"))},
]


def places(value: Any) -> Iterator[Place]:
    """Every place within a row."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, within in list(pairs):
        yield value, key
        yield from places(within)


def garbled(text: Any, token: str, at: int) -> Any:
    if not isinstance(text, str):
        return token
    place = at % (len(text) + 1)
    return text[:place] + token + text[place:]


@st.composite
def mutation(draw: st.DrawFn, row: Any) -> None:
    """One damage, done in place."""
    found = list(places(row))
    if not found:
        return
    parent, key = found[draw(st.integers(0, 999)) % len(found)]
    kind = draw(st.sampled_from("drop value text token token image name double swap speaker".split()))
    if kind == "drop":
        del parent[key]
    elif kind == "value":
        parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    elif kind == "text":
        parent[key] = draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)))
    elif kind == "token":
        parent[key] = garbled(parent[key], draw(st.sampled_from(TOKENS)), draw(st.integers(0, 60)))
    elif kind == "image" and isinstance(row, dict):
        holder = parent if key in ("image", "path", "url", "bytes") or isinstance(parent, list) else row
        name = key if holder is parent else draw(st.sampled_from(["image", "images"]))
        holder[name] = copy.deepcopy(draw(st.sampled_from(IMAGES)))
    elif kind == "name" and isinstance(parent, dict):
        parent[draw(st.sampled_from(NAMES))] = parent.pop(key)
    elif kind == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == "swap" and isinstance(parent, list):
        parent[key], parent[0] = parent[0], parent[key]
    elif kind == "speaker" and isinstance(parent, dict):
        parent["from" if "from" in parent else "role"] = draw(st.sampled_from(SPEAKERS))


@st.composite
def mutated_row(draw: st.DrawFn, number: int) -> Any:
    form = copy.deepcopy(draw(st.sampled_from(FORMS)))
    row = form if isinstance(form, list) else {"id": f"r{number}", **form}
    for _ in range(draw(st.integers(0, 3))):
        draw(mutation(row))
    return row


@st.composite
def mutated_rows(draw: st.DrawFn, count: int) -> list[Any]:
    rows = [draw(mutated_row(number)) for number in range(count)]
    return [row for row in rows if written(row) is not None]


def written(row: Any) -> str | None:
    """The row as a line; None for half a character, which the tests of files are about."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return None
    return line
