"""The form of a teacher's answer: one JSON schema, sent with the question and held against what comes back.

    field, classes ── answer_schema ──▶ schema ──┬─ response_format ──▶ the request
                                                 └─ parsed(text) ─────▶ {"element": "water", …} or BadAnswer

The schema is the only statement of that form. It keeps to what strict structured output takes: every key is required,
no other is allowed, "none" is null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from rankwise.data.label_names import label_of
from rankwise.errors import DataError

DESCRIPTIONS = {
    "visual_features": "three to six short observations that decided it",
    "color_breakdown": "the main colours with their rough shares",
    "texture": "the dominant texture in a few words",
    "reason": "one or two sentences that lead from the observations to the class",
    "confidence": "from 0 to 1: how likely a careful second person is to choose the same class",
    "ambiguity_note": "what makes the case hard; null where nothing does",
}
KINDS = {"object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "null": (NoneType,)}
KIND_NAMES = {"object": "an object", "array": "a list", "string": "a text", "number": "a number", "null": "null"}
THOUGHT = ("<think>", "</think>")
BEGINNING = re.compile(r'\{\s*["}]')


class BadAnswer(DataError):
    """Why a teacher's answer can't be used: not JSON, a class outside the set, a number out of range."""


def alternative_key(field: str) -> str:
    return f"alternative_{field}"


def answer_keys(field: str) -> tuple[str, ...]:
    """The keys of an answer. What was seen comes before the verdict: a model writes them in this order, and the verdict
    then follows from what it has written."""
    seen = ("visual_features", "color_breakdown", "texture", "reason")
    return (*seen, field, "confidence", alternative_key(field), "ambiguity_note")


def answer_schema(field: str, labels: Sequence[str], descriptions: Mapping[str, str]) -> dict[str, Any]:
    """The JSON schema of an answer; `descriptions` stand over the general ones, by key."""
    text, may_be_null = {"type": "string"}, ["string", "null"]
    forms: dict[str, dict[str, Any]] = {
        "visual_features": {"type": "array", "items": text},
        "color_breakdown": text,
        "texture": text,
        "reason": text,
        field: {"type": "string", "enum": list(labels)},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        alternative_key(field): {"type": may_be_null, "enum": [*labels, None]},
        "ambiguity_note": {"type": may_be_null},
    }
    said = {
        field: "the class of the image",
        alternative_key(field): "the runner-up; null where there is none",
        **DESCRIPTIONS,
        **descriptions,
    }
    keys = answer_keys(field)
    return {
        "type": "object",
        "properties": {key: {**forms[key], "description": said[key]} for key in keys},
        "required": list(keys),
        "additionalProperties": False,
    }


def response_format(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """`response_format` of a chat request: strict structured output."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": dict(schema)}}


def parsed(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The answer, in the schema's order. BadAnswer says what is wrong with it.

    A thought before the answer, prose or a code fence around its one JSON object, and the spelling of a class name are
    put right; nothing else is.
    """
    try:
        answer = _decoded(text)
        json.dumps(answer, ensure_ascii=False).encode()  # an escaped half of a character is JSON, and no text
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"not JSON ({error}): {_shown(text)}") from error
    if isinstance(answer, dict):
        answer = {key: _class_of(value, schema["properties"].get(key, {})) for key, value in answer.items()}
    wrong = problem(answer, schema, "the answer")
    if wrong:
        raise BadAnswer(f"{wrong}: {_shown(text)}")
    return {key: answer[key] for key in schema["properties"]}


def problem(value: Any, schema: Mapping[str, Any], name: str) -> str | None:
    """The first way in which a value is not what the schema says (the part of JSON Schema that is used here)."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not any(isinstance(value, KINDS[kind]) for kind in kinds):
        return f"{name} must be {' or '.join(KIND_NAMES[kind] for kind in kinds)}, found {_shown(json.dumps(value))}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{name} must be one of {', '.join(str(each) for each in schema['enum'])}; found {_shown(str(value))}"
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        return f"{name} must be from {schema['minimum']} to {schema['maximum']}, found {value}"
    if isinstance(value, list):
        wrongs = (problem(item, schema["items"], f"{name}[{place}]") for place, item in enumerate(value))
        return next(filter(None, wrongs), None)
    return _problem_inside(value, schema) if isinstance(value, dict) else None


def _problem_inside(value: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    lacking = [key for key in schema["required"] if key not in value]
    if lacking:
        return f"{', '.join(lacking)} missing"
    for key, item in value.items():
        if key not in schema["properties"]:
            return f"unknown key {_shown(key)}"
        wrong = problem(item, schema["properties"][key], key)
        if wrong:
            return wrong
    return None


def _class_of(value: Any, schema: Mapping[str, Any]) -> Any:
    """A class's own spelling for an answer that is that class; a sentence around it is none."""
    labels = [label for label in schema.get("enum", ()) if label]
    return (label_of(value, labels) if isinstance(value, str) else None) or value


def _decoded(text: str) -> Any:
    """The JSON of a text: all of it, else the one object that stands in it, behind the thought of a reasoning model."""
    try:
        return DECODER.decode(text.strip())
    except ValueError as error:
        _, closed, rest = text.rpartition(THOUGHT[1])
        if not closed and text.lstrip().startswith(THOUGHT[0]):
            raise ValueError("a thought without an answer") from error
        found = list(_objects(rest))
        if len(found) > 1:
            raise ValueError(f"{len(found)} JSON objects; which one is the answer?") from error
        if not found:
            raise
        return found[0]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, outermost ones. Raises what is wrong with one that begins like an object."""
    end = 0
    while begun := BEGINNING.search(text, end):
        found, end = DECODER.raw_decode(text, begun.start())
        yield found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:120]}…")
