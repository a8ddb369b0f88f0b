"""Every answer of the teacher, appended to a file as soon as it is there: what is in it is never paid for again.

ledger = AnswerLedger(folder / "ledger.jsonl")
ledger.add(Entry(Key(image, task, model, vote), …))     # on the disk when this returns
ledger.of(key)                                          # the answers to this question so far, in order

One line per answer, unusable ones too (they were paid for):
    {"image": sha256, "task": sha256, "model": "gpt-4o", "vote": 0, "attempt": 1, "image_id": "00007_beach",
     "text": "{…}", "refusal": null, "finish_reason": "stop", "input_tokens": 812, "output_tokens": 97, …}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.store.files import explained
from rankwise.store.ledger import drop_cut_line

NAME = "ledger.jsonl"


@dataclass(frozen=True)
class Key:
    """One question. image: hash of the pixels shown. task: hash of all else that is asked. vote: 0, 1, …"""

    image: str
    task: str
    model: str
    vote: int


@dataclass(frozen=True)
class Reply:
    """What the service sent back. text: empty where it refused; problem: what kept it from being an answer at all."""

    text: str
    refusal: str | None = None
    finish_reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    served_by: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. attempt: 1 for the first answer to the question. usd: its cost; None where not known."""

    key: Key
    attempt: int
    image_id: str
    reply: Reply
    usd: float | None
    at: str

    def line(self) -> str:
        row = {**asdict(self.key), "attempt": self.attempt, "image_id": self.image_id, **asdict(self.reply)}
        return json.dumps({**row, "usd": self.usd, "at": self.at}, ensure_ascii=False) + "\n"


class AnswerLedger:
    """The answers of a data set, read at the start; the file is held by one process (the folder's lock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._by_key: dict[Key, list[Entry]] = {}
        drop_cut_line(path)
        for entry in read_entries(path):
            self._keep(entry)

    def __len__(self) -> int:
        return len(self.entries)

    def of(self, key: Key) -> list[Entry]:
        return self._by_key.get(key, [])

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


def read_entries(path: Path) -> Iterator[Entry]:
    """The lines of a ledger. DataError, naming the line, for one that is not an answer."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield parsed(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: not an answer of a teacher ({error!r}); what stands there was paid for: "
                    "mend it by hand, or take the line away to have it asked again"
                ) from error


def parsed(row: dict[str, Any]) -> Entry:
    key = Key(*(row[item.name] for item in fields(Key)))
    reply = Reply(**{item.name: row[item.name] for item in fields(Reply)})
    return Entry(key, int(row["attempt"]), row["image_id"], reply, row["usd"], row["at"])
