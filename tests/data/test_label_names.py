"""Which class a name or an answer means: laws over labels and decorations, and every command that reads or counts
labels, asked with labels that a word boundary, a case or a Unicode form gets wrong."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from misbehaving_teacher import saying
from PIL import Image
from rows import logged
from tiny_vision import tiny_smolvlm

from rankwise.cli import main
from rankwise.data.example import Example
from rankwise.data.label_answer import (
    FINAL,
    QUOTES,
    found_label,
    label_called,
    label_of,
    name_key,
    named_labels,
    spellings,
)
from rankwise.data.label_task import read_task, task_from
from rankwise.data.sources.load import load
from rankwise.device.llama.generator import GGUFGenerator
from rankwise.device.sides import Shipped
from rankwise.errors import UsageError
from rankwise.evaluate.generate import Generated, HFGenerator
from rankwise.labels.dataset import read_rows
from rankwise.labels.images import find_images
from rankwise.labels.teacher.loopback import LoopbackTeacher

HARD = ("C", "C++", "un-ripe", "ripe", "🔥", "水", "İ", "café", "hot dog", "dog", "3", "ผลไม้")
NFD = unicodedata.normalize("NFD", "café")
SPACED = [label for label in HARD if label not in ("🔥", "水", "ผลไม้")]
TASK = task_from({"classes": list(HARD)}, "the test", "hard")


# --- laws ----------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=8)
label_sets = st.lists(names, min_size=2, max_size=6, unique_by=name_key).filter(lambda found: all(map(name_key, found)))
FORMS: list[Callable[[str], str]] = [
    str,
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: unicodedata.normalize("NFC", text),
    lambda text: f"  {text}\n",
    str.casefold,
]


@given(label_sets, st.data(), st.sampled_from(FORMS))
def test_an_answer_that_is_a_label_is_that_label(labels: list[str], data: st.DataObject, form: Any) -> None:
    label = data.draw(st.sampled_from(labels))
    assume(name_key(label.casefold()) == name_key(label))  # a handful of Greek letters fold twice
    assert (
        label_called(form(label), labels) == label_of(form(label), labels) == found_label(form(label), labels) == label
    )


@given(
    st.sampled_from(HARD),
    st.sampled_from(["", *QUOTES]),
    st.sampled_from(["", *FINAL, "...", "?!"]),
    st.sampled_from([*FORMS, str.upper]),
)
def test_quotes_and_final_marks_do_not_count(label: str, quote: str, end: str, form: Any) -> None:
    for answer in (f"{quote}{form(label)}{quote}{end}", f"{quote}{form(label)}{end}{quote}"):
        assert label_of(answer, HARD) == found_label(answer, HARD) == label
    assert label_called(f"{label}.", HARD) is None, "a name in a file is no answer"


@given(st.sampled_from(SPACED), st.sampled_from("aZé5_-\u2010'’я"), st.booleans())
def test_in_scripts_with_spaces_nothing_may_touch_a_label(label: str, beside: str, left: bool) -> None:
    text = f"I say {beside}{label} now" if left else f"I say {label}{beside} now"
    assert label not in named_labels(text, HARD)
    assert found_label(f"I say {label} now", HARD) == label


@given(st.sampled_from(["水", "ผลไม้"]), st.sampled_from(["这是{}吗", "答えは{}です", "มันคือ{}ครับ", "{}", "it is {}!"]))
def test_in_scripts_without_spaces_a_label_stands_anywhere(label: str, text: str) -> None:
    assert found_label(text.format(label), HARD) == label


@given(st.sampled_from(HARD), st.sampled_from(HARD))
def test_two_labels_are_none(first: str, second: str) -> None:
    assert found_label(f"it is {first} or {second}", HARD) == (first if first == second else None)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("C#", None),
        ("C++", "C++"),
        ("**C++**", "C++"),
        ("C++11", None),
        ("a hot dog", "hot dog"),
        ("a hot dog and a dog", None),
        ("UN-RIPE", "un-ripe"),
        ("not quite un-ripe", "un-ripe"),
        ("It is 'ripe'.", "ripe"),
        ("the ripe's", None),
        ("3.5", None),
        ("about 3, I think", "3"),
        ("-3", None),
        ("i̇", "İ"),
        ("答えはripeです", "ripe"),
        ("👨‍🔥", None),
        ("", None),
        ("…", None),
    ],
)
def test_what_a_free_text_names(text: str, label: str | None) -> None:
    assert found_label(text, HARD) == label


def test_a_label_within_an_emoji_or_a_flag_is_not_seen() -> None:
    assert found_label("🇺🇸🇩🇪", ("🇸🇩", "🇩🇪")) == "🇩🇪"
    assert found_label("👍🏽", ("👍", "👎")) is None


def test_a_class_is_spelt_as_most_have_it() -> None:
    assert spellings([NFD, "Café", "café", "cat", "Cat"]) == {
        NFD: "café",
        "Café": "café",
        "café": "café",
        "cat": "Cat",
        "Cat": "Cat",
    }


# --- what reads labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [NFD, "CAFÉ", "unparsed"])
def test_a_task_with_one_name_twice_is_refused(twin: str) -> None:
    with pytest.raises(UsageError, match=r"the same name|mean no class"):
        task_from({"classes": ["café", "tea", twin]}, "task.json")


def test_every_hard_label_makes_a_task(tmp_path: Path) -> None:
    assert read_task(TASK.save(tmp_path).parent).labels == HARD
    with pytest.raises(UsageError, match="must name every class; C, dog missing"):
        task_from({**TASK.record(), "student_prompt": f"{', '.join(set(HARD) - {'C', 'dog'})}:"}, "task.json")


def photos(folder: Path, names: Sequence[str]) -> Path:
    """A picture below each name, none like another."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number * 9 % 256, number, 200 - number)).save(file)
    return folder


