"""Every answer of the teacher, appended to a file as soon as it is there: what is in it is never paid for again.

ledger = AnswerLedger(folder / "ledger.jsonl")
ledger.add(Entry(Key(image, task, model, vote), …))     # on the disk when this returns
ledger.of(key)                                          # the answers to this question so far, in order

One line per answer, unusable ones too (they were paid for):
    {"image": sha256, "task": sha256, "model": "gpt-4o", "vote": 0, "attempt": 1, "image_id": "00007_beach",
     "text": "{…}", "refusal": null, "finish_reason": "stop", "input_tokens": 812, "output_tokens": 97, …,
     "address": "https://api.openai.com/v1", "max_tokens": 1000}
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankwise.data.teacher.reply import Reply, count, refusal_of, text_of, word
from rankwise.files.atomic import explained
from rankwise.files.ledger import drop_cut_line

NAME = "ledger.jsonl"
FAULT = "the service's response is"  # how the problem of an error page began that earlier versions stored


@dataclass(frozen=True)
class Key:
    """One question. image: hash of the pixels shown. task: hash of all else that is asked. vote: 0, 1, …"""

    image: str
    task: str
    model: str
    vote: int


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. attempt: 1 for the first answer to the question. usd: its cost; None where not known.

    address: where it was asked; max_tokens: the longest answer that was asked for. Both are no part of the question:
    None in lines of earlier versions.
    """

    key: Key
    attempt: int
    image_id: str
    reply: Reply
    usd: float | None
    at: str
    address: str | None = None
    max_tokens: int | None = None

    def line(self) -> str:
        row = {**asdict(self.key), "attempt": self.attempt, "image_id": self.image_id, **asdict(self.reply)}
        row |= {"usd": self.usd, "at": self.at, "address": self.address, "max_tokens": self.max_tokens}
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


class AnswerLedger:
    """The answers of a data set, read at the start; the file is held by one process (the folder's lock).

    bad: lines that are no answer of a teacher, with their numbers; they stay where they are, and are not used. faults:
    how many lines of an earlier version hold an error page in place of an answer; those are asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.bad: list[str] = []
        self.faults = 0
        self._by_key: dict[Key, list[Entry]] = {}
        drop_cut_line(path)
        self._read()
        self._old = frozenset(map(id, self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    def of(self, key: Key) -> list[Entry]:
        return self._by_key.get(key, [])

    def is_old(self, entry: Entry) -> bool:
        """Whether an entry was there before this run."""
        return id(entry) in self._old

    def add(self, entry: Entry) -> None:
        """Append; the line is on the disk when this returns."""
        with explained(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(entry.line())
            stream.flush()
            os.fsync(stream.fileno())
        self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._by_key.setdefault(entry.key, []).append(entry)

    def _read(self) -> None:
        content = self.path.read_bytes() if self.path.is_file() else b""
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                entry = parsed(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.bad.append(f"line {number}: {type(error).__name__}: {str(error)[:80]}")
                continue
            if (entry.reply.problem or "").startswith(FAULT):
                self.faults += 1
            else:
                self._keep(entry)


def parsed(row: Any) -> Entry:
    """A line's content as an entry. ValueError, KeyError or TypeError where it is none.

    A text that an earlier version stored as it came (a list of parts) is read as `reply` reads it.
    """
    key = Key(*(_typed(row, item.name, int if item.name == "vote" else str) for item in fields(Key)))
    reply = Reply(
        text_of(row["text"]),
        refusal_of({"content": row["text"], "refusal": row["refusal"]}),
        word(row["finish_reason"]),
        count(row, "input_tokens"),
        count(row, "output_tokens"),
        word(row["served_by"]),
        word(row["problem"]),
    )
    usd = _typed(row, "usd", (int, float), None)
    if usd is not None and not 0 <= usd < math.inf:
        raise ValueError(f"usd is {usd}")
    return Entry(
        key,
        _typed(row, "attempt", int),
        _typed(row, "image_id", str),
        reply,
        usd,
        _typed(row, "at", str),
        word(row.get("address")),
        count(row, "max_tokens"),
    )


def _typed(row: Any, name: str, kind: type | tuple[type, ...], missing: Any = ...) -> Any:
    value = row[name]
    if value is None and missing is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r:.40}")
    return value
