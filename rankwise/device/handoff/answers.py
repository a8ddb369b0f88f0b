"""Answers as they come back, from a server or in a file: which tokens were told at which place.

One line for each answer, in JSON:

    {"case": "17", "place": 3, "api": "chat", "top_logprobs": [{"token": " pub", "logprob": -0.2}, …]}
    {"case": "17", "place": 3, "api": "completions", "response": {…}}          what an OpenAI-compatible API answered

`place` is the number of forced tokens. A token is told by its id (`"id": 5`, `"token": "token_id:5"`) or by its text;
a text that two tokens of the vocabulary share is left in the bin of all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any

from rankwise.device.handoff.cases import ROUTES, HandoffCases
from rankwise.device.handoff.verdict import Told
from rankwise.device.llama.client import LEAST_LOGPROB
from rankwise.errors import DataError
from rankwise.files.document import given_lines, read_lines

AS_ID = "token_id:"
SLACK = 0.01  # by which rounded probabilities may sum to more than 1
FAR = 0.1  # by which they do not, however they were rounded
UNNATURAL = "are these natural logarithms of probabilities?"


class Unnatural(ValueError):
    """What is told is far from being log-probabilities."""


@dataclass(frozen=True)
class TokenLogProb:
    """A token that was told, by id or by text."""

    logprob: float
    id: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Heard:
    """One line. prompt_tokens: tokens that were read, as far as told. where: its file and line, or the server."""

    case: str
    place: int
    api: str
    top: tuple[TokenLogProb, ...]
    prompt_tokens: int | None = None
    where: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Heard:
        """KeyError, TypeError or ValueError for a line that is none."""
        response = row.get("response")
        top = told_by(response) if response is not None else [entry(one) for one in row["top_logprobs"]]
        count = (response.get("usage") or {}).get("prompt_tokens") if response else row.get("prompt_tokens")
        api = str(row["api"])
        if api not in ROUTES:
            raise ValueError(f"api is {api!r}; one of {', '.join(ROUTES)}")
        if not top:
            raise ValueError("no log-probabilities")
        found = cls(str(row["case"]), whole(row["place"]), api, tuple(top), None if count is None else whole(count))
        if found.mass > 1 + SLACK:
            kind = Unnatural if found.mass > 1 + FAR else ValueError
            raise kind(f"probabilities that sum to {found.mass:.3g}, more than 1: {UNNATURAL}")
        if all(one.logprob <= LEAST_LOGPROB for one in top):
            raise ValueError("no log-probability above the least")
        return found

    @property
    def mass(self) -> float:
        """Probability of all tokens that were told."""
        return sum(math.exp(one.logprob) for one in self.top)

    @property
    def certain(self) -> bool:
        """Whether one token has probability 1, and the others, if any, none."""
        values = sorted(one.logprob for one in self.top)
        return values[-1] == 0 and all(value <= LEAST_LOGPROB for value in values[:-1])

    def times(self, factor: float) -> Heard:
        """Log-probabilities of another base."""
        top = [replace(one, logprob=max(one.logprob * factor, LEAST_LOGPROB)) for one in self.top]
        return replace(self, top=tuple(top))

    def as_row(self) -> dict[str, Any]:
        top = [
            {"token": one.text, "logprob": one.logprob} | ({} if one.id is None else {"id": one.id}) for one in self.top
        ]
        return {
            "case": self.case,
            "place": self.place,
            "api": self.api,
            "top_logprobs": top,
            "prompt_tokens": self.prompt_tokens,
        }


def told_by(response: Mapping[str, Any]) -> list[TokenLogProb]:
    """The tokens of the first place that an OpenAI-compatible API told, the likeliest ones and the one it took: of
    completions ({"top_logprobs": [{text: log p}]}), and of chat ({"content": [{…}]}), which llama.cpp has for both."""
    choices = response["choices"]
    found = (choices[0].get("logprobs") if choices else None) or {}
    if found.get("content"):
        first = found["content"][0]
        entries = [*(first.get("top_logprobs") or first.get("top_probs") or ()), first]
    else:
        rows = found.get("top_logprobs") or [{}]
        tops = rows[0] if rows else {}
        tokens = zip(found.get("tokens") or (), found.get("token_logprobs") or (), strict=False)
        entries = [{"token": text, "logprob": value} for text, value in [*(tops or {}).items(), *list(tokens)[:1]]]
    return list({(one.id, one.text): one for one in map(entry, entries)}.values())


def entry(row: Mapping[str, Any]) -> TokenLogProb:
    text, value = str(row.get("token", "")), row["logprob"]
    known = row.get("id")
    if known is None and text.startswith(AS_ID):
        known = text.removeprefix(AS_ID)
    value = LEAST_LOGPROB if value is None else max(float(value), LEAST_LOGPROB)
    if math.isnan(value):
        raise ValueError("logprob is NaN")
    if value > SLACK:
        raise Unnatural(f"logprob is {value:.4g}, above 0: {UNNATURAL}")
    return TokenLogProb(min(value, 0.0), None if known is None else whole(known), text)


def whole(value: Any) -> int:
    """An integer, also in digits; ValueError for a fraction."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"expected an integer, found {value!r}")
    return int(value)


