"""From samples to token ids and labels: one renderer for training, evaluation and the device.

    Example ── layout (sections, raw) or chat ──▶ texts ── encoding, piece by piece ──▶ Rendered(input_ids, labels)
    images ── Sight.expanded ──▶ image tokens in the texts before answers

Labels are -100 except on answers and the end token behind each. What is masked is known from where a piece came
from, never from its ids: the pad token may be the end token.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.data.chat import MARK, ChatTemplate, Encoder, mark_control, pattern, plain
from rankwise.data.example import Example, check_answer, check_media, check_slots
from rankwise.data.images import BadImage
from rankwise.data.template import Layout, of_media, pin_date, prefixed, raw, sections, without_images
from rankwise.data.vision_inputs import IGNORED, Sight
from rankwise.errors import DataError, UsageError
from rankwise.options.sections import IF_OVERLONG

STYLES = ("sections", "chat", "raw")


class Overlong(DataError):
    """A sample needs more tokens than the limit. One with images is never shortened: an image cut off is none.

    uncut: whether cutting its source has not been tried and may help.
    """

    def __init__(self, sample: str, needed: int, limit: int, image_tokens: int = 0, *, uncut: bool = False) -> None:
        self.needed = needed
        images = f", {image_tokens} of them for its images" if image_tokens else ""
        ways = "--overlong drop or truncate_source" if uncut else "--overlong drop"
        super().__init__(
            f"sample {sample} needs {needed} tokens{images}, the limit is {limit}; raise --max_seq_length, "
            f"or pass {ways}"
        )


@dataclass(frozen=True)
class Rendered:
    """Token ids of one sample; labels of the same length, -100 where nothing is learnt; the images that its image
    tokens stand for, in order."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Piece:
    ids: list[int]
    trained: bool


