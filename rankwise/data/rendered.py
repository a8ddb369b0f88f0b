"""Rendered samples as a torch data set: all checked once before training, tokenized again as they are asked for."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from tqdm.auto import tqdm

from rankwise.data.answers import NothingToLearn, answers_apart
from rankwise.data.chat import TurnsApart
from rankwise.data.example import Example, View, chosen
from rankwise.data.images import BadImage
from rankwise.data.render import Overlong, Rendered, Renderer
from rankwise.errors import DataError, UsageError


@dataclass(frozen=True)
class Checked:
    """What a check of all samples found: positions of the usable ones with their lengths, ids of the others.

    answers: for each usable one, which of its answers it teaches, counted from 1, where each answer is a sample of its
    own; 0 for all of them. bad: why samples cannot be rendered, where the renderer skips them. digest: of all that is
    learnt, in order: ids, labels, and of pictures their names and sizes with a piece of each.
    """

    usable: tuple[int, ...]
    lengths: tuple[int, ...]
    dropped: tuple[str, ...]
    refused: tuple[str, ...]
    truncated: int
    answers: tuple[int, ...] = ()
    bad: tuple[str, ...] = ()
    digest: str = ""

    def notes(self) -> list[str]:
        """Sentences for the user about samples that do not enter as they are; empty when all do."""
        lines = []
        if self.dropped:
            lines.append(f"warning: {len(self.dropped)} samples dropped, longer than the limit: {_some(self.dropped)}")
        if self.truncated:
            lines.append(f"warning: the source of {self.truncated} samples was cut to the limit")
        if self.refused:
            lines.append(f"warning: {len(self.refused)} samples refused, nothing to learn: {_some(self.refused)}")
        if self.bad:
            shown = "".join(f"\n    {reason}" for reason in self.bad[:5])
            lines.append(f"warning: {len(self.bad)} bad samples skipped:{shown}")
        if any(self.answers):
            rows = len({row for row, answer in zip(self.usable, self.answers, strict=True) if answer})
            lines.append(
                f"note: {rows} conversations become {sum(map(bool, self.answers))} samples, one for each answer: the "
                "chat template renders earlier answers otherwise than they were given"
            )
        return lines


def outcomes(example: Example, renderer: Renderer) -> list[tuple[Example, Rendered | ValueError]]:
    """The sample as training sees it, rendered, or why it cannot be: one, or one for each of its answers where the chat
    template renders earlier answers otherwise than they were given."""
    try:
        return [(example, renderer.training(example))]
    except TurnsApart:
        return [outcome for part in answers_apart(example) for outcome in outcomes(part, renderer)]
    except UsageError:
        raise
    except ValueError as error:  # a plain one is what an image processor says of a picture's form
        return [(example, error)]


def check_samples(examples: Sequence[Example], renderer: Renderer, *, prompts: bool = False) -> Checked:
    """Render every sample once, whole as for training, or with `prompts` up to the answer as for generation.

    Overlong ones raise, with their number and the longest, unless the renderer drops or cuts; samples that cannot be
    rendered raise unless it skips them; samples without a label are refused by id; DataError if no sample is left.
    """
    usable, lengths, answers, truncated = [], [], [], 0
    refused: list[str] = []
    bad: list[str] = []
    overlong: list[tuple[int, str]] = []
    digest = hashlib.sha256()
    for position, example in enumerate(tqdm(examples, desc="tokenize", unit="sample", disable=None, leave=False)):
        found = [prompted(example, renderer)] if prompts else outcomes(example, renderer)
        for number, (sample, rendered) in enumerate(found, 1):
            if isinstance(rendered, Rendered):
                usable.append(position)
                lengths.append(len(rendered.input_ids))
                answers.append(number if sample is not example else 0)
                truncated += rendered.truncated
                for piece in () if prompts else pieces(rendered, renderer):
                    digest.update(piece)
            elif isinstance(rendered, NothingToLearn):
                refused.append(sample.id)
            elif isinstance(rendered, Overlong):
                overlong.append((rendered.needed, sample.id))
            elif renderer.skip_bad and not isinstance(rendered, BadImage):
                bad.append(str(rendered))
            elif isinstance(rendered, BadImage):
                raise rendered
            else:
                ways = "leave such samples out with --skip_bad; `rankwise check` lists all of them"
                raise DataError(f"{rendered}; {ways}") from rendered
    if overlong and renderer.overlong != "drop":
        raise _too_long(overlong, len(examples), renderer, renderer.limit - renderer.reserve * prompts)
    if not usable:
        raise DataError(
            f"none of {len(examples)} samples can be used: {len(overlong)} longer than {renderer.limit} tokens, "
            f"{len(refused)} with all labels masked ({_some(refused)}), {len(bad)} bad ({'; '.join(bad[:2])})"
        )
    dropped = tuple(sample for _, sample in overlong)
    rest = tuple(answers), tuple(bad), digest.hexdigest()
    return Checked(tuple(usable), tuple(lengths), dropped, tuple(refused), truncated, *rest)


def pieces(rendered: Rendered, renderer: Renderer) -> Iterator[bytes]:
    """What is learnt of a sample, as bytes."""
    yield array("q", rendered.input_ids).tobytes()
    yield array("q", rendered.labels).tobytes()
    if renderer.sight is not None:
        for reference in rendered.images:
            yield reference.encode()
            yield renderer.sight.reader.mark(reference)


def prompted(example: Example, renderer: Renderer) -> tuple[Example, Rendered | ValueError]:
    """The sample's prompt, or why it cannot be rendered."""
    try:
        return example, renderer.prompt(example)
    except UsageError:
        raise
    except ValueError as error:
        return example, error


@dataclass(frozen=True)
class Learnt(View):
    """Rows as samples: each whole, or one of its answers with what was said before it (see `Checked.answers`)."""

    rows: Sequence[Example]
    answers: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def made(self, index: int) -> Example:
        answer, row = self.answers[index], self.rows[index]
        return answers_apart(row)[answer - 1] if answer else row


class RenderedDataset(Dataset[dict[str, Any]]):
    """Samples as {input_ids, labels, sample_index, images}; `sample_index` is the position here, `sample_id` its name.

    With the Trainer pass `remove_unused_columns=False`, or the index is taken out before the collator sees it.
    """

    def __init__(self, examples: Sequence[Example], renderer: Renderer) -> None:
        self.renderer = renderer
        self.checked = check_samples(examples, renderer)
        rows = chosen(examples, self.checked.usable)
        self.examples = Learnt(rows, self.checked.answers) if any(self.checked.answers) else rows

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.checked.lengths

    def notes(self) -> list[str]:
        return self.checked.notes()

    def sample_id(self, index: int) -> str:
        return self.examples[index].id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rendered = self.renderer.training(self.examples[index])
        return {
            "input_ids": rendered.input_ids,
            "labels": rendered.labels,
            "sample_index": index,
            "images": rendered.images,
        }


def _too_long(overlong: Sequence[tuple[int, str]], total: int, renderer: Renderer, limit: int) -> DataError:
    needed, sample = max(overlong)
    cut = renderer.overlong == "truncate_source"
    longer = " without their sources (those with images are never cut)" if cut else ""
    ways = "--overlong drop" if cut else "--overlong drop or --overlong truncate_source"
    return DataError(
        f"{len(overlong)} of {total} samples are longer than {limit} tokens{longer}; the longest, "
        f"{sample}, needs {needed}. Raise --max_seq_length, or pass {ways}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
