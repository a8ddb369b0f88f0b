"""Laws of the teacher: patience has bounds, nothing is asked twice, answers are checked, votes and cost are right."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from misbehaving_teacher import (
    Behaviour,
    chatting,
    failing,
    fenced,
    filtered,
    hanging_up,
    in_order,
    refusing,
    saying,
    slow,
    too_many,
    truncated,
    well,
)
from PIL import Image, ImageDraw

from rankwise.data.device import DeviceTarget
from rankwise.data.label_task import LabelTask, load_task
from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.labels.dataset import pixel_hash
from rankwise.labels.teacher.answers import (
    Reply,
    Unusable,
    VoteResult,
    agreement,
    check_answer,
    fleiss,
    majority,
    majority_error,
    symmetric_error,
    verdict,
)
from rankwise.labels.teacher.client import Teacher, Unanswered, http_client
from rankwise.labels.teacher.ledger import AnswerLedger, BudgetReached, Key, LedgerEntry, Prices, Spending, prices_of
from rankwise.labels.teacher.loopback import LoopbackTeacher, Response, picture_of
from rankwise.labels.teacher.questions import Asker, ImageToLabel, Question, collect
from rankwise.options.label import TeacherSection

TARGET = DeviceTarget(image_size=32)
KEY = Key("image", "task", "model", 0)
COLOURS = {"water": (30, 90, 180), "wood": (45, 110, 45), "fire": (225, 50, 20), "metal": (120, 120, 125)}


@pytest.fixture(scope="module")
def task() -> LabelTask:
    return load_task("elements")


def picture(number: int, colour: tuple[int, int, int] = COLOURS["water"]) -> ImageToLabel:
    """A picture of one colour but for a dot whose place is its number."""
    image = Image.new("RGB", (32, 32), colour)
    ImageDraw.Draw(image).point((number % 32, number // 32), "white")
    return ImageToLabel(f"{number:05d}_picture", pixel_hash(image), TARGET.jpeg(image))


def settings(url: str, **changes: Any) -> TeacherSection:
    quick = {"requests_per_minute": 60_000, "timeout": 5, "max_retries": 2, "max_wait": 20, "max_tokens": 600}
    return TeacherSection(base_url=url, **{**quick, **changes})


def asking(
    behaviour: Behaviour,
    task: LabelTask,
    ledger: AnswerLedger,
    pictures: list[ImageToLabel],
    wanted: int = 99,
    *,
    votes: int = 1,
    spending: Spending | None = None,
    seen: Any = lambda found: None,
    **changes: Any,
) -> tuple[list[VoteResult] | BaseException, LoopbackTeacher, Spending]:
    """Collect verdicts from a server that behaves so; what came out or was raised, the server, the cost."""
    spending = spending or Spending(None)

    async def work(server: LoopbackTeacher) -> list[VoteResult]:
        async with Teacher(settings(server.url, **changes), spending) as teacher:
            return await collect(Asker(teacher, ledger, Question(task), votes), pictures, wanted, keep, seen)

    with LoopbackTeacher(behaviour) as server:
        return outcome(work(server)), server, spending


def keep(found: VoteResult) -> bool:
    return found.confidence >= 0.75


def outcome(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return asyncio.run(coroutine)
    except (ServiceError, DataError, Unanswered) as error:
        return error


@pytest.fixture
def ledger(tmp_path: Path) -> AnswerLedger:
    return AnswerLedger(tmp_path / "ledger.jsonl")


# --- the client: patience with bounds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviours", "requests", "may_be_charged"),
    [
        ((too_many(),), 2, 0),
        ((failing(500), failing(503)), 3, 0),
        ((slow(3),), 2, 1),
        ((hanging_up,), 2, 1),
    ],
    ids=["429", "500, 503", "slow", "hangs up"],
)
def test_trouble_that_passes_is_waited_out(
    behaviours: tuple[Behaviour, ...], requests: int, may_be_charged: int, task: LabelTask, ledger: AnswerLedger
) -> None:
    found, server, spending = asking(in_order(*behaviours), task, ledger, [picture(0)], timeout=1)
    assert isinstance(found, list) and [keep(one) for one in found] == [True]
    assert len(server.requests) == requests
    assert len(ledger) == spending.answers == 1
    assert (spending.may_be_charged, spending.open) == (may_be_charged, 0)


def test_retry_after_is_obeyed(task: LabelTask, ledger: AnswerLedger) -> None:
    """Without the header the first wait is at most half a second."""
    started = time.monotonic()
    found, _, _ = asking(in_order(too_many("1.5")), task, ledger, [picture(0)])
    assert isinstance(found, list) and found[0].content
    assert time.monotonic() - started > 1.5


def test_trouble_that_stays_ends_within_bounds(task: LabelTask, ledger: AnswerLedger) -> None:
    """Three questions without an answer, each with its retries: the service is down."""
    found, server, _ = asking(failing(503), task, ledger, [picture(n) for n in range(9)], concurrency=1, max_retries=1)
    assert isinstance(found, ServiceError) and "3 questions in a row" in str(found)
    assert len(server.requests) == 3 * 2
    assert len(ledger) == 0


def test_one_question_without_an_answer_does_not_stop_the_others(task: LabelTask, ledger: AnswerLedger) -> None:
    behaviour = in_order(failing(503), failing(503))
    pictures = [picture(n) for n in range(3)]
    found, _, _ = asking(behaviour, task, ledger, pictures, concurrency=1, max_retries=1)
    assert isinstance(found, list)
    assert [one.answered for one in found] == [False, True, True]
    again, server, _ = asking(well, task, ledger, pictures)
    assert len(server.requests) == 1, "only the one without an answer is asked again"
    assert isinstance(again, list) and all(one.answered for one in again)


def test_a_service_that_is_not_there_charges_nothing(task: LabelTask, ledger: AnswerLedger) -> None:
    """No connection: nothing was sent that could be charged."""
    with LoopbackTeacher() as server:
        url = server.url
    spending = Spending(None)

    async def work() -> None:
        async with Teacher(settings(url), spending) as teacher:
            await teacher.ask(Question(task).messages(picture(0).jpeg), None)

    assert isinstance(outcome(work()), Unanswered)
    assert (spending.may_be_charged, spending.open) == (0, 0)


def test_the_total_wait_has_a_bound(task: LabelTask, ledger: AnswerLedger) -> None:
    started = time.monotonic()
    found, _, _ = asking(slow(20), task, ledger, [picture(0)], timeout=15, max_wait=1)
    assert isinstance(found, list) and not found[0].answered
    assert "1 s" in str(found[0].problem)
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (failing(401, "Incorrect API key provided: sk-very-secret"), "401"),
        (failing(403, "not for you"), "403"),
        (failing(429, "You exceeded your current quota", code="insufficient_quota"), "quota"),
        (failing(404, "no such model"), "404"),
        (failing(400, "unknown parameter"), "400"),
    ],
    ids=["401", "403", "quota", "404", "400"],
)
def test_what_no_patience_helps_against_stops_at_once(
    behaviour: Behaviour, words: str, task: LabelTask, ledger: AnswerLedger
) -> None:
    """Five answers are good; then no more is asked than was on its way."""
    started = time.monotonic()
    pictures = [picture(n) for n in range(40)]
    behaviours = in_order(*[well] * 5, then=behaviour)
    found, server, _ = asking(behaviours, task, ledger, pictures, openai_api_key="sk-very-secret")
    assert isinstance(found, ServiceError) and words in str(found)
    assert "sk-very-secret" not in str(found)
    assert len(ledger) == 5
    assert len(server.requests) <= 5 + 5
    assert time.monotonic() - started < 8, "an empty account was retried"


def test_requests_keep_to_the_rate_and_the_slots(task: LabelTask, ledger: AnswerLedger) -> None:
    """Evenly spaced from the first on, retries among them, and never more than two in flight."""
    times: list[float] = []
    lock = threading.Lock()

    def behave(request: dict[str, Any]) -> Response:
        with lock:
            times.append(time.monotonic())
            number = len(times)
        return failing(500)(request) if number in (3, 5) else slow(0.3)(request)

    pictures = [picture(n) for n in range(8)]
    found, server, _ = asking(behave, task, ledger, pictures, requests_per_minute=600, concurrency=2)
    assert isinstance(found, list) and all(one.content for one in found)
    assert len(times) == 10
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.06  # 0.1 s apart when sent
    assert server.most_in_flight == 2


def test_the_teacher_sees_exactly_the_picture_the_task_and_the_schema(task: LabelTask, ledger: AnswerLedger) -> None:
    shown = picture(7)
    _, server, _ = asking(well, task, ledger, [shown])
    request = server.requests[0]
    assert picture_of(request) == shown.jpeg
    parts = request["messages"][0]["content"]
    assert parts[0] == {"type": "text", "text": task.teacher_prompt}
    assert parts[1]["image_url"]["detail"] == "high"
    assert request["response_format"]["json_schema"]["schema"] == task.schema
    assert "max_tokens" in request and "temperature" not in request


def test_without_structured_output_the_schema_stands_in_the_text(task: LabelTask) -> None:
    for form in ("json_object", "none"):
        question = Question(task, form=form)
        assert json.dumps(task.schema) in question.text
        assert question.digest != Question(task).digest
    assert Question(task, form="none").response_format is None


def test_a_key_is_needed_for_openai_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        Teacher(TeacherSection(), Spending(None))
    assert "sk-secret" not in repr(TeacherSection(openai_api_key="sk-secret"))


# --- what counts as an answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (chatting, "not JSON"),
        (truncated, "length limit"),
        (saying(element="sky"), "sky"),
        (saying(confidence=75), "confidence"),
        (refusing, "refusal"),
        (filtered, "refusal"),
    ],
    ids=["chat", "truncated", "class outside the set", "confidence", "refusal", "filter"],
)
def test_what_is_no_answer_is_asked_once_more_then_quarantined(
    behaviour: Behaviour, words: str, task: LabelTask, ledger: AnswerLedger
) -> None:
    """And both were paid for: a later run does not ask again."""
    found, server, _ = asking(behaviour, task, ledger, [picture(0)])
    assert isinstance(found, list)
    assert len(server.requests) == len(ledger) == 2
    assert found[0].content is None and found[0].answered and words in str(found[0].problem)
    again, server, _ = asking(well, task, AnswerLedger(ledger.path), [picture(0)])
    assert isinstance(again, list) and again == found
    assert not server.requests


@pytest.mark.parametrize("behaviour", [chatting, truncated, saying(element="sky"), refusing])
def test_the_second_answer_counts_where_it_is_one(behaviour: Behaviour, task: LabelTask, ledger: AnswerLedger) -> None:
    found, _, _ = asking(in_order(behaviour), task, ledger, [picture(0)])
    assert isinstance(found, list) and found[0].content and found[0].content["element"] == "water"
    assert [entry.attempt for entry in ledger.entries] == [1, 2]


@pytest.mark.parametrize("behaviour", [fenced, saying(element=" Water")])
def test_fences_and_case_are_put_right(behaviour: Behaviour, task: LabelTask, ledger: AnswerLedger) -> None:
    found, server, _ = asking(behaviour, task, ledger, [picture(0)])
    assert isinstance(found, list) and found[0].content and found[0].content["element"] == "water"
    assert len(server.requests) == 1


def test_an_attempt_of_an_earlier_run_counts(task: LabelTask, ledger: AnswerLedger) -> None:
    """Stopped between the first, useless answer and the second: one more is asked, not two."""
    key = Key(picture(0).digest, Question(task).digest, "gpt-4o", 0)
    ledger.add(LedgerEntry(key, 1, "00000_picture", Reply("no idea"), 0.0, "then"))
    _, server, _ = asking(chatting, task, AnswerLedger(ledger.path), [picture(0)])
    assert len(server.requests) == 1


# --- the ledger ---------------------------------------------------------------------------------------------------


def test_nothing_in_the_ledger_is_asked_again(task: LabelTask, ledger: AnswerLedger) -> None:
    pictures = [picture(n) for n in range(12)]
    first, _, _ = asking(well, task, ledger, pictures, votes=2)
    again, server, spending = asking(well, task, AnswerLedger(ledger.path), pictures, votes=2)
    assert again == first
    assert not server.requests and spending.answers == 0
    more, server, _ = asking(well, task, AnswerLedger(ledger.path), pictures, votes=3)
    assert len(server.requests) == 12, "only the third votes"
    assert isinstance(more, list) and len(more) == 12


@pytest.mark.parametrize("change", [{"detail": "low"}, {"temperature": 0.5}, {"jpeg_quality": 50}, {"form": "none"}])
def test_another_question_has_another_key(change: dict[str, Any], task: LabelTask) -> None:
    assert Question(task, **change).digest != Question(task).digest


def test_a_cut_line_is_dropped_and_all_others_stay(ledger: AnswerLedger) -> None:
    entries = [LedgerEntry(KEY, number, "id", Reply(f"{{}}\n\u2028{number} é"), 0.1, "now") for number in (1, 2)]
    for entry in entries:
        ledger.add(entry)
    whole = ledger.path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        ledger.path.write_bytes(whole[:cut])
        assert AnswerLedger(ledger.path).entries == entries[:1]
        assert ledger.path.read_bytes() == whole[:last]
    mended = AnswerLedger(ledger.path)
    mended.add(entries[1])
    assert AnswerLedger(ledger.path).entries == entries


@pytest.mark.parametrize("line", [b"nonsense", b"{}", b"[]", b'{"image": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_broken_line_is_named_and_left_where_it_is(line: bytes, ledger: AnswerLedger) -> None:
    ledger.add(LedgerEntry(KEY, 1, "id", Reply("{}"), None, "now"))
    ledger.path.write_bytes(line + b"\n" + ledger.path.read_bytes())
    before = ledger.path.read_bytes()
    read = AnswerLedger(ledger.path)
    assert read.entries == ledger.entries
    assert len(read.bad) == 1 and read.bad[0].startswith("line 1: ")
    assert ledger.path.read_bytes() == before


# --- how many are asked -------------------------------------------------------------------------------------------


def test_no_more_is_asked_than_is_needed(task: LabelTask, ledger: AnswerLedger) -> None:
    """Every third answer is unsure: 6 kept are the first 6 sure ones, whatever came first."""
    pictures = [picture(n) for n in range(40)]
    unsure = {one.jpeg for one in pictures[::3]}

    def behave(request: dict[str, Any]) -> Response:
        shown = picture_of(request)
        answer = saying(confidence=0.3 if shown in unsure else 0.9)(request)
        return Response(200, answer.content, delay=hash(shown) % 7 / 100)

    found, server, _ = asking(behave, task, ledger, pictures, wanted=6, concurrency=5)
    assert isinstance(found, list)
    assert [one.image_id for one in found] == [one.image_id for one in pictures[:9]]
    assert sum(map(keep, found)) == 6
    assert len(server.requests) == 9
    fewer, server, _ = asking(behave, task, AnswerLedger(ledger.path), pictures, wanted=2)
    assert fewer == found[:3] and not server.requests


def test_a_pool_that_is_too_small_is_asked_whole(task: LabelTask, ledger: AnswerLedger) -> None:
    found, server, _ = asking(saying(confidence=0.1), task, ledger, [picture(n) for n in range(4)], wanted=3)
    assert isinstance(found, list) and len(found) == len(server.requests) == 4


def test_pictures_are_made_as_they_are_needed(task: LabelTask, ledger: AnswerLedger) -> None:
    made: list[int] = []

    def pictures() -> Any:
        for number in range(100):
            made.append(number)
            yield picture(number)

    found, _, _ = asking(well, task, ledger, pictures(), wanted=3)
    assert isinstance(found, list) and len(made) == 3


# --- votes --------------------------------------------------------------------------------------------------------


def test_the_majority_decides_and_its_confidence_is_the_mean_of_those_who_agree(task: LabelTask) -> None:
    def vote(element: str, confidence: float) -> dict[str, Any]:
        return {"element": element, "confidence": confidence, "reason": element}

    found = verdict("id", [vote("water", 0.9), vote("wood", 1.0), vote("water", 0.7)], task)
    assert found.content and found.content["element"] == "water" and found.confidence == pytest.approx(0.8)
    tied = verdict("id", [vote("water", 0.9), vote("wood", 1.0)], task)
    assert tied.content is None and "tied" in str(tied.problem)
    one_left = verdict("id", [Unusable("refusal"), vote("wood", 0.8)], task)
    assert one_left.content and one_left.content["element"] == "wood"
    assert verdict("id", [Unusable("a"), Unusable("b")], task).problem == "b"
    assert majority(["a", "b", "b"]) == "b" and majority(["a", "b"]) is None and majority([]) is None


def test_votes_are_asked_for_and_their_agreement_is_measured(task: LabelTask, ledger: AnswerLedger) -> None:
    behaviour = in_order(*[well, well, saying(element="fire")] * 6)
    found, server, _ = asking(behaviour, task, ledger, [picture(n) for n in range(6)], votes=3, concurrency=1)
    assert isinstance(found, list) and len(server.requests) == 18
    assert {Counter(one.votes)["water"] for one in found} == {2}
    assert all(one.content and one.content["element"] == "water" for one in found)
    measured = agreement([one.votes for one in found], task.labels)
    assert measured and measured.pair_agreement == pytest.approx(1 / 3)


def test_kappa_of_the_published_example() -> None:
    """Ten subjects, fourteen raters, five categories: 0.210."""
    table = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
               7 7 0 0 0  3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7""".split()
    rows = [[int(count) for count in table[start : start + 5]] for start in range(0, 50, 5)]
    assert fleiss(rows) == pytest.approx(0.210, abs=5e-4)


