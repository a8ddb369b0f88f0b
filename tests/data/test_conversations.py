"""Conversations with images: every slot has its image, what does not fit is named, and big files stay on the disk."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from rankwise.data.dataset import RenderedDataset
from rankwise.data.example import Chosen, Examples, check_slots
from rankwise.data.images import ImageReader
from rankwise.data.render import IGNORED, Renderer
from rankwise.data.sources.load import load
from rankwise.data.sources.rows import IndexedSamples
from rankwise.data.split import split_groups, subset
from rankwise.errors import DataError
from rankwise.options.sections import DataSection

Row = dict[str, Any]


def said(*texts: str, **more: Any) -> Row:
    """A conversation in ShareGPT form; turns alternate."""
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)], **more}


def messages(*contents: Any, **more: Any) -> Row:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)], **more}


def weighted(last: Any = None, asked: Any = None, **first: Any) -> Row:
    """Two exchanges: what the first answer, the last one and the last question say about loss."""
    answers = ({"role": "assistant", "content": "a", **first}, {"role": "assistant", "content": "b", "loss": last})
    questions = ({"role": "user", "content": "q"}, {"role": "user", "content": "r", "loss": asked})
    return {"messages": [questions[0], answers[0], questions[1], answers[1]]}


def rows_of(tmp_path: Path, *rows: Any, name: str = "rows.jsonl", **how: Any) -> Examples:
    file = tmp_path / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return load("conversations", file, how=DataSection(**how))


# --- slots and images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "texts", "images"),
    [
        (said("<image>Who?", "He.", image="a.jpg"), ["<image>Who?", "He."], ["a.jpg"]),
        (said("Who? <IMAGE>", "He.", image=["a.jpg"]), ["Who? <image>", "He."], ["a.jpg"]),
        (said("<__media__>\nWho?\n", "He.", images=["a.jpg"]), ["<image>\nWho?\n", "He."], ["a.jpg"]),
        (said("<image><IMAGE> b", "x", images=["a", "b"]), ["<image><image> b", "x"], ["a", "b"]),
        (
            messages("<image>Who?", "He.", "And now?<image>", "She.", images=["a", "a"]),
            ["<image>Who?", "He.", "And now?<image>", "She."],
            ["a", "a"],
        ),
        (
            messages(
                [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "!"}], "x", image="a"
            ),
            ["See <image>!", "x"],
            ["a"],
        ),
        (
            messages(
                [{"type": "image_url", "image_url": {"url": "own"}}, {"type": "text", "text": "and <image>"}],
                [{"type": "text", "value": "x"}],
                image="listed",
            ),
            ["<image>and <image>", "x"],
            ["own", "listed"],
        ),
        (
            messages([{"type": "image", "path": "p"}, {"type": "image", "url": "u"}], "x"),
            ["<image><image>", "x"],
            ["p", "u"],
        ),
        (messages([{"type": "image_url", "value": "v"}], "x"), ["<image>", "x"], ["v"]),
        (said("Hi", "Yo", image=None), ["Hi", "Yo"], []),
        (said("Hi", "Yo", images=[]), ["Hi", "Yo"], []),
        (said("Hi", "Yo", image="", images=None), ["Hi", "Yo"], []),
    ],
)
def test_every_slot_has_its_image_in_order(tmp_path: Path, row: Row, texts: list[str], images: list[str]) -> None:
    [example] = rows_of(tmp_path, row)
    assert [turn.text for turn in example.turns] == texts
    assert example.images == tuple(images)
    assert example.references == (texts[-1],)
    check_slots(example, "<image>")


@pytest.mark.parametrize(
    ("row", "learnt"),
    [
        (weighted(), [True, True]),
        (weighted(loss=True, weight=1, asked=False), [True, True]),
        (weighted(loss=False), [False, True]),
        (weighted(train=False), [False, True]),
        (weighted(training=False), [False, True]),
        (weighted(weight=0), [False, True]),
        (weighted(weight=0.0, loss=None), [False, True]),
        (weighted(last=False), [True]),
    ],
)
def test_an_answer_that_says_so_is_not_learnt(tmp_path: Path, row: Row, learnt: list[bool]) -> None:
    """What follows the last answer that is learnt teaches nothing, and goes."""
    [example] = rows_of(tmp_path, row)
    assert [turn.trained for turn in example.turns if turn.role == "assistant"] == learnt
    for style, template in (("sections", None), ("raw", None), ("chat", CHAT_TEMPLATE)):
        tokenizer = tiny_tokenizer(tmp_path / style, chat_template=template)
        rendered = Renderer(tokenizer, style=style).training(example)
        taught = tokenizer.decode([label for label in rendered.labels if label != IGNORED])
        assert taught.replace(" ", "") == "".join(f"{'ab'[place]}</s>" for place, on in enumerate(learnt) if on)
        assert "a</s>" in tokenizer.decode(rendered.input_ids)
        assert rendered.input_ids[: len(Renderer(tokenizer, style=style).prompt_ids(example))] == Renderer(
            tokenizer, style=style
        ).prompt_ids(example)


def test_an_image_behind_the_last_answer_that_is_learnt_goes_with_its_question(tmp_path: Path) -> None:
    row = said("<image>Who?", "He.", "And <image>?", "She.", images=["a", "b"])
    row["conversations"][3]["loss"] = False
    [example] = rows_of(tmp_path, row)
    assert (example.images, example.references) == (("a",), ("He.",))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stays_apart_from_the_answer(tmp_path: Path, name: str) -> None:
    row = messages("Who?", "He.")
    row["messages"][1][name] = "Hm."
    [example] = rows_of(tmp_path, row)
    assert (example.answer, example.turns[-1].reasoning) == ("He.", "Hm.")
    with pytest.raises(DataError, match="reasoning_content needs a chat template that writes it"):
        Renderer(tiny_tokenizer(tmp_path)).training(example)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said("Who?", "He.", images=["a", "b"]), r"no placeholders \(<image>\) for 2 images; put .* --image-first"),
        (said("<image>Who?", "He."), r"1 placeholder \(<image>\) for no images"),
        (said("<image><image>Who?", "He.", image="a"), "2 placeholders .* for 1 image; .* pass --repeat-image"),
        (said("<image>Who?", "He.", images=["a", "b"]), "1 placeholder .* for 2 images"),
        (said("<image>" * 3, "He.", images=["a", "b"]), "3 placeholders .* for 2 images; each placeholder"),
        (messages([{"type": "image", "value": "own"}], "x", images=["other"]), "no placeholders .* for 1 image"),
        (said("<image>Who?", "He <image>.", images=["a", "b"]), "an answer holds an image placeholder"),
        (said("Who?", "<IMAGE>"), "an answer holds an image placeholder"),
        (messages("x", [{"type": "image", "value": "a"}]), "an image part stands in an answer"),
        (said("<image>", "x", image=3), "image must be a path"),
        (said("<image>", "x", image={"a": 1}), "image must be a path"),
        (said("<image>", "x", image=["a", None]), "image must be a path"),
        (said("<image>", "x", image="a", images=["b"]), "both image and images, and they differ"),
        (messages([{"type": "video", "video": "v"}], "x"), 'cannot use a content part of type "video"'),
        (messages([{"type": "image_url"}], "x"), "must name its image"),
        (
            messages([{"type": "image", "url": {"a": 1}}, {"type": "image", "image": 5}], "x"),
            "must name its image|no image",
        ),
        (messages([{"type": "text", "text": 5}], "x"), "text must be a string, found 5"),
        (messages([], "x"), "empty turn"),
        (messages([{"type": "text", "text": " "}], "x"), "empty turn"),
        (messages("x", None), "empty turn"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": ["hello"]}, "a turn must be an object"),
        (weighted(loss=0.5), "loss of a turn is true or false, 1 or 0; found 0.5"),
        (weighted(train="false"), 'train of a turn is true or false, 1 or 0; found "false"'),
        (weighted(weight=[1]), "weight of a turn is true or false"),
        (weighted(weight=1, loss=False), "loss and weight of a turn contradict each other"),
        (weighted(loss=False, last=False), "no answer is learnt: loss, train or weight is off for each"),
        (weighted(asked=True), "loss is on for a turn of user: only answers are learnt"),
        (weighted(tool_calls=[{"name": "f"}]), "cannot use 'tool_calls'"),
        (said("x", "y", tools=[{"name": "f"}]), "cannot use 'tools'"),
        (said("x", "y", chat_template_kwargs={"enable_thinking": False}), "give it as --chat_template_kwargs"),
        (weighted(reasoning_content=["z"]), "reasoning_content is a text of an assistant's turn"),
        (said("x", "y", system_prompt=["z"]), "a content part must be an object"),
    ],
)
def test_what_does_not_fit_is_named_with_sample_line_and_reason(tmp_path: Path, row: Row, reason: str) -> None:
    good = said("Hi", "Yo", id="good")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: sample s7: .*{reason}"):
        rows_of(tmp_path, good, {"id": "s7"} | row)
    rows = rows_of(tmp_path, good, {"id": "s7"} | row, skip_bad=True)
    assert len(rows) == 1
    [bad] = rows.skipped
    assert (bad.sample, bad.line) == ("s7", 2) and "warning: 1 bad rows skipped" in rows.notes()[0]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_half_a_character_is_no_text(tmp_path: Path, name: str) -> None:
    r"""JSON may escape one half of a surrogate pair; whole pairs, and a text that shows an escape, are fine."""
    rows = [said("Hi \U0001f600 \\\\ud83d", "Yo"), said("Hi", "Yo \ud83d"), said("Hi", "Yo", image="\ude00.jpg")]
    written = ",\n".join(map(json.dumps, rows))
    file = tmp_path / name
    file.write_text(written.replace(",\n", "\n") if name.endswith("l") else f"[\n{written}]")
    read = load("conversations", file, how=DataSection(skip_bad=True))
    assert [example.turns[0].text for example in read] == ["Hi \U0001f600 \\\\ud83d"]
    assert [row.line for row in read.skipped] == ([2, 3] if name.endswith("l") else [3, 4])
    assert all("half of a character" in row.reason for row in read.skipped)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "1" * 5000 + "}"], ids=["deep", "large"])
def test_json_that_python_cannot_hold_is_a_bad_row(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(said('Hi', 'Yo'))}\n{line}\n")
    with pytest.raises(DataError, match="line 2: cannot be read"):
        load("conversations", file)


def test_one_image_for_several_placeholders_on_request(tmp_path: Path) -> None:
    row = said("<image> and <image>", "x", "again <image>", "y", image="a")
    [example] = rows_of(tmp_path, row, repeat_image=True)
    assert example.images == ("a", "a", "a")
    with pytest.raises(DataError, match=r"3 placeholders .* for 2 images"):
        rows_of(tmp_path, row | {"image": ["a", "b"]}, repeat_image=True)


def test_samples_of_the_same_images_are_one_group(tmp_path: Path) -> None:
    data = "data:image/png;base64," + "A" * 100_000
    rows = rows_of(
        tmp_path,
        said("<image>1", "x", image="a"),
        said("<image>2<image>", "x", images=["a", "a"]),
        said("<image>3", "x", image="b"),
        said("4", "x"),
        said("<image>5", "x", image=data),
        said("<image>6", "x", image=data),
    )
    groups = [row.group for row in rows]
    assert groups[0] == groups[1] and groups[4] == groups[5] and len(set(groups)) == 4
    assert max(map(len, groups)) <= 200


def test_cota_questions_see_their_images(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    rows = [
        {"question": "Why?", "answer": "So.", "image": "a.jpg"},
        {"question": "Left of <IMAGE>?", "answer": "So.", "image": ["a.jpg"]},
        {"question": "Why?", "answer": "So.", "images": ["a.jpg", "b.jpg"]},
    ]
    file.write_text(json.dumps(rows))
    examples = load("cota", file)
    assert [e.turns[1].text for e in examples] == ["<image>\nWhy?", "Left of <image>?", "<image>\n<image>\nWhy?"]
    assert [len(e.images) for e in examples] == [1, 1, 2]
    for wrong in ({"image": {"a": 1}}, {"question": "<image>?"}, {"answer": "<image>"}):
        file.write_text(json.dumps([rows[0] | {"image": None} | wrong]))
        with pytest.raises(DataError, match="line 1: sample c-1: "):
            load("cota", file)


# --- real files --------------------------------------------------------------------------------------------------

REAL = {  # file: (samples, with images, images, folder of the image paths)
    "lmms_finetune_example/celeba_image_train.json": (90, 90, 90, "lmms_finetune_example/images"),
    "lmms_finetune_example/celeba_image_eval.json": (10, 10, 10, "lmms_finetune_example/images"),
    "lmms_finetune_example/single_image.json": (2, 2, 2, "lmms_finetune_example/images"),
    "lmms_finetune_example/multi_images.json": (2, 2, 6, "lmms_finetune_example/images"),
    "lmms_finetune_example/single_image_has_text_only.json": (4, 2, 2, "lmms_finetune_example/images"),
    "llama_factory_mllm_demo/data/mllm_demo.json": (6, 6, 8, "llama_factory_mllm_demo/data"),
    "llama_factory_mllm_demo/data/v1_multimodal_demo.jsonl": (24, 24, 32, "llama_factory_mllm_demo"),
    "qwen_vl_finetune_demo/demo/single_images.json": (3, 3, 3, "qwen_vl_finetune_demo"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_with_all_their_images(shared_data: Path, name: str) -> None:
    samples, seen, images, folder = REAL[name]
    rows = load("conversations", shared_data / "llava" / name)
    assert (len(rows), rows.with_images, sum(len(row.images) for row in rows)) == (samples, seen, images)
    reader = ImageReader(shared_data / "llava" / folder)
    for row in rows:
        check_slots(row, "<image>")
        for image in row.images:
            assert min(reader.size(image)) > 0


# --- big files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.data.sources.load.LARGE", 0)


MIXED = [
    said("<image>Hä?", "Éa", image="a.jpg", id="first", task_type="x"),
    "",
    said("Hi", "Yo", task_type="y"),
    said("Hi", "Ya", system_prompt="Be."),
    said("<image> and <image>", "z", images=["a.jpg", "b.jpg"]),
    said("Hi", "Yo", id=7),
    said("Hi", "Last"),
]


def mixed_file(path: Path) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) if row else "" for row in MIXED]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


def test_a_big_file_reads_as_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = mixed_file(tmp_path / "rows.jsonl")
    held = load("conversations", file)
    monkeypatch.setattr("rankwise.data.sources.load.LARGE", file.stat().st_size - 1)
    lazy = load("conversations", file)
    assert isinstance(held.items, tuple) and isinstance(lazy.items, IndexedSamples)
    assert list(lazy) == list(held) and lazy[-1] == held[-1]
    assert [example.line for example in lazy] == [example.line for example in held] == [1, 3, 4, 5, 6, 7]
    assert (len(lazy), lazy.with_images, lazy.notes()) == (len(held), held.with_images, held.notes())
    assert tuple(lazy.items[1:4:2]) == held.items[1:4:2]
    assert list(pickle.loads(pickle.dumps(lazy.items))) == list(held)
    with pytest.raises(IndexError):
        lazy[len(lazy)]


def test_bad_rows_of_a_big_file_are_named_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps(said("Hi", "Yo", id="a"))
    bad = [good, '{"x', json.dumps(said("Hi")), "[1]", b"\xff".decode("latin1")]
    file.write_bytes("\n".join([good, *bad, json.dumps(said("Hi", "Yo"))]).encode("latin1"))
    held = load("conversations", file, how=DataSection(skip_bad=True))
    with pytest.raises(DataError) as first:
        load("conversations", file)
    monkeypatch.setattr("rankwise.data.sources.load.LARGE", 0)
    lazy = load("conversations", file, how=DataSection(skip_bad=True))
    assert list(lazy) == list(held) and lazy.skipped == held.skipped and len(held.skipped) == 4
    with pytest.raises(DataError) as again:
        load("conversations", file)
    assert str(first.value) == str(again.value)


@pytest.mark.usefixtures("small_limit")
def test_a_file_changed_behind_its_index_is_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, said("Hi", "Yo"), said("Hi", "Ya"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(said("Hello", "there")))
    with pytest.raises(DataError, match="has changed since it was checked"):
        rows[1]


def big_file(path: Path, count: int) -> Path:
    """Rows of about 2 kB, a hundred images."""
    with path.open("w") as stream:
        for number in range(count):
            row = said(f"<image>{number}", "word " * 400, image=f"{number % 100}.jpg", task_type=str(number % 3))
            stream.write(json.dumps(row) + "\n")
    return path


def grown(file: Path) -> tuple[int, int]:
    """Bytes that remain and that there were at most, from reading to the split parts of it."""
    tracemalloc.start()
    try:
        rows = load("conversations", file)
        split = split_groups(rows.items, 0.1, random.Random(0))
        part = subset(split.train, 0.5, None, random.Random(0))
        assert len(part) and isinstance(part, Chosen) and isinstance(split.val, Chosen)
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("small_limit")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """1,500 rows more are 3 MB of text more: of a row 48 bytes remain, and while reading there are ids and groups."""
    few, many = (big_file(tmp_path / f"{count}.jsonl", count) for count in (500, 2000))
    grown(few)  # imports and caches
    (kept, peak), (kept_more, peak_more) = grown(few), grown(many)
    more = many.stat().st_size - few.stat().st_size
    assert more > 3_000_000
    assert kept_more - kept < 100 * 1500
    assert peak_more - peak < more / 8


def test_splits_and_subsets_of_a_big_file_are_those_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = big_file(tmp_path / "rows.jsonl", 300)
    held = load("conversations", file)
    monkeypatch.setattr("rankwise.data.sources.load.LARGE", 0)
    lazy = load("conversations", file)
    one, two = (split_groups(rows.items, 0.2, random.Random(5)) for rows in (held, lazy))
    assert one.record() == two.record() and list(two.val) == list(one.val)
    assert list(two.train) == list(one.train)
    drawn = [subset(split.train, 0.3, 50, random.Random(1)) for split in (one, two)]
    assert list(drawn[0]) == list(drawn[1]) and len(drawn[0]) == 50
    assert list(drawn[1][10:20]) == list(drawn[0][10:20])


def test_a_big_file_renders_as_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = mixed_file(tmp_path / "rows.jsonl")
    renderer = Renderer(tiny_tokenizer(tmp_path / "tokenizer"))
    held = RenderedDataset(load("conversations", file).items, renderer)
    monkeypatch.setattr("rankwise.data.sources.load.LARGE", 0)
    lazy = RenderedDataset(load("conversations", file).items, renderer)
    assert [lazy[n] for n in range(len(lazy))] == [held[n] for n in range(len(held))]
    assert lazy.lengths == held.lengths
    assert [lazy.sample_id(n) for n in range(len(lazy))] == ["first", "rows-2", "rows-3", "rows-4", "7", "rows-6"]
