"""Texts to token ids, as a tokenizer makes them of whole conversations, yet piece by piece.

    head, text ── behind ──▶ the ids that `text` adds where it stands behind `head`

A text is only tokenized from the last control token of its head on: tokenizers cut there, whatever stands before.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from rankwise.data.example import Turn
from rankwise.errors import DataError

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


def marked(turn: Turn, control: re.Pattern[str]) -> Turn:
    """The turn with control tokens in its texts marked, so that they are tokenized as text."""
    if MARK not in turn.text and not control.search(turn.text) and not control.search(turn.reasoning):
        return turn
    text, reasoning = mark_control_tokens([turn.text, turn.reasoning], control)
    return replace(turn, text=text, reasoning=reasoning)


def plain(text: str) -> str:
    """A text for comparison: Unicode form and outer whitespace do not count."""
    return unicodedata.normalize("NFKC", text).strip()
