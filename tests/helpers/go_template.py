"""As much of Go's text/template as a Modelfile of ours uses: if, else if, eq, range over messages, fields, literals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
LITERAL = re.compile(r'"(.*)"', re.DOTALL)


def executed(template: str, *, system: str = "", prompt: str = "", messages: Sequence[tuple[str, str]] = ()) -> str:
    """messages: (role, content)."""
    said = [{"Role": role, "Content": content} for role, content in messages]
    words = ACTION.sub(lambda found: f"\0\1{found[1]}\0", template).split("\0")
    text, rest = block(words, {"System": system, "Prompt": prompt, "Messages": said}, True)
    assert not rest
    return text


def block(words: list[str], data: Mapping[str, Any], shown: bool) -> tuple[str, list[str]]:
    """The text up to the end or the else of this block, and what follows, that word first."""
    text = ""
    while words:
        word, *words = words
        action = word.removeprefix("\1")
        if action == word:
            text += word * shown
        elif action == "end" or action.startswith("else"):
            return text, [word, *words]
        elif action.startswith("range "):
            rounds = [block(words, {**data, **each}, shown) for each in data[action.removeprefix("range .")]]
            words = block(words, data, False)[1][1:]
            text += "".join(round[0] for round in rounds)
        elif action.startswith("if "):
            branch, words = chosen([word, *words], data, shown)
            text += branch
        elif shown:
            literal = LITERAL.fullmatch(action)
            text += literal[1] if literal else data[action.removeprefix(".")]
    return text, []


def chosen(words: list[str], data: Mapping[str, Any], shown: bool) -> tuple[str, list[str]]:
    """The text of the first branch whose condition holds, and what follows the end."""
    text, done = "", False
    while True:
        word, *words = words
        action = word.removeprefix("\1")
        if action == "end":
            return text, words
        condition = action.removeprefix("else").strip()
        now = shown and not done and holds(condition, data)
        branch, words = block(words, data, now)
        text, done = text + branch, done or now


def holds(condition: str, data: Mapping[str, Any]) -> bool:
    if not condition:
        return True
    words = condition.split()[1:]
    if words[0] == "eq":
        return bool(data[words[1].removeprefix(".")] == words[2].strip('"'))
    return bool(data[words[0].removeprefix(".")])
