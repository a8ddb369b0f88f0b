"""JSON over HTTP with a llama.cpp server: no proxy, few retries, and errors that say which server and what it said.

    Talk("http://192.168.1.20:8080").get("/props")            # a mapping, or ServiceError
    Talk(url).post("/tokenize", {"content": "a word"})

Proxy variables are not honoured: the server is this machine or a device beside it. Redirects are not followed.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rankwise.errors import ServiceError, UsageError

LOADING = 503  # what a llama.cpp server answers until its model is loaded
PAUSES = (0.2, 0.5, 1.0)  # seconds between the tries of a request that did not get through
EXAMPLE = "http://192.168.1.20:8080"
LONGEST = 300  # characters of a server's own words in a message


class Refusal(ServiceError):
    """The server understood a request and answered with an error; `kind` is its own name for it."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Talk:
    """Requests to one server.

    url: http or https, host and port; a path in front of the API is kept. timeout: seconds for one answer. patience:
    seconds to wait for a server that is still loading its model. key: sent as bearer token, shown nowhere. lost: asked
    when a request did not get through; it raises where it knows why no other will.
    """

    url: str
    timeout: float = 120.0
    patience: float = 60.0
    key: str | None = field(default=None, repr=False)
    lost: Callable[[], None] = field(default=lambda: None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _address(self.url))

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path; ServiceError where there is none."""
        return self._answer("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object answered to a JSON body; Refusal for what the server did not take."""
        return self._answer("POST", path, json.dumps(body).encode())

    def _answer(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        started = time.monotonic()
        while True:
            status, content = self._tried(method, path, body)
            if status != LOADING:
                return self._read(path, status, content)
            if time.monotonic() - started > self.patience:
                raise ServiceError(f"{self.url} is still loading its model after {self.patience:g} s")
            time.sleep(PAUSES[1])

    def _tried(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and content; what did not get through is tried again, what takes too long is not."""
        for pause in (*PAUSES, None):
            try:
                return self._once(method, path, body)
            except TimeoutError as error:
                raise ServiceError(f"{self.url}{path} did not answer within {self.timeout:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                self.lost()
                if pause is None:
                    reason = str(error) or type(error).__name__
                    raise ServiceError(
                        f"{self.url} cannot be reached: {reason}; is a llama.cpp server running there, and is the "
                        "port open to this machine?"
                    ) from error
                time.sleep(pause)
        raise AssertionError

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        assert parts.hostname
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            connection.request(method, parts.path + path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _read(self, path: str, status: int, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServiceError(
                f"{self.url}{path} answers {status} without a JSON object: {_shown(content)!r}; "
                "is it a llama.cpp server?"
            )
        if not 200 <= status < 300 or found.get("error"):  # a proxy may send an error with status 200
            raise self._refusal(path, status, found.get("error"), content)
        return found

    def _refusal(self, path: str, status: int, error: Any, content: bytes) -> Refusal:
        named = error if isinstance(error, dict) else {}
        said = str(named.get("message") or _shown(content))[:LONGEST]
        if self.key:
            said = said.replace(self.key, "…")
        return Refusal(f"{self.url}{path} answers {status}: {said}", str(named.get("type", "")))


def _address(given: str) -> str:
    """Scheme, host, port and path of a server; UsageError, without what may be secret, for anything else."""
    try:
        parts = urlsplit(given if "://" in given else f"http://{given}")
        port = f":{parts.port}" if parts.port else ""
    except ValueError as error:
        raise UsageError(f"not the address of a server ({error}); give one like {EXAMPLE}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"not the address of a server: it has no host, or is not http; give one like {EXAMPLE}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(f"leave user, password and query out of the address of {parts.hostname}; like {EXAMPLE}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def _shown(content: bytes) -> str:
    return content[:LONGEST].decode(errors="replace")