def test_kappa_is_not_defined_for_one_class_only() -> None:
    measured = agreement([["water"] * 3] * 4, ("water", "wood"))
    assert measured and measured.kappa is None and measured.accuracy_ceiling == 1.0
    assert agreement([["water"]], ("water", "wood")) is None
    assert agreement([], ("water", "wood")) is None


@given(st.floats(0, 1), st.integers(2, 8))
def test_the_error_explains_the_agreement(share: float, classes: int) -> None:
    """Two votes with that error agree as often as was measured."""
    error = share * (classes - 1) / classes
    agree = (1 - error) ** 2 + error**2 / (classes - 1)
    assert symmetric_error(agree, classes) == pytest.approx(error, abs=1e-6)


@given(st.floats(0, 0.5), st.integers(1, 5), st.integers(2, 4))
def test_the_majority_s_error_is_that_of_all_outcomes(error: float, votes: int, classes: int) -> None:
    """By brute force over every sequence of votes."""
    right = wrong = 0.0
    for outcome in itertools.product(range(classes), repeat=votes):
        leaders = Counter(outcome).most_common()
        if len(leaders) > 1 and leaders[0][1] == leaders[1][1]:
            continue
        chance = math.prod(1 - error if vote == 0 else error / (classes - 1) for vote in outcome)
        right, wrong = right + chance * (leaders[0][0] == 0), wrong + chance * (leaders[0][0] != 0)
    assert majority_error(error, votes, classes) == pytest.approx(wrong / (right + wrong), abs=1e-9)


