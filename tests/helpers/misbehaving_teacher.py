"""Answers of a teacher that misbehaves on order, for the loopback server of the package.

with LoopbackTeacher(in_order(too_many(), well)) as server: …      # first 429, then a good answer
with LoopbackTeacher(always(refusing)) as server: …
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from typing import Any

from rankwise.labels.teacher.loopback import Response, completion, label_by_colours

Behaviour = Callable[[dict[str, Any]], Response]
well: Behaviour = label_by_colours


def in_order(*behaviours: Behaviour, then: Behaviour = well) -> Behaviour:
    """The n-th request gets the n-th behaviour; those after the last get `then`."""
    rest, lock = iter(behaviours), threading.Lock()

    def respond(request: dict[str, Any]) -> Response:
        with lock:
            behaviour = next(rest, then)
        return behaviour(request)

    return respond


def failing(status: int, message: str = "on order", code: str | None = None, **headers: str) -> Behaviour:
    """An error status with OpenAI's error body; header names with `_` for `-`."""
    body = json.dumps({"error": {"message": message, "type": "on_order", "code": code}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: Response(status, body, named)


def too_many(retry_after: str | None = None) -> Behaviour:
    return failing(429, "slow down", **({"Retry_After": retry_after} if retry_after else {}))


def slow(seconds: float) -> Behaviour:
    """A good answer, late."""
    return lambda request: Response(200, well(request).content, delay=seconds)


def hanging_up(request: dict[str, Any]) -> Response:
    """A good answer whose connection ends in its middle."""
    return Response(200, well(request).content, cut=120)


def garbled(request: dict[str, Any]) -> Response:
    """A complete response whose body is no JSON."""
    return Response(200, b'{"choices": [')


def web_page(request: dict[str, Any]) -> Response:
    """What a proxy says instead of the service."""
    return Response(200, b"<html>hello</html>", {"Content-Type": "text/html"})


def chatting(request: dict[str, Any]) -> Response:
    return completion("It looks like a lake to me!", request)


def truncated(request: dict[str, Any]) -> Response:
    """An answer cut at the length limit."""
    text = answer_of(well(request))
    return completion(text[: len(text) // 2], request, finish_reason="length")


def refusing(request: dict[str, Any]) -> Response:
    return completion("", request, refusal="I cannot help with this image.")


def filtered(request: dict[str, Any]) -> Response:
    """The service's filter instead of an answer, as an error status."""
    return failing(400, "the image was filtered", code="content_filter")(request)


def saying(**content: Any) -> Behaviour:
    """A good answer with some of its values replaced."""
    return lambda request: completion(json.dumps({**json.loads(answer_of(well(request))), **content}), request)


def fenced(request: dict[str, Any]) -> Response:
    return completion(f"```json\n{answer_of(well(request))}\n```", request)


def answer_of(response: Response) -> str:
    """The text of a chat completion."""
    return str(json.loads(response.content)["choices"][0]["message"]["content"])


# --- outages with status 200, and answers in odd forms ------------------------------------------------------------


def raw(content: bytes, **headers: str) -> Behaviour:
    """A response with status 200 and this body; header names with `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: Response(200, content, named)


def error_inside(message: str, code: Any = None) -> Behaviour:
    """An error that comes with status 200, as proxies send it."""
    return raw(json.dumps({"error": {"message": message, "code": code}}).encode())


def changed(change: Callable[[dict[str, Any]], Any]) -> Behaviour:
    """A good response whose JSON was changed in place."""

    def respond(request: dict[str, Any]) -> Response:
        body = json.loads(well(request).content)
        change(body)
        return Response(200, json.dumps(body).encode())

    return respond


def message(**fields: Any) -> Behaviour:
    """A good response with other fields in its message; a callable makes its value of the good text."""

    def change(body: dict[str, Any]) -> None:
        inside = body["choices"][0]["message"]
        text = inside["content"]
        inside |= {name: value(text) if callable(value) else value for name, value in fields.items()}

    return changed(change)


def without_choices(value: Any) -> Behaviour:
    return changed(lambda body: body.update(choices=value))


def usage(value: Any) -> Behaviour:
    return changed(lambda body: body.update(usage=value))


def streamed(request: dict[str, Any]) -> Response:
    """A stream of events that nobody asked for."""
    text = b'data: {"choices": [{"delta": {"content": "{"}}]}\n\ndata: [DONE]\n\n'
    return Response(200, text, {"Content-Type": "text/event-stream"})


def bomb(request: dict[str, Any]) -> Response:
    """64 MiB of spaces, compressed to 64 KiB."""
    return Response(200, BOMB, {"Content-Encoding": "gzip"})


def compressed(request: dict[str, Any]) -> Response:
    return Response(200, gzip.compress(well(request).content), {"Content-Encoding": "gzip"})


def redirecting(url: str, status: int = 307) -> Behaviour:
    return lambda request: Response(status, b"", {"Location": f"{url}/chat/completions"})


BOMB = gzip.compress(b" " * 2**26, 1)
