"""CoTA: a question (with images), a chain of thought, tool actions, an answer.

Rows `{id, task_type, image, question, chain_of_thought: [str], actions: [{action, params}], answer}` in a JSON list,
`{"data": […]}` or JSON Lines; `question` and `answer` are needed, the rest may be missing. A question without
placeholders comes after its images. Samples of one image are one group, `task_type` is the stratum.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from rankwise.data.example import Example, Turn
from rankwise.data.sources.rows import BadRow, Build, RowFile, json_samples
from rankwise.data.sources.slots import (
    COLUMNS,
    Slots,
    listed_images,
    put_first,
    refuse_beside,
    refuse_in_answer,
    refuse_unread_images,
    sample_of,
)

ANSWER = "Answer:"
INSTRUCTION = "Answer the question. Think step by step, name the actions you take, then give the answer."


def read(source: RowFile) -> Iterator[Example]:
    """One sample per row; a row without id is named by the file and its number."""
    return json_samples(source, build(source))


def build(source: RowFile) -> Build:
    """How a row of this file becomes a sample; no row needs another one."""
    return partial(_example, source.how.repeat_image)


def _example(repeat_image: bool, identity: str, row: dict[str, Any]) -> Example:
    listed = listed_images(row)
    refuse_beside(row)
    if not listed:
        refuse_unread_images(row, COLUMNS)
    slots = Slots(bool(listed))
    question = slots.read(_text(row, "question"))
    if not slots.places:
        question = put_first(question, len(listed))
        slots.places += [None] * len(listed)
    images = slots.filled(listed, repeat=repeat_image)
    response = _response(row)
    refuse_in_answer(response)
    if response.startswith(ANSWER):
        slots.changes.append(
            f"without a chain of thought, read as CoTA: an instruction before it, {ANSWER!r} learnt too"
        )
    asked = [Turn("user", INSTRUCTION, "Instruction"), Turn("user", question, "Question")]
    return sample_of(identity, row, [*asked, Turn("assistant", response, "Response")], images, slots.changes)


def final_answer(response: str) -> str:
    """What stands behind the last `Answer:` of a response; all of it where there is none."""
    return response.rpartition(ANSWER)[2].strip()


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{key} must be a text, found {json.dumps(value)[:60]}")
    return value.strip()


def _response(row: dict[str, Any]) -> str:
    """Thoughts and actions one a line, then the answer: what the model learns to write."""
    thoughts = row.get("chain_of_thought") or []
    thoughts = [thoughts] if isinstance(thoughts, str) else thoughts
    if not isinstance(thoughts, list) or not all(isinstance(thought, str) for thought in thoughts):
        raise BadRow("chain_of_thought must be a list of texts")
    lines = [f"Thought: {thought.strip()}" for thought in thoughts]
    lines += [_action(action) for action in _actions(row)]
    return "\n".join([*lines, f"{ANSWER} {_text(row, 'answer')}"])


def _actions(row: dict[str, Any]) -> list[dict[str, Any]]:
    actions = row.get("actions") or []
    named = isinstance(actions, list) and all(
        isinstance(action, dict) and isinstance(action.get("action"), str) for action in actions
    )
    if not named:
        raise BadRow("actions must be a list of {action, params}")
    return actions


def _action(action: dict[str, Any]) -> str:
    parameters = json.dumps(action.get("params") or {}, ensure_ascii=False)
    return f"Action: {action['action']} {parameters}"
