"""One record, for text and for vision alike: what every source yields and everything after it reads."""

from __future__ import annotations

import re
from abc import abstractmethod
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from rankwise.errors import DataError

ROLES = ("system", "user", "assistant")
IMAGE_SLOT = "<image>"


@dataclass(frozen=True)
class Turn:
    """One piece of a sample: who says it, what, and the heading it stands under in the sections form.

    Several user turns in a row are the sections of one prompt (instruction, table, question …). reasoning: what an
    answer was thought out with, for chat templates that write it. trained: off for an answer that is not learnt.
    """

    role: str
    text: str
    heading: str = ""
    reasoning: str = ""
    trained: bool = True

    def __post_init__(self) -> None:
        assert self.role in ROLES, self.role


@dataclass(frozen=True)
class Example:
    """One sample.

    group: samples that must not be parted by a split (meaning representation, dialogue, image).
    references: every accepted answer to this prompt, for scoring; training uses the last turn.
    stratum: `task_type` where the rows have one; a subset takes its share of each.
    images: as named in the file, in the order of their slots.
    facts: what a scorer needs beside the texts, by the source's own names (WikiSQL: table_id, header, sql …; where
    samples have a class: `label`, and all `labels` there are; `sources`: the files that `images` were made of, where
    they are kept); no part of a sample's identity. line: where in its file
    the sample starts, 0 where there is no file; none either. changes: what was done to the row to make a sample of it;
    none either.
    """

    id: str
    group: str
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    stratum: str | None = None
    images: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    line: int = field(default=0, compare=False)
    changes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        assert self.turns and self.turns[-1].role == "assistant" and self.turns[-1].trained, self.id

    @property
    def answer(self) -> str:
        return self.turns[-1].text

    @property
    def sources(self) -> tuple[str, ...]:
        """The pictures before anything was done to them, as far as they are kept."""
        return tuple(self.facts.get("sources") or self.images)

    @property
    def prompt(self) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
        """Prompt of the answer: samples with equal prompts are one question with several answers."""
        return self.turns[:-1], self.images


class View(Sequence[Example]):
    """Samples that are made when they are asked for: `made` makes the one at a position. A slice is a view too."""

    @abstractmethod
    def made(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return Chosen(self, range(len(self))[index]) if isinstance(index, slice) else self.made(index)


@dataclass(frozen=True)
class Chosen(View):
    """Some samples of a sequence, by their positions in it."""

    whole: Sequence[Example]
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def made(self, index: int) -> Example:
        return self.whole[self.positions[index]]


def chosen(examples: Sequence[Example], positions: Iterable[int]) -> Sequence[Example]:
    """The samples at these positions: a tuple of those in memory, a view of those that are parsed when asked for."""
    if isinstance(examples, tuple | list):
        return tuple(examples[position] for position in positions)
    return Chosen(examples, array("Q", positions))


@dataclass(frozen=True)
class Rejected:
    """A row of a file that is no sample. sample: its id, where the row could be read that far."""

    file: Path
    line: int
    reason: str
    sample: str | None = None

    def __str__(self) -> str:
        named = "" if self.sample is None else f"sample {self.sample}: "
        return f"{self.file}, line {self.line}: {named}{self.reason}"


@dataclass(frozen=True)
class Examples:
    """What a source read, in file order, with the files it came from and the rows that are not among the items.

    items: a tuple, or of a big file a sequence that parses a row when it is asked for. skipped: bad rows, each with its
    place and reason. left_out: how many rows the official files hold that are no samples, by reason. changes: in how
    many rows something was done to make a sample of them, by what it was.
    """

    items: Sequence[Example]
    files: tuple[Path, ...] = ()
    skipped: tuple[Rejected, ...] = field(default=(), repr=False)
    left_out: Mapping[str, int] = field(default_factory=dict)
    changes: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]

    @cached_property
    def with_images(self) -> int:
        """Number of samples that carry images."""
        return sum(bool(example.images) for example in self.items)

    def notes(self, *, sees_images: bool = False) -> list[str]:
        """Sentences for the user about rows left out and images not used; empty when there is nothing to say."""
        lines = [f"note: {count:,} left out: {reason}" for reason, count in self.left_out.items()]
        lines += [f"note: {count:,} {'row' if count == 1 else 'rows'}: {what}" for what, count in self.changes.items()]
        if self.skipped:
            shown = "".join(f"\n    {reason}" for reason in self.skipped[:5])
            more = f"\n    … and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
            lines.append(f"warning: {len(self.skipped)} bad rows skipped:{shown}{more}")
        if self.with_images and not sees_images:
            lines.append(
                f"warning: {self.with_images} of {len(self)} samples have images; this run uses their text only"
            )
        return lines


