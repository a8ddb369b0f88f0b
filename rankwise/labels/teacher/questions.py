"""Images in, verdicts out: asks the teacher what the ledger doesn't know yet, and no more than is needed.

    pictures, in order ──▶ at most `concurrency` at a time ──▶ verdicts ──▶ until enough are kept

A picture is taken up only while those kept and those being asked could not be enough together. So never more are kept
than wanted, and which ones are asked does not depend on how fast which answer came: a run that was killed and run again
ends with the same rows as one that was not.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rankwise.data.device import DeviceTarget
from rankwise.data.label_task import LabelTask
from rankwise.errors import Interrupted, ServiceError
from rankwise.labels.teacher.answers import CUT, Content, Unusable, VoteResult, check_answer, usable, verdict
from rankwise.labels.teacher.client import OFFICIAL, Teacher, TeacherStopped, Unanswered, address_of
from rankwise.labels.teacher.ledger import DEFAULT_BUDGET, AnswerLedger, Key, LedgerEntry, Prices, Spending, prices_of
from rankwise.labels.teacher.loopback import MODEL as LOOPBACK
from rankwise.options.label import TeacherSection

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 20.0  # seconds that open questions get to finish
ATTEMPTS = 2  # an answer that cannot be used is asked for once more
UNANSWERED_IN_A_ROW = 3  # after so many questions without any answer, each with all its retries, the service is down


class Stopping:
    """A context inside a running event loop in which the first signal is a request and the second one ends at once.

    Every answer is on the disk before it is used, so the second one loses only answers that are still on their way.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._handles = sys.platform != "win32" and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Stopping:
        for number in SIGNALS if self._handles else ():
            self._loop.add_signal_handler(number, self._receive, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS if self._handles else ():
            self._loop.remove_signal_handler(number)

    def _receive(self, number: int) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = number
        self._asked.set()
        text = "waiting for the answers that are on their way; a second signal stops at once"
        print(f"\nrankwise: {text}", file=sys.stderr, flush=True)

    async def next_done(self, tasks: set[asyncio.Task[Any]], *, wait: bool = True) -> set[asyncio.Task[Any]]:
        """The tasks that are done; with `wait`, once there is one. Raises Interrupted where a signal came."""
        asked = asyncio.create_task(self._asked.wait())
        try:
            done, _ = await asyncio.wait(
                {*tasks, asked}, timeout=None if wait else 0, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            asked.cancel()
        if self.requested is not None:
            name = signal.Signals(self.requested).name
            raise Interrupted(f"interrupted by {name}; every answer is in the ledger", self.requested)
        return done - {asked}

    async def wind_down(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Let open tasks finish for a while, then cancel them; what they raise is of no more interest."""
        open_tasks = [task for task in tasks if not task.done()]
        if open_tasks:
            await asyncio.wait(open_tasks, timeout=GRACE)
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class ImageToLabel:
    """An image to label. digest: of the device's pixels. jpeg: those pixels, as the teacher sees them."""

    image_id: str
    digest: str
    jpeg: bytes


@dataclass(frozen=True)
class Question:
    """What is asked of every picture. detail: how closely the service looks. form: json_schema, json_object or none."""

    task: LabelTask
    detail: str = "high"
    form: str = "json_schema"
    temperature: float | None = None
    jpeg_quality: int = 90

    @property
    def response_format(self) -> dict[str, Any] | None:
        forms = {"json_schema": self.task.response_format, "json_object": {"type": "json_object"}, "none": None}
        return forms[self.form]

    @property
    def text(self) -> str:
        """The prompt; where the service is not given the schema, it stands in the text."""
        if self.form == "json_schema":
            return self.task.teacher_prompt
        schema = json.dumps(self.task.schema, ensure_ascii=False)
        return f"{self.task.teacher_prompt}\n\nAnswer with one JSON object of this JSON schema:\n{schema}"

    def messages(self, jpeg: bytes) -> list[dict[str, Any]]:
        url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        image = {"type": "image_url", "image_url": {"url": url, "detail": self.detail}}
        return [{"role": "user", "content": [{"type": "text", "text": self.text}, image]}]

    @property
    def digest(self) -> str:
        """Hash of all that is asked but the picture: the ledger's `task`."""
        asked = [self.text, self.response_format, self.detail, self.temperature, self.jpeg_quality]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()

    @property
    def text_bytes(self) -> int:
        """Size of what goes with every picture: more tokens than this it cannot be."""
        return len(self.text.encode()) + len(json.dumps(self.response_format).encode())


def where(section: TeacherSection) -> str:
    """The address of the teacher, as it is recorded."""
    return LOOPBACK if section.loopback_teacher else address_of(section.base_url)


def question_of(section: TeacherSection, task: LabelTask, target: DeviceTarget) -> Question:
    return Question(task, section.detail, section.response_format, section.temperature, target.jpeg_quality)


def spending_of(section: TeacherSection, question: Question, ledger: AnswerLedger | None = None) -> Spending:
    """What the data set has cost so far, and the limit. List prices are OpenAI's own: elsewhere they must be given."""
    listed = section.teacher_model if where(section) == OFFICIAL else ""
    prices = prices_of(listed, section.usd_per_million_input, section.usd_per_million_output)
    prices = Prices(0.0, 0.0) if section.loopback_teacher else prices
    budget = section.budget_usd
    if budget is None and prices and not section.loopback_teacher:
        budget = DEFAULT_BUDGET
    spending = Spending(prices, budget, section.max_tokens, question.text_bytes)
    for entry in ledger.entries if ledger else ():
        spending.enter(entry.reply.input_tokens, entry.reply.output_tokens, entry.usd)
    return spending


class Asker:
    """A teacher with its ledger: `verdict(picture)` asks for the votes that the ledger lacks.

    address: where the teacher is, as the ledger records it. again: answers of earlier runs do not count where they are
    from elsewhere or unusable. max_unusable: so many pictures in a row without a usable answer, and none before, are a
    teacher that never gives one; 0 for any number.
    """

    def __init__(
        self,
        teacher: Teacher,
        ledger: AnswerLedger,
        question: Question,
        votes: int = 1,
        *,
        address: str | None = None,
        again: bool = False,
        max_unusable: int = 0,
    ) -> None:
        self.teacher, self.ledger, self.question, self.votes = teacher, ledger, question, votes
        self.address, self.again, self.max_unusable = address, again, max_unusable
        self.in_a_row = self.unusable = 0
        self._digest, self._format = question.digest, question.response_format

    @property
    def room(self) -> int:
        """Maximum number of images in flight: of a teacher that has not answered usably yet, no more than
        it takes to tell."""
        most = self.teacher.settings.concurrency
        return min(most, self.max_unusable - self.unusable) if self.max_unusable else most

    def judge(self, verdict: VoteResult) -> None:
        """Count a verdict. Raises ServiceError where the teacher never answers usably."""
        if verdict.votes:
            self.max_unusable = 0
        self.unusable += verdict.answered
        if self.max_unusable and self.unusable >= self.max_unusable:
            raise ServiceError(
                f"the first {self.unusable} images got no usable answer; the last, {verdict.image_id}: "
                f"{verdict.problem}. None is asked about again: change the teacher, the task or --response_format, "
                "ask the same teacher anew with --ask_again, or go on with --max_unusable 0"
            )

    async def verdict(self, picture: ImageToLabel) -> VoteResult:
        """Raises ServiceError where going on is pointless, TeacherStopped where work was stopped before an answer."""
        outcomes = await asyncio.gather(
            *(self._vote(picture, number) for number in range(self.votes)), return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, Unusable | Unanswered):
                raise failure
        unanswered = [failure for failure in failures if isinstance(failure, Unanswered)]
        if unanswered:
            return VoteResult(picture.image_id, problem=str(unanswered[0]), answered=False)
        return verdict(picture.image_id, outcomes, self.question.task)  # type: ignore[arg-type]

    async def _vote(self, picture: ImageToLabel, number: int) -> Content:
        key = Key(picture.digest, self._digest, self.teacher.settings.teacher_model, number)
        while True:
            entries = self.standing(key)
            try:
                if entries:
                    return check_answer(entries[-1].reply, self.question.task)
            except Unusable:
                if len(entries) >= ATTEMPTS:
                    raise
            await self._ask(key, picture, len(self.ledger.of(key)) + 1)

    def standing(self, key: Key) -> list[LedgerEntry]:
        """Valid answers of the ledger: without those cut at a lower token limit than today's."""
        return [entry for entry in self.ledger.of(key) if not self._superseded(entry)]

    def _superseded(self, entry: LedgerEntry) -> bool:
        cut = entry.reply.finish_reason == CUT and (entry.max_tokens or 0) < self.teacher.settings.max_tokens
        old = self.again and self.ledger.is_old(entry)
        if old and entry.address != self.address:
            return True
        return (cut or old) and not usable(entry.reply, self.question.task)

    async def _ask(self, key: Key, picture: ImageToLabel, attempt: int) -> None:
        """One answer, in the ledger before anything else happens to it."""
        try:
            reply = await self.teacher.ask(self.question.messages(picture.jpeg), self._format)
        except Unanswered as error:
            self.in_a_row += 1
            if self.in_a_row >= UNANSWERED_IN_A_ROW:
                raise ServiceError(f"{self.in_a_row} questions in a row got no answer; the last: {error}") from error
            raise
        self.in_a_row = 0
        usd = self.teacher.spending.cost(reply.input_tokens, reply.output_tokens)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        limit = self.teacher.settings.max_tokens
        self.ledger.add(LedgerEntry(key, attempt, picture.image_id, reply, usd, at, self.address, limit))
        self.teacher.spending.enter(reply.input_tokens, reply.output_tokens, usd)


async def collect(
    asker: Asker,
    pictures: Iterable[ImageToLabel],
    wanted: int,
    keep: Callable[[VoteResult], bool],
    seen: Callable[[VoteResult], None] = lambda verdict: None,
) -> list[VoteResult]:
    """Verdicts on the first pictures of which `wanted` are kept (on all, where there are not so many), in order.

    pictures: made one by one, in a thread, one ahead of the requests and none in vain. seen: called with each verdict
    as it comes. SIGINT and SIGTERM stop the work: Interrupted. Whatever ends it early, no new question is sent, and
    those that are on their way are waited for a while, since they are paid for, and seen.
    """
    stream, order, kept = iter(pictures), list[asyncio.Task[VoteResult]](), 0
    open_tasks, picture = set[asyncio.Task[VoteResult]](), None
    with Stopping() as stopping:
        try:
            while True:
                if picture is None and kept + len(open_tasks) < wanted:  # once true for a picture, it stays true
                    picture = await asyncio.to_thread(next, stream, None)
                room = picture is not None and len(open_tasks) < asker.room
                if picture is not None and room:
                    order.append(asyncio.create_task(asker.verdict(picture)))
                    open_tasks.add(order[-1])
                    picture = None
                elif not open_tasks:
                    return [task.result() for task in order]
                for task in await stopping.next_done(open_tasks, wait=not room):
                    open_tasks.discard(task)
                    kept += keep(task.result())
                    seen(task.result())
                    asker.judge(task.result())
        finally:
            asker.teacher.stop(TeacherStopped())
            await stopping.wind_down(order)
            for task in open_tasks:
                if not task.cancelled() and not task.exception():
                    seen(task.result())