def read_answers(path: Path, cases: HandoffCases) -> list[Heard]:
    """DataError for a line that is no answer, is to a place that was not asked, or answers a place again."""
    seen: set[tuple[str, int, str]] = set()

    def parse(row: Mapping[str, Any]) -> Heard:
        one = Heard.of(row)
        if cases.find(one.case, one.place) is None:
            raise ValueError(f"case {one.case!r}, place {one.place} was not asked in these cases")
        if (one.case, one.place, one.api) in seen:
            raise ValueError(f"case {one.case!r}, place {one.place} was answered by {one.api} already")
        seen.add((one.case, one.place, one.api))
        return one

    if not path.is_file():
        raise DataError(f"{path}: no such file (--answers)")
    found = list(read_lines(path, "an answer", parse, "see docs/handoff.md for the form of a line", given_lines))
    if not found:
        raise DataError(f"{path}: no answers; one JSON object per line, see docs/handoff.md")
    lines = (number for number, _ in given_lines(path))
    return [replace(one, where=f"{path}, line {line}") for one, line in zip(found, lines, strict=True)]


def by_api(cases: HandoffCases, answers: Sequence[Heard]) -> dict[str, dict[int, Told]]:
    """API → the place's number → token → log p; the API that an app would use first comes first. Each API's texts are
    read in the form that more of them have."""
    found: dict[str, dict[int, Told]] = {}
    for api in cases.routes:
        own = [one for one in answers if one.api == api]
        if own:
            form = max((0, 1), key=lambda number: sum(1 for one in own for _ in known(cases, one, number)))
            found[api] = {row_of(cases, one): dict(known(cases, one, form)) for one in own}
    return found


def row_of(cases: HandoffCases, answer: Heard) -> int:
    place = cases.find(answer.case, answer.place)
    assert place
    return place.row


def known(cases: HandoffCases, answer: Heard, form: int) -> Iterator[tuple[int, float]]:
    """The told tokens that the cases know, texts being in this form."""
    ids = cases.ids_of(form)
    for one in answer.top:
        token = ids.get(one.text) if one.id is None else one.id
        if token is not None:
            yield token, one.logprob


def longer(cases: HandoffCases, answers: Sequence[Heard], api: str) -> int | None:
    """Tokens that the server counts beyond those of training's prompts, the median, where all are on one side of 0;
    None where they are not, or where it does not count."""
    lengths = {case.id: len(case.ids) for case in cases.cases}
    found = [
        one.prompt_tokens - lengths[one.case] - one.place
        for one in answers
        if one.api == api and one.prompt_tokens is not None
    ]
    alike = found and (min(found) > 0 or max(found) < 0 or not any(found))
    return int(median_low(found)) if alike else None
