"""Class names and the answers that hold them: one rule for files, teachers, scores and the device.

    name_key("CAFE\\u0301") == name_key("café")          names: Unicode form, case and space at the ends do not count
    label_of('"Ripe."', labels)                         "ripe": an answer that is a label
    found_label("It looks ripe to me", labels)          "ripe": the only label that a text names

In scripts with spaces a text names a label where no letter, digit, hyphen or apostrophe touches it (`un-ripe` is not
`ripe`, nor `C#` `C`); in Han, kana, Thai, Lao, Khmer and Myanmar, which write none, wherever it stands. What a longer
label covers does not count, and a text that names two labels names none.

    field, classes ── answer_schema ──▶ schema ──┬─ response_format ──▶ the teacher's request
                                                 └─ parsed(text) ─────▶ {"element": "water", …} or BadAnswer

The schema is the only statement of a teacher's answer. It keeps to what strict structured output takes: every key is
required, no other is allowed, "none" is null.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import NoneType
from typing import Any

import regex

from rankwise.errors import DataError

UNPARSED = "unparsed"  # the guess of an answer that names no label; no class may be called so
QUOTES = "\"'`“”„‟‘’‚‛«»‹›「」『』＂＇"
FINAL = ".!?。！？…"

UNSPACED = r"[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]"
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]"
JOINT = rf"[{LETTER}_'’＇\-\u00ad\u2010\u2011\u2212\ufe63\uff0d]"
BEFORE, BEHIND = rf"(?<!{JOINT})", rf"(?!{JOINT}|[+#])"  # C# and C++ are names of their own
NUMBER_BEFORE, NUMBER_BEHIND = r"(?<!\p{N}[.,])", r"(?![.,]\p{N})"  # 3.5 is not 5
OPENING, CLOSING = rf"(?<=(?<!{LETTER})['‘＇])", rf"(?=['’＇](?!{LETTER}))"  # around a label they are no apostrophes


def name_key(name: str) -> str:
    """What two names of one class have in common: NFC(casefold(NFC(name))), trimmed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Each name → how its class is spelt, in NFC: as most of the names have it, the first in the alphabet of equals."""
    names = list(names)
    counts = Counter(unicodedata.normalize("NFC", name).strip() for name in names)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    chosen = {name_key(name): name for name in reversed(ranked)}
    return {name: chosen[name_key(name)] for name in names}


def label_called(name: str, labels: Sequence[str]) -> str | None:
    """The label of that name, in the labels' own spelling; None where there is none."""
    return _by_key(tuple(labels)).get(name_key(name))


def label_of(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer is: by its name, then without quotes around it and marks that end a sentence."""
    known, key = _by_key(tuple(labels)), name_key(answer)
    while key and key not in known:
        unquoted = key.strip(QUOTES).strip()
        if unquoted == key and key[-1] not in FINAL:
            break
        key = unquoted if unquoted != key else key[:-1].rstrip()
    return known.get(key)


def named_labels(text: str, labels: Sequence[str]) -> set[str]:
    """The labels that a text names anywhere."""
    known, text = _by_key(tuple(labels)), name_key(text)
    whole = {match.start() for match in regex.finditer(r"\X", text)} | {len(text)}  # not in the middle of an emoji
    found = {match.span(): known[match[0]] for match in _pattern(tuple(labels)).finditer(text, overlapped=True)}
    spans = [span for span in found if whole.issuperset(span)]
    whole_ones = [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]
    return {found[span] for span in whole_ones}  # none that lies inside another


def found_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text is, or else the only one that it names; None where it names none or several."""
    label = label_of(text, labels)
    named = {label} if label else named_labels(text, labels)
    return named.pop() if len(named) == 1 else None


@lru_cache(maxsize=64)
def _by_key(labels: tuple[str, ...]) -> Mapping[str, str]:
    return {name_key(label): label for label in labels}


@lru_cache(maxsize=64)
def _pattern(labels: tuple[str, ...]) -> regex.Pattern[str]:
    """Every label's key where a text names it, longest first."""
    longest_first = sorted(_by_key(labels), key=len, reverse=True)
    return regex.compile("|".join(map(_standing, longest_first)), regex.V1)


def _standing(key: str) -> str:
    """A pattern of a key with nothing at its ends that would make it another word."""
    written = regex.escape(key, literal_spaces=True)
    if not regex.search(LETTER, key, regex.V1):
        return written
    ends = [regex.match(UNSPACED, end, regex.V1) for end in (key[0], key[-1])]
    left = "" if ends[0] else BEFORE + NUMBER_BEFORE * key[0].isnumeric()
    right = "" if ends[1] else BEHIND + NUMBER_BEHIND * key[-1].isnumeric()
    return f"{left}{written}{right}|{OPENING}{written}{CLOSING}"


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
