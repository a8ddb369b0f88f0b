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

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.example import Example, Examples, chosen
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.engines import Subject
from rankwise.evaluate.likelihood import Batch
from rankwise.features.answers import Replacement, baselines, controls, of_method
from rankwise.features.approximation import normalised, shared_basis
from rankwise.features.dataset import SPLIT, cached, read_split
from rankwise.features.encoder import Preparation, picture_digest
from rankwise.features.measures import network
from rankwise.features.trained import Network
from rankwise.models.vision_features import image_features
from rankwise.page.text import plural

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


CROSSED = "each half of the pictures with a basis from the other half's features"


@dataclass(frozen=True)
class Part:
    """Rows that share a basis (r, D) of the shared PCA; None where there are too few pictures for one."""

    places: Sequence[int]
    basis: Tensor | None


def fitting(found: Sequence[Network], shapes: Sequence[Shape], asked: bool) -> tuple[list[Network], list[str]]:
    """The networks that take these shapes, and notes on the others.

    asked: they were named; then DataError for one that does not fit.
    """
    usable, notes = [], []
    for each in found:
        wanted = (each.net.settings.tokens, each.net.settings.channels)
        if all(shape == wanted for shape in shapes):
            usable.append(each)
            continue
        line = f"{each.name} takes {sized(wanted)}, and these pictures give {', '.join(map(sized, shapes))}"
        if asked:
            raise DataError(f"{each.folder}: {line}; leave it out of --arch, or capture and train at that size")
        notes.append(f"{line}: left out")
    return usable, notes


def origin_notes(found: Sequence[Network], fingerprint: str, rows: Questions) -> list[str]:
    """What a reader must know of where the networks come from: another model, or pictures that are asked about here."""
    notes = []
    for each in found:
        if each.cache is None:
            notes.append(f"{each.name}: which model its features came from is not known: {each.lost}")
            continue
        origin = each.cache.model
        if origin is None:
            notes.append(f"{each.name} was trained on {each.cache.source}, which names no model")
        elif origin.fingerprint != fingerprint:
            notes.append(
                f"warning: {each.name} was trained on features of {origin.name}, whose files are not this model's "
                f"({origin.fingerprint[:12]}… against {fingerprint[:12]}…): unless they see alike, its numbers are not "
                "those of a network for this model"
            )
        notes += seen_in_training(each, rows)
    return notes


def seen_in_training(each: Network, rows: Questions) -> list[str]:
    assert each.cache is not None
    trained = {each.cache.groups[place] for place in read_split(each.folder / SPLIT, each.cache).train}
    shown = {picture for row in rows.pictures for picture in row}
    known = len(shown & trained)
    if not known:
        return []
    return [
        f"warning: {each.name} was trained on {known} of these {len(shown)} pictures: it does better than on new ones"
    ]


def sized(shape: Shape) -> str:
    return f"{shape[0]} tokens × {shape[1]} channels"


def ranks_of(asked: Sequence[int], found: Sequence[Network], shapes: Sequence[Shape]) -> list[int]:
    """Ranks of the baselines, ascending. UsageError for one that no matrix has."""
    most = max(min(shape) for shape in shapes)
    default = [each.rank for each in found] or [max(1, most // 4), max(1, most // 2), most]
    ranks = sorted(set(asked or default))
    if not 1 <= ranks[0] <= ranks[-1] <= most:
        raise UsageError(f"--ranks: matrices of {sized(max(shapes))} have ranks 1 to {most}; got {ranks}")
    return ranks


def parts(rows: Questions, found: Sequence[Network], rank: int, seed: int) -> tuple[list[Part], str]:
    """The rows with the bases of the shared PCA, and where those come from: the training matrices of a cache, else,
    crosswise, the rows' own pictures. found: networks whose caches hold features of this model."""
    whole = list(range(len(rows)))
    for each in found:
        if each.cache is not None:
            split = read_split(each.folder / SPLIT, each.cache)
            basis = shared_basis(cached(each.cache, split.train), rank).to(rows.tested.device)
            return [Part(whole, basis)], f"basis from the {len(split.train)} training matrices of {each.cache.path}"
    halves = rows.halves(seed)
    if len(halves) < 2:
        return [Part(whole, None)], "left out, since there is only one picture and no cache to take a basis from"
    first, second = (shared_basis(rows.features(places), rank) for places in halves)
    return [Part(halves[0], second), Part(halves[1], first)], CROSSED


def replacements(
    part: Part, ranks: Sequence[int], found: Sequence[Network], shapes: Sequence[Shape], seed: int
) -> list[Replacement]:
    """All that stand in, in the table's order: no picture, baselines by method and rank, networks, all ranks."""
    whole, nothing = controls(*max(shapes, key=min))
    by_rank = [baselines(rank, part.basis, seed) for rank in ranks]
    ordered = [method for same in zip(*by_rank, strict=True) for method in same]
    learned = [one for each in found for one in of_method(network(each.net, each.name), each.rank)]
    return [nothing, *ordered, *learned, whole]