@dataclass(frozen=True)
class Renderer:
    """How samples become tokens.

    max_length: most tokens of a sample; `positions`, the model's own limit, lowers it. reserve: tokens of it that a
    prompt leaves free for what is generated. overlong: `error` and `drop` raise Overlong (a data set drops),
    `truncate_source` shortens the longest user turn at its end, never the answer. generation_eos: end tokens of
    the model's generation config; they end an answer too, and replace a missing end token of the tokenizer. sight:
    how the model takes images; without it a sample's text is rendered alone. chat_template: a template's text, in place
    of the tokenizer's own. template_kwargs: variables that every rendering is given (`enable_thinking` …), JSON values;
    the date that the template prints is added to them, so `replace` and whoever reads `settings` render it again.
    skip_bad: a data set leaves out samples that cannot be rendered, counted, instead of raising. vocabulary: rows of
    the model's embeddings; a text with a token beyond them is a DataError.
    """

    tokenizer: PreTrainedTokenizerBase
    style: str = "sections"
    max_length: int = 2048
    overlong: str = "error"
    positions: int | None = None
    reserve: int = 0
    generation_eos: int | Sequence[int] | None = None
    sight: Sight | None = None
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    skip_bad: bool = False
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for value, allowed in ((self.style, STYLES), (self.overlong, IF_OVERLONG)):
            if value not in allowed:
                raise UsageError(f"{value!r} is not one of {', '.join(allowed)}")
        if self.reserve >= self.limit:
            raise UsageError(
                f"{self.reserve} tokens to generate leave no room for a prompt within {self.limit}; "
                "lower --max_new_tokens or raise --max_seq_length"
            )
        if self.style != "chat" and (self.chat_template or self.template_kwargs):
            raise UsageError(
                f"--chat_template and --chat_template_kwargs act on --prompt chat; this is --prompt {self.style}"
            )
        if self.style != "raw" and self.sight and self.sight.prefixes:
            name = type(self.sight.processor).__name__
            raise UsageError(f"{name} makes rows of one prompt and one answer: --prompt raw, not --prompt {self.style}")
        if self.style == "chat":
            object.__setattr__(self, "template_kwargs", pin_date(self.template_source, self.template_kwargs))
        assert self.end_ids

    @cached_property
    def limit(self) -> int:
        return min(self.max_length, self.positions or self.max_length)

    def leaving(self, tokens: int) -> Renderer:
        """With room for so many generated tokens on top of a prompt of full length, as far as the model's positions go:
        what training saw whole is asked whole."""
        return replace(self, max_length=self.max_length + tokens, reserve=tokens)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The begin token, where one is put before a prompt that lacks it."""
        return tuple(self.begin)

    @cached_property
    def template_source(self) -> str:
        """Text of the chat template in use. UsageError where there is none."""
        if not (self.chat_template or self.tokenizer.chat_template):
            raise UsageError("the tokenizer has no chat template; give one with --chat_template, or --prompt sections")
        return str(self.chat_template or self.tokenizer.get_chat_template())

    @cached_property
    def template(self) -> ChatTemplate:
        image_token = None if self.sight is None else self.sight.image_token
        ends = self.tokenizer.convert_ids_to_tokens(self._configured_ends)
        return ChatTemplate.of(self.tokenizer, self.template_source, self.template_kwargs, image_token, ends)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; the first one stands behind each: the chat template's, else the tokenizer's."""
        written = self.template.end if self.style == "chat" else ""
        template = self.tokenizer(written, add_special_tokens=False)["input_ids"][-1:] if written else []
        own = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if not (template or own or self._configured_ends):
            raise UsageError("neither the tokenizer nor the generation config names an end token (eos)")
        return tuple(dict.fromkeys([*template, *own, *self._configured_ends]))

    @cached_property
    def _configured_ends(self) -> list[int]:
        given = self.generation_eos
        return [given] if isinstance(given, int) else list(given or ())

    def training(self, example: Example) -> Rendered:
        """Ids and labels of a whole sample; the ids start with exactly `prompt_ids` of it, reserve apart.

        TurnsApart where each of its answers needs a sample of its own: `samples` makes them.
        """
        pieces, truncated = self._fitted(example, self.limit, with_answer=True)
        ids = [token for piece in pieces for token in piece.ids]
        labels = [token if piece.trained else IGNORED for piece in pieces for token in piece.ids]
        return Rendered(ids, labels, truncated, self._images(example))

    def prompt(self, example: Example) -> Rendered:
        """Everything before the last answer, all of it masked; it leaves `reserve` tokens of the limit free."""
        pieces, truncated = self._fitted(example, self.limit - self.reserve, with_answer=False)
        ids = [token for piece in pieces for token in piece.ids]
        return Rendered(ids, [IGNORED] * len(ids), truncated, self._images(example))

    def prompt_ids(self, example: Example) -> list[int]:
        """Ids of the prompt: what the model is given to generate from."""
        return self.prompt(example).input_ids

    def prompt_text(self, example: Example, slot: str) -> str:
        """The prompt as a text with `slot` where each image goes, for an engine that makes tokens and images by itself.

        It begins with the begin token's text where the prompt's ids begin with that token. Nothing is cut off it.
        """
        example = example if self.sight else without_images(example)
        text = self._before(example)
        if MARK in text:
            raise DataError(
                f"sample {example.id}: its text holds a control token, and an engine that is given text obeys it"
            )
        begin = self.begin if self.encoder.ids(text)[:1] != self.begin else []
        slotted = text if self.sight is None else text.replace(self.sight.image_token, slot)
        return "".join(self.tokenizer.convert_ids_to_tokens(begin)) + slotted

    def text(self, ids: Sequence[int]) -> str:
        """Ids as a text, special tokens included, for records and for eyes."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def answer(self, ids: Sequence[int]) -> str:
        """What was generated, up to the first end token, as a text without special tokens or outer whitespace."""
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids))
        text = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how samples are rendered, for records and to tell runs apart."""
        target = self.sight.target if self.sight else None
        device = {"device": target.geometry} if target else {}
        template: dict[str, Any] = {}
        if self.style == "chat":
            template["chat_template"] = hashlib.sha256(self.template_source.encode()).hexdigest()
            template["chat_template_kwargs"] = dict(self.template_kwargs)
        return {"prompt": self.style, **template, "max_seq_length": self.limit, "overlong": self.overlong, **device}

    def _images(self, example: Example) -> tuple[str, ...]:
        return () if self.sight is None else example.images

    def _fitted(self, example: Example, limit: int, *, with_answer: bool) -> tuple[list[_Piece], bool]:
        """Pieces within the limit, and whether the source was shortened for it."""
        if self.sight is None:
            example = without_images(example)
        pieces = self._pieces(example, with_answer)
        self._refuse_beyond(example, pieces)
        if _length(pieces) <= limit:
            return pieces, False
        if self.overlong != "truncate_source" or example.images:
            uncut = not example.images and self.overlong != "truncate_source"
            raise Overlong(example.id, _length(pieces), limit, self._image_tokens(pieces), uncut=uncut)
        return self._shortened(example, limit, with_answer), True

    def _refuse_beyond(self, example: Example, pieces: Sequence[_Piece]) -> None:
        """DataError for a token that the model has no embedding of: the tokenizer is longer than the model."""
        top = max((token for piece in pieces for token in piece.ids), default=0)
        if self.vocabulary is not None and top >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(top)
            raise DataError(
                f"sample {example.id}: its token {token!r} is number {top:,}, and the model has "
                f"{self.vocabulary:,} embeddings; use the model's own tokenizer, or resize its embeddings"
            )

    def _image_tokens(self, pieces: Sequence[_Piece]) -> int:
        if self.sight is None:
            return 0
        return sum(piece.ids.count(self.sight.placeholder_id) for piece in pieces)

    def _shortened(self, example: Example, limit: int, with_answer: bool) -> list[_Piece]:
        """Pieces with as much of the longest user turn's beginning as fits, found by bisection."""
        users = [number for number, turn in enumerate(example.turns) if turn.role == "user"]
        source = max(users, key=lambda number: len(example.turns[number].text))
        pieces = self._pieces(_cut(example, source, 0), with_answer)
        if _length(pieces) > limit:
            raise Overlong(f"{example.id} without its source", _length(pieces), limit)
        fits, too_long = 0, len(example.turns[source].text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            shorter = self._pieces(_cut(example, source, middle), with_answer)
            if _length(shorter) <= limit:
                fits, pieces = middle, shorter
            else:
                too_long = middle
        return pieces

    def _pieces(self, example: Example, with_answer: bool) -> list[_Piece]:
        """Prompt and answer pieces in turn; without the answer, those before the last one."""
        if self.sight is not None:
            check_slots(example, self.sight.image_token)
        check_media(example, self.media)
        if self.style == "chat" and not with_answer:
            [text] = self._expanded(example, [self.template.prompt(example)])
            return [_Piece(self._opening(text), False)]
        for turn in example.turns if with_answer else example.turns[:-1]:
            check_answer(example.id, turn, self.encoder.control)
        chat = self.style == "chat"
        layout = self.template.layout(example, self._end) if chat else self._plain_layout(example)
        before = self._expanded(example, layout.before)
        pieces = [_Piece(self._opening(before[0]), False)]
        for number, answer in enumerate(layout.answers if with_answer else layout.answers[:-1]):
            head = before[number] if number == 0 else layout.end + before[number]
            pieces.append(_Piece(self._answer(example.id, layout, head, answer), True))
            if number + 1 < len(before):
                pieces.append(_Piece(self.encoder.behind(layout.end, before[number + 1]), False))
        return pieces

    def _answer(self, sample: str, layout: Layout, head: str, answer: str) -> list[int]:
        """Ids of an answer and its end token, checked to say what the text says."""
        if layout.in_context:
            answer += layout.end
            ids = self.encoder.behind(head, answer)
            said = self.encoder.said(ids)
        else:
            ids = self.encoder.ids(answer)
            said = self.encoder.said(ids)
            ids.append(self.end_ids[0])
        if plain(said) != plain(answer):
            raise DataError(
                f"sample {sample}: the tokenizer does not reproduce its answer: "
                f"{answer[:80]!r} reads back as {said[:80]!r}"
            )
        return ids

    def _expanded(self, example: Example, before: Sequence[str]) -> Sequence[str]:
        """The texts before answers with each image token replaced by what stands for that image."""
        if self.sight is None:
            return before
        try:
            return self.sight.expanded(before, example.images)
        except BadImage as error:
            raise BadImage(f"sample {example.id}: {error}") from error

    def _before(self, example: Example) -> str:
        """Text of everything before the last answer."""
        if self.style == "chat":
            return self.template.prompt(example)
        layout = self._plain_layout(example)
        answered = zip(layout.answers, layout.before[1:], strict=False)
        return layout.before[0] + "".join(f"{answer}{layout.end}{head}" for answer, head in answered)

    def _plain_layout(self, example: Example) -> Layout:
        """The sections, or the texts alone, with control tokens in them marked as text."""
        if any(turn.reasoning for turn in example.turns):
            raise DataError(
                f"sample {example.id}: reasoning_content needs a chat template that writes it: --prompt chat"
            )
        example = replace(example, turns=tuple(mark_control(turn, self.encoder.control) for turn in example.turns))
        if self.style == "raw" and self.sight and self.sight.prefixes:
            return prefixed(example, self.sight.image_token, self._end)
        if self.style == "raw":
            return raw(example, None if self.sight is None else self.sight.image_token, self._end)
        if example.images:
            raise UsageError("images need the model's chat template: --prompt chat (or raw)")
        return sections(example, self._end)

    @cached_property
    def encoder(self) -> Encoder:
        if self.style == "chat":
            return Encoder(self.tokenizer, self.template.control)
        own = [self.tokenizer.bos_token, *self.tokenizer.convert_ids_to_tokens(list(self.end_ids))]
        return Encoder(self.tokenizer, pattern(own))

    @cached_property
    def special(self) -> re.Pattern[str]:
        """The tokenizer's special tokens."""
        return pattern([token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special])

    @cached_property
    def media(self) -> re.Pattern[str]:
        """The tokenizer's tokens for images, videos and what is around them."""
        return pattern(of_media([token.content for token in self.tokenizer.added_tokens_decoder.values()]))

    @cached_property
    def begin(self) -> list[int]:
        """What is put before a prompt that does not begin with it: the tokenizer's begin token. A chat template writes
        it itself or goes without, but for a processor's prompts, before which transformers puts it."""
        return [] if self.style == "chat" and self.sight is None else self.encoder.begin

    @cached_property
    def _end(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.end_ids[0]))

    def _opening(self, text: str) -> list[int]:
        ids = self.encoder.ids(text)
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids


def _length(pieces: Sequence[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _cut(example: Example, turn: int, characters: int) -> Example:
    turns = list(example.turns)
    turns[turn] = replace(turns[turn], text=turns[turn].text[:characters])
    return replace(example, turns=tuple(turns))
