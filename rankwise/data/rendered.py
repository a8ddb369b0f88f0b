"""Rendered samples as a torch data set: all checked once before training, tokenised again as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from tqdm.auto import tqdm

from rankwise.data.example import Example, chosen
from rankwise.data.render import NothingToLearn, Overlong, Renderer
from rankwise.errors import DataError


@dataclass(frozen=True)
class Checked:
    """What a check of all samples found: positions of the usable ones with their lengths, ids of the others."""

    usable: tuple[int, ...]
    lengths: tuple[int, ...]
    dropped: tuple[str, ...]
    refused: tuple[str, ...]
    truncated: int

    def notes(self) -> list[str]:
        """Sentences for the user about samples that do not enter as they are; empty when all do."""
        lines = []
        if self.dropped:
            lines.append(f"warning: {len(self.dropped)} samples dropped, longer than the limit: {_some(self.dropped)}")
        if self.truncated:
            lines.append(f"warning: the source of {self.truncated} samples was cut to the limit")
        if self.refused:
            lines.append(f"warning: {len(self.refused)} samples refused, nothing to learn: {_some(self.refused)}")
        return lines


def check_samples(examples: Sequence[Example], renderer: Renderer, *, prompts: bool = False) -> Checked:
    """Render every sample once, whole as for training, or with `prompts` up to the answer as for generation.

    Overlong ones raise, with their number and the longest, unless the renderer drops or cuts; samples without a
    label are refused by id; DataError if no sample is left.
    """
    usable, lengths, refused, truncated = [], [], [], 0
    overlong: list[tuple[int, str]] = []
    for position, example in enumerate(tqdm(examples, desc="tokenise", unit="sample", disable=None, leave=False)):
        try:
            rendered = renderer.prompt(example) if prompts else renderer.training(example)
        except NothingToLearn:
            refused.append(example.id)
        except Overlong as error:
            overlong.append((error.needed, example.id))
        else:
            usable.append(position)
            lengths.append(len(rendered.input_ids))
            truncated += rendered.truncated
    if overlong and renderer.overlong != "drop":
        raise _too_long(overlong, len(examples), renderer.limit - renderer.reserve * prompts)
    if not usable:
        raise DataError(
            f"none of {len(examples)} samples can be used: {len(overlong)} longer than {renderer.limit} tokens, "
            f"{len(refused)} with all labels masked ({_some(refused)})"
        )
    dropped = tuple(sample for _, sample in overlong)
    return Checked(tuple(usable), tuple(lengths), dropped, tuple(refused), truncated)


class RenderedDataset(Dataset[dict[str, Any]]):
    """Samples as {input_ids, labels, sample_index, images}; `sample_index` is the position here, `sample_id` its name.

    With the Trainer pass `remove_unused_columns=False`, or the index is taken out before the collator sees it.
    """

    def __init__(self, examples: Sequence[Example], renderer: Renderer) -> None:
        self.renderer = renderer
        self.checked = check_samples(examples, renderer)
        self.examples = chosen(examples, self.checked.usable)

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


def _too_long(overlong: Sequence[tuple[int, str]], total: int, limit: int) -> DataError:
    needed, sample = max(overlong)
    return DataError(
        f"{len(overlong)} of {total} samples are longer than {limit} tokens; the longest, {sample}, needs "
        f"{needed}. Raise --max_seq_length, or pass --overlong drop or --overlong truncate_source"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
