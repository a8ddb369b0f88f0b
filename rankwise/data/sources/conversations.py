"""Conversations in ShareGPT/LLaVA form (`conversations`: from, value) or messages form (`messages`: role, content).

Rows of a JSON list, `{"data": […]}` or JSON Lines. Content is a text or a list of typed parts (keyed `text` or
`value`); `image` or `images` name pictures; `system_prompt` (or `system`) beside the turns is the system turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.sources.rows import BadRow, RowFile, json_samples

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}


def read(source: RowFile) -> Iterator[Example]:
    """One sample per conversation; a row without id is named by the file and its number."""
    return json_samples(source, _example)


def _example(identity: str, row: dict[str, Any]) -> Example:
    images = _images(row)
    turns = [_turn(turn, images) for turn in _listed(row)]
    system = row.get("system_prompt") or row.get("system")
    if system:
        turns.insert(0, Turn("system", _nonempty(system), HEADINGS["system"]))
    _check_order(turns)
    stratum = row.get("task_type")
    return Example(
        id=identity,
        group=" ".join(images) or identity,
        turns=tuple(turns),
        stratum=None if stratum is None else str(stratum),
        images=tuple(images),
    )


def _listed(row: dict[str, Any]) -> list[Any]:
    key = "conversations" if "conversations" in row else "messages"
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow("needs a list of turns under 'conversations' or 'messages'")
    return turns


def _images(row: dict[str, Any]) -> list[str]:
    value = row.get("images") or row.get("image") or []
    images = [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadRow("image must be a path or a list of paths")
    return list(images)


def _turn(turn: Any, images: list[str]) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow(f"a turn must be an object, found {json.dumps(turn)[:60]}")
    said_by = turn.get("from", turn.get("role"))
    if said_by not in ROLES:
        raise BadRow(f"unknown role {said_by!r}; known are {', '.join(ROLES)}")
    content = turn.get("value", turn.get("content"))
    text = "".join(_part(part, images) for part in content) if isinstance(content, list) else content
    role = ROLES[said_by]
    return Turn(role, _nonempty(text), HEADINGS[role])


def _part(part: Any, images: list[str]) -> str:
    """The text of a typed part; an image part is noted and leaves its slot in the text."""
    if not isinstance(part, dict):
        raise BadRow(f"a content part must be an object, found {json.dumps(part)[:60]}")
    kind = part.get("type", "text")
    value = part.get("text", part.get("value")) if kind == "text" else part.get("value", part.get(kind))
    if kind == "text" and isinstance(value, str):
        return value
    value = value.get("url") if isinstance(value, dict) else value
    if kind in {"image", "image_url"} and isinstance(value, str):
        images.append(value)
    elif kind != "image" or value is not None:
        raise BadRow(f"cannot use a content part of type {kind!r}")
    return IMAGE_SLOT


def _nonempty(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadRow("empty turn" if text in ("", None) else f"a turn's text must be a string, found {str(text)[:60]}")
    return text


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise BadRow("the system turn must come first, and once")
    spoken = [role for role in roles if role != "system"]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise BadRow(f"turns must alternate user, assistant and end with the assistant; found {', '.join(spoken)}")
