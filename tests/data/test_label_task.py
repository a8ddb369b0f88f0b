"""Task files are read strictly, prompts can be answered, and a teacher's answer is what the schema says or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.label_answer import BadAnswer
from rankwise.data.label_task import PACKAGED, LabelTask, load_task, read_task, task_from, task_of_labels
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import TASK

MINIMAL = {"classes": {"cat": "small, meows", "dog": "larger, barks"}}
GOOD: dict[str, Any] = {
    "visual_features": ["waves", "a ship"],
    "color_breakdown": "blue 80 %, white 20 %",
    "texture": "ripples",
    "reason": "The sea fills the picture.",
    "element": "water",
    "confidence": 0.9,
    "alternative_element": None,
    "ambiguity_note": None,
}


@pytest.fixture(scope="module")
def elements() -> LabelTask:
    return load_task("elements")


def written(folder: Path, content: str, name: str = "task.yaml") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


# --- the shipped task ---------------------------------------------------------------------------------------------


def test_elements_is_the_documented_task(elements: LabelTask) -> None:
    assert elements.labels == ("water", "land", "fire", "wood", "metal")
    assert (elements.field, elements.alternative) == ("element", "alternative_element")
    assert elements.student_prompt.endswith("\nElement:")
    assert len(elements.student_prompt.split()) < 25
    assert set(elements.schema["properties"]) == set(GOOD)


@pytest.mark.parametrize(
    "rule",
    ["A car is metal", "A tree is wood", "Ice and snow are water", "The sky is not water", "more than 50 %"],
)
def test_elements_tells_the_teacher_every_documented_override(elements: LabelTask, rule: str) -> None:
    assert rule in " ".join(elements.teacher_prompt.split())
    assert rule.lower() not in elements.student_prompt.lower(), "the student is asked briefly"


def test_every_task_of_the_package_loads_by_name_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    names = [path.stem for path in PACKAGED.glob("*.yaml")]
    assert "elements" in names
    for name in names:
        task = load_task(name)
        assert task.name == name == load_task(f"{name}.yaml").name
        task.save(tmp_path / name)
        assert read_task(tmp_path / name) == load_task(tmp_path / name) == task
        assert read_task(tmp_path / name).schema == task.schema


# --- one's own task file -------------------------------------------------------------------------------------------


def test_classes_are_enough(tmp_path: Path) -> None:
    task = load_task(written(tmp_path, "classes: {cat: small, dog: large}\nfield: pet\n", "pets.yaml"))
    assert (task.name, task.field, task.labels) == ("pets", "pet", ("cat", "dog"))
    assert task.student_prompt.endswith("cat, dog.\nPet:")
    assert "cat: small" in task.teacher_prompt and "cat: small" not in task.student_prompt


def test_yaml_json_and_a_list_of_names_say_the_same(tmp_path: Path) -> None:
    as_json = load_task(written(tmp_path, json.dumps({"name": "t", "classes": ["cat", "dog"]}), "task.json"))
    as_yaml = load_task(written(tmp_path, "name: t\nclasses: [cat, dog]\n"))
    assert as_json == as_yaml == task_from({"name": "t", "classes": {"cat": None, "dog": ""}}, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clases: {a: x, b: y}", r"task\.yaml: unknown key 'clases'; did you mean classes"),
        ("name: x", r"task\.yaml: classes: needs names"),
        ("classes: {}", "classes: needs names"),
        ("classes: {a: x}", "classes: 1 given; a choice needs two"),
        ("classes: {a: x, b: y, a: z}", r"task\.yaml: a is set twice"),
        ("classes: [a, b, a]", "'a' and 'a' count as the same name"),
        ("classes: {Water: x, water: y}", "'Water' and 'water' count as the same name"),
        ("classes: {yes: x, no: y}", "True is no text; put it in quotes"),
        ("classes: {a: [1], b: y}", "the definition of a must be a text"),
        ("classes: {' a': x, b: y}", "' a' is not a valid name"),
        ("classes: {a: x, '<image>': y}", "'<image>' is not a valid name"),
        ("classes: [a, b]\nname: 7", "name must be a text, found 7"),
        ("classes: [a, b]\nname: a b", "the name needs letters"),
        ("classes: [a, b]\nfield: reason", "field 'reason': a row has another column of that name"),
        ("classes: [a, b]\nfield: My Field", "field 'My Field': needs a lower-case word"),
        ("classes: [cat, dog]\nstudent_prompt: 'cat? Label:'", "student_prompt: must name every class; dog missing"),
        ("classes: [cat, dog]\nstudent_prompt: 'cats or dogs? Label:'", "cat, dog missing"),
        ("classes: [cat, dog]\nteacher_prompt: Is it a dog?", "teacher_prompt: must name every class; cat missing"),
        ("classes: [cat, dog]\nstudent_prompt: cat or dog?", r"must end in a cue such as `Label:`"),
        ("classes: [cat, dog]\nfield: pet\nstudent_prompt: 'cat or dog :'", r"must end in a cue such as `Pet:`"),
        ("classes: [cat, dog]\nstudent_prompt: '<__media__> cat or dog? Pet:'", "leave the image marker out"),
        ("classes: [a, b]\nanswer: {texture: 3}", "answer: must be a mapping"),
        ("classes: [a, b]\nanswer: {textur: x}", "answer: unknown key 'textur'; did you mean texture"),
        ("classes: [a, b]\nformat: rankwise-task/9", "this version reads"),
        ("- a\n- b", "a task must be a mapping"),
        ("classes: [a, b", r"task\.yaml, line \d: not YAML"),
    ],
)
def test_what_is_wrong_with_a_task_file_is_said(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_task(written(tmp_path, content))
    assert "task.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("classes", "student", "teacher"),
    [
        (["熟", "未熟"], "这是哪一类？熟、未熟。答案：", "请选择：熟或未熟。"),
        (["水", "火"], "水か火か。答え:", "画像は水ですか火ですか"),
        (["สุก", "ดิบ"], "ผลไม้นี้สุกหรือดิบ คำตอบ:", "สุกหรือดิบ"),
        (["cat", "dog"], "cat or dog? Answer (one word):", "cat or dog?"),
        (["cat", "dog"], 'cat or dog? "Answer":', "cat or dog?"),
        (["car", "car wash"], "A car or a car wash? Answer:", "car: on a road. car wash: a building."),
        (["C", "C++"], "C, C++? Language:", "C or C++"),
    ],
    ids=["Chinese", "Japanese", "Thai", "in brackets", "quoted", "one class in another", "marks"],
)
def test_prompts_of_any_language_are_taken(classes: list[str], student: str, teacher: str) -> None:
    task = task_from({"classes": classes, "student_prompt": student, "teacher_prompt": teacher}, "here")
    assert task.labels == tuple(classes)


@pytest.mark.parametrize(
    ("classes", "student", "message"),
    [
        (["car", "bus"], "A car wash or a bus? No car! Answer", "must end in a cue"),
        (["car", "car wash"], "A car wash or not? Answer:", "car missing"),
        (["C", "C++"], "Is it C++? Answer:", "C missing"),
        (["熟", "未熟"], "未熟吗？答案：", "熟 missing"),
        (["cat", "dog"], "cat or dog? ::", "must end in a cue"),
        (["cat", "dog"], "cat or dog? Answer: ：", "must end in a cue"),
    ],
)
def test_a_class_inside_a_longer_one_is_not_named(classes: list[str], student: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task_from({"classes": classes, "student_prompt": student}, "here")


def test_missing_tasks_and_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="the package has the tasks elements: unknown task 'element'; did you mean ele"
    ):
        load_task("element")
    with pytest.raises(DataError, match="is not a labelled data set"):
        read_task(tmp_path)
    written(tmp_path, '{"classes": ["a"]}', TASK)
    with pytest.raises(DataError, match=r"task\.json: .*a choice needs two"):
        read_task(tmp_path)
    written(tmp_path, '{"classes":\n ["a",}', TASK)
    with pytest.raises(DataError, match=r"task\.json, line 2"):
        read_task(tmp_path)


def test_labels_that_were_found_make_a_task() -> None:
    task = task_of_labels(["b", "a", "b"], "found")
    assert (task.labels, task.name, task.field) == (("a", "b"), "found", "label")


# --- answers ------------------------------------------------------------------------------------------------------


def test_the_schema_is_one_that_strict_structured_output_takes(elements: LabelTask) -> None:
    schema = elements.schema
    assert schema["required"] == list(schema["properties"]) and schema["additionalProperties"] is False
    assert schema["properties"]["element"]["enum"] == list(elements.labels)
    assert schema["properties"]["alternative_element"]["enum"] == [*elements.labels, None]
    assert all(form["description"] for form in schema["properties"].values())
    form = elements.response_format
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"] == schema
    keys = list(schema["properties"])
    assert keys.index("reason") < keys.index("element") < keys.index("confidence"), "first the reason, then the verdict"


def test_descriptions_of_the_task_file_reach_the_schema() -> None:
    task = task_from({**MINIMAL, "answer": {"texture": "fur, in a word"}}, "here")
    assert task.schema["properties"]["texture"]["description"] == "fur, in a word"


def test_good_answers_come_back_in_order(elements: LabelTask) -> None:
    mixed = json.dumps(dict(reversed(GOOD.items())))
    for text in (mixed, f"\n```json\n{mixed}\n```\n", f"```\n{mixed}```", mixed.replace("water", " Water ")):
        answer = elements.validate_answer(text)
        assert answer == GOOD and list(answer) == list(GOOD)


@pytest.mark.parametrize(
    "around",
    [
        "Here it is: {} Anything else?",
        "In {{curly}} words:\n```json\n{}\n```\nDone.",
        '<think>{{"element": "fire"}}, or not?</think>{}',
        "<think>hm</think>\n```json\n{}\n```",
        "thought without a beginning </think> {}",
    ],
)
def test_one_object_in_prose_a_fence_or_behind_a_thought_is_taken(elements: LabelTask, around: str) -> None:
    assert elements.validate_answer(around.format(json.dumps(GOOD))) == GOOD
    inside = {**GOOD, "reason": 'a sign says </think> and {"a": 1}'}
    assert elements.validate_answer(json.dumps(inside)) == inside


@pytest.mark.parametrize(
    ("around", "message"),
    [
        ("{0} or {0}", "2 JSON objects; which one"),
        ("<think>perhaps {0}", "a thought without an answer"),
        ('{0} {{"element": "wa', "not JSON"),
        ('{{"answer": {0}', "not JSON"),
        ("[{0}]", "the answer must be an object"),
    ],
)
def test_what_may_be_another_answer_is_not_taken(elements: LabelTask, around: str, message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        elements.validate_answer(around.format(json.dumps(GOOD)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element": "sky"}, "element must be one of water, land, fire, wood, metal; found 'sky'"),
        ({"element": None}, "element must be a text, found 'null'"),
        ({"element": ["water"]}, "element must be a text"),
        ({"alternative_element": "sky"}, "alternative_element must be one of"),
        ({"confidence": 95}, "confidence must be from 0 to 1, found 95"),
        ({"confidence": -0.1}, "confidence must be from 0 to 1"),
        ({"confidence": "0.9"}, "confidence must be a number"),
        ({"confidence": True}, "confidence must be a number"),
        ({"confidence": float("nan")}, "not JSON .*NaN is no number"),
        ({"confidence": float("inf")}, "not JSON .*Infinity is no number"),
        ({"visual_features": "waves"}, "visual_features must be a list"),
        ({"visual_features": ["waves", 3]}, r"visual_features\[1\] must be a text, found '3'"),
        ({"reason": None}, "reason must be a text"),
        ({"reason": "half \ud83d"}, "not JSON .*surrogates"),
        ({"colour": "blue"}, "unknown key 'colour'"),
    ],
)
def test_a_wrong_answer_is_refused_with_the_reason(elements: LabelTask, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadAnswer, match=message) as error:
        elements.validate_answer(json.dumps({**GOOD, **change}))
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("I can't help with that.", r"not JSON .*: \"I can't help"),
        (json.dumps(GOOD)[:-9], "not JSON"),
        ('{"element": "water", "element": "fire"}', "a key appears twice"),
        ('{"element": "water"}', "visual_features, color_breakdown, texture, reason, confidence, .* missing"),
        ("[]", "the answer must be an object"),
        ("water", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_answer_is_refused(elements: LabelTask, text: str, message: str) -> None:
    with pytest.raises(BadAnswer, match=message) as error:
        elements.validate_answer(text)
    assert len(str(error.value)) < 500


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    task = task_from(MINIMAL, "here")
    with pytest.raises(BadAnswer):
        task.validate_answer(text)


@given(
    st.fixed_dictionaries(
        {
            "visual_features": st.lists(st.text(alphabet=st.characters(codec="utf-8"))),
            "color_breakdown": st.text(alphabet=st.characters(codec="utf-8")),
            "texture": st.text(alphabet=st.characters(codec="utf-8")),
            "reason": st.text(alphabet=st.characters(codec="utf-8")),
            "label": st.sampled_from(["cat", "dog"]),
            "confidence": st.floats(0, 1) | st.sampled_from([0, 1]),
            "alternative_label": st.sampled_from(["cat", "dog", None]),
            "ambiguity_note": st.none() | st.text(alphabet=st.characters(codec="utf-8")),
        }
    )
)
def test_every_answer_of_the_schemas_form_is_taken_as_it_is(answer: dict[str, Any]) -> None:
    assert task_from(MINIMAL, "here").validate_answer(json.dumps(answer)) == answer
