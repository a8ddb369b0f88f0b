"""One question to a service that speaks the OpenAI protocol, asked with patience that has bounds.

    slot (at most `concurrency`) ──▶ budget ──▶ rate (requests per minute) ──▶ request ──▶ Reply
                                                       ▲ retries of the SDK: 429, 5xx, timeouts, Retry-After

async with Teacher(settings, spending) as teacher:
    reply = await teacher.ask(messages, response_format)

Whatever makes every further request pointless (a wrong key, no quota, an unknown model) is a ServiceError; what only
this request ran into, after all retries, is Unanswered.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rankwise.data.teacher.ledger import Reply
from rankwise.data.teacher.price import Spending
from rankwise.errors import ServiceError, UsageError, need

KEY_VARIABLE = "OPENAI_API_KEY"
OFFICIAL = "api.openai.com"
HERE = ("127.0.0.1", "localhost", "::1")
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
FILTERED = ("content_policy_violation", "content_filter")


class Unanswered(Exception):
    """A question that stayed without an answer after all retries; another one may still get its answer."""


class TeacherStopped(Exception):
    """A question that was not sent, because the work is being stopped."""


@dataclass(frozen=True)
class TeacherSettings:
    """Who is asked, and how patiently.

    base_url: None for OpenAI itself (or $OPENAI_BASE_URL). api_key: never shown or saved; scrubbed from messages.
    timeout: seconds for one attempt to connect, and between two pieces of its answer. max_retries: attempts after the
    first, each after a wait that doubles from half a second to eight, or that the service names in Retry-After (up to
    two minutes). max_wait: seconds for one question, retries and waits included. max_tokens: longest answer.
    temperature: None for the service's own.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 5
    requests_per_minute: float = 60
    timeout: float = 60
    max_retries: int = 10  # about a minute of waits
    max_wait: float = 600
    max_tokens: int = 600
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests_per_minute", "timeout", "max_wait", "max_tokens"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name} must be above 0, got {getattr(self, name)}")
        if self.max_retries < 0:
            raise UsageError(f"--max_retries cannot be negative, got {self.max_retries}")


@dataclass
class Attempts:
    """The attempts of one question. open: the last one has reached the service, and has no status yet."""

    open: bool = False


_attempts: ContextVar[Attempts] = ContextVar("attempts")


class Teacher:
    """A client with one bound on requests in flight and one on requests per minute, retries included."""

    def __init__(self, settings: TeacherSettings, spending: Spending) -> None:
        limiter = need("aiolimiter", extra="label").AsyncLimiter
        self.settings, self.spending = settings, spending
        self._stopped: Exception | None = None
        self._openai = need("openai", extra="label")
        self._slots = asyncio.Semaphore(settings.concurrency)
        # A bucket of one: evenly spaced. A bucket of n would let 2 n - 1 pass in the first minute.
        self._rate = limiter(1, 60 / settings.requests_per_minute)
        self._client = self._connect()

    def _connect(self) -> Any:
        key = self.settings.api_key or os.environ.get(KEY_VARIABLE)
        if not key and not self.settings.base_url:
            raise UsageError(f"the teacher needs a key: set {KEY_VARIABLE}, or name another service with --base_url")
        hooks = {"request": [self._before_attempt], "response": [self._after_attempt]}
        on_this_machine = urlsplit(self.settings.base_url or "").hostname in HERE
        return self._openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=self.settings.base_url,
            timeout=self.settings.timeout,
            max_retries=self.settings.max_retries,
            http_client=self._openai.DefaultAsyncHttpxClient(event_hooks=hooks, trust_env=not on_this_machine),
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
            except ServiceError as error:
                self.stop(error)
                raise
            try:
                await self._rate.acquire()
                self._raise_if_stopped()
                return await self._answered(self._request(messages, response_format))
            except ServiceError as error:
                self.stop(error)
                raise
            finally:
                self.spending.release()

    def stop(self, reason: Exception) -> None:
        """From now on nothing is sent: whoever asks, or waits to, gets the (first) reason."""
        self._stopped = self._stopped or reason

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise self._stopped

    def _request(
        self, messages: Sequence[Mapping[str, Any]], response_format: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        # OpenAI's reasoning models take the new name only, most other servers the old one only.
        limit = "max_completion_tokens" if self._client.base_url.host == OFFICIAL else "max_tokens"
        request = {"model": self.settings.model, "messages": list(messages), limit: self.settings.max_tokens}
        if response_format is not None:
            request["response_format"] = response_format
        if self.settings.temperature is not None:
            request["temperature"] = self.settings.temperature
        return request

    async def _answered(self, request: dict[str, Any]) -> Reply:
        attempts, answered = Attempts(), False
        _attempts.set(attempts)
        try:
            async with asyncio.timeout(self.settings.max_wait):
                completion = await self._client.chat.completions.create(**request)
            reply = self._reply(completion)
            answered = not reply.problem  # the service may charge for what is no answer, and does not say how much
            return reply
        except json.JSONDecodeError as error:
            return Reply("", problem=f"the service's response is not JSON: {error.msg}")
        except TimeoutError as error:
            raise Unanswered(f"no answer within {self.settings.max_wait:g} s, retries included") from error
        except self._openai.APIStatusError as error:
            return self._refused(error)
        except self._openai.APIError as error:
            raise Unanswered(self.scrubbed(str(error.message))) from error
        finally:
            if attempts.open and not answered:
                self.spending.may_be_charged += 1

    def _reply(self, completion: Any) -> Reply:
        """A response as a Reply; one that is no chat completion is an answer that cannot be used."""
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            return Reply("", problem="the service's response is not a chat completion")
        usage, message = completion.usage, choices[0].message
        return Reply(
            text=message.content or "",
            refusal=message.refusal,
            finish_reason=choices[0].finish_reason,
            input_tokens=usage.prompt_tokens if usage else 0,
            output_tokens=usage.completion_tokens if usage else 0,
            served_by=completion.model,
        )

    def _refused(self, error: Any) -> Reply:
        """What an error status means: a refused picture, a service in trouble, or one that will never answer."""
        said = self.scrubbed(str(error.message))
        if error.code in FILTERED:
            return Reply("", refusal=said, finish_reason="content_filter")
        if error.status_code == 401:
            raise ServiceError(f"the teacher does not accept the key (401: {said}); check {KEY_VARIABLE}") from None
        if error.code in NO_QUOTA:
            raise ServiceError(f"the account has no quota left ({error.status_code}: {said})") from None
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            raise Unanswered(f"the service kept answering {error.status_code}: {said}") from None
        raise ServiceError(f"the teacher refuses the request ({error.status_code}: {said})") from None

    async def _before_attempt(self, request: Any) -> None:
        """Hook of the HTTP client: the SDK's retries count as requests, and wait for the rate like any other."""
        attempts = _attempts.get()
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            if attempts.open:
                self.spending.may_be_charged += 1
            attempts.open = False
            self._raise_if_stopped()
            await self._rate.acquire()

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            attempts.open = attempts.open or event.endswith("send_request_body.complete")

        request.extensions["trace"] = trace

    async def _after_attempt(self, response: Any) -> None:
        """Hook of the HTTP client: an error status costs nothing, and no retry helps against an empty account."""
        if response.status_code < 400:
            return
        _attempts.get().open = False
        if response.status_code == 429:
            await response.aread()
            if any(code.encode() in response.content for code in NO_QUOTA):
                response.headers["x-should-retry"] = "false"

    def scrubbed(self, text: str) -> str:
        """A message without the key, should the service repeat it."""
        key = self._client.api_key
        return text.replace(key, "***") if key and key != "none" else text
