"""What counts as an answer, and what becomes of several: the label of an image, or the reason why it has none.

Reply ── refused? ── of the task's schema? ──▶ {"element": "water", …}  ──┐
              └────────── Unusable("…")  ─────────────────────────────────┴─ votes ──▶ Verdict
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.label_answer import BadAnswer
from rankwise.data.label_task import LabelTask
from rankwise.data.teacher.reply import Reply
from rankwise.data.teacher.votes import majority

Content = Mapping[str, Any]
LONGEST = 300  # characters of a refusal in a message
CUT = "length"  # the finish_reason of an answer that ends at the limit


class Unusable(Exception):
    """Why an answer cannot be used, in a few words."""


def checked(reply: Reply, task: LabelTask) -> dict[str, Any]:
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
        return bool(checked(reply, task))
    except Unusable:
        return False


@dataclass(frozen=True)
class Verdict:
    """What the votes say of an image.

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


def verdict(image_id: str, outcomes: Sequence[Content | Unusable], task: LabelTask) -> Verdict:
    """The majority of the usable votes; without one, the reason."""
    contents = [outcome for outcome in outcomes if not isinstance(outcome, Unusable)]
    votes = tuple(str(content[task.field]) for content in contents)
    label = majority(votes)
    if label is None:
        tied = "votes tied: " + ", ".join(f"{name} {count}" for name, count in Counter(votes).most_common())
        reasons = [str(outcome) for outcome in outcomes if isinstance(outcome, Unusable)]
        return Verdict(image_id, votes, problem=tied if votes else reasons[-1])
    agreeing = [content for content in contents if content[task.field] == label]
    confidence = sum(content["confidence"] for content in agreeing) / len(agreeing)
    return Verdict(image_id, votes, {**agreeing[0], "confidence": confidence})
