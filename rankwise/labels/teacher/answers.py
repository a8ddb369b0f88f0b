"""Teacher responses: parse them, check the answers, and combine votes into a label, or the reason for none.

    body of a response ── read ──┬─▶ Reply        an answer, usable or not: it was paid for, and is stored
                                 └─▶ NoAnswer     an error page, a cut body, an error with status 200: asked again
    Reply ── checked ──▶ {"element": "water", …} or Unusable ── verdict (the majority of the votes) ──▶ Verdict
    votes (images × k) ── agreement ──▶ kappa, error of one vote, error of the majority: the student's floor

Only a JSON object with a message in its first choice is an answer. What else the service adds is ignored.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.data.label_answer import BadAnswer
from rankwise.data.label_task import LabelTask
from rankwise.errors import need

NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
FILTERED = ("content_policy_violation", "content_filter")
STATUS_OF = {"invalid_api_key": 401, "rate_limit_exceeded": 429}
STATUS_OF |= dict.fromkeys(NO_QUOTA, 429) | dict.fromkeys(FILTERED, 400)
BAD_GATEWAY = 502  # what an outage is taken for that comes with status 200 and names no status of its own
TEXT_PARTS = (None, "text", "output_text")
MOST_TOKENS = 10**9
SHOWN = 200  # characters of a response in a message
LONGEST = 300  # characters of a refusal in a message
CUT = "length"  # the finish_reason of an answer that ends at the limit
MODEL = (
    "each vote is right with one probability and otherwise any other class, independently of the other votes; errors "
    "that the teacher makes every time are not seen by votes and come on top"
)
Content = Mapping[str, Any]


# --- reading ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer. text: empty where the service refused. problem: what kept it from being a text (a tool call, say).
    input_tokens, output_tokens: None where the service does not say."""

    text: str
    refusal: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    served_by: str | None = None
    problem: str | None = None


class NoAnswer(Exception):
    """Why a response is no answer. status: the HTTP status that it should have had; code: the service's own."""

    def __init__(self, why: str, status: int = BAD_GATEWAY, code: str | None = None) -> None:
        super().__init__(why)
        self.status, self.code = status, code


def read(body: bytes) -> Reply:
    """The answer in the body of a response that claims success. Raises NoAnswer."""
    content = _object(body)
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    error = content.get("error") or (choice.get("error") if isinstance(choice, dict) else None)
    if error:
        raise _error(error)
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise NoAnswer(f"JSON that is no chat completion: {excerpt(body)}")
    text, refusal = text_of(message.get("content")), refusal_of(message)
    call = not text and not refusal and (message.get("tool_calls") or message.get("function_call"))
    usage = content.get("usage")
    tokens = (count(usage, "prompt_tokens", "input_tokens"), count(usage, "completion_tokens", "output_tokens"))
    problem = "a tool call instead of an answer" if call else None
    return Reply(text, refusal, word(choice.get("finish_reason")), *tokens, word(content.get("model")), problem)


def text_of(content: Any) -> str:
    """The text of a message's content: a text, a list of typed parts, an object in place of its JSON, or nothing."""
    if content is None or isinstance(content, str):
        return whole(content or "")
    if isinstance(content, list):
        return whole("".join(_texts(content)))
    return json.dumps(content, ensure_ascii=True)


def refusal_of(message: Mapping[str, Any]) -> str | None:
    """The refusal of a message: its own field, or a part of its content."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    said = [message.get("refusal"), *(part.get("refusal") for part in parts if part.get("type") == "refusal")]
    found = next((each for each in said if each), None)
    return None if found is None else text_of(found)


def whole(text: str) -> str:
    """A text that can be written: JSON may hold halves of characters, which become `?`."""
    return text.encode("utf-8", "replace").decode()


def excerpt(body: bytes) -> str:
    """The beginning of a response, for messages."""
    text = body[: 4 * SHOWN].decode("utf-8", "replace").strip()
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def _texts(parts: Iterable[Any]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            text = part.get("text")
            text = text.get("value") if isinstance(text, dict) else text
            if isinstance(text, str):
                yield text


def _object(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise NoAnswer(f"bytes that are no UTF-8: {excerpt(body)}") from None
    if not text:
        raise NoAnswer("an empty body")
    if text.startswith("<"):
        raise NoAnswer(f"a web page: {excerpt(body)}")
    if text.startswith(("data:", "event:", ":")):
        raise NoAnswer(f"a stream of events, which was not asked for: {excerpt(body)}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", str(error))
        raise NoAnswer(f"what is not JSON, or JSON that was cut ({said}): {excerpt(body)}") from None
    if not isinstance(content, dict):
        raise NoAnswer(f"JSON that is no chat completion: {excerpt(body)}")
    return content


def _error(error: Any) -> NoAnswer:
    """An error that came with status 200, as the status that it names."""
    fields = error if isinstance(error, dict) else {"message": error}
    code = fields.get("code") or fields.get("type")
    named = int(str(code)) if str(code).isascii() and str(code).isdigit() and len(str(code)) == 3 else 0
    status = named if 400 <= named < 600 else STATUS_OF.get(str(code), BAD_GATEWAY)
    said = text_of(fields.get("message") or fields)[:SHOWN]
    return NoAnswer(f"an error: {said}", status, None if code is None else str(code)[:SHOWN])


def word(value: Any) -> str | None:
    """A short text; None for anything else."""
    return whole(value)[:SHOWN] if isinstance(value, str) else None


def count(usage: Any, *names: str) -> int | None:
    """A number of tokens; None for what is none (`null`, a text, a negative number)."""
    given = next((usage[name] for name in names if name in usage), None) if isinstance(usage, dict) else None
    if isinstance(given, str) and given.strip().isascii() and given.strip().isdigit():
        given = given.strip()[:20]
    elif isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        return None
    return int(given) if 0 <= int(given) <= MOST_TOKENS else None


class Unusable(Exception):
    """Why an answer cannot be used, in a few words."""


def check_answer(reply: Reply, task: LabelTask) -> dict[str, Any]:
    """The answer in the schema's order. Unusable where it is none: a refusal, no JSON, a class outside the set …"""
    if reply.problem:
        raise Unusable(reply.problem)
    if reply.refusal or reply.finish_reason == "content_filter":
        raise Unusable(f"refusal: {(reply.refusal or 'content filter')[:LONGEST]}")
    try:
        return task.validate_answer(reply.text)
    except BadAnswer as error:
        cut = "cut at the length limit (--max_tokens); " if reply.finish_reason == CUT else ""
        raise Unusable(f"{cut}{error}") from error


