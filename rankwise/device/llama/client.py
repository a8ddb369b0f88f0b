"""Client of a llama.cpp server: prompts with images, forced answers and their log-probabilities, token ids.

    prompt ── marker and BOS put right ──▶ /completion ──▶ Completion(text, tokens, logprobs, top …)

The address of the server may be a child process's (`runtime.LlamaServer`) or a phone's (`runtime.RemoteServer`).
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rankwise.data.device import MARKER
from rankwise.device.llama.builds import named
from rankwise.errors import DataError, RankwiseError, ServiceError, UsageError

LOADING = 503  # what a llama.cpp server answers until its model is loaded
PAUSES = (0.2, 0.5, 1.0)  # seconds between the tries of a request that did not get through
EXAMPLE = "http://192.168.1.20:8080"
LONGEST = 300  # characters of a server's own words in a message
Told = TypeVar("Told")


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
    when a request did not get through; it raises where it knows why no other will. kind: of server, for messages.
    """

    url: str
    timeout: float = 120.0
    patience: float = 60.0
    key: str | None = field(default=None, repr=False)
    lost: Callable[[], None] = field(default=lambda: None, repr=False)
    kind: str = "a llama.cpp server"

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _address(self.url))

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path; ServiceError where there is none."""
        return self._answer("GET", path, None, dict)

    def entries(self, path: str) -> list[Any]:
        """The JSON array at a path; ServiceError where there is none."""
        return self._answer("GET", path, None, list)

    def post(self, path: str, body: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
        """The JSON object answered to a JSON body; Refusal for what the server did not take."""
        return self._answer("POST", path, json.dumps(body).encode(), dict)

    def _answer(self, method: str, path: str, body: bytes | None, kind: type[Told]) -> Told:
        started = time.monotonic()
        while True:
            status, content = self._tried(method, path, body)
            if status != LOADING:
                return self._read(path, status, content, kind)
            if time.monotonic() - started > self.patience:
                raise ServiceError(f"{self.url} is still loading its model after {self.patience:g} s")
            time.sleep(PAUSES[1])

    def _tried(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and content. Failed connections are retried, timeouts are not."""
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
                        f"{self.url} cannot be reached: {reason}; is {self.kind} running there, and is the "
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

    def _read(self, path: str, status: int, content: bytes, kind: type[Told]) -> Told:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        error = found.get("error") if isinstance(found, dict) else None  # a proxy may send an error with status 200
        if isinstance(found, dict) and (error or not 200 <= status < 300):
            raise self._refusal(path, status, error, content)
        if not isinstance(found, kind) or not 200 <= status < 300:
            failed = Refusal if 400 <= status < 500 else ServiceError  # a path that the server does not have
            what = "object" if kind is dict else "array"
            raise failed(
                f"{self.url}{path} answers {status} without a JSON {what}: {_shown(content)!r}; is it {self.kind}?"
            )
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


REPLACED = "\ufffd"  # what a piece of a character reads as
LEAST_LOGPROB = -103.98  # nats; the smallest float32 is e^-103.28, and what is less comes as a probability of 0
SURE = 1e4  # added to the logit of an end token that is wanted; log-probabilities are those before it
GREEDY = {
    "temperature": 0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "mirostat": 0,
    "ignore_eos": False,
    "stop": [],
}
SHOWN = 200  # characters of an answer in a message
TOO_LONG = "exceed_context_size_error"


class NotTold(UsageError):
    """The log-probabilities of a given answer are not available from a llama.cpp server."""


@dataclass(frozen=True)
class RuntimeInfo:
    """What answers: build, its random image marker, the model's path there, context in tokens, whether it sees.

    begin_id, begin_text: the BOS that the runtime itself puts before every prompt that is a text; None and "" where it
    puts none. A prompt that begins with that text has it dropped, or it would stand there twice. where: the address,
    or the files.
    """

    build: str
    marker: str
    model: str
    context: int
    sees: bool
    begin_id: int | None = None
    begin_text: str = ""
    where: str = ""


@dataclass(frozen=True)
class Completion:
    """One answer.

    tokens: ids that were generated, an end token included. prompt_tokens: ids that were read, those of images
    included; prompt_text: they as a text, without those of images. ended: an end token came. seconds: of the whole
    request. logprobs: log p of each of `tokens` in nats, and top: the likeliest ids of each position with theirs; both
    the model's own before any grammar or bias, and empty where not asked for and where one of the tokens is a piece
    of a character (the server then leaves places out).
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt_text: str
    seconds: float
    ended: bool
    logprobs: tuple[float, ...] = ()
    top: tuple[Mapping[int, float], ...] = ()


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA that the server has loaded. scale: what it is multiplied by for requests that name none."""

    id: int
    path: str
    scale: float


