"""Label task: classes, prompts of teacher and student, and the answer's schema.

    elements.yaml ── load_task ──▶ LabelTask ──┬─ teacher_prompt, response_format, validate_answer ──── teacher
                                               ├─ student_prompt, labels ────────────────────────────── training, device
                                               └─ save ──▶ task.json beside the labelled data

task = load_task("elements")          # one of the package, or the path of a YAML or JSON file
task.validate_answer(text)            # {"element": "water", "confidence": 0.9, …}, or BadAnswer
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as attribute
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from rankwise.data import label_answer
from rankwise.data.label_answer import UNPARSED, name_key, named_labels
from rankwise.data.template import PATTERN
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import TASK
from rankwise.files.atomic import read_json
from rankwise.files.document import Document
from rankwise.options.field import read_values, unknown


def content_of(path: Path) -> Any:
    """What the file holds; an error with the line where it cannot be read: DataError of a task.json, which we write."""
    return read_json(path) if path.suffix == ".json" else read_values(path)


DOCUMENT = Document(TASK, "rankwise-task/1", "a label task", "rankwise label")
PACKAGED = Path(__file__).parents[1] / "recipes" / "tasks"
KEYS = ("format", "name", "field", "classes", "teacher_prompt", "student_prompt", "answer")
NAME, FIELD = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII), re.compile(r"[a-z][a-z0-9_]*")
TAKEN = {*label_answer.DESCRIPTIONS, "image_id", "image_path", "image_sha256"}  # other columns of a row
LONGEST_NAME = 64  # of a schema in a request
CUE = re.compile(r"[^\s:：][:：]\Z")  # how a student prompt ends: "Element:", "Answer (one word):", "答案："


@dataclass(frozen=True)
class LabelClass:
    """One class, with its definition (may be empty)."""

    name: str
    definition: str = ""


@dataclass(frozen=True)
class LabelTask:
    """A question with a closed set of answers. UsageError where it cannot be asked.

    field: what the answer is called in rows and in the teacher's JSON. teacher_prompt: everything a careful person
    needs to label as meant. student_prompt: short, names every class and ends in a cue such as `Element:`; the bare
    class name follows. answer: descriptions of the answer's keys, over the general ones.
    """

    name: str
    field: str
    classes: tuple[LabelClass, ...]
    teacher_prompt: str
    student_prompt: str
    answer: Mapping[str, str] = attribute(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        _check_names(self, where)
        _check_classes(self.labels, where)
        _check_prompts(self, where)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, as declared."""
        return tuple(each.name for each in self.classes)

    @property
    def alternative(self) -> str:
        """The key of the runner-up: `alternative_element`."""
        return label_answer.alternative_key(self.field)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the teacher's answer."""
        return label_answer.answer_schema(self.field, self.labels, self.answer)

    @property
    def response_format(self) -> dict[str, Any]:
        """The schema as a chat request wants it (strict structured output)."""
        return label_answer.response_format(self.name.replace(".", "_"), self.schema)

    def validate_answer(self, text: str) -> dict[str, Any]:
        """The teacher's answer as a dictionary in the schema's order; `label_answer.BadAnswer` where it is none."""
        return label_answer.parsed(text, self.schema)

    def record(self) -> dict[str, Any]:
        """The content of task.json; `task_from` reads it back."""
        return {
            "name": self.name,
            "field": self.field,
            "classes": {each.name: each.definition for each in self.classes},
            "teacher_prompt": self.teacher_prompt,
            "student_prompt": self.student_prompt,
            "answer": dict(self.answer),
        }

    def save(self, folder: Path | str) -> Path:
        return DOCUMENT.write(folder, self.record())


def load_task(name_or_path: str | Path) -> LabelTask:
    """A task of the package by name, or one's own by the path of its YAML or JSON file, or of a folder with task.json.

    Raises UsageError, naming file and key.
    """
    path = Path(name_or_path)
    if path.is_dir() and (path / TASK).is_file():
        path = path / TASK
    return _read(path) if path.is_file() else _packaged(path)


def read_task(folder: Path | str) -> LabelTask:
    """The task of a labelled data set. DataError where task.json is missing or not one."""
    path = Path(folder) / TASK
    if not path.is_file():
        raise DataError(f"{path} is missing: the folder is not a labelled data set (`rankwise label` writes one)")
    try:
        return task_from(content_of(path), str(path))
    except UsageError as error:
        raise DataError(str(error)) from error


def task_from(content: Any, where: str, name: str = "task") -> LabelTask:
    """A task from a file's content. Only `classes` is needed: names with definitions, or a list of names."""
    if not isinstance(content, dict):
        raise UsageError(f"{where}: a task must be a mapping with {', '.join(KEYS[1:])}")
    for key in content:
        if key not in KEYS:
            raise unknown(str(key), KEYS, where, "key")
    if content.get("format", DOCUMENT.format) != DOCUMENT.format:
        raise UsageError(f"{where}: the format is {content['format']!r}, this version reads {DOCUMENT.format!r}")
    texts = {key: _text(content, key, where) for key in ("name", "field", "teacher_prompt", "student_prompt")}
    classes = _classes(content.get("classes"), where)
    chosen = texts["field"] or "label"
    try:
        return LabelTask(
            texts["name"] or name,
            chosen,
            classes,
            texts["teacher_prompt"] or general_teacher_prompt(classes),
            texts["student_prompt"] or general_student_prompt(chosen, classes),
            _answer(content.get("answer"), chosen, where),
        )
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def task_of_labels(labels: list[str], name: str = "labels", field: str = "label") -> LabelTask:
    """The task whose classes are the labels that data already have, in the order of the alphabet."""
    return task_from({"classes": sorted(set(labels)), "name": name, "field": field}, "the labels found")


