"""Conversations in ShareGPT/LLaVA form (`conversations`: from, value) or messages form (`messages`: role, content).

Rows of a JSON list, `{"data": […]}` or JSON Lines. Content is a text or a list of typed parts (keyed `text` or
`value`); `image` or `images` name pictures, each with its placeholder in a text; a typed image part names its own, or
takes the next of those. `system_prompt` (or `system`) beside the turns is the system turn.
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
    turns = [_turn(said_by, content, slots) for said_by, content in _said(row)]
    _check_order(turns)
    refuse_in_answers(turns)
    images = filled(slots, listed_images(row), repeat=repeat_image)
    stratum = row.get("task_type")
    return Example(
        id=identity,
        group=group_of(images) or identity,
        turns=tuple(turns),
        references=(turns[-1].text,),
        stratum=None if stratum is None else str(stratum),
        images=images,
    )


def _said(row: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(role, content) of every turn, the system's first."""
    key = "conversations" if "conversations" in row else "messages"
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow("needs a list of turns under 'conversations' or 'messages'")
    system = row.get("system_prompt") or row.get("system")
    if system:
        yield "system", system
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow(f"a turn must be an object, found {json.dumps(turn)[:60]}")
        yield turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def _turn(said_by: Any, content: Any, slots: Slots) -> Turn:
    if not isinstance(said_by, str) or said_by not in ROLES:
        raise BadRow(f"unknown role {said_by!r:.60}; known are {', '.join(ROLES)}")
    text = "".join(_part(part, slots) for part in content) if isinstance(content, list) else _text(content, slots)
    if not text.strip():
        raise BadRow("empty turn")
    return Turn(ROLES[said_by], text, HEADINGS[ROLES[said_by]])


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
