"""From turns to text: which text surrounds each answer, in the sections form or through a chat template.

A layout holds texts only; `render` makes tokens of it, piece by piece, so that an answer's tokens never depend on
what stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rankwise.data.example import IMAGE_MARKER, IMAGE_SLOT, Example, Turn
from rankwise.data.template import with_date
from rankwise.errors import DataError, UsageError

SLOT = re.compile(rf"\n?{IMAGE_SLOT}\n?")  # a line break beside a slot parts marker and text, and is no part of either
HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}
SENTINEL = "\ue000{}\ue001"  # private-use characters: no template touches them, no text holds them


@dataclass(frozen=True)
class Layout:
    """Texts in order: before[0] answers[0] before[1] answers[1] … after. The end token opens the text that follows
    an answer, or is absent. Image tokens stand in the texts before answers, one for each image."""

    before: tuple[str, ...]
    answers: tuple[str, ...]
    after: str = ""


def without_images(example: Example) -> Example:
    """The sample as a text-only run sees it: image slots cut out of its texts."""
    if not example.images:
        return example
    turns = tuple(replace(turn, text=IMAGE_MARKER.sub("", turn.text).strip()) for turn in example.turns)
    return replace(example, turns=turns, images=())


def sections(example: Example, end: str) -> Layout:
    """Headed sections with a blank line between, the answer last, `end` (the end token) after each earlier answer."""
    before, answers, text = [], [], ""
    for turn in example.turns:
        text += f"{heading(turn)}\n"
        if turn.role == "assistant":
            before.append(text)
            answers.append(turn.text)
            text = f"{end}\n\n"
        else:
            text += f"{turn.text}\n\n"
    return Layout(tuple(before), tuple(answers))


def raw(example: Example, image_token: str | None, end: str) -> Layout:
    """The turns' texts and nothing else, an answer behind a space, `end` after each earlier answer: what an app without
    a chat template sends."""
    before, answers, text = [], [], ""
    for turn in example.turns:
        if turn.role == "assistant":
            before.append(text)
            answers.append(f" {turn.text}")
            text = end
        else:
            slot = IMAGE_SLOT if image_token is None else image_token
            text += ("\n" if text and not text.endswith(end) else "") + turn.text.replace(IMAGE_SLOT, slot)
    return Layout(tuple(before), tuple(answers))


def heading(turn: Turn) -> str:
    return f"### {turn.heading or HEADINGS[turn.role]}:"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, tried out once: how it takes content, and what it puts before an answer.

    typed: content goes in as [{"type": "text", …}], because the template loses plain strings or images. lead:
    whitespace between the generation prompt and the answer; it belongs to the answer, or a prompt for generation
    would end in a token that training never saw there. image_token: what the template puts where an image part is.
    source: the template itself. kwargs: the variables that it is given.
    """

    tokenizer: PreTrainedTokenizerBase
    typed: bool
    lead: str
    image_token: str | None = None
    source: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str | None = None,
        source: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> ChatTemplate:
        """Try the template on one exchange; UsageError where there is none, or it drops the texts or the image."""
        if not (source or tokenizer.chat_template):
            raise UsageError("the tokenizer has no chat template; use --prompt sections")
        question, answer = SENTINEL.format("question"), SENTINEL.format("answer")
        asked = question if image_token is None else IMAGE_SLOT + question
        for typed in (False, True) if image_token is None else (True, False):
            form = cls(tokenizer, typed, "", image_token, source, dict(kwargs or {}))
            try:
                text = form.text([("user", asked), ("assistant", answer)])
            except (TypeError, TemplateError):  # this template takes content in the other form
                continue
            if question in text and answer in text and text.count(image_token or question) == 1:
                prompt = form.text([("user", asked)], generate=True)
                return replace(form, lead=_lead(text.split(answer)[0], prompt))
        if image_token is None:
            raise UsageError("the chat template does not reproduce the texts of a conversation; use --prompt sections")
        raise UsageError(f"the chat template does not put one {image_token} where an image is; is it this model's own?")

    def text(self, messages: Sequence[tuple[str, str]], *, generate: bool = False) -> str:
        conversation = [{"role": role, "content": self._content(text)} for role, text in messages]
        source, kwargs = with_date(self.source or self.tokenizer.get_chat_template(), self.kwargs)
        return str(
            self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generate, chat_template=source, **kwargs
            )
        )

    def _content(self, text: str) -> str | list[dict[str, Any]]:
        """A message with its image slots as the template takes them."""
        if not self.typed:
            return text if self.image_token is None else SLOT.sub(lambda _: str(self.image_token), text)
        if self.image_token is None:
            return [{"type": "text", "text": text}]
        pieces = [[{"type": "text", "text": piece}] if piece else [] for piece in SLOT.split(text)]
        return [part for piece in pieces for part in ({"type": "image"}, *piece)][1:]

    def layout(self, example: Example) -> Layout:
        """Render with a sentinel in place of every answer, then cut at the sentinels."""
        answers = [turn.text for turn in example.turns if turn.role == "assistant"]
        marks = [SENTINEL.format(number) for number in range(len(answers))]
        text = self.text(_messages(example, marks))
        pieces = re.split("|".join(marks), text)
        if len(pieces) != len(marks) + 1 or [text.count(mark) for mark in marks] != [1] * len(marks):
            raise DataError(
                f"sample {example.id}: the chat template does not reproduce every answer once and verbatim; "
                "use --prompt sections"
            )
        before = [piece.removesuffix(self.lead) for piece in pieces[:-1]]
        return Layout(tuple(before), tuple(self.lead + answer for answer in answers), pieces[-1])


def _lead(before: str, generation_prompt: str) -> str:
    rest = before.removeprefix(generation_prompt)
    return rest if rest.isspace() else ""


def _messages(example: Example, marks: Sequence[str]) -> list[tuple[str, str]]:
    """(role, content) with marks for answers; the sections of one prompt become one message."""
    messages, unused = [], iter(marks)
    for role, group in groupby(example.turns, key=lambda turn: turn.role):
        turns = list(group)
        if role == "assistant":
            messages += [(role, next(unused)) for _ in turns]
        elif len(turns) == 1:
            messages.append((role, turns[0].text))
        else:
            messages.append((role, "\n\n".join(f"{heading(turn)}\n{turn.text}" for turn in turns)))
    return messages
