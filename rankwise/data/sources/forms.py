"""The forms that conversations come in, as one: turns {role, content}, the system's first.

    ShareGPT, LLaVA, Qwen-VL, XComposer   conversations: [{from, value}]
    messages                              messages: [{role, content}]
    XTuner                                conversation: [{system, input, output}]
    swift                                 query, response, history: [[query, response]]
    Alpaca                                instruction, input, output, history
    TRL                                   prompt, completion: texts, or lists of messages
    PaliGemma, Florence                   image, prefix, suffix

The system's text may stand beside the turns, as `system` or `system_prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rankwise.data.sources.rows import BadRow, as_found

Row = dict[str, Any]
LISTS = ("conversations", "messages", "conversation")


def turns_of(row: Row) -> Iterator[Row]:
    """Every turn of a row as it is written; BadRow where it has none."""
    system = row.get("system_prompt") or row.get("system")
    if system:
        yield {"role": "system", "content": system}
    form = next((form for keys, form in FORMS.items() if all(row.get(key) is not None for key in keys)), None)
    if form is None:
        needed = "needs a list of turns under 'conversations' or 'messages' (or another form of docs/data.md)"
        raise BadRow(f"{needed}; it has {', '.join(map(as_found, row)) or 'nothing'}")
    yield from form(row)


def _listed(key: str) -> Callable[[Row], Iterator[Row]]:
    def form(row: Row) -> Iterator[Row]:
        turns = row[key]
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"needs a list of turns under {key!r}, found {as_found(turns)}")
        for turn in turns:
            if not isinstance(turn, dict):
                raise BadRow(f"a turn must be an object, found {as_found(turn)}")
            yield from _exchange(turn) if "input" in turn or "output" in turn else [turn]

    return form


def _exchange(turn: Row) -> Iterator[Row]:
    """XTuner's pair; its first one may bring the system's text."""
    if turn.get("system"):
        yield {"role": "system", "content": turn["system"]}
    if turn.get("input"):  # without one, the answer goes on
        yield {"role": "user", "content": turn["input"]}
    yield {"role": "assistant", "content": turn.get("output")}


def _asked(row: Row, question: Any, answer: Any) -> Iterator[Row]:
    """The pairs of `history`, then this question and its answer."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow(f"history is a list of [question, answer], found {as_found(history)}")
    for said, replied in [*history, (question, answer)]:
        yield {"role": "user", "content": said}
        yield {"role": "assistant", "content": replied}


def _swift(row: Row) -> Iterator[Row]:
    return _asked(row, row["query"], row["response"])


def _alpaca(row: Row) -> Iterator[Row]:
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow(f"instruction and input must be texts, found {as_found(parts)}")
    return _asked(row, "\n".join(part for part in parts if part.strip()), row["output"])


def _prompted(row: Row) -> Iterator[Row]:
    for role, key in (("user", "prompt"), ("assistant", "completion")):
        if isinstance(row[key], list):
            yield from _listed(key)(row)
        else:
            yield {"role": role, "content": row[key]}


def _suffixed(row: Row) -> Iterator[Row]:
    return _asked({}, row["prefix"], row["suffix"])


FORMS: dict[tuple[str, ...], Callable[[Row], Iterator[Row]]] = {
    **{(key,): _listed(key) for key in LISTS},
    ("query", "response"): _swift,
    ("instruction", "output"): _alpaca,
    ("prompt", "completion"): _prompted,
    ("prefix", "suffix"): _suffixed,
}
MARKS = (
    *LISTS,
    "query response",
    "instruction output",
    "prompt completion",
    "prefix suffix",
)  # columns by which a row is told
