"""Conversations in the forms that are in circulation (`forms`): rows of a JSON list, JSON Lines or a parquet file.

Content is a text or a list of typed parts (keyed `text` or `value`); `image` or `images` name pictures, each with its
placeholder in a text; a typed image part, or `<img>path</img>` in a text, names its own. An answer may carry
`reasoning_content`, which a chat template may write, and `loss`, `train` or `weight`: off, and it is not learnt.
What is done to a row to make a sample of it is said (`Example.changes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.sources.rows import BadRow, Build, RowFile, as_found, json_samples, speakers_of
from rankwise.data.sources.slots import (
    BESIDE_TURNS,
    COLUMNS,
    Slots,
    listed_images,
    put_first,
    reference_of,
    refuse_in_answer,
    refuse_unread_images,
    sample_of,
    turns_of,
)
from rankwise.data.template import NAMED
from rankwise.options.sections import DataSection

SAID_BY = {
    "system": "system developer",
    "user": "user human customer client prompter questioner instruction",
    "assistant": "assistant gpt bot model chatbot chatgpt ai agent bard bing function_call",
}
RESULTS = ("tool", "function", "observation", "ipython", "tool_response", "function_response")
SPEAKERS = {name: role for role, names in SAID_BY.items() for name in names.split()} | dict.fromkeys(RESULTS, "user")
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("loss", "train", "training", "weight", "loss_weight", "loss_scale")
UNUSED = (
    *("tool_calls", "function_call", "tools", "functions", "chat_template_kwargs", "objects"),
    *("rejected_response", "rejected", "chosen", "video", "videos", "audio", "audios"),
)
HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}
IMAGE_PARTS = ("image", "image_url")


def read(source: RowFile) -> Iterator[Example]:
    """One sample per conversation; a row without id is named by the file and its number."""
    return json_samples(source, build(source))


def build(source: RowFile) -> Build:
    """How a row of this file becomes a sample; no row needs another one."""
    speakers = SPEAKERS | speakers_of(source.how.roles)
    return partial(_example, source.how, speakers)


def _example(how: DataSection, speakers: Mapping[str, str], identity: str, row: dict[str, Any]) -> Example:
    _refuse_unused(row)
    listed, written = listed_images(row), list(turns_of(row))
    slots = Slots(bool(listed) or any(_shows(_content(turn)) for turn in written), listed=bool(listed))
    if not slots.pictured:
        refuse_unread_images(row, COLUMNS)
    said = [turn for turn in (_turn(turn, speakers, slots) for turn in written) if turn.text.strip()]
    turns = _in_order(said, slots.changes)
    turns = _with_places(turns, listed, slots, how)
    images = slots.filled(listed, repeat=how.repeat_image)
    turns = _up_to_the_last_learnt(turns, slots.changes)
    images = images[: sum(turn.text.count(IMAGE_SLOT) for turn in turns)]
    return sample_of(identity, row, turns, images, slots.changes)


def _content(turn: Mapping[str, Any]) -> Any:
    return next((turn[key] for key in ("value", "content", "text") if turn.get(key) is not None), None)


def _shows(content: Any) -> bool:
    """Whether the content of a turn brings an image."""
    if isinstance(content, list):
        return any(isinstance(part, dict) and (_kind(part) in IMAGE_PARTS or _shows(_words(part))) for part in content)
    return isinstance(content, str) and any(path.strip() for path in NAMED.findall(content) if "<" not in path)


def _turn(turn: dict[str, Any], speakers: Mapping[str, str], slots: Slots) -> Turn:
    said_by, content = turn.get("from") or turn.get("role"), _content(turn)
    if not isinstance(said_by, str) or said_by.strip().lower() not in speakers:
        if said_by in (None, ""):
            raise BadRow(f"a turn does not say who speaks (from, role); it has {as_found(list(turn))}")
        name = said_by if isinstance(said_by, str) and said_by.isidentifier() else "NAME"
        raise BadRow(f"unknown role {as_found(said_by)}; --roles says who it is: {name}=assistant")
    _refuse_unused(turn)
    refuse_unread_images(turn, BESIDE_TURNS)
    role = speakers[said_by.strip().lower()]
    text = _parts(content, role, slots) if isinstance(content, list) else _text(content, role, slots)
    if not text.strip() and role != "system":
        raise BadRow("empty turn")
    if said_by.strip().lower() in RESULTS and role == "user":
        slots.changes.append(f"what {said_by.strip().lower()} returns is taken as the user's turn")
    return Turn(role, text, HEADINGS[role], _reasoning(turn, role), _trained(turn, role))


def _refuse_unused(values: dict[str, Any]) -> None:
    """BadRow for what would change the prompt or the answer, and has no place in a sample."""
    found = next((name for name in UNUSED if values.get(name)), None)
    if found == "chat_template_kwargs":
        raise BadRow("chat_template_kwargs is one for all rows: give it as --chat_template_kwargs")
    if found:
        raise BadRow(f"cannot use {found!r}: write it into the texts, or leave it out")
    if values.get("label") is False:
        raise BadRow("label is false: its answer was rated as a bad one (KTO), and would be learnt")


def _reasoning(turn: dict[str, Any], role: str) -> str:
    text = next((turn[name] for name in REASONING if turn.get(name)), "")
    if not isinstance(text, str) or (text and role != "assistant"):
        raise BadRow(f"reasoning_content is a text of an assistant's turn, found {as_found(text)} of {role}")
    return text


def _trained(turn: dict[str, Any], role: str) -> bool:
    """Whether an answer is learnt; BadRow for what is neither on nor off, and for other turns that should be learnt."""
    given = {name: turn[name] for name in WEIGHTS if turn.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise BadRow(f"{name} of a turn is true or false, 1 or 0; found {as_found(value)}")
        if value and role != "assistant":
            raise BadRow(f"{name} is on for a turn of {role}: only answers are learnt")
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRow(f"{' and '.join(given)} of a turn contradict each other")
    return all(given.values()) or role != "assistant"


# --- texts and parts ---------------------------------------------------------------------------------------------


def _kind(part: Mapping[str, Any]) -> Any:
    """The type of a content part, as it says or as what it holds shows."""
    return part.get("type") or next((kind for kind in IMAGE_PARTS if part.get(kind)), "text")


def _words(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)


def _parts(parts: list[Any], role: str, slots: Slots) -> str:
    """The text of a list of typed parts. Where the row lists no images and the texts have as many placeholders as there
    are image parts, those stand at the placeholders (XTuner)."""
    if not all(isinstance(part, dict) for part in parts):
        raise BadRow(f"a content part must be an object, found {as_found(parts)}")
    start = len(slots.places)
    pieces = [_part(part, role, slots) for part in parts]
    named = [place for place in slots.places[start:] if isinstance(place, str)]
    words = [piece for piece, part in zip(pieces, parts, strict=True) if _kind(part) not in IMAGE_PARTS]
    if not slots.listed and named and slots.places[start:].count(None) == len(named) == len(parts) - len(words):
        slots.places[start:] = named
        return "".join(words)
    return "".join(pieces)


def _part(part: dict[str, Any], role: str, slots: Slots) -> str:
    """The text of a typed part; an image part leaves its slot in the text."""
    kind = _kind(part)
    if kind == "text":
        return _text(_words(part), role, slots)
    if kind not in IMAGE_PARTS:
        raise BadRow(f"cannot use a content part of type {as_found(kind)}")
    if role == "assistant":
        raise BadRow(f"an image part stands in an answer; an image is nothing that a model can write ({IMAGE_SLOT})")
    index = part.get("index")  # TRL: which of the listed images it is
    slots.places.append(_reference(part, kind) or (index if isinstance(index, int) else None))
    return IMAGE_SLOT


def _reference(part: dict[str, Any], kind: str) -> str | None:
    """The image that a part names: as text, or as {"url"|"path"|"bytes": …}. None where an `image` part names none."""
    value = next((part[key] for key in ("value", kind, "path", "url", "source") if part.get(key) is not None), None)
    value = part if value is None and part.get("bytes") else value
    found = reference_of(value)
    if found or (value is None and kind == "image"):
        return found
    raise BadRow(f"a content part of type {kind!r} must name its image with a path or URL")


def _text(content: Any, role: str, slots: Slots) -> str:
    """A text with its placeholders as slots; those of other programs in an answer are text."""
    if content is None:
        return ""
    if not isinstance(content, str):
        raise BadRow(f"a turn's text must be a string, found {as_found(content)}")
    if role == "assistant":
        refuse_in_answer(content)
        return content
    return slots.read(content)


# --- turns in order ----------------------------------------------------------------------------------------------


def _in_order(turns: list[Turn], changes: list[str]) -> list[Turn]:
    """Turns of one role in a row as one; the system's first and once; an assistant's greeting is context."""
    merged = [_one(list(group), changes) for _, group in groupby(turns, key=lambda turn: turn.role)]
    if any(turn.role == "system" for turn in merged[1:]):
        raise BadRow("the system turn must come first, and once")
    spoken = [place for place, turn in enumerate(merged) if turn.role != "system"]
    if spoken and merged[spoken[0]].role == "assistant":
        merged[spoken[0]] = replace(merged[spoken[0]], trained=False)
        changes.append("begins with the assistant, whose first turn is context and not learnt")
    return merged


def _one(turns: list[Turn], changes: list[str]) -> Turn:
    if len(turns) == 1:
        return turns[0]
    if len({turn.trained for turn in turns}) > 1:
        raise BadRow("answers in a row of which one is learnt and another is not; part them with a question")
    if any(turn.reasoning for turn in turns[1:]):
        raise BadRow("reasoning_content in the middle of an answer: answers in a row are joined")
    if turns[0].role == "system" and len({turn.text for turn in turns}) == 1:
        return turns[0]  # beside the turns and once more in them
    changes.append(f"turns of the {turns[0].role} in a row joined, a line break between them")
    return replace(turns[0], text="\n".join(turn.text for turn in turns))


def _with_places(turns: list[Turn], listed: Sequence[str], slots: Slots, how: DataSection) -> list[Turn]:
    """With the images of a row that has no placeholder before its first question: a single one, or as asked."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if slots.places or first is None or not (len(listed) == 1 or (listed and how.image_first)):
        return turns
    slots.places += [None] * len(listed)
    slots.changes.append("images without a placeholder put before the first question")
    placed = replace(turns[first], text=put_first(turns[first].text, len(listed)))
    return [*turns[:first], placed, *turns[first + 1 :]]


def _up_to_the_last_learnt(turns: list[Turn], changes: list[str]) -> list[Turn]:
    """The turns up to the last answer that is learnt: nothing is learnt from what follows it."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    learnt = [number for number in answers if turns[number].trained]
    if not learnt:
        off = "loss, train or weight is off for each" if answers else "turns must end with the assistant's"
        if answers and not any(turn.role == "user" for turn in turns[: answers[-1]]):
            off = "no question comes before one"
        raise BadRow(f"no answer is learnt: {off}; found {', '.join(turn.role for turn in turns)}")
    if turns[-1].role != "assistant":
        changes.append("what follows the last answer left out")
    return turns[: learnt[-1] + 1]
