"""The shards of a cache that are features of pictures.

    picture ── Preparation ── processor ── vision side ──▶ features, finite and of one shape ──▶ Matrices

The model is loaded when the first shard is made: a capture that is complete loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rankwise.core.geometry import Grid
from rankwise.data.features.cache import ModelOrigin
from rankwise.data.features.pictures import Pictures
from rankwise.data.features.preparing import Preparation, picture_digest
from rankwise.data.features.writer import CacheRecipe, Matrices, shard_places
from rankwise.data.images import BadImage
from rankwise.errors import DataError
from rankwise.models.sites import torch_dtype
from rankwise.options.features import CaptureConfig
from rankwise.stages.engines import pick_device
from rankwise.stages.features.eyes import Eye

Step = Callable[[int], object]  # told how many more pictures are done


@dataclass
class PictureShards:
    """Features of pictures, `--batch_size` of them at a time."""

    config: CaptureConfig
    pictures: Pictures
    preparation: Preparation
    eye: Eye
    origin: ModelOrigin
    first: tuple[str, tuple[int, int]] | None = field(default=None, init=False)

    @property
    def count(self) -> int:
        return min(len(self.pictures.names), self.config.num_images or len(self.pictures.names))

    @cached_property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.config.dtype, trained=False, device=self.device)

    @cached_property
    def model(self) -> Any:
        return self.eye.load(self.dtype, self.device)

    @cached_property
    def recipe(self) -> CacheRecipe:
        how = self.preparation.record(self.eye.processor)
        return CacheRecipe(
            shards=len(self.places),
            dtype=self.config.cache_dtype,
            model=self.origin,
            pictures=self.pictures.digest(self.count),
            settings={
                "pictures": self.count,
                "shard_size": self.config.shard_size,
                "model_dtype": str(self.dtype).removeprefix("torch."),
                "skip_bad": self.config.skip_bad,
                **how,
            },
            source=str(self.config.images),
        )

    @property
    def places(self) -> list[range]:
        return shard_places(self.count, self.config.shard_size)

    def size(self, shard: int) -> int:
        return len(self.places[shard])

    def made(self, shard: int, step: Step) -> Matrices:
        """Raises DataError, naming the picture, where one cannot be read (unless --skip_bad), gives another number of
        tokens than the others, or features that are not finite."""
        places, rows, left_out = self.places[shard], [], []
        for start in range(0, len(places), self.config.batch_size):
            batch = places[start : start + self.config.batch_size]
            opened, bad = self.opened(batch)
            rows += self.seen(opened) if opened else []
            left_out += bad
            step(len(batch))
        return Matrices(
            torch.stack([row.features for row in rows]) if rows else None,
            tuple(row.name for row in rows),
            tuple(row.group for row in rows),
            one_grid(rows),
            tuple(left_out),
        )

    def opened(self, places: Sequence[int]) -> tuple[dict[str, Image.Image], list[tuple[str, str]]]:
        """Prepared pictures by name, and names with reasons of those that cannot be read."""
        found, bad = {}, []
        for place in places:
            name = self.pictures.names[place]
            try:
                found[name] = self.preparation.picture(self.pictures.open(place))
            except BadImage as reason:
                if not self.config.skip_bad:
                    raise DataError(f"{reason}; remove it, or pass --skip_bad to leave such pictures out") from reason
                bad.append((name, str(reason)))
        return found, bad

    def seen(self, images: dict[str, Image.Image]) -> list[Row]:
        """The matrices of these pictures, in order."""
        laid = [self.eye.grids(image) for image in images.values()]
        counts = [len(found) if found else 1 for found in laid]
        features = self.features(images)
        if len(features) != sum(counts):
            raise DataError(
                f"{len(images)} pictures ({next(iter(images))} …) gave {len(features)} feature matrices where "
                f"{sum(counts)} were expected: how {type(self.model).__name__} cuts pictures is not known here"
            )
        rows, rest = [], iter(features)
        for (name, image), found, count in zip(images.items(), laid, counts, strict=True):
            group = picture_digest(image)
            for tile in range(count):
                named = f"{name}#{tile}" if count > 1 else name
                matrix, seen = next(rest)
                grid = found[tile] if found else seen
                rows.append(self.checked(Row(named, group, matrix, (grid.rows, grid.columns) if grid else None)))
        return rows

    def features(self, images: dict[str, Image.Image]) -> list[tuple[Tensor, Grid | None]]:
        """(T, D) each, on the CPU, with its grid where the tower tells it."""
        try:
            inputs = self.eye.pixels(list(images.values()))
        except ValueError as error:
            raise DataError(f"the processor refuses a picture among {', '.join(images)}: {error}") from error
        try:
            with torch.inference_mode():
                moved = {name: value.to(self.device) for name, value in inputs.items()}
                return [(matrix.cpu(), grid) for matrix, grid in self.eye.features(self.model, moved)]
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"out of memory with {len(images)} pictures at a time; complete shards are safe: run it again with a "
                "smaller --batch_size"
            ) from error

    def checked(self, row: Row) -> Row:
        shape = (row.features.shape[0], row.features.shape[1])
        self.first = self.first or (row.name, shape)
        if shape != self.first[1]:
            raise DataError(
                f"{row.name} gives {shape[0]} tokens, {self.first[0]} {self.first[1][0]}: the matrices of a cache have "
                "equal shapes; leave --native out, so that pictures are stretched to one size"
            )
        if not torch.isfinite(row.features).all():
            raise DataError(f"{row.name}: the tower's features are not finite in {self.dtype}; try --dtype float32")
        return row


@dataclass(frozen=True)
class Row:
    """One matrix with its names. grid: (rows, columns) of its tokens, where known."""

    name: str
    group: str
    features: Tensor
    grid: tuple[int, int] | None


def one_grid(rows: Sequence[Row]) -> tuple[int, int] | None:
    """The grid of all rows; None where they differ."""
    found = {row.grid for row in rows}
    return found.pop() if len(found) == 1 else None
