"""One question to a service that speaks the OpenAI protocol, asked with bounded patience.

    slot (at most `concurrency`) ──▶ budget ──▶ rate (requests per minute) ──▶ request ──▶ Reply
                                                  ▲ the SDK's retries: 408, 409, 429, 5xx, timeouts; Retry-After

async with Teacher(settings, spending) as teacher:
    reply = await teacher.ask(messages, response_format)

Whatever makes every further request pointless (a wrong key, no quota, an unknown model) is a ServiceError; what only
this request ran into, after all retries or because of its image, is Unanswered. Nothing but an answer of the teacher
comes back as a Reply: what came with status 200 and is no answer gets the status that it should have had
(`judge_response`), so that it is waited out and asked again like any other outage.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from rankwise.errors import ServiceError, UsageError, need
from rankwise.labels.teacher.answers import FILTERED, NO_QUOTA, NoAnswer, Reply, read
from rankwise.labels.teacher.ledger import Spending
from rankwise.options.field import check_address
from rankwise.options.label import TeacherSection

KEY_VARIABLE, ADDRESS_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
OFFICIAL = "https://api.openai.com/v1"
HERE = ("127.0.0.1", "localhost", "::1")
OF_THE_PICTURE = (400, 413, 415, 422)  # error statuses that another picture may not get
LONGEST = 500  # characters of a service's own words in a message
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


def http_client(openai: ModuleType, before_retry: Callable[[Attempts], Awaitable[None]], address: str) -> Any:
    """The SDK's HTTP client. before_retry: awaited before every attempt but the first. Redirects are not followed: the
    key and the picture are for the address that was given."""
    given = urlsplit(address)

    class Client(openai.DefaultAsyncHttpxClient):  # type: ignore[name-defined]
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            attempts = attempts_of.get()
            if request.headers.get("x-stainless-retry-count", "0") != "0":
                await before_retry(attempts)

            async def trace(event: str, info: Mapping[str, Any]) -> None:
                attempts.open = attempts.open or event.endswith("send_request_body.complete")

            attempts.fault = None
            request.extensions["trace"] = trace
            return await judge_response(await super().send(request, stream=True, **options), attempts)

    return Client(
        trust_env=given.hostname not in HERE,
        follow_redirects=False,
        verify=given.scheme != "http",  # which shows no certificate: reading authorities takes longer than a request
    )


async def judge_response(response: Any, attempts: Attempts) -> Any:
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


class Unanswered(Exception):
    """A question that got no answer, after all retries; another one may still get its answer."""


class TeacherStopped(Exception):
    """A question that was not sent, because the work is being stopped."""


def address_of(base_url: str | None) -> str:
    """Where the teacher is: the given address, else $OPENAI_BASE_URL, else OpenAI. UsageError where that variable holds
    a password or a query: the address is recorded and printed."""
    given = base_url or check_address(os.environ.get(ADDRESS_VARIABLE) or OFFICIAL, ADDRESS_VARIABLE)
    return given.rstrip("/")


class Teacher:
    """A client with one bound on requests in flight and one on requests per minute, retries included.

    Of its settings: the key is never shown or saved, and scrubbed from messages. timeout: seconds for one attempt to
    connect, and between two pieces of its answer. max_retries: attempts after the first, each after a wait that doubles
    from half a second to eight, or that the service names in Retry-After (up to two minutes).
    """

    def __init__(self, settings: TeacherSection, spending: Spending) -> None:
        limiter = need("aiolimiter", extra="label").AsyncLimiter
        self.settings, self.spending = settings, spending
        self._stopped: Exception | None = None
        self._openai = need("openai", extra="label")
        self._slots = asyncio.Semaphore(settings.concurrency)
        # A bucket of one: evenly spaced. A bucket of n would let 2 n - 1 pass in the first minute.
        self._rate = limiter(1, 60 / settings.requests_per_minute)
        self._client = self._connect()

    def _connect(self) -> Any:
        key, address = self.settings.openai_api_key or os.environ.get(KEY_VARIABLE), address_of(self.settings.base_url)
        if not key and address == OFFICIAL:
            raise UsageError(f"the teacher needs a key: set {KEY_VARIABLE}, or name another service with --base_url")
        return self._openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=address,
            timeout=self.settings.timeout,
            max_retries=self.settings.max_retries,
            http_client=http_client(self._openai, self._before_retry, address),
        )

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, Any]], response_format: Mapping[str, Any] | None) -> Reply:
        """One answer. Raises Unanswered, ServiceError, BudgetReached, or TeacherStopped where it was not sent."""
        async with self._slots:
            self._raise_if_stopped()
            try:
                await self.spending.admit()
                try:
                    await self._rate.acquire()
                    self._raise_if_stopped()
                    return await self._answered(self._request(messages, response_format))
                finally:
                    self.spending.release()
            except ServiceError as error:
                self.stop(error)
                raise

    def stop(self, reason: Exception) -> None:
        """Stop sending: every new or waiting request fails with the (first) reason."""
        self._stopped = self._stopped or reason

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise self._stopped

    def _request(self, messages: Sequence[Mapping[str, Any]], form: Mapping[str, Any] | None) -> dict[str, Any]:
        # OpenAI's reasoning models take the new name only, most other servers the old one only.
        official = self._client.base_url.host == urlsplit(OFFICIAL).hostname
        limit = "max_completion_tokens" if official else "max_tokens"
        request = {"model": self.settings.teacher_model, "messages": list(messages), limit: self.settings.max_tokens}
        more = {"response_format": form, "temperature": self.settings.temperature}
        return request | {name: value for name, value in more.items() if value is not None}

    async def _answered(self, request: dict[str, Any]) -> Reply:
        attempts, answered = Attempts(), False
        attempts_of.set(attempts)
        try:
            async with asyncio.timeout(self.settings.max_wait):
                response = await self._client.chat.completions.with_raw_response.create(**request)
            answered = True
            return read(response.content)
        except TimeoutError as error:
            raise Unanswered(f"no answer within {self.settings.max_wait:g} s, retries included") from error
        except self._openai.APIStatusError as error:
            return self._refused(error, attempts.fault)
        except self._openai.APIError as error:
            cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
            raise Unanswered(self.scrubbed(f"{error.message}{cause}")[:LONGEST]) from error
        finally:
            self.spending.may_be_charged += attempts.open and not answered

    def _refused(self, error: Any, fault: str | None) -> Reply:
        """What an error status means: a refused picture, a service in trouble, or one that will never answer."""
        status = error.status_code
        said = self.scrubbed(str(error.message)).removeprefix(f"Error code: {status} - ")[:LONGEST]
        if error.code in FILTERED:
            return Reply("", said, "content_filter", input_tokens=0, output_tokens=0)
        if status == 401:
            raise ServiceError(f"the teacher does not accept the key (401: {said}); check {KEY_VARIABLE}") from None
        if error.code in NO_QUOTA:
            raise ServiceError(f"the account has no quota left ({status}: {said})") from None
        if status in (408, 409, 429) or status >= 500:
            what = f"{self.scrubbed(fault)}, with status 200" if fault else f"{status}: {said}"
            raise Unanswered(f"the service kept answering {what}") from None
        if status in OF_THE_PICTURE:
            raise Unanswered(f"the teacher refuses the request ({status}: {said})") from None
        if status < 400:
            raise ServiceError(f"the teacher's address redirects ({status}, not followed); correct --base_url")
        raise ServiceError(f"the teacher refuses the request ({status}: {said})") from None

    async def _before_retry(self, attempts: Attempts) -> None:
        """The SDK's retries count as requests, and wait for the rate like any other."""
        self.spending.may_be_charged += attempts.open
        attempts.open = False
        self._raise_if_stopped()
        await self._rate.acquire()

    def scrubbed(self, text: str) -> str:
        """A message without the key, should the service repeat it."""
        key = self._client.api_key
        return text.replace(key, "***") if key and key != "none" else text
