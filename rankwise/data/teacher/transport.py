"""The way to a service, bounded: whole responses up to a size, and a success only where there is an answer.

    request ──▶ rate ──▶ HTTP client of the SDK ──▶ whole body, at most LARGEST ──┬─▶ answer
                  ▲                                                               └─▶ status 4xx, 5xx
                  └──────────── the SDK's retries: 408, 409, 429, 5xx, timeouts ──────────┘

What came with status 200 and is no answer gets the status that it should have had, so that it is waited out and asked
again like any other outage.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from rankwise.data.teacher.reply import NO_QUOTA, NoAnswer, read

LARGEST = 8 * 2**20  # bytes of one response, decompressed; an answer has a few thousand
NOT_THE_BODY_S = ("content-encoding", "content-length", "transfer-encoding")
KEPT = ("retry-after",)  # of the headers of what is no answer


@dataclass
class Attempts:
    """The attempts of one question. open: the last one has reached the service, and has no error status yet. fault:
    what it got in place of an answer, with status 200."""

    open: bool = False
    fault: str | None = None


attempts_of: ContextVar[Attempts] = ContextVar("attempts_of")


def http_client(openai: ModuleType, before_retry: Callable[[Attempts], Awaitable[None]], trust_env: bool) -> Any:
    """The SDK's HTTP client. before_retry: awaited before every attempt but the first. Redirects are not followed: the
    key and the picture are for the address that was given."""

    class Client(openai.DefaultAsyncHttpxClient):  # type: ignore[name-defined]
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            attempts = attempts_of.get()
            if request.headers.get("x-stainless-retry-count", "0") != "0":
                await before_retry(attempts)

            async def trace(event: str, info: Mapping[str, Any]) -> None:
                attempts.open = attempts.open or event.endswith("send_request_body.complete")

            attempts.fault = None
            request.extensions["trace"] = trace
            return await judged(await super().send(request, stream=True, **options), attempts)

    return Client(trust_env=trust_env, follow_redirects=False)


async def judged(response: Any, attempts: Attempts) -> Any:
    """The whole response, or the error that it is. An error status costs nothing; no retry helps an empty account."""
    content, status, headers = b"", response.status_code, dict[str, str]()
    try:
        content = await body_of(response)
        if response.is_success:
            read(content)
        else:
            attempts.open = False
        headers = {name: value for name, value in response.headers.items() if name not in NOT_THE_BODY_S}
    except NoAnswer as fault:
        attempts.fault = str(fault)
        attempts.open = attempts.open and fault.code is None  # an error with a name of its own was not charged
        status = fault.status if response.is_success else status
        content = json.dumps({"error": {"message": str(fault), "code": fault.code}}).encode()
        headers = {name: response.headers[name] for name in KEPT if name in response.headers}
    if status == 429 and any(code.encode() in content for code in NO_QUOTA):
        headers["x-should-retry"] = "false"
    return type(response)(status, headers=headers, content=content, request=response.request)


async def body_of(response: Any) -> bytes:
    """The whole body, decompressed. Raises NoAnswer where it is too large."""
    body = bytearray()
    try:
        async for part in response.aiter_bytes():
            body += part
            if len(body) > LARGEST:
                raise NoAnswer(f"more than {LARGEST:,} bytes")
    finally:
        await response.aclose()
    return bytes(body)