@dataclass(frozen=True)
class ServerRuntime:
    """A llama.cpp server as a `Runtime`. build: the package that brought it, as its name says; peak: its memory.

    lora: the scale of each LoRA, by its id, that every request names; None for the server's own scales.
    """

    talk: Talk
    build: str | None = None
    where: str = ""
    peak: Callable[[], int | None] = lambda: None
    lora: Mapping[int, float] | None = None
    _ending: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)
    _pieces: dict[int, str] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def info(self) -> RuntimeInfo:
        """Asked once. ServiceError where the server is too old to say how an image is marked."""
        return _understood(f"{self.talk.url}/props", self._described, self.talk.get("/props"))

    def _described(self, props: Mapping[str, Any]) -> RuntimeInfo:
        if "media_marker" not in props or "default_generation_settings" not in props:
            raise ServiceError(
                f"{self.talk.url}/props names no media_marker, so this llama.cpp server is too old; update it"
            )
        begin = self._begin_id()
        return RuntimeInfo(
            build=named(str(props.get("build_info", "")), self.build),
            marker=str(props["media_marker"]),
            model=str(props.get("model_path", "")),
            context=int(props["default_generation_settings"]["n_ctx"]),
            sees=bool(props.get("modalities", {}).get("vision", False)),
            begin_id=begin,
            begin_text="" if begin is None else self.detokenize([begin]),
            where=self.where or self.talk.url,
        )

    def _begin_id(self) -> int | None:
        bare, whole = self.tokenize("a"), self.tokenize("a", add_special=True)
        return whole[0] if whole[1 : 1 + len(bare)] == bare and whole != bare else None

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of a text; add_special: with what the runtime puts around a prompt."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._told("/tokenize", body, lambda answer: [int(token) for token in answer["tokens"]])

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._told("/detokenize", {"tokens": list(ids)}, lambda answer: str(answer["content"]))

    def apply_template(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt that the GGUF's own chat template makes with these variables, ready for an answer; without the BOS
        at its beginning where the runtime puts one before every prompt by itself."""
        body = {"messages": list(messages), **({"chat_template_kwargs": dict(variables)} if variables else {})}
        return self._told("/apply-template", body, lambda answer: str(answer["prompt"]))

    def _told(self, path: str, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Told]) -> Told:
        return _understood(self.talk.url + path, read, self.talk.post(path, body))

    def loras(self) -> list[LoadedLora]:
        """What `--lora` has loaded. ServiceError where this build does not tell."""
        path = "/lora-adapters"
        read = lambda rows: [LoadedLora(int(row["id"]), str(row["path"]), float(row["scale"])) for row in rows]  # noqa: E731
        return _understood(self.talk.url + path, read, self.talk.entries(path))

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Scales of the LoRAs by id, for all requests that name none. ServiceError where this build does not take
        them."""
        self.talk.post("/lora-adapters", _scaled(scales))

    def naming(self, lora: Mapping[int, float] | None) -> ServerRuntime:
        """The same server, with every request naming its LoRAs."""
        return replace(self, lora=lora)

    def memory(self) -> int | None:
        """Peak resident memory of the runtime in bytes, its interpreter included; None where it can't be known."""
        return self.peak()

    def complete(
        self,
        prompt: str | Sequence[int],
        images: Sequence[bytes] = (),
        *,
        max_new_tokens: int = 32,
        top: int = 0,
        grammar: str | None = None,
        force: Sequence[int] | str | None = None,
        reuse: bool = False,
    ) -> Completion:
        """The greedy answer to a prompt, or a given one with its log-probabilities.

        prompt: token ids, sent as they are, or a text in which each image stands as `<__media__>`; images: PNG or
        JPEG. top: how many of the likeliest ids to name at each position. force: the answer to give, as ids (or a
        text, tokenised here); it may end in an end token, and max_new_tokens is then not asked. reuse: keep what the
        prompt shares with the last request's; faster, the same up to rounding.

        UsageError where the prompt and its answer exceed the context, NotTold where `force` has pieces of characters
        for tokens, DataError where slots and images disagree.
        """
        assert grammar is None or force is None
        body: dict[str, Any] = {**GREEDY, "n_predict": max_new_tokens, "cache_prompt": reuse, "return_tokens": True}
        body |= {"prompt": self._sent(prompt, images), "n_probs": top, "post_sampling_probs": False}
        body |= {} if self.lora is None else {"lora": _scaled(self.lora)}
        if grammar is not None:
            body["grammar"] = grammar
        wanted = self.tokenize(force) if isinstance(force, str) else None if force is None else list(force)
        if wanted is not None:
            body |= {**self._forcing(wanted), "n_probs": max(top, 1), "n_predict": len(wanted)}
        answer, seconds = self._timed(body)
        found = _understood(f"{self.talk.url}/completion", lambda given: _completion(given, seconds, top), answer)
        if wanted is not None and list(found.tokens) != wanted:
            raise ServiceError(
                f"{self.talk.url} gave the ids {list(found.tokens)} where {wanted} were asked for; its llama.cpp is "
                "too old to be given an answer, or an end token stands inside the answer"
            )
        return found

    def _forcing(self, ids: Sequence[int]) -> dict[str, Any]:
        """A grammar of exactly these ids. An end token is no part of a grammar: the one that is wanted is made the
        likeliest where the grammar is through, which is where end tokens are let in."""
        inner, last = (ids[:-1], ids[-1:]) if self.ends(ids[-1]) else (ids, ())
        broken = [token for token in dict.fromkeys(inner) if REPLACED in self._piece(token)]
        if broken:
            raise NotTold(
                f"the answer's tokens {broken} are pieces of characters, whose log-probabilities a llama.cpp server "
                "does not tell; compare what is generated instead"
            )
        return {"grammar": _ids_alone(inner), "logit_bias": [[token, SURE] for token in last]}

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.detokenize([token])
        return self._pieces[token]

    def ends(self, token: int) -> bool:
        """Whether the runtime takes an id for an end of an answer. Tried out: nothing else may follow a grammar."""
        if token not in self._ending:
            body = {"prompt": [token], "n_predict": 1, "grammar": _ids_alone(()), "logit_bias": [[token, SURE]]}
            body = GREEDY | body | {"return_tokens": True}
            self._ending[token] = self._told(
                "/completion", body, lambda answer: [int(each) for each in answer["tokens"]] == [token]
            )
        return self._ending[token]

    def _timed(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        try:
            answer = self.talk.post("/completion", body)
        except Refusal as error:
            if error.kind == TOO_LONG:
                raise UsageError(f"{error}; raise --context (now {self.info.context} tokens)") from error
            raise
        return answer, time.perf_counter() - started

    def _sent(self, prompt: str | Sequence[int], images: Sequence[bytes]) -> Any:
        if not isinstance(prompt, str):
            if images:
                raise DataError("images need a text prompt; a prompt of token ids has no image slots")
            return list(prompt)
        if prompt.count(MARKER) != len(images):
            raise DataError(
                f"a prompt has {prompt.count(MARKER)} image slots ({MARKER}) and {len(images)} images; the marker is "
                "never text"
            )
        info = self.info
        text = prompt.removeprefix(info.begin_text) if info.begin_text else prompt
        if not images:
            return text
        if not info.sees:
            raise UsageError(f"{info.where} has no vision part, so it takes no images; give its mmproj file too")
        encoded = [base64.b64encode(image).decode() for image in images]
        return {"prompt_string": text.replace(MARKER, info.marker), "multimodal_data": encoded}


def _scaled(scales: Mapping[int, float]) -> list[dict[str, float]]:
    return [{"id": number, "scale": scale} for number, scale in scales.items()]


def _understood(where: str, read: Callable[[Any], Told], answer: Any) -> Told:
    """Parse a response. ServiceError where its JSON is not a llama.cpp server's."""
    try:
        return read(answer)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RankwiseError):
            raise
        raise ServiceError(
            f"{where} answered with unexpected JSON ({type(error).__name__}: {error}): {str(answer)[:SHOWN]}; "
            "is it a llama.cpp server, and not too old?"
        ) from error


def _ids_alone(ids: Sequence[int]) -> str:
    return "root ::= " + (" ".join(f"<[{token}]>" for token in ids) or '""')


def _completion(answer: Mapping[str, Any], seconds: float, named: int) -> Completion:
    tokens = tuple(int(token) for token in answer["tokens"])
    places = answer.get("completion_probabilities", [])
    if len(places) != len(tokens):  # it names none for a token that is a piece of a character
        places = []
    likeliest = [{int(one["id"]): _logprob(one) for one in place["top_logprobs"]} for place in places]
    return Completion(
        text=str(answer["content"]),
        tokens=tokens,
        prompt_tokens=int(answer["tokens_evaluated"]),
        prompt_text=str(answer.get("prompt", "")),
        seconds=seconds,
        ended=answer.get("stop_type") == "eos",
        logprobs=tuple(_logprob(place) for place in places),
        top=tuple(likeliest) if named else (),
    )


def _logprob(place: Mapping[str, Any]) -> float:
    return max(float(place["logprob"]), LEAST_LOGPROB)