def general_student_prompt(field: str, classes: tuple[LabelClass, ...]) -> str:
    names = ", ".join(each.name for each in classes)
    return f"Classify this image. Choose one of: {names}.\n{field.replace('_', ' ').capitalize()}:"


def general_teacher_prompt(classes: tuple[LabelClass, ...]) -> str:
    lines = "\n".join(f"- {each.name}{': ' if each.definition else ''}{each.definition}" for each in classes)
    return (
        "Label this image with exactly one of these classes. Black bars at its edges are padding and count for nothing."
        f"\n{lines}\nFirst write down what you see, then why it leads to the class, then the class. Name the runner-up "
        "and what makes the case hard where there is a rival, and let the confidence show it."
    )


# --- reading ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> LabelTask:
    return task_from(content_of(path), str(path), path.stem)


@cache
def _packaged(given: Path) -> LabelTask:
    path = PACKAGED / f"{given.stem}.yaml"
    if given.parent == Path(".") and given.suffix in ("", ".yaml") and path.is_file():
        return _read(path)
    names = sorted(each.stem for each in PACKAGED.glob("*.yaml"))
    raise unknown(str(given), names, f"no such file, and the package has the tasks {', '.join(names)}", "task")


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise UsageError(f"{where}: {key} must be a text, found {value!r:.60}")
    return value.strip()


def _classes(given: Any, where: str) -> tuple[LabelClass, ...]:
    pairs: list[tuple[Any, Any]] = []
    if isinstance(given, dict):
        pairs = list(given.items())
    elif isinstance(given, list):
        pairs = [(name, None) for name in given]
    if not pairs:
        raise UsageError(f"{where}: classes: needs names with definitions (`water: sea, rivers …`), or a list of names")
    for name, definition in pairs:
        if not isinstance(name, str):
            raise UsageError(f"{where}: classes: {name!r} is no text; put it in quotes")
        if not isinstance(definition, str | None):
            raise UsageError(f"{where}: classes: the definition of {name} must be a text, found {definition!r:.60}")
    return tuple(LabelClass(name, (definition or "").strip()) for name, definition in pairs)


def _answer(given: Any, field: str, where: str) -> dict[str, str]:
    if not isinstance(given, dict | None) or not all(isinstance(text, str) for text in (given or {}).values()):
        raise UsageError(f"{where}: answer: must be a mapping from keys of the answer to their meanings")
    keys = label_answer.answer_keys(field)
    for key in given or {}:
        if key not in keys:
            raise unknown(str(key), keys, f"{where}: answer", "key")
    return dict(given or {})


# --- checks -------------------------------------------------------------------------------------------------------


def _check_names(task: LabelTask, where: str) -> None:
    if not NAME.fullmatch(task.name) or len(task.name) > LONGEST_NAME:
        raise UsageError(f"{where}: the name needs letters, digits, `_`, `-` or `.`, at most {LONGEST_NAME}")
    if not FIELD.fullmatch(task.field):
        raise UsageError(f"{where}: field {task.field!r}: needs a lower-case word of letters, digits and `_`")
    if task.field in TAKEN or task.field.startswith("alternative_"):
        raise UsageError(f"{where}: field {task.field!r}: a row has another column of that name; choose another word")


def _check_classes(labels: tuple[str, ...], where: str) -> None:
    if len(labels) < 2:
        raise UsageError(f"{where}: classes: {len(labels)} given; a choice needs two or more")
    seen: dict[str, str] = {}
    for label in labels:
        if not label or label != " ".join(label.split()) or PATTERN.search(label):
            raise UsageError(f"{where}: classes: {label!r} is not a valid name: one line without surrounding spaces")
        key = name_key(label)
        if key == UNPARSED:
            raise UsageError(f"{where}: classes: {label!r} is the name of answers that mean no class; choose another")
        if key in seen:
            twin = seen[key]
            raise UsageError(f"{where}: classes: {twin!r} and {label!r} count as the same name; use different ones")
        seen[key] = label


def _check_prompts(task: LabelTask, where: str) -> None:
    for key in ("teacher_prompt", "student_prompt"):
        prompt = getattr(task, key)
        named = named_labels(prompt, task.labels)
        lacking = [label for label in task.labels if label not in named]
        if lacking:
            raise UsageError(f"{where}: {key}: must name every class; {', '.join(lacking)} missing")
        if PATTERN.search(prompt):
            raise UsageError(f"{where}: {key}: leave the image marker out; the image is put before the text")
    if not CUE.search(task.student_prompt):
        cue = task.field.replace("_", " ").capitalize()
        raise UsageError(f"{where}: student_prompt: must end in a cue such as `{cue}:`; the class name follows it")