def one_per_prompt(examples: Iterable[Example]) -> list[Example]:
    """The first sample of every distinct prompt, in order: what to generate from, with all its references."""
    first: dict[Hashable, Example] = {}
    for example in examples:
        first.setdefault(example.prompt, example)
    return list(first.values())


def share_references(examples: Iterable[Example]) -> list[Example]:
    """Give every sample the answers of all samples with its prompt as references."""
    rows = list(examples)
    answers: dict[Hashable, list[str]] = {}
    for example in rows:
        answers.setdefault(example.prompt, []).append(example.answer)
    shared = {prompt: tuple(texts) for prompt, texts in answers.items()}
    return [replace(example, references=shared[example.prompt]) for example in rows]


class NothingToLearn(DataError):
    """Every label of a sample is masked."""


def answers_apart(example: Example) -> list[Example]:
    """One sample for each answer that is learnt: what was said before it, and that answer."""
    turns = example.turns
    learnt = [number for number, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    given = [replace(turn, trained=False) if turn.role == "assistant" else turn for turn in turns]
    return [
        replace(
            example,
            id=f"{example.id}#{count}",
            turns=(*given[:number], turns[number]),
            images=example.images[: sum(turn.text.count(IMAGE_SLOT) for turn in turns[:number])],
        )
        for count, number in enumerate(learnt, 1)
    ]


def check_answer(sample: str, turn: Turn, control: re.Pattern[str]) -> None:
    """NothingToLearn for an empty answer, DataError for one that holds a token which ends or opens turns."""
    if turn.role != "assistant" or not turn.trained:
        return
    if not turn.text.strip():
        raise NothingToLearn(f"sample {sample}: its answer is empty, so all its labels are masked")
    found = control.search(turn.text) or control.search(turn.reasoning)
    if found:
        raise DataError(f"sample {sample}: its answer holds {found[0]}, a control token of the model; take it out")


def check_media(example: Example, tokens: re.Pattern[str]) -> None:
    """DataError where a text holds one of the tokenizer's own tokens for images or videos, or for what is around them:
    outside a slot it stands for nothing."""
    for turn in example.turns:
        if found := tokens.search(turn.text.replace(IMAGE_SLOT, "")):
            raise DataError(
                f"sample {example.id}: its text holds {found[0]}, a token of this model for images or videos; take it "
                "out, or name the image that it stands for"
            )


def check_slots(example: Example, image_token: str) -> None:
    """DataError unless a sample's texts ask for as many images as it has; the model's image token is never text."""
    asked = [turn.text.count(IMAGE_SLOT) for turn in example.turns]
    answered = [count for turn, count in zip(example.turns, asked, strict=True) if turn.role == "assistant"]
    if sum(asked) != len(example.images) or any(answered):
        raise DataError(
            f"sample {example.id}: {sum(asked)} image slots ({IMAGE_SLOT}) in its texts, {sum(answered)} of them in "
            f"answers, and {len(example.images)} images; each image needs one slot, before the last answer"
        )
    if image_token != IMAGE_SLOT and any(image_token in turn.text for turn in example.turns):
        raise DataError(f"sample {example.id}: its text holds {image_token}, which stands for an image in this model")
