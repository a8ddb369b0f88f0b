"""What a service sent back, read strictly: an answer of the teacher, or a fault on the way to it.

    body of a response ── read ──┬─▶ Reply        an answer, usable or not: it was paid for, and is stored
                                 └─▶ NoAnswer     an error page, a cut body, an error with status 200: asked again

Only a JSON object with a message in its first choice is an answer. What else the service adds is ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
FILTERED = ("content_policy_violation", "content_filter")
STATUS_OF = {"invalid_api_key": 401, "rate_limit_exceeded": 429}
STATUS_OF |= dict.fromkeys(NO_QUOTA, 429) | dict.fromkeys(FILTERED, 400)
BAD_GATEWAY = 502  # what an outage is taken for that comes with status 200 and names no status of its own
TEXT_PARTS = (None, "text", "output_text")
MOST_TOKENS = 10**9
SHOWN = 200  # characters of a response in a message


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
        raise NoAnswer(f"JSON that is no chat completion: {shown(body)}")
    text, refusal = text_of(message.get("content")), refusal_of(message)
    call = not text and not refusal and (message.get("tool_calls") or message.get("function_call"))
    usage = content.get("usage")
    return Reply(
        text,
        refusal,
        word(choice.get("finish_reason")),
        count(usage, "prompt_tokens", "input_tokens"),
        count(usage, "completion_tokens", "output_tokens"),
        word(content.get("model")),
        "a tool call instead of an answer" if call else None,
    )


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


def shown(body: bytes) -> str:
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
        raise NoAnswer(f"bytes that are no UTF-8: {shown(body)}") from None
    if not text:
        raise NoAnswer("an empty body")
    if text.startswith("<"):
        raise NoAnswer(f"a web page: {shown(body)}")
    if text.startswith(("data:", "event:", ":")):
        raise NoAnswer(f"a stream of events, which was not asked for: {shown(body)}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", str(error))
        raise NoAnswer(f"what is not JSON, or JSON that was cut ({said}): {shown(body)}") from None
    if not isinstance(content, dict):
        raise NoAnswer(f"JSON that is no chat completion: {shown(body)}")
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
