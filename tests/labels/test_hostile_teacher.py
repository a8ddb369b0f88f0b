"""A hostile teacher, by the command: what is stored, what is paid, exit code and sentence for each misbehaviour.

What is no answer is never stored, and asked again by the next run; what is an answer is stored once, usable or not, and
never paid for again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from misbehaving_teacher import (
    Behaviour,
    bomb,
    changed,
    chatting,
    compressed,
    error_inside,
    failing,
    fenced,
    filtered,
    garbled,
    hanging_up,
    in_order,
    message,
    raw,
    redirecting,
    refusing,
    saying,
    slow,
    streamed,
    too_many,
    truncated,
    usage,
    web_page,
    well,
    without_choices,
)
from PIL import Image

from rankwise.cli import main
from rankwise.files.atomic import read_object
from rankwise.labels.dataset import read_rows
from rankwise.labels.teacher.ledger import AnswerLedger, LedgerEntry
from rankwise.labels.teacher.loopback import LoopbackTeacher

SECRET = "sk-do-not-show-0123456789"
PICTURES = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's waits between attempts, without the waiting; no key and no address of this machine's user."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(PICTURES):
        image = Image.new("RGB", (32, 32), (30, 90, 180))
        image.putpixel((number, 0), (255, 255, 255))
        image.save(folder / f"sea{number}.png")
    return folder


def label(photos: Path, out: Path, behaviour: Behaviour, *more: str) -> tuple[int, int]:
    """Exit code, and how many requests the teacher got."""
    with LoopbackTeacher(behaviour) as server:
        quick = ["--requests_per_minute", "60000", "--max_retries", "1", "--timeout", "1", "--image_size", "32"]
        command = ["label", str(photos), "-o", str(out), "--base_url", server.url, *quick]
        command += [*([] if "--concurrency" in more else ["--concurrency", "1"]), *more]
        return main(command), len(server.requests)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- no answers ---------------------------------------------------------------------------------------------------

OUTAGES = {
    "web page": (web_page, "a web page: '<html>hello</html>'"),
    "error JSON": (error_inside("upstream is down"), "an error: upstream is down, with status 200"),
    "error as text": (raw(b'{"error": "bad gateway"}'), "an error: bad gateway"),
    "error in the choice": (changed(lambda body: body["choices"][0].update(error={"message": "lost"})), "error: lost"),
    "rate limit inside": (error_inside("slow down", 429), "an error: slow down"),
    "other JSON": (raw(b'{"detail": "Not Found"}'), "JSON that is no chat completion"),
    "a list": (raw(b"[]"), "JSON that is no chat completion"),
    "empty body": (raw(b""), "an empty body"),
    "truncated JSON": (garbled, "JSON that was cut"),
    "stream of events": (streamed, "a stream of events"),
    "not UTF-8": (raw(b'{"choices": "\xff\xfe"}'), "no UTF-8"),
    "deep JSON": (raw(b"[" * 200_000), "not JSON"),
    "choices empty": (without_choices([]), "no chat completion"),
    "choices null": (without_choices(None), "no chat completion"),
    "message null": (without_choices([{"message": None}]), "no chat completion"),
    "huge": (raw(b" " * (8 * 2**20 + 1)), "more than 8,388,608 bytes"),
    "gzip bomb": (bomb, "more than 8,388,608 bytes"),
    "not gzip": (raw(b"hello", Content_Encoding="gzip"), "Connection error"),
    "500": (failing(500), "500"),
    "429": (too_many(), "429"),
    "429, Retry-After": (too_many("0.01"), "429"),
    "hangs up": (hanging_up, "Connection error"),
    "slow": (slow(1.5), "timed out"),
}


@pytest.mark.parametrize(("behaviour", "sentence"), OUTAGES.values(), ids=OUTAGES)
def test_what_is_no_answer_is_never_stored(
    behaviour: Behaviour, sentence: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked again within bounds, three questions in a row end the run, and the next run asks for all."""
    more = ("--trial", "0")
    assert label(photos, tmp_path / "d", behaviour, *more) == (5, 3 * 2)
    error = capsys.readouterr().err
    assert sentence.lower() in error.lower() and "3 questions in a row" in error
    assert lines(tmp_path / "d" / "ledger.jsonl") == []
    assert len(lines(tmp_path / "d" / "quarantine.jsonl")) == 2
    assert label(photos, tmp_path / "d", well, *more) == (0, PICTURES)


