"""Conversations in ShareGPT/LLaVA form (`conversations`: from, value) or messages form (`messages`: role, content).

Rows of a JSON list, `{"data": […]}` or JSON Lines. Content is a text or a list of typed parts (keyed `text` or
`value`); `image` or `images` name pictures, each with its placeholder in a text; a typed image part names its own, or
takes the next of those. `system_prompt` (or `system`) beside the turns is the system turn. An answer may carry
`reasoning_content`, which a chat template may write, and `loss`, `train` or `weight`: off, and it is not learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.sources.rows import BadRow, Build, RowFile, json_samples
from rankwise.data.sources.slots import filled, group_of, listed_images, refuse_in_answers, slotted

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("loss", "train", "training", "weight", "loss_weight")
UNUSED = ("tool_calls", "function_call", "tools", "functions", "chat_template_kwargs")
HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}
Slots = list[str | None]  # what each slot shows, where it says so itself


def read(source: RowFile) -> Iterator[Example]:
    """One sample per conversation; a row without id is named by the file and its number."""
    return json_samples(source, build(source))


def build(source: RowFile) -> Build:
    """How a row of this file becomes a sample; no row needs another one."""
    return partial(_example, source.repeat_image)


def _example(repeat_image: bool, identity: str, row: dict[str, Any]) -> Example:
    slots: Slots = []
    _refuse_unused(row)
    said = [_turn(turn, slots) for turn in _said(row)]
    _check_order(said)
    refuse_in_answers(said)
    turns = _up_to_the_last_learnt(said)
    shown = sum(turn.text.count(IMAGE_SLOT) for turn in turns)
    images = filled(slots, listed_images(row), repeat=repeat_image)[:shown]
    stratum = row.get("task_type")
    return Example(
        id=identity,
        group=group_of(images) or identity,
        turns=tuple(turns),
        references=(turns[-1].text,),
        stratum=None if stratum is None else str(stratum),
        images=images,
    )


def _said(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every turn as it is written, the system's first."""
    key = "conversations" if "conversations" in row else "messages"
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow("needs a list of turns under 'conversations' or 'messages'")
    system = row.get("system_prompt") or row.get("system")
    if system:
        yield {"role": "system", "content": system}
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow(f"a turn must be an object, found {json.dumps(turn)[:60]}")
        yield turn


def _turn(turn: dict[str, Any], slots: Slots) -> Turn:
    said_by, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(said_by, str) or said_by not in ROLES:
        raise BadRow(f"unknown role {said_by!r:.60}; known are {', '.join(ROLES)}")
    _refuse_unused(turn)
    role = ROLES[said_by]
    text = "".join(_part(part, slots) for part in content) if isinstance(content, list) else _text(content, slots)
    if not text.strip():
        raise BadRow("empty turn")
    return Turn(role, text, HEADINGS[role], _reasoning(turn, role), _trained(turn, role))


def _refuse_unused(values: dict[str, Any]) -> None:
    """BadRow for what would change the prompt or the answer, and has no place in a sample."""
    found = next((name for name in UNUSED if values.get(name)), None)
    if found == "chat_template_kwargs":
        raise BadRow("chat_template_kwargs is one for all rows: give it as --chat_template_kwargs")
    if found:
        raise BadRow(f"cannot use {found!r}: write it into the texts, or leave it out")


def _reasoning(turn: dict[str, Any], role: str) -> str:
    text = next((turn[name] for name in REASONING if turn.get(name)), "")
    if not isinstance(text, str) or (text and role != "assistant"):
        raise BadRow(f"reasoning_content is a text of an assistant's turn, found {json.dumps(text)[:60]} of {role}")
    return text


def _trained(turn: dict[str, Any], role: str) -> bool:
    """Whether an answer is learnt; BadRow for what is neither on nor off, and for other turns that should be learnt."""
    given = {name: turn[name] for name in WEIGHTS if turn.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise BadRow(f"{name} of a turn is true or false, 1 or 0; found {json.dumps(value)[:60]}")
        if value and role != "assistant":
            raise BadRow(f"{name} is on for a turn of {role}: only answers are learnt")
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRow(f"{' and '.join(given)} of a turn contradict each other")
    return all(given.values()) or role != "assistant"


def _up_to_the_last_learnt(turns: list[Turn]) -> list[Turn]:
    """The turns up to the last answer that is learnt: nothing is learnt from what follows it."""
    learnt = [number for number, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    if not learnt:
        raise BadRow("no answer is learnt: loss, train or weight is off for each")
    return turns[: learnt[-1] + 1]


def _part(part: Any, slots: Slots) -> str:
    """The text of a typed part; an image part leaves its slot in the text."""
    if not isinstance(part, dict):
        raise BadRow(f"a content part must be an object, found {json.dumps(part)[:60]}")
    kind = part.get("type", "text")
    if kind == "text":
        return _text(part.get("text", part.get("value")), slots)
    if kind not in ("image", "image_url"):
        raise BadRow(f"cannot use a content part of type {kind!r:.60}")
    slots.append(_reference(part, kind))
    return IMAGE_SLOT


def _reference(part: dict[str, Any], kind: str) -> str | None:
    """The image that a part names: as text, or as {"url": text}. None where an `image` part names none."""
    value = next((part[key] for key in ("value", kind, "path", "url") if part.get(key) is not None), None)
    value = value.get("url") if isinstance(value, dict) else value
    if (isinstance(value, str) and value) or (value is None and kind == "image"):
        return value
    raise BadRow(f"a content part of type {kind!r} must name its image with a path or URL")


def _text(content: Any, slots: Slots) -> str:
    if content is None:
        return ""
    if not isinstance(content, str):
        raise BadRow(f"a turn's text must be a string, found {json.dumps(content)[:60]}")
    text, count = slotted(content)
    slots += [None] * count
    return text


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise BadRow("the system turn must come first, and once")
    spoken = [role for role in roles if role != "system"]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise BadRow(f"turns must alternate user, assistant and end with the assistant; found {', '.join(spoken)}")
