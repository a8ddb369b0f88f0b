"""Every answer of the teacher, appended to a file as soon as it is there, and what the answers cost.

What is in the ledger is never paid for again, and the budget is not exceeded.

ledger = AnswerLedger(folder / "ledger.jsonl")
ledger.add(Entry(Key(image, task, model, vote), …))     # on the disk when this returns
ledger.of(key)                                          # the answers to this question so far, in order

One line per answer, unusable ones too (they were paid for):
    {"image": sha256, "task": sha256, "model": "gpt-4o", "vote": 0, "attempt": 1, "image_id": "00007_beach",
     "text": "{…}", "refusal": null, "finish_reason": "stop", "input_tokens": 812, "output_tokens": 97, …,
     "address": "https://api.openai.com/v1", "max_tokens": 1000}

spending = Spending(prices_of("gpt-4o", None, None), budget_usd=5.0, max_output_tokens=600, text_bytes=2400)
await spending.admit()                # waits where the open requests might use up the budget; raises where none is open
spending.enter(812, 97, spending.cost(812, 97))
spending.release()
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rankwise.errors import ServiceError, UsageError
from rankwise.files.document import append_lines, drop_cut_line, finished_lines
from rankwise.labels.teacher.answers import Reply, count, refusal_of, text_of, word

NAME = "ledger.jsonl"
FAULT = "the service's response is"  # how the problem of an error page began that earlier versions stored
MILLION = 1_000_000
DEFAULT_BUDGET = 10.0  # dollars, where prices are known: some 1,500 pictures of gpt-4o
# US dollars per million tokens (input, output), list prices of June 2026; exact names only: dated versions differ.
PRICES = {"gpt-4o": (2.50, 10.00), "gpt-4o-mini": (0.15, 0.60)}
# Before the first answer has said how many: above gpt-4o-mini's 8,500 tokens for a picture of one tile.
IMAGE_TOKENS = 10_000


@dataclass(frozen=True)
class Key:
    """One question. image: hash of the pixels shown. task: hash of all else that is asked. vote: 0, 1, …"""

    image: str
    task: str
    model: str
    vote: int


@dataclass(frozen=True)
class LedgerEntry:
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

    def record(self) -> dict[str, Any]:
        """A line of the ledger: the fields of question and reply among its own."""
        row = {**asdict(self.key), "attempt": self.attempt, "image_id": self.image_id, **asdict(self.reply)}
        return row | {"usd": self.usd, "at": self.at, "address": self.address, "max_tokens": self.max_tokens}


class AnswerLedger:
    """The answers of a data set, read at the start; the file is held by one process (the folder's lock).

    bad: lines that are no answer of a teacher, with their numbers; they stay where they are, and are not used. faults:
    how many lines of an earlier version hold an error page in place of an answer; those are asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[LedgerEntry] = []
        self.bad: list[str] = []
        self.faults = 0
        self._by_key: dict[Key, list[LedgerEntry]] = {}
        drop_cut_line(path)
        self._read()
        self._old = frozenset(map(id, self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    def of(self, key: Key) -> list[LedgerEntry]:
        return self._by_key.get(key, [])

    def is_old(self, entry: LedgerEntry) -> bool:
        """Whether an entry is from an earlier run."""
        return id(entry) in self._old

    def add(self, entry: LedgerEntry) -> None:
        """Append; the line is on the disk when this returns."""
        append_lines(self.path, [entry.record()])
        self._keep(entry)

    def _keep(self, entry: LedgerEntry) -> None:
        self.entries.append(entry)
        self._by_key.setdefault(entry.key, []).append(entry)

    def _read(self) -> None:
        for number, line in finished_lines(self.path):
            try:
                entry = parse_entry(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.bad.append(f"line {number}: {type(error).__name__}: {str(error)[:80]}")
                continue
            if (entry.reply.problem or "").startswith(FAULT):
                self.faults += 1
            else:
                self._keep(entry)


def parse_entry(row: Any) -> LedgerEntry:
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
    attempt, image_id, at = _typed(row, "attempt", int), _typed(row, "image_id", str), _typed(row, "at", str)
    return LedgerEntry(key, attempt, image_id, reply, usd, at, word(row.get("address")), count(row, "max_tokens"))


def _typed(row: Any, name: str, kind: type | tuple[type, ...], missing: Any = ...) -> Any:
    value = row[name]
    if value is None and missing is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r:.40}")
    return value


class BudgetReached(ServiceError):
    """The next request could exceed the budget."""


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input + output_tokens * self.output) / MILLION


def prices_of(model: str, per_million_input: float | None, per_million_output: float | None) -> Prices | None:
    """The given prices, else the list's; None for a model that is not on it. Both are given or neither."""
    if (per_million_input is None) != (per_million_output is None):
        raise UsageError("give both --usd_per_million_input and --usd_per_million_output, or neither")
    if per_million_input is not None and per_million_output is not None:
        return Prices(per_million_input, per_million_output)
    return Prices(*PRICES[model]) if model in PRICES else None


@dataclass
class Spending:
    """Tokens and dollars of one data set, earlier runs included, and what the open requests may still add.

    budget_usd: None for no limit. max_output_tokens: the longest answer that a request asks for. text_bytes: size of
    the prompt and the schema; no tokenizer makes more tokens of a text than it has bytes. Input tokens of a request are
    taken to be at most what any answer has reported so far (all images have one size), before that IMAGE_TOKENS more
    than the text's bytes. uncounted: answers of which the service did not say the tokens; each costs the most that a
    request can cost, where prices are known.

    may_be_charged: requests that were sent and have neither an answer nor an error status (a timeout, a cut
    connection). The service may charge for them, so the budget counts each at the most that a request can cost.
    """

    prices: Prices | None
    budget_usd: float | None = None
    max_output_tokens: int = 0
    text_bytes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0
    answers: int = 0
    uncounted: int = 0
    may_be_charged: int = 0
    open: int = 0
    most_input: int = 0
    _change: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def __post_init__(self) -> None:
        if self.budget_usd is not None and self.prices is None:
            known = "give --usd_per_million_input and --usd_per_million_output"
            raise UsageError(f"--budget_usd needs prices, and this model's are not known: {known}")

    @property
    def usd(self) -> float | None:
        """What the answers have cost; None where the prices are not known."""
        return self.spent if self.prices else None

    @property
    def most_per_request(self) -> float:
        """Maximum cost of one more request, in dollars."""
        expected = self.most_input or IMAGE_TOKENS + self.text_bytes
        return self.cost(expected, self.max_output_tokens) or 0.0

    def cost(self, input_tokens: int | None, output_tokens: int | None) -> float | None:
        """Dollars of an answer; None where the prices are not known."""
        if self.prices is None:
            return None
        if input_tokens is None or output_tokens is None:
            return self.most_per_request
        return self.prices.cost(input_tokens, output_tokens)

    def enter(self, input_tokens: int | None, output_tokens: int | None, usd: float | None) -> None:
        """Count an answer: a new one, or one of an earlier run at the price of its time."""
        self.answers += 1
        self.spent += usd or 0.0
        self.uncounted += input_tokens is None or output_tokens is None
        self.input_tokens += input_tokens or 0
        self.output_tokens += output_tokens or 0
        self.most_input = max(self.most_input, input_tokens or 0)

    async def admit(self) -> None:
        """Return once one more request is sure to stay within the budget. BudgetReached where that cannot be."""
        while not self._fits():
            if not self.open:
                raise BudgetReached(
                    f"the next request could cost up to ${self.most_per_request:.4f} and exceed the budget of "
                    f"${self.budget_usd:.2f} (--budget_usd)"
                )
            self._change.clear()
            await self._change.wait()
        self.open += 1

    def _fits(self) -> bool:
        if self.budget_usd is None:
            return True
        unsettled = self.open + self.may_be_charged + 1
        return self.spent + unsettled * self.most_per_request <= self.budget_usd

    def release(self) -> None:
        """Mark one request as finished."""
        self.open -= 1
        self._change.set()

    def words(self) -> str:
        """The cost so far, for people."""
        tokens = f"{self.input_tokens:,} + {self.output_tokens:,} tokens"
        cost = "cost unknown (no prices for this model)" if self.usd is None else f"${self.usd:.4f}"
        lost = f", and {self.may_be_charged} without an answer that may be charged" if self.may_be_charged else ""
        uncounted = f" ({self.uncounted} answers without a number of tokens)" if self.uncounted else ""
        return f"{self.answers} answers, {tokens}{uncounted}, {cost}{lost}"

    def as_dict(self) -> dict[str, object]:
        return {
            "answers": self.answers,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "usd": self.usd,
            "usd_per_million": [self.prices.input, self.prices.output] if self.prices else None,
            "requests_that_may_be_charged": self.may_be_charged,
            "answers_without_token_counts": self.uncounted,
        }