def test_more_votes_leave_fewer_errors() -> None:
    errors = [majority_error(0.2, votes, 5) for votes in (1, 3, 5, 7)]
    assert errors[0] == pytest.approx(0.2)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


# --- cost ---------------------------------------------------------------------------------------------------------


def test_prices_are_given_or_known() -> None:
    assert prices_of("gpt-4o", None, None) == Prices(2.50, 10.00)
    assert prices_of("gpt-4o", 1.0, 2.0) == Prices(1.0, 2.0)
    assert prices_of("a model of my own", None, None) is None
    assert Prices(2.5, 10.0).cost(1_000_000, 100_000) == pytest.approx(3.5)
    with pytest.raises(UsageError, match="both"):
        prices_of("gpt-4o", 1.0, None)
    with pytest.raises(UsageError, match="--usd_per_million_input"):
        Spending(None, budget_usd=1.0)


def charging(output_tokens: list[int]) -> Behaviour:
    """Good answers that are charged 900 input tokens, and so many output tokens in turn."""
    turns, lock = itertools.cycle(output_tokens), threading.Lock()

    def respond(request: dict[str, Any]) -> Response:
        body = json.loads(well(request).content)
        with lock:
            body["usage"] = {"prompt_tokens": 900, "completion_tokens": next(turns), "total_tokens": 0}
        return Response(200, json.dumps(body).encode(), delay=0.01)

    return respond


