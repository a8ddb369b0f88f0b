"""The rows of `rankwise features downstream`: those with pictures, which pictures are the same, and their batches.

data file ── questions ──▶ Questions ── batches(rows) ──▶ padded batches, pixels included, made as they are asked for
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rankwise.core.approximation import normalised
from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.example import Example, Examples, chosen
from rankwise.data.features.preparing import Preparation, picture_digest
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, UsageError
from rankwise.models.vision_features import image_features
from rankwise.page.text import plural
from rankwise.score.likelihood import Batch
from rankwise.stages.engines import Subject

Shape = tuple[int, int]


@dataclass(frozen=True)
class Questions:
    """Samples with pictures that a model is asked.

    pictures: of each sample, SHA-256 of its pictures as the processor gets them, which is how a feature cache names
    them. groups: one name per sample; samples that share a picture, directly or over others, have the same.
    """

    tested: Subject
    rows: RenderedDataset
    pictures: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    batch_size: int

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, places: Sequence[int] | None = None) -> Iterator[Batch]:
        """Batches of the samples at these places, in this order; all of them by default."""
        wanted = range(len(self)) if places is None else places
        collate = Collator.of(self.rows.renderer.tokenizer, sight=self.rows.renderer.sight)
        for start in range(0, len(wanted), self.batch_size):
            yield collate([self.rows[place] for place in wanted[start : start + self.batch_size]])

    @torch.inference_mode()
    def features(self, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Normalised features (1, T, D) of every matrix of these samples' pictures, in order."""
        device = self.tested.device
        for batch in self.batches(places):
            inputs = {name: value.to(device) for name, value in batch.items()}
            for matrix in image_features(self.tested.model, inputs):
                yield normalised(matrix)[None]

    def halves(self, seed: int) -> list[list[int]]:
        """Places of two halves without a common picture; one of the whole where there is only one picture."""
        names = sorted(set(self.groups))
        random.Random(seed).shuffle(names)
        first = set(names[: (len(names) + 1) // 2])
        parts: list[list[int]] = [[], []]
        for place, name in enumerate(self.groups):
            parts[name not in first].append(place)
        return [part for part in parts if part]


def with_pictures(examples: Examples, most: int | None, path: str) -> tuple[Sequence[Example], list[str]]:
    """The first samples, without those that show nothing, which are counted in a note. DataError where none is left."""
    first = examples.items[:most] if most else examples.items
    seeing = [place for place in range(len(first)) if first[place].images]
    if not seeing:
        raise DataError(f"{path}: none of {plural(len(first), 'row')} has a picture, so there is nothing to replace")
    left_out = len(first) - len(seeing)
    notes = [f"{plural(left_out, 'row')} of {len(first)} left out: without a picture"] if left_out else []
    return chosen(first, seeing), notes


def questions(tested: Subject, examples: Sequence[Example], batch_size: int) -> Questions:
    """UsageError for a model that sees nothing."""
    rows, reader = RenderedDataset(examples, tested.renderer), require_sight(tested).reader
    shown = [example.images for example in rows.examples]
    digests = {reference: picture_digest(reader.open(reference)) for row in shown for reference in dict.fromkeys(row)}
    pictures = tuple(tuple(digests[reference] for reference in row) for row in shown)
    return Questions(tested, rows, pictures, connected(pictures), batch_size)


def require_sight(tested: Subject) -> Sight:
    """UsageError for a model that sees nothing."""
    if tested.renderer.sight is None:
        raise UsageError(f"{tested.base} takes no pictures, so it has no visual features to replace")
    return tested.renderer.sight


def connected(pictures: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """A name for each row of pictures, the same for rows that are connected by any."""
    leader = {name: name for row in pictures for name in row}

    def first(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for row in pictures:
        leaders = [first(name) for name in row]
        leader.update(dict.fromkeys(leaders, min(leaders)))
    return tuple(first(row[0]) for row in pictures)


@dataclass(frozen=True)
class StretchedReader:
    """An ImageReader whose pictures are stretched to a square, as `features capture` does. Raises BadImage as it
    does."""

    reader: Any
    side: int

    @property
    def folder(self) -> Path:
        folder: Path = self.reader.folder
        return folder

    def open(self, reference: str) -> Image.Image:
        return Preparation(self.side).picture(self.reader.open(reference))

    def size(self, reference: str) -> tuple[int, int]:
        self.reader.size(reference)  # a picture that is not there has no size
        return self.side, self.side

    def digest(self, reference: str) -> str:
        digest: str = self.reader.digest(reference)
        return digest

    def mark(self, reference: str) -> bytes:
        mark: bytes = self.reader.mark(reference)
        return mark


def stretched(tested: Subject, side: int | None, default: int | None = None) -> Subject:
    """The subject that sees its pictures as squares of this side, or of the default; as it is where there is neither,
    or, without a side, where a device makes its pictures. UsageError for a side where a device does."""
    sight = require_sight(tested)
    if side is None and (default is None or sight.target):
        return tested
    if sight.target:
        raise UsageError(
            f"--image_size {side}: the pictures of this model are made for its device ({sight.target.image_size} "
            "pixels, device.json); leave --image_size out"
        )
    seeing: Any = StretchedReader(sight.reader, side or default or 0)
    return replace(tested, renderer=replace(tested.renderer, sight=replace(sight, reader=seeing)))
