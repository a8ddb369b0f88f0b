"""An OpenAI-compatible server, asked place by place: vLLM, SGLang, llama-server, Ollama, and what speaks like them.

    Cases ──▶ /completions with token ids · /completions with text · /chat/completions ──▶ Heard*, one token each

What a server can do is tried out on the first place: how many log-probabilities it tells, whether it takes token ids,
whether it goes on with an answer that was begun. What it refuses is left out, with its reason.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.device.handoff.answers import Heard, Unnatural
from rankwise.device.handoff.cases import CHAT, IDS, TEXT, HandoffCase, HandoffCases, Place
from rankwise.device.llama.client import Refusal, Talk
from rankwise.device.llama.runtime import KEY_VARIABLE
from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.page.text import plural

KEYS = ("OPENAI_API_KEY", KEY_VARIABLE)
COUNTS = (64, 20, 5, 1)  # log-probabilities per place; OpenAI's own limits are 20 (chat) and 5 (completions)
TRIED = 4  # places that may be without log-probabilities before an API is given up
BEGUN = "chat, behind an answer's first token"
KIND = "an OpenAI-compatible server"
AS_IDS = {"return_tokens_as_token_ids": True}  # vLLM: "token_id:5" in place of a text
GO_ON = {"continue_final_message": True, "add_generation_prompt": False}  # vLLM, SGLang; llama-server does so anyway
Body = dict[str, Any]


@dataclass
class OpenAIServer:
    """One server. left_out: API → why it tells nothing."""

    talk: Talk
    model: str
    most: int
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, served_model: str | None, most: int) -> OpenAIServer:
        """ServiceError where nothing like it answers; UsageError where it serves several models and none is named."""
        key = next(filter(None, map(os.environ.get, KEYS)), None)
        talk = Talk(url, key=key, kind=KIND)
        return cls(talk, served_model or only_model(talk), most)

    def answers(self, cases: HandoffCases, api: str | None) -> Iterator[Heard]:
        """All that it tells, API by API. api: the only one to ask. ServiceError where it tells no log-probabilities."""
        told = False
        for route, asked in routes(cases, api).items():
            extra = self._tried(route, cases, asked[:TRIED])
            if extra is not None:
                told = True
                yield from self._all(route, cases, asked, extra)
        if not told:
            reasons = "; ".join(f"{route}: {why}" for route, why in self.left_out.items())
            raise ServiceError(f"{self.talk.url} tells no log-probabilities: {reasons}")

    def _all(
        self, route: str, cases: HandoffCases, asked: Sequence[tuple[HandoffCase, Place]], extra: Body
    ) -> Iterator[Heard]:
        alone: dict[str, int | None] = {}  # case → tokens of its prompt, as the server counts them
        untold = 0
        for case, place in asked:
            try:
                if route != CHAT or not place.forced:
                    heard = self._asked(route, cases, case, place, extra)
                    alone[case.id] = heard.prompt_tokens
                    yield heard
                elif BEGUN not in self.left_out:
                    went_on = self._continued(cases, case, place, extra, alone.get(case.id))
                    yield from [went_on] if went_on else []
            except Untold:  # llama.cpp tells nothing of a piece of a character
                untold += 1
        if untold:
            self.left_out[f"{route}, {untold} of {plural(len(asked), 'place')}"] = "answered without log-probabilities"

    def _continued(
        self, cases: HandoffCases, case: HandoffCase, place: Place, extra: Body, alone: int | None
    ) -> Heard | None:
        """The answer behind a begun one; None, noted, where the server takes that for a turn that is over."""
        try:
            heard = self._asked(CHAT, cases, case, place, extra)
        except Refusal as error:
            self.left_out[BEGUN] = str(error)
            return None
        if alone is None or heard.prompt_tokens != alone + place.forced:
            self.left_out[BEGUN] = "an answer that was begun is not continued"
            return None
        return heard

    def _tried(self, route: str, cases: HandoffCases, asked: Sequence[tuple[HandoffCase, Place]]) -> Body | None:
        """What is asked for beside the prompt, as far as the server takes it; None where it tells nothing."""
        counts = [self.most, *(count for count in COUNTS if count < self.most)]
        for extra in ({**of_count(route, count), **ids} for count in counts for ids in (AS_IDS, {})):
            for case, place in asked:
                try:
                    heard = self._asked(route, cases, case, place, extra)
                except Refusal as error:
                    self.left_out[route] = str(error)
                    break
                except Untold as error:
                    self.left_out[route] = str(error)
                    continue
                wanted = len(case.ids) + place.forced
                if route == IDS and heard.prompt_tokens not in (None, wanted):
                    self.left_out[route] = f"{wanted} token ids are read as {plural(heard.prompt_tokens or 0, 'token')}"
                    return None
                self.left_out.pop(route, None)
                return extra
            else:
                return None
        return None

    def _asked(self, route: str, cases: HandoffCases, case: HandoffCase, place: Place, extra: Body) -> Heard:
        body = {"model": self.model, "max_tokens": 1, "temperature": 0, **extra}
        if route == CHAT:
            kwargs = {"chat_template_kwargs": dict(cases.template_kwargs)} if cases.template_kwargs else {}
            body |= {"messages": messages_of(cases, case, place), **kwargs, **(GO_ON if place.forced else {})}
            response = self.talk.post("/chat/completions", body)
        else:
            text = [*case.ids, *case.answer[: place.forced]] if route == IDS else case.prompt + place.text
            response = self.talk.post("/completions", body | {"prompt": text})
        where = f"{self.talk.url}, case {case.id}, place {place.forced}"
        try:
            heard = Heard.of({"case": case.id, "place": place.forced, "api": route, "response": response})
        except Unnatural as error:
            raise DataError(f"{where}: {route}: {error}") from error
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise Untold(f"{self.talk.url}: {route} answers without log-probabilities ({error})") from error
        return replace(heard, where=where)


class Untold(ServiceError):
    """An answer came without log-probabilities."""


def only_model(talk: Talk) -> str:
    """The name of the one model that the server lists."""
    try:
        names = [str(one["id"]) for one in talk.get("/models")["data"]]
    except (Refusal, KeyError, TypeError) as error:
        raise UsageError(f"{talk.url}/models lists no models ({error}); name one with --served_model") from error
    if len(names) != 1:
        raise UsageError(f"{talk.url} serves {', '.join(names) or 'nothing'}: choose one with --served_model")
    return names[0]


def routes(cases: HandoffCases, api: str | None) -> dict[str, list[tuple[HandoffCase, Place]]]:
    """API → the places that it can be asked for. UsageError where there is none."""
    pairs = [(case, place) for case in cases.cases for place in case.places]
    seeing = any(case.images for case in cases.cases)
    places = {
        CHAT: [(case, place) for case, place in pairs if not place.forced or (place.as_text and tidy(place.text))],
        TEXT: [(case, place) for case, place in pairs if place.as_text],
        IDS: pairs,
    }
    can = {CHAT: cases.chats and api in (None, CHAT), **dict.fromkeys((TEXT, IDS), not seeing and api in (None, TEXT))}
    found = {name: places[name] for name in cases.routes if can[name] and places[name]}
    if not found:
        why = "pictures need a chat API" if seeing else "no chat template makes the prompts of these rows"
        raise UsageError(f"nothing can be asked{f' by --api {api}' if api else ''}: {why}")
    return found


def tidy(text: str) -> bool:
    """Whether a begun answer keeps its whitespace in templates that strip messages."""
    return text == text.strip()


def of_count(route: str, count: int) -> Body:
    return {"logprobs": True, "top_logprobs": count} if route == CHAT else {"logprobs": count}


def messages_of(cases: HandoffCases, case: HandoffCase, place: Place) -> list[Mapping[str, Any]]:
    """The case's messages with its pictures as data URLs, and what the answer begins with."""
    pictures = iter(case.images)

    def shown(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part.get("type") != "image":
            return part
        data = base64.b64encode(cases.pictures[next(pictures)]).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    said: list[Mapping[str, Any]] = [
        one if isinstance(one["content"], str) else {**one, "content": [shown(part) for part in one["content"]]}
        for one in case.messages
    ]
    return [*said, {"role": "assistant", "content": place.text}] if place.forced else said