@pytest.mark.parametrize("budget", [0.05, 0.1])
def test_the_budget_is_not_exceeded_and_well_used(budget: float, task: LabelTask, ledger: AnswerLedger) -> None:
    """Answers vary from 10 tokens to the limit; five are in flight. At the end not even one more was sure to fit."""
    spending = Spending(Prices(2.5, 10), budget, max_output_tokens=300, text_bytes=Question(task).text_bytes)
    pictures = [picture(n) for n in range(200)]
    found, server, _ = asking(charging([10, 300, 150]), task, ledger, pictures, spending=spending, max_tokens=300)
    most = Prices(2.5, 10).cost(900, 300)
    spent = sum(Prices(2.5, 10).cost(e.reply.input_tokens, e.reply.output_tokens) for e in ledger.entries)
    assert budget - most < spent <= budget
    assert isinstance(found, BudgetReached)
    assert sum(entry.usd or 0 for entry in ledger.entries) == pytest.approx(spent) == spending.usd
    assert len(ledger) == len(server.requests)


def test_a_request_that_may_be_charged_counts_against_the_budget(task: LabelTask, ledger: AnswerLedger) -> None:
    """The service may have worked for the answers that never came."""
    spending = Spending(Prices(0, 10), 0.0125, max_output_tokens=300)
    behaviour = in_order(charging([300]), hanging_up, hanging_up, then=charging([300]))
    pictures = [picture(n) for n in range(9)]
    found, server, _ = asking(behaviour, task, ledger, pictures, spending=spending, concurrency=1, max_tokens=300)
    assert isinstance(found, BudgetReached)
    assert spending.may_be_charged == 2
    assert len(server.requests) == 4, "four times 0.003 dollars at most"