def test_label_makes_one_class_of_two_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders as two systems name them, and a file whose rows spell one class in four ways."""
    listed = [f"{name}/{number}.png" for name in ("café", NFD, "tea") for number in range(3)]
    images = photos(tmp_path / "photos", listed)
    assert main(["label", str(images), "--from_folders", "-o", str(tmp_path / "a"), "--image_size", "20"]) == 0
    assert f"{NFD!r} is the class 'café' in another spelling" in capsys.readouterr().out
    summary = json.loads((tmp_path / "a" / "label.json").read_text())
    assert {name: sum(parts.values()) for name, parts in summary["classes"].items()} == {"café": 6, "tea": 3}
    assert summary["respelt"] == {NFD: "café"}

    ways = ["café", NFD, "CAFÉ", "café ", "tea", "tea", "tea", "tea", "tea"]
    rows = [{"image": path, "label": label} for path, label in zip(listed, ways, strict=True)]
    twice = [{"image": listed[0], "label": NFD}]  # no contradiction, only the same row again
    for name, content in (("rows", rows), ("twice", rows + twice)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    words = ["label", str(images), "--image_size", "20", "--val_fraction", "0.25", "--labels_file"]
    assert main([*words, str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "b")]) == 0
    found = {row.label for row in read_rows(tmp_path / "b")}
    assert found == {"café", "tea"} == set(read_task(tmp_path / "b").labels)
    held_out = [row.label for row in read_rows(tmp_path / "b" / "val.jsonl")]
    assert sorted(held_out) == ["café", "tea"], "one class is one stratum"
    capsys.readouterr()
    assert main([*words, str(tmp_path / "twice.jsonl"), "-o", str(tmp_path / "c")]) == 3
    assert "stands before" in capsys.readouterr().err


def test_rows_are_read_in_the_tasks_own_spelling(tmp_path: Path) -> None:
    hard_dataset(tmp_path)
    assert [example.answer for example in load("labels", tmp_path, "train")] == list(HARD)
    assert [row.label for row in read_rows(tmp_path / "train.jsonl")] == list(HARD)
    assert {example.stratum for example in load("labels", tmp_path, "dev")} == set(HARD)


def test_two_forms_of_a_coco_category_are_one_stratum(tmp_path: Path) -> None:
    photos(tmp_path / "val2017", ["1.jpg", "2.jpg"])
    categories = [{"id": 1, "name": "café", "supercategory": "x"}, {"id": 2, "name": NFD, "supercategory": "X"}]
    content = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)],
        "annotations": [{"image_id": number, "category_id": number, "area": 1} for number in (1, 2)],
        "categories": categories,
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    assert len({photo.strata for photo in find_images(tmp_path).photos}) == 1


def test_a_teachers_answer_must_be_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelt in any way it is taken; a sentence about it is not, nor `C#` as `C`."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    images, task = photos(tmp_path / "photos", ["one.png"]), tmp_path / "task.json"
    task.write_text(json.dumps(TASK.record(), ensure_ascii=False))
    answers = {"C++": "C++", '"c++".': "C++", NFD.upper(): "café", "🔥": "🔥", "水。": "水", "un-ripe": "un-ripe"}
    refused = dict.fromkeys(["C#", "it is C", "ripeness", "C or C++", "café au lait"])
    for number, (said, label) in enumerate((answers | refused).items()):
        out = tmp_path / str(number)
        words = ["label", str(images), "-o", str(out), "--task_file", str(task), "--requests_per_minute", "60000"]
        with LoopbackTeacher(saying(label=said, alternative_label=None)) as server:
            code = main([*words, "--base_url", server.url, "--image_size", "20", "--val_fraction", "0"])
        assert (code, [row.label for row in read_rows(out)] if code == 0 else None) == (
            (0, [label]) if label else (3, None)
        ), said


# --- what counts answers ---------------------------------------------------------------------------------------------


def hard_dataset(folder: Path) -> Path:
    """A row of every label in both parts, spelt as a file from another system has it."""
    spelt = {"café": NFD, "ripe": "RIPE"}
    TASK.save(folder)
    for name, start in (("train", 0), ("val", 100)):
        paths = [f"images/{start + number}.png" for number in range(len(HARD))]
        photos(folder, paths)
        rows = [
            {
                "image_id": f"{start + number:05d}",
                "image_path": path,
                "image_sha256": f"{start + number}",
                "label": spelt.get(label, label),
            }
            for number, (path, label) in enumerate(zip(paths, HARD, strict=True))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_smolvlm(tmp_path_factory.mktemp("base"), longest_edge=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hard_dataset(tmp_path_factory.mktemp("hard"))


def answering(how: Callable[[str], str]) -> Callable[..., Iterator[Generated]]:
    """A generator whose every answer is made from the true label."""

    def generate(_: Any, examples: Sequence[Example]) -> Iterator[Generated]:
        yield from (Generated(place, "…", how(each.answer)) for place, each in enumerate(examples))

    return generate


def itself(label: str) -> str:
    return label


def decorated(label: str) -> str:
    return f' "{unicodedata.normalize("NFD", label.upper())}".'


def another(label: str) -> str:
    return f"{label}-{label}#"


@pytest.mark.parametrize(("how", "accuracy"), [(itself, 100), (decorated, 100)])
def test_evaluate_counts_answers_that_are_labels(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[str], str], accuracy: float
) -> None:
    monkeypatch.setattr(HFGenerator, "generate", answering(how))
    words = ["evaluate", str(base), "--task", "labels", "--data_path", str(data), "--classify", "generation"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "evaluation_results.json").read_text())
    assert results["metrics"]["accuracy"] == accuracy
    scoring = results["settings"]["scoring"]
    assert (scoring["labels"], scoring["unparsed"]) == (list(HARD), 0)
    assert scoring["confusion"] == [[int(x == y) for x in range(len(HARD) + 1)] for y in range(len(HARD))]


def test_the_best_checkpoint_is_chosen_by_answers_that_are_labels(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right at the first of two evaluations and wrong at the second: the first checkpoint stays."""
    shown: list[int] = []

    def generate(self: Any, examples: Sequence[Example]) -> Iterator[Generated]:
        shown.append(len(examples))
        return answering(another if len(shown) > 1 else decorated)(self, examples)

    monkeypatch.setattr(HFGenerator, "generate", generate)
    words = "--use_cpu --batch_size 6 --no_plots --log_frequency 0 --max_seq_length 300 --select accuracy"
    chosen = "--select_by generation --max_steps 2 --eval_strategy steps --eval_steps 1"
    call = ["train", "--model_name", str(base), "--data_path", str(data), "-o", str(tmp_path)]
    assert main([*call, *words.split(), *chosen.split()]) == 0
    found = [float(row["eval_accuracy"]) for row in logged(tmp_path) if row["eval_accuracy"]]
    assert found[0] == 1.0 and found[1] < 0.5
    assert "kept the best checkpoint: checkpoint-1," in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Glyph")  # of the confusion matrix
def test_validate_counts_answers_that_are_labels(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFGenerator, "generate", answering(itself))
    monkeypatch.setattr(GGUFGenerator, "generate", answering(decorated))
    runtime = SimpleNamespace(info=SimpleNamespace(build="test", model="m.gguf"), memory=lambda: None)
    monkeypatch.setattr(Shipped, "start", lambda *_: nullcontext(runtime))
    words = ["validate", "--server", "http://127.0.0.1:9", "--outtype", "f16", "--reference", str(base)]
    words += ["--task", "labels", "--data_path", str(data), "--parity_samples", "0", "-o", str(tmp_path)]
    assert main([*words, "--min_accuracy", "1.0"]) == 0
    content = json.loads((tmp_path / "validation.json").read_text())
    assert (content["accuracy"], content["unparsed"]) == (1.0, 0)
    assert [row["predicted_label"] for row in content["predictions"]] == list(HARD)
    assert [row["true_label"] for row in content["predictions"]] == list(HARD)