@pytest.mark.parametrize(("behaviour", "sentence"), OUTAGES.values(), ids=OUTAGES)
def test_one_outage_costs_nothing_else(behaviour: Behaviour, sentence: str, photos: Path, tmp_path: Path) -> None:
    """In the middle of a run, and over within the retries."""
    more = ("--trial", "0")
    assert label(photos, tmp_path / "d", in_order(well, well, behaviour), *more) == (0, PICTURES + 1)
    assert len(read_rows(tmp_path / "d")) == len(lines(tmp_path / "d" / "ledger.jsonl")) == PICTURES


STOPS = {
    "401": (failing(401, "no"), "key"),
    "401 inside 200": (error_inside("no", "invalid_api_key"), "key"),
    "no quota": (failing(429, "no", code="insufficient_quota"), "quota"),
    "no quota inside 200": (error_inside("no", "insufficient_quota"), "quota"),
    "payment inside 200": (error_inside("no credits", 402), "no credits"),
    "404": (failing(404, "no such model"), "no such model"),
    "redirect": (redirecting("http://127.0.0.1:9/v1"), "redirect"),
    "redirect of a GET": (redirecting("http://127.0.0.1:9/v1", 302), "redirect"),
}


@pytest.mark.parametrize(("behaviour", "sentence"), STOPS.values(), ids=STOPS)
def test_what_no_patience_helps_against_is_asked_once(
    behaviour: Behaviour, sentence: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(photos, tmp_path / "d", behaviour) == (5, 1)
    assert sentence in capsys.readouterr().err
    assert lines(tmp_path / "d" / "ledger.jsonl") == []
    assert (tmp_path / "d" / "quarantine.jsonl").read_text() == ""
    assert label(photos, tmp_path / "d", well) == (0, PICTURES)


def test_neither_key_nor_picture_follow_a_redirect(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with LoopbackTeacher() as elsewhere:
        assert label(photos, tmp_path / "d", redirecting(elsewhere.url)) == (5, 1)
        assert not elsewhere.requests and not elsewhere.keys


def test_one_picture_that_the_service_refuses_costs_nothing_else(photos: Path, tmp_path: Path) -> None:
    """A 400 may be about the picture; three in a row are about the request."""
    refused = failing(400, "unsupported image")
    assert label(photos, tmp_path / "d", in_order(refused, well, refused), "--trial", "0") == (0, PICTURES)
    assert len(read_rows(tmp_path / "d")) == PICTURES - 2
    assert label(photos, tmp_path / "d", well) == (0, 2)
    assert label(photos, tmp_path / "e", refused) == (5, 3)


# --- answers that cannot be used ----------------------------------------------------------------------------------

UNUSABLE = {
    "chat": (chatting, "It looks like a lake"),
    "class outside the set": (saying(element="sky"), "sky"),
    "refusal": (refusing, "refusal: I cannot help"),
    "refusal part": (message(content=[{"type": "refusal", "refusal": "no, I won't"}]), "refusal: no, I won't"),
    "filter": (filtered, "refusal"),
    "tool call only": (message(content=None, tool_calls=[{"id": "1"}]), "a tool call instead of an answer"),
    "content null": (message(content=None), "not JSON"),
    "content missing": (changed(lambda body: body["choices"][0]["message"].pop("content")), "not JSON"),
    "content a number": (message(content=7), "must be an object"),
    "cut": (truncated, "cut at the length limit (--max_tokens)"),
    "half a character": (message(content="\ud83d"), "not JSON"),
    "thought without an end": (message(content=lambda text: f"<think>I wonder {text}"), "thought without an answer"),
    "two answers": (message(content=lambda text: f"{text}\nor {text}"), "2 JSON objects"),
}


@pytest.mark.parametrize(("behaviour", "quoted"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_teacher_that_never_answers_usably_is_stopped_and_not_paid_twice(
    behaviour: Behaviour, quoted: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five pictures, each asked about once more; the last answer is quoted, and confidence is not blamed."""
    assert label(photos, tmp_path / "d", behaviour, "--trial", "0") == (5, 5 * 2)
    error = capsys.readouterr().err
    assert "the first 5 images got no usable answer" in error and quoted in error and "confidence" not in error
    assert len(lines(tmp_path / "d" / "ledger.jsonl")) == 10
    quarantine = lines(tmp_path / "d" / "quarantine.jsonl")
    assert len(quarantine) == 5 and all(len(row["answers"]) == 2 for row in quarantine)
    assert label(photos, tmp_path / "d", well, "--trial", "0") == (5, 0)
    assert quoted in capsys.readouterr().err
    assert label(photos, tmp_path / "d", well, "--trial", "0", "--max_unusable", "0") == (0, PICTURES - 5)
    assert label(photos, tmp_path / "d", well, "--trial", "0", "--ask_again") == (0, 5 + 3)


@pytest.mark.parametrize("behaviour", [chatting, slow(0.1)], ids=["useless", "well"])
def test_many_at_a_time_pay_no_more_until_one_is_usable(behaviour: Behaviour, photos: Path, tmp_path: Path) -> None:
    """With all eight in flight, a teacher that never answers usably would be paid for eight."""
    found = label(photos, tmp_path / "d", behaviour, "--trial", "0", "--concurrency", "8")
    assert found == ((5, 10) if behaviour is chatting else (0, PICTURES))


@pytest.mark.parametrize(("behaviour", "quoted"), UNUSABLE.values(), ids=UNUSABLE)
def test_one_unusable_answer_costs_nothing_else(
    behaviour: Behaviour, quoted: str, photos: Path, tmp_path: Path
) -> None:
    """Even where it is the first picture, and the second answer is no better."""
    assert label(photos, tmp_path / "d", in_order(behaviour, behaviour), "--trial", "0") == (0, PICTURES + 1)
    assert len(read_rows(tmp_path / "d")) == PICTURES - 1
    [row] = lines(tmp_path / "d" / "quarantine.jsonl")
    assert quoted in row["problem"]


def test_the_message_of_nothing_kept_names_the_reason(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(photos, tmp_path / "d", saying(confidence=0.5))[0] == 3
    error = capsys.readouterr().err
    assert "8 got a confidence below --min_confidence 0.75 (the highest: 0.50)" in error and "usable" not in error
    few = tmp_path / "few"
    few.mkdir()
    (few / "one.png").write_bytes((photos / "sea0.png").read_bytes())
    assert label(few, tmp_path / "e", chatting) == (3, 2)
    error = capsys.readouterr().err
    assert "1 got no usable answer" in error and "It looks like a lake" in error and "confidence" not in error
    assert len(lines(tmp_path / "e" / "quarantine.jsonl")) == 1


# --- odd forms of good answers ------------------------------------------------------------------------------------

ODD = {
    "parts": message(content=lambda text: [{"type": "text", "text": text[:40]}, {"type": "text", "text": text[40:]}]),
    "part as text": message(content=lambda text: [text]),
    "thinking part": message(content=lambda text: [{"type": "thinking", "text": "{}"}, {"type": "text", "text": text}]),
    "an object": message(content=json.loads),
    "usage null": usage(None),
    "usage text": usage("812 tokens"),
    "usage missing": changed(lambda body: body.pop("usage")),
    "usage null inside": usage({"prompt_tokens": None, "completion_tokens": "many"}),
    "usage negative": usage({"prompt_tokens": -1, "completion_tokens": 1e300}),
    "numbers as texts": usage({"prompt_tokens": "812", "completion_tokens": "97"}),
    "extra fields": changed(lambda body: body.update(x_extra={"a": [1]}, error=None)),
    "model a number": changed(lambda body: body.update(model=7, id=None)),
    "finish reason odd": changed(lambda body: body["choices"][0].update(finish_reason={"a": 1})),
    "byte order mark": lambda request: raw(b"\xef\xbb\xbf" + well(request).content)(request),
    "compressed": compressed,
    "fenced": fenced,
    "prose around": message(content=lambda text: f"Sure {{here}} it is:\n```json\n{text}\n```\nAnything else?"),
    "thought before": message(content=lambda text: f'<think>{{"element": "fire"}}?</think>\n{text}'),
    "thought without beginning": message(content=lambda text: f"hm, well</think>{text}"),
}


@pytest.mark.parametrize("behaviour", ODD.values(), ids=ODD)
def test_an_odd_form_of_a_good_answer_is_taken(behaviour: Behaviour, photos: Path, tmp_path: Path) -> None:
    more = ("--num_images", "4", "--usd_per_million_input", "1", "--usd_per_million_output", "1")
    assert label(photos, tmp_path / "d", behaviour, *more) == (0, 4)
    assert [row.label for row in read_rows(tmp_path / "d")] == ["water"] * 4
    assert label(photos, tmp_path / "d", well, *more) == (0, 0)
    assert all(entry["usd"] > 0 for entry in lines(tmp_path / "d" / "ledger.jsonl")), "no count is not free"


def test_a_filter_that_is_an_error_status_costs_nothing(photos: Path, tmp_path: Path) -> None:
    prices = ("--usd_per_million_input", "10", "--usd_per_million_output", "10", "--trial", "0")
    assert label(photos, tmp_path / "d", in_order(filtered, filtered), *prices) == (0, PICTURES + 1)
    assert [row["usd"] for row in lines(tmp_path / "d" / "ledger.jsonl")[:2]] == [0, 0]


def test_answers_without_counts_keep_to_the_budget(photos: Path, tmp_path: Path) -> None:
    """Each is taken to have cost the most that a request can."""
    prices = ("--usd_per_million_input", "0", "--usd_per_million_output", "1000", "--max_tokens", "100")
    assert label(photos, tmp_path / "d", usage(None), *prices, "--budget_usd", "0.35") == (5, 3)
    assert [entry["usd"] for entry in lines(tmp_path / "d" / "ledger.jsonl")] == pytest.approx([0.1] * 3)


# --- the ledger ---------------------------------------------------------------------------------------------------


def test_a_bad_line_of_the_ledger_is_named_and_the_run_goes_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(photos, tmp_path / "d", well) == (0, PICTURES)
    ledger = tmp_path / "d" / "ledger.jsonl"
    whole = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([*whole[:2], '{"image": 1}\n', *whole[3:]]))
    assert label(photos, tmp_path / "d", well) == (0, 1), "what stood in the third line is asked again"
    assert f"{ledger}, line 3: " in capsys.readouterr().err
    assert '{"image": 1}\n' in ledger.read_text()
    assert len(read_object(tmp_path / "d" / "label.json")["teacher"]["bad_ledger_lines"]) == 1


def test_what_earlier_versions_stored_is_read_as_what_it_is(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of parts is its text; an error page is no answer; nothing has an address or a limit."""
    assert label(photos, tmp_path / "d", well) == (0, PICTURES)
    ledger = tmp_path / "d" / "ledger.jsonl"
    rows = [{**row} for row in lines(ledger)]
    for row in rows:
        del row["address"], row["max_tokens"]
    rows[0]["text"] = [{"type": "text", "text": rows[0]["text"]}]
    rows[1] |= {"text": "", "problem": "the service's response is not JSON: Expecting value"}
    rows[2] |= {"text": rows[2]["text"][:50], "finish_reason": "length"}
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert label(photos, tmp_path / "d", well) == (0, 2), "the page, and what was cut at nobody knows which limit"
    error = capsys.readouterr().err
    assert "1 error pages" in error and "line " not in error
    assert len(read_rows(tmp_path / "d")) == PICTURES
    assert label(photos, tmp_path / "d", well) == (0, 0)


def test_a_cut_answer_is_asked_again_at_a_higher_limit_only(photos: Path, tmp_path: Path) -> None:
    more = ("--trial", "0", "--num_images", "3", "--max_unusable", "0")
    assert label(photos, tmp_path / "d", in_order(truncated, truncated), *more, "--max_tokens", "100") == (0, 2 + 3)
    assert {row["max_tokens"] for row in lines(tmp_path / "d" / "ledger.jsonl")} == {100}
    for limit, requests in (("100", 0), ("50", 0), ("200", 1), ("200", 0)):
        before = len(lines(tmp_path / "d" / "ledger.jsonl"))
        assert label(photos, tmp_path / "d", well, *more, "--max_tokens", limit)[0] == 0
        assert len(lines(tmp_path / "d" / "ledger.jsonl")) - before == requests, limit


def test_another_address_is_warned_about_and_asked_on_request(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's name is the key: its answers count wherever they were given."""
    assert label(photos, tmp_path / "d", well) == (0, PICTURES)
    first = lines(tmp_path / "d" / "ledger.jsonl")[0]["address"]
    assert "answers of gpt-4o" not in capsys.readouterr().err
    assert label(photos, tmp_path / "d", well) == (0, 0)
    error = capsys.readouterr().err
    assert f"8 answers of gpt-4o are of {first}" in error and "--ask_again" in error
    assert label(photos, tmp_path / "d", saying(reason="anew"), "--ask_again") == (0, PICTURES)
    assert {row.reason for row in read_rows(tmp_path / "d")} == {"anew"}


class Killed(BaseException):
    """As if the process ended here."""


def first_chats() -> Behaviour:
    return in_order(chatting)


@pytest.mark.parametrize("made", [lambda: well, first_chats], ids=["well", "first useless"])
@pytest.mark.parametrize("stored", [False, True], ids=["before the line", "behind it"])
def test_killed_at_any_request_nothing_is_paid_twice_or_lost(
    made: Callable[[], Behaviour], stored: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind its line an answer is never asked for again; before, only the one on its way is."""
    assert label(photos, tmp_path / "whole", well)[0] == 0
    add = AnswerLedger.add
    for at in range(1, PICTURES + 1):
        out, behaviour, count = tmp_path / str(at), made(), 0

        def dying(ledger: AnswerLedger, entry: LedgerEntry, at: int = at) -> None:
            nonlocal count
            count += 1
            if count < at or stored:
                add(ledger, entry)
            if count == at:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(AnswerLedger, "add", dying)
            with pytest.raises(Killed):
                label(photos, out, behaviour)
        assert not (out / "labels.jsonl").exists()
        answered = lines(out / "ledger.jsonl")
        assert len(answered) == at - (not stored)
        useless = sum("lake" in row["text"] for row in answered)
        code, requests = label(photos, out, behaviour)
        assert (code, requests) == (0, PICTURES - len(answered) + useless)
        assert (out / "labels.jsonl").read_bytes() == (tmp_path / "whole" / "labels.jsonl").read_bytes()


def test_cut_anywhere_the_ledger_loses_at_most_its_last_line(photos: Path, tmp_path: Path) -> None:
    """As a kill in the middle of a write leaves it."""
    assert label(photos, tmp_path / "d", well) == (0, PICTURES)
    ledger = tmp_path / "d" / "ledger.jsonl"
    whole = ledger.read_bytes()
    table = (tmp_path / "d" / "labels.jsonl").read_bytes()
    for cut in range(0, len(whole) + 1, len(whole) // 12):
        ledger.write_bytes(whole[:cut])
        assert label(photos, tmp_path / "d", well) == (0, PICTURES - whole[:cut].count(b"\n"))
        assert (tmp_path / "d" / "labels.jsonl").read_bytes() == table


# --- the trial ----------------------------------------------------------------------------------------------------


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: str | None) -> list[str]:
    """Somebody who answers so (None: Ctrl-D); the questions asked."""
    asked: list[str] = []

    def reply(question: str) -> str:
        asked.append(question)
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", reply)
    return asked


PRICES = ("--usd_per_million_input", "10", "--usd_per_million_output", "10")


def test_a_script_sees_the_trial_and_goes_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("a script was asked"))
    behaviour = in_order(well, chatting, chatting)
    assert label(photos, tmp_path / "d", behaviour, *PRICES) == (0, PICTURES + 1)
    shown = capsys.readouterr().out.splitlines()
    start = shown.index("trial: 3 images")
    rows = lines(tmp_path / "d" / "ledger.jsonl")
    first, second = rows[0], rows[1]
    tokens = f"{first['input_tokens']} + {first['output_tokens']} tokens, ${first['usd']:.4f}"
    assert shown[start + 1].split("  ")[1] == first["image_id"] and "water 1.00" in shown[start + 1]
    assert tokens in shown[start + 1]
    assert second["image_id"] in shown[start + 2] and "no label: not JSON" in shown[start + 2]
    usd = sum(row["usd"] for row in rows[:4]) / 3 * 5
    assert shown[start + 4] == f"the rest: about 5 images, ${usd:.2f} at this price (--budget_usd 10.00)"


@pytest.mark.parametrize("answer", ["n", "", None, "no"])
def test_at_a_terminal_no_stops_and_nothing_is_paid_twice(
    answer: str | None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = at_a_terminal(monkeypatch, answer)
    assert label(photos, tmp_path / "d", well) == (130, 3)
    error = capsys.readouterr().err
    assert len(asked) == 1 and "the same command goes on" in error and "3 of 1000 rows kept" in error
    at_a_terminal(monkeypatch, "y")
    assert label(photos, tmp_path / "d", well) == (0, PICTURES - 3)
    again = at_a_terminal(monkeypatch, "n")
    assert label(photos, tmp_path / "d", well) == (0, 0)
    assert not again, "a run that went past the trial needs no other"


@pytest.mark.parametrize("more", [("--yes",), ("--trial", "0"), ("--num_images", "3")])
def test_no_question_where_it_is_answered_or_decides_nothing(
    more: tuple[str, ...], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked"))
    at_a_terminal(monkeypatch, "n").append("unused")
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked"))
    assert label(photos, tmp_path / "d", well, *more)[0] == 0


def test_a_recipe_asks_nobody(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = at_a_terminal(monkeypatch, "n")
    recipe = tmp_path / "r.yaml"
    with LoopbackTeacher() as server:
        options = f"images: {photos}, base_url: {server.url}, requests_per_minute: 60000, output_dir: {tmp_path / 'd'}"
        recipe.write_text(f"stages:\n  - {{command: label, {options}}}\n")
        assert main(["run", str(recipe), "-o", str(tmp_path / "run")]) == 0
        assert len(server.requests) == PICTURES and not asked


def test_the_trial_of_a_teacher_that_answers_nothing_usable_is_shown(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(photos, tmp_path / "d", chatting) == (5, 10)
    assert capsys.readouterr().out.count("no label: not JSON") == 3


def test_a_bare_run_has_a_budget(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.labels.teacher.questions.DEFAULT_BUDGET", 0.25)
    prices = ("--usd_per_million_input", "0", "--usd_per_million_output", "1000", "--max_tokens", "100")
    assert label(photos, tmp_path / "d", usage(None), *prices)[0] == 5
    shown = capsys.readouterr()
    assert "budget of $0.25 (--budget_usd)" in shown.err and "budget: $0.25, the default" in shown.out
    monkeypatch.undo()
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert main(["label", str(photos), "-o", str(tmp_path / "e"), "--dry_run"]) == 0
    assert "for at most $10.00 (--budget_usd)" in capsys.readouterr().out


# --- keys in addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [f"http://127.0.0.1:9/v1?key={SECRET}", f"http://me:{SECRET}@127.0.0.1:9/v1"])
@pytest.mark.parametrize("by", ["flag", "file", "recipe", "set", "variable", "recipe's variable", "dry run"])
def test_a_key_in_an_address_lands_nowhere(
    address: str,
    by: str,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before anything is written: not in a file, the output, a log or a traceback."""
    monkeypatch.setenv("RANKWISE_DEBUG", "1")
    out, given = tmp_path / "out", tmp_path / "given"
    given.mkdir()
    plain = ["label", str(photos), "-o", str(out)]
    command = {
        "flag": [*plain, "--base_url", address],
        "dry run": [*plain, "--base_url", address, "--dry_run"],
        "file": ["label", str(given / "c.yaml"), str(photos), "-o", str(out)],
        "recipe": ["run", str(given / "r.yaml"), "-o", str(out)],
        "set": ["run", str(given / "s.yaml"), "-o", str(out), "--set", f"label.base_url={address}"],
        "recipe's variable": ["run", str(given / "v.yaml"), "-o", str(out)],
        "variable": plain,
    }[by]
    stage = f"stages:\n  - command: label\n    images: {photos}\n"
    (given / "c.yaml").write_text(f"base_url: {address}\n")
    (given / "r.yaml").write_text(f"{stage}    base_url: {address}\n")
    (given / "s.yaml").write_text(stage)
    (given / "v.yaml").write_text(f"variables:\n  URL: none\n{stage}    base_url: ${{URL}}\n")
    if by == "variable":
        monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.setenv("URL", address)
    assert main(command) == 2
    shown = capfd.readouterr()
    assert "no user, password or query" in shown.err
    assert SECRET not in shown.out + shown.err + caplog.text
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert not (out / "ledger.jsonl").exists()


@pytest.mark.parametrize("command", ["validate", "bundle"])
def test_a_key_in_the_address_of_a_server_is_refused_too(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWISE_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    assert main([command, "--server", f"http://127.0.0.1:9?key={SECRET}"]) == 2
    shown = capfd.readouterr()
    assert "no user, password or query" in shown.err and SECRET not in shown.out + shown.err
    assert not list(tmp_path.iterdir())


def test_the_address_of_the_environment_is_recorded_and_has_no_list_prices(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackTeacher() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert main(["label", str(photos), "-o", str(tmp_path / "d"), "--num_images", "1", "--image_size", "32"]) == 0
        summary = read_object(tmp_path / "d" / "label.json")
        assert summary["teacher"]["service"] == server.url and summary["cost"]["usd"] is None
        assert lines(tmp_path / "d" / "ledger.jsonl")[0]["address"] == server.url
