"""The forms that conversations come in, as one: turns {role, content}, the system's first.

    ShareGPT, LLaVA, Qwen-VL, XComposer   conversations: [{from, value}]
    messages                              messages: [{role, content}]
    XTuner                                conversation: [{system, input, output}]
    Firefly, Phi-3                        conversation, conversations: [{human or user, assistant}]
    the Cauldron, FineVision              images, texts: [{user, assistant}]
    swift                                 query, response, history: [[query, response]]
    Alpaca, Dolly                         instruction, input or context, output or response, history
    OpenOrca                              system_prompt, question, response
    TRL                                   prompt, completion (or response): texts, or lists of messages
    PaliGemma, Florence                   image, prefix, suffix

The system's text may stand beside the turns, as `system` or `system_prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rankwise.data.sources.rows import BadRow, as_found

Row = dict[str, Any]
LISTS = ("conversations", "messages", "conversation", "texts")
ASKED, ANSWERED = ("input", "user", "human"), ("output", "assistant")  # keys of a question and its answer in one turn
BESIDE = ("context", "choices", "options", "hint", "passage", "lecture")  # parts of a question in columns of their own


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


def refuse_beside(row: Row) -> None:
    """BadRow where a part of the question stands in a column that is not read: the model would answer without it."""
    found = next((name for name in BESIDE if row.get(name)), None)
    if found:
        raise BadRow(f"its question has {found!r} beside it, which no prompt would show: write it into the question")


def _listed(key: str) -> Callable[[Row], Iterator[Row]]:
    def form(row: Row) -> Iterator[Row]:
        turns = row[key]
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"needs a list of turns under {key!r}, found {as_found(turns)}")
        for turn in turns:
            if not isinstance(turn, dict):
                raise BadRow(f"a turn must be an object, found {as_found(turn)}")
            speaks = turn.get("from") or turn.get("role") or turn.keys().isdisjoint((*ASKED, *ANSWERED))
            yield from [turn] if speaks else _exchange(turn)

    return form


def _exchange(turn: Row) -> Iterator[Row]:
    """A question and its answer; XTuner's first one may bring the system's text."""
    if turn.get("system"):
        yield {"role": "system", "content": turn["system"]}
    asked = next((turn[key] for key in ASKED if turn.get(key)), None)
    if asked:  # without one, the answer goes on
        yield {"role": "user", "content": asked}
    yield {"role": "assistant", "content": next((turn[key] for key in ANSWERED if turn.get(key)), None)}


def _asked(row: Row, question: Any, answer: Any) -> Iterator[Row]:
    """The pairs of `history`, then this question and its answer."""
    refuse_beside(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow(f"history is a list of [question, answer], found {as_found(history)}")
    for said, replied in [*history, (question, answer)]:
        yield {"role": "user", "content": said}
        yield {"role": "assistant", "content": replied}


def _alpaca(row: Row) -> Iterator[Row]:
    more = "input" if row.get("input") else "context"
    parts = [row["instruction"], row.get(more) or ""]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow(f"instruction and {more} must be texts, found {as_found(parts)}")
    answer = row["response"] if row.get("output") is None else row["output"]
    return _asked({**row, more: None}, "\n".join(part for part in parts if part.strip()), answer)


def _pair(question: str, answer: str) -> Callable[[Row], Iterator[Row]]:
    return lambda row: _asked(row, row[question], row[answer])


def _prompted(answer: str) -> Callable[[Row], Iterator[Row]]:
    def form(row: Row) -> Iterator[Row]:
        if not any(isinstance(row[key], list) for key in ("prompt", answer)):
            yield from _asked(row, row["prompt"], row[answer])
            return
        refuse_beside(row)
        for role, key in (("user", "prompt"), ("assistant", answer)):
            yield from _listed(key)(row) if isinstance(row[key], list) else [{"role": role, "content": row[key]}]

    return form


FORMS: dict[tuple[str, ...], Callable[[Row], Iterator[Row]]] = {
    **{(key,): _listed(key) for key in LISTS},
    ("query", "response"): _pair("query", "response"),
    ("instruction", "output"): _alpaca,
    ("instruction", "response"): _alpaca,
    ("system_prompt", "question", "response"): _pair("question", "response"),
    ("prompt", "completion"): _prompted("completion"),
    ("prompt", "response"): _prompted("response"),
    ("prefix", "suffix"): _pair("prefix", "suffix"),
}
MARKS = tuple(map(" ".join, FORMS))  # columns by which a row is told