def usable(reply: Reply, task: LabelTask) -> bool:
    try:
        return bool(check_answer(reply, task))
    except Unusable:
        return False


@dataclass(frozen=True)
class VoteResult:
    """Result of the votes on an image.

    content: the first answer that voted for the label, with the mean confidence of all that did; None where there is no
    label, for the reason in `problem`. votes: the label of each usable vote. answered: False where the service gave no
    answer at all, so that the image is asked again in the next run.
    """

    image_id: str
    votes: tuple[str, ...] = ()
    content: Content | None = None
    problem: str | None = None
    answered: bool = True

    @property
    def confidence(self) -> float:
        return float(self.content["confidence"]) if self.content else 0.0


def verdict(image_id: str, outcomes: Sequence[Content | Unusable], task: LabelTask) -> VoteResult:
    """The majority of the usable votes; without one, the reason."""
    contents = [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
    votes = tuple(str(content[task.field]) for content in contents)
    label = majority(votes)
    if label is None:
        tied = "votes tied: " + ", ".join(f"{name} {count}" for name, count in Counter(votes).most_common())
        reasons = [str(outcome) for outcome in outcomes if isinstance(outcome, Unusable)]
        return VoteResult(image_id, votes, problem=tied if votes else reasons[-1])
    agreeing = [content for content in contents if content[task.field] == label]
    confidence = sum(content["confidence"] for content in agreeing) / len(agreeing)
    return VoteResult(image_id, votes, {**agreeing[0], "confidence": confidence})


def majority(votes: Sequence[str]) -> str | None:
    """The label with more votes than any other; None where the first place is shared, or there is no vote."""
    ranked = Counter(votes).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


# --- agreement of the votes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class VoteAgreement:
    """Agreement of k votes per image.

    pair_agreement: share of pairs of votes on one image that are equal. kappa: Fleiss', None where it is not defined
    (all votes are one class). vote_error, majority_error: share of wrong labels that `symmetric_error` implies, for one
    vote and for the majority of k (ties left out). accuracy_ceiling: 1 − majority_error, the accuracy that a student
    who is always right would reach against these labels.
    """

    images: int
    votes: int
    pair_agreement: float
    kappa: float | None
    vote_error: float
    majority_error: float
    accuracy_ceiling: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error_model": MODEL}


def agreement(votes: Sequence[Sequence[str]], labels: Sequence[str]) -> VoteAgreement | None:
    """Agreement of images that all have the same number k ≥ 2 of votes; None where there are none."""
    if not votes or len(votes[0]) < 2:
        return None
    k = len(votes[0])
    table = [[row.count(label) for label in labels] for row in (list(row) for row in votes)]
    pairs = sum(count * (count - 1) for row in table for count in row) / (len(table) * k * (k - 1))
    error = symmetric_error(pairs, len(labels))
    wrong = majority_error(error, k, len(labels))
    return VoteAgreement(len(table), k, pairs, fleiss(table), error, wrong, 1 - wrong)


def fleiss(table: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' kappa of counts (images, classes), as statsmodels computes it."""
    if sum(any(row[column] for row in table) for column in range(len(table[0]))) < 2:
        return None  # chance agreement is 1: 0 / 0
    return float(need("statsmodels.stats.inter_rater", extra="label").fleiss_kappa(table, method="fleiss"))


def symmetric_error(pair_agreement: float, classes: int) -> float:
    """The error ε of one vote that makes two votes agree this often.

    Right with 1 − ε, each other class with ε / (C − 1): two votes agree with (1 − ε)² + ε² / (C − 1). Of the two roots
    the one below (C − 1) / C, where the true class is the likeliest; agreement below chance gives that value itself.
    """
    if classes < 2:
        return 0.0
    chance = 1 / classes
    above = max(0.0, pair_agreement - chance) / (1 - chance)
    return (1 - chance) * (1 - math.sqrt(above))


def majority_error(error: float, votes: int, classes: int) -> float:
    """Error rate of the majority of k votes, where there is one: summed over all outcomes of the votes."""
    others = classes - 1
    right = wrong = 0.0
    for counts in compositions(votes, classes):
        leader = max(counts)
        if counts.count(leader) > 1:
            continue
        missed = votes - counts[0]
        ways = math.factorial(votes) / math.prod(math.factorial(count) for count in counts)
        spread = (error / others) ** missed if others else float(not missed)
        probability = ways * (1 - error) ** counts[0] * spread
        right, wrong = (right + probability, wrong) if counts[0] == leader else (right, wrong + probability)
    return wrong / (right + wrong) if right + wrong else 0.0


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered sum of so many parts, zeros included."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)
