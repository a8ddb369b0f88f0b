"""A chat template at work, and its tokens: what it writes before an answer, what the answer adds, which token ends it.

    messages before answer k ── with the generation prompt ──▶ prompt of answer k
    the same with answer k ──── what is added to that prompt ─▶ what answer k teaches

Nothing stands in for an answer: templates look into answers (Qwen3 parts off `<think>`) and at where they stand. A text
is only tokenized from the last control token of its head on: tokenizers cut there, whatever stands before.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.template import SLOT, Layout, joined, with_date
from rankwise.errors import DataError, UsageError

Key = TypeVar("Key")
Value = TypeVar("Value")
KEPT = 4_000_000  # characters of prompts that are kept with what was made of them: many rows may have one prompt
MARK = "\U000f0000"  # what transformers puts before a control token that is text


class Kept(dict[Key, Value]):
    """Values by key until their keys' texts have `KEPT` characters, when all are dropped."""

    characters = 0

    def keep(self, key: Key, value: Value, characters: int) -> Value:
        self.characters += characters
        if self.characters > KEPT:
            self.clear()
            self.characters = characters
        self[key] = value
        return value


@dataclass(frozen=True)
class Encoder:
    """A tokenizer; `control`: the tokens at which texts may be cut."""

    tokenizer: PreTrainedTokenizerBase
    control: re.Pattern[str]
    _known: Kept[str, tuple[int, ...]] = field(default_factory=Kept, init=False, compare=False, repr=False)

    @cached_property
    def begin(self) -> list[int]:
        """The begin token, where the tokenizer puts one before a text."""
        begin = self.tokenizer.bos_token_id
        adds = begin is not None and self.tokenizer("a")["input_ids"][:1] == [begin]
        return [begin] if adds else []

    def ids(self, text: str) -> list[int]:
        """Ids of a text, special tokens read as such except those marked as text. DataError where the tokenizer cannot
        write those as text."""
        known = self._known.get(text)
        return list(known or self._known.keep(text, tuple(self._ids(text)), len(text)))

    def _ids(self, text: str) -> list[int]:
        if MARK not in text:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        try:
            return list(encode_marked_chat(self.tokenizer, text))
        except ValueError as error:
            raise DataError(f"control tokens in its text: {error}") from error

    def behind(self, head: str, text: str) -> list[int]:
        """Ids that a text adds to those of its head: the head's ids with them are those of both together.

        Where the tokenizer would join characters across the border (a line break of each), the text is tokenized apart:
        the head is what a model is given, and what it writes starts behind it.
        """
        start = max((found.start() for found in self.control.finditer(head)), default=0) if MARK not in head else 0
        before, both = self.ids(head[start:]), self._ids(head[start:] + text)
        return both[len(before) :] if both[: len(before)] == before else self._apart(text)

    def _apart(self, text: str) -> list[int]:
        """Ids of a text from the middle of another: SentencePiece puts a space before the first word of a text."""
        line, both = self.ids("\n"), self._ids("\n" + text)
        return both[len(line) :] if both[: len(line)] == line else self._ids(text)

    def said(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def mark_control(turn: Turn, control: re.Pattern[str]) -> Turn:
    """The turn with control tokens in its texts marked, so that they are tokenized as text."""
    if MARK not in turn.text and not control.search(turn.text) and not control.search(turn.reasoning):
        return turn
    text, reasoning = mark_control_tokens([turn.text, turn.reasoning], control)
    return replace(turn, text=text, reasoning=reasoning)


def plain(text: str) -> str:
    """A text for comparison: Unicode form and outer whitespace do not count."""
    return unicodedata.normalize("NFKC", text).strip()


QUESTION, ANSWER, REPLY = ("\ue000question\ue001", "\ue000answer\ue001", "\ue000reply\ue001")
Message = dict[str, Any]


class TemplateRefused(DataError):
    """The template raises an error for a conversation: a role that it does not take, say."""


class TurnsApart(DataError):
    """Earlier answers are rendered otherwise than they were given, so each answer needs a sample of its own."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, tried out once.

    typed: content goes in as [{"type": "text", …}], because the template loses plain strings or images. image_token:
    what it puts where an image part is. tail: what it puts behind the last answer of a conversation. end: the end token
    that it puts behind an answer, with what stands before that token; "" where it puts none. control: tokens of the
    template's own, which are text where a turn's text holds them.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    kwargs: Mapping[str, Any]
    image_token: str | None
    typed: bool
    tail: str = ""
    end: str = ""
    control: re.Pattern[str] = re.compile("(?!)")
    _known: Kept[tuple[Turn, ...], str] = field(default_factory=Kept, init=False, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        kwargs: Mapping[str, Any],
        image_token: str | None = None,
        ends: Sequence[str] = (),
    ) -> ChatTemplate:
        """Try the template on one exchange. ends: end tokens of the model's generation config.

        UsageError where it raises an error, lacks a variable, or drops the texts or the image.
        """
        for name in kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise UsageError(f"--chat_template_kwargs: the chat template has no variable {name}")
        source, kwargs = with_date(source, kwargs)
        asked = [Turn("user", QUESTION if image_token is None else IMAGE_SLOT + QUESTION), Turn("assistant", ANSWER)]
        reason = "it does not reproduce the texts of a conversation"
        for typed in (False, True) if image_token is None else (True, False):
            form = cls(tokenizer, source, kwargs, image_token, typed)
            try:
                text = form.text(asked)
            except TemplateRefused as error:  # this template takes content in the other form
                reason = str(error)
                continue
            if QUESTION in text and ANSWER in text and text.count(image_token or QUESTION) == 1:
                return form._tried(asked, text.split(ANSWER)[-1], ends)
        if image_token is None:
            raise UsageError(
                f"the chat template cannot be used: {reason}; give another one (--chat_template), or --prompt sections"
            )
        raise UsageError(
            f"the chat template does not put one {image_token} where an image is ({reason}); is it this model's own?"
        )

    def _tried(self, asked: Sequence[Turn], tail: str, ends: Sequence[str]) -> ChatTemplate:
        """The template with what it puts behind an answer, and with its control tokens."""
        try:
            going_on = self.text([*asked, Turn("user", REPLY)], generate=True)
        except TemplateRefused:  # one exchange is all that it takes
            going_on = ""
        added = [token for token in self.tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
        end = _end(tail, going_on.split(ANSWER)[-1], [token.content for token in added], ends)
        named = (self.tokenizer.bos_token, self.tokenizer.eos_token, *ends)
        own = [token.content for token in added if token.special and token.content in self.source + going_on]
        own += [token.content for token in added if token.content in named or token.content in end]
        control = pattern(own, but=self.image_token)
        return replace(self, tail=tail, end=end, control=control)

    def text(self, turns: Sequence[Turn], *, generate: bool = False) -> str:
        """The conversation as the template writes it; `generate`: with what comes before an answer. Refused where it
        raises an error."""
        if not generate:
            return self._rendered(turns, generate)
        known = self._known.get(tuple(turns))
        return known or self._known.keep(tuple(turns), text := self._rendered(turns, generate), len(text))

    def _rendered(self, turns: Sequence[Turn], generate: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    self.messages(turns),
                    tokenize=False,
                    add_generation_prompt=generate,
                    chat_template=self.source,
                    **self.kwargs,
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateRefused(f"the chat template refuses it: {error}") from error

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """What the template is given: control tokens in the turns' texts are marked, so that they are read as text."""
        return [self._message(mark_control(turn, self.control)) for turn in turns]

    def _message(self, turn: Turn) -> Message:
        reasoning = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
        return {"role": turn.role, "content": self._content(turn.text), **reasoning}

    def _content(self, text: str) -> str | list[dict[str, Any]]:
        """A message with its image slots as the template takes them."""
        if not self.typed:
            return text if self.image_token is None else SLOT.sub(lambda _: str(self.image_token), text)
        if self.image_token is None:
            return [{"type": "text", "text": text}]
        pieces = [[{"type": "text", "text": piece}] if piece else [] for piece in SLOT.split(text)]
        return [part for piece in pieces for part in ({"type": "image"}, *piece)][1:]

    def prompt(self, example: Example) -> str:
        """What the last answer is given to."""
        return self._named(example, joined(example)[:-1], generate=True)

    def layout(self, example: Example, end: str) -> Layout:
        """Prompts and answers of a sample. end: what stands behind an answer where the template puts no end token.

        TurnsApart where its answers cannot be learnt in one sample; DataError where one cannot be learnt at all.
        """
        turns, end = joined(example), self.end or end
        before: list[str] = []
        answers: list[str] = []
        done = ""
        for number in (number for number, turn in enumerate(turns) if turn.role == "assistant" and turn.trained):
            prompt = self._named(example, turns[:number], generate=True)
            if not prompt.startswith(done):
                raise TurnsApart(f"sample {example.id}: the chat template renders earlier answers otherwise")
            answer = self._answer(example, turns, number, prompt)
            before.append(prompt[len(done) :])
            answers.append(answer)
            done = prompt + answer + end
        return Layout(tuple(before), tuple(answers), end, in_context=True)

    def _answer(self, example: Example, turns: Sequence[Turn], number: int, prompt: str) -> str:
        """What rendering this answer adds to its prompt, without what the template puts behind it."""
        whole = self._named(example, turns[: number + 1])
        answer = whole[len(prompt) : len(whole) - len(self.tail)]
        if whole != prompt + answer + self.tail:
            shown = f"{prompt[-40:]!r} is what it is generated from, and {whole[-80:]!r} what training would see"
            raise DataError(
                f"sample {example.id}: the chat template does not write its answer behind the prompt for it: {shown}; "
                "choose another mode of the template with --chat_template_kwargs (enable_thinking …), or another "
                "template with --chat_template"
            )
        for name, text in (("answer", turns[number].text), ("reasoning_content", turns[number].reasoning)):
            if not _ends_in(text, prompt, answer):
                raise DataError(
                    f"sample {example.id}: the chat template does not reproduce its {name}; give a template that does "
                    "(--chat_template), or change the row"
                )
        return answer

    def _named(self, example: Example, turns: Sequence[Turn], *, generate: bool = False) -> str:
        try:
            return self.text(turns, generate=generate)
        except TemplateRefused as error:
            raise TemplateRefused(f"sample {example.id}: {error}") from error


def pattern(tokens: Sequence[str], but: str | None = None) -> re.Pattern[str]:
    """Any of these tokens, the longest first; nothing where there are none."""
    longest_first = sorted(
        {token for token in tokens if token and token != but}, key=lambda token: (-len(token), token)
    )
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _end(last: str, going_on: str, added: Sequence[str], ends: Sequence[str]) -> str:
    """What an answer ends with, up to its end token: `last` stands behind it at the end, `going_on` before a reply.

    The tokens that both begin with, else the first of the last answer (gpt-oss writes another one there); else the one
    that opens the next turn, if the model stops on it (GLM-4 writes nothing behind an answer); else "".
    """
    token = re.compile(rf"\s*({pattern(added).pattern})")
    behind, next_turn = list(_run(token, last)), list(_run(token, going_on))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(behind, next_turn, strict=False)))
    if shared:
        return last[: behind[shared - 1][1]]
    if behind:
        return last[: behind[0][1]]
    if next_turn and (not ends or next_turn[0][0] in ends):
        return going_on[: next_turn[0][1]]
    return ""


def _ends_in(text: str, prompt: str, answer: str) -> bool:
    """Whether the answer, behind its prompt, reproduces a text, whitespace apart: what opens it, `<think>` say, may be
    the end of the prompt."""
    text, prompt, answer = ("".join(each.split()) for each in (text, prompt, answer))
    place = (prompt + answer).rfind(text)
    return not text or (place >= 0 and place + len(text) > len(prompt))


def _run(token: re.Pattern[str], text: str) -> Iterator[tuple[str, int]]:
    """(token, where it ends) of the tokens that a text begins with."""
    place = 0
    while found := token.match(text, place):
        place = found.end()
        yield found[1], place