def test_a_retried_answer_is_charged_twice(task: LabelTask, ledger: AnswerLedger) -> None:
    _, _, spending = asking(in_order(chatting), task, ledger, [picture(0)], spending=Spending(Prices(1, 1)))
    assert spending.answers == 2
    used = [entry.reply.input_tokens + entry.reply.output_tokens for entry in ledger.entries]
    assert spending.usd == pytest.approx(sum(used) / 1_000_000)


# --- the loopback teacher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", COLOURS)
def test_the_loopback_teacher_labels_by_colours(element: str, task: LabelTask, ledger: AnswerLedger) -> None:
    """Padding is not counted, and the answer is of the schema."""
    wide = Image.new("RGB", (64, 16), COLOURS[element])
    shown = ImageToLabel("id", "digest", DeviceTarget(image_size=64).jpeg(wide))
    found, _, _ = asking(well, task, ledger, [shown])
    assert isinstance(found, list) and found[0].content
    assert found[0].content["element"] == element
    assert found[0].confidence > 0.9, "a JPEG's colours bleed into the padding"
    assert check_answer(ledger.entries[0].reply, task) == found[0].content


def test_the_loopback_teacher_tells_other_tasks_by_hue(ledger: AnswerLedger, tmp_path: Path) -> None:
    """Colours by their name; whatever else by its place in the list."""
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"field": "shade", "classes": ["red", "blue"]}))
    shown = [picture(0, (250, 10, 10)), picture(1, (10, 10, 240))]
    found, _, _ = asking(well, load_task(path), ledger, shown)
    assert isinstance(found, list)
    assert [one.content["shade"] for one in found if one.content] == ["red", "blue"]
    path.write_text(json.dumps({"classes": ["spoon", "fork", "knife"]}))
    found, _, _ = asking(well, load_task(path), ledger, [picture(2, (200, 40, 40)), picture(3, (40, 200, 40))])
    assert isinstance(found, list)
    assert [one.content["label"] for one in found if one.content] == ["spoon", "fork"]


def test_certificates_are_verified_wherever_there_are_some() -> None:
    class Told:
        def __init__(self, **options: Any) -> None:
            self.verify = options["verify"]

    sdk: Any = SimpleNamespace(DefaultAsyncHttpxClient=Told)
    told = {"https://api.openai.com/v1": True, "https://127.0.0.1/v1": True, "http://127.0.0.1:8080/v1": False}
    assert {address: http_client(sdk, AsyncMock(), address).verify for address in told} == told
