"""Depth values on the disk: one small file per image and token grid, made once and read by every run after.

    <folder>/3f/3f9c….safetensors      {"depth": (tokens,) float16}, its key as metadata

A file bears its name only once it is whole, so several processes may fill one folder at the same time.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankwise.core.geometry import Grid
from rankwise.errors import DataError
from rankwise.files.atomic import atomic_write

FORMAT = "rankwise-depth-map/1"


class BrokenMap(DataError):
    """A cached map that cannot be used. The pass that fills the cache makes it again; a reader stops."""


@dataclass(frozen=True)
class MapKey:
    """What a cached map depends on: the image, what made the map (with its input size), and the token grids.

    image, source: hexadecimal digests or short names.
    """

    image: str
    source: str
    grids: tuple[Grid, ...]

    @property
    def text(self) -> str:
        grids = [[*grid.box, grid.rows, grid.columns] for grid in self.grids]
        return json.dumps({"format": FORMAT, "image": self.image, "source": self.source, "grids": grids})

    @property
    def tokens(self) -> int:
        return sum(grid.tokens for grid in self.grids)


@dataclass(frozen=True)
class DepthCache:
    """A folder of maps normalised to [0, 1], float16, before alpha."""

    folder: Path

    def file(self, key: MapKey) -> Path:
        name = hashlib.sha256(key.text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, key: MapKey) -> Tensor | None:
        """(tokens,) float16 in [0, 1], or None where there is none. Raises BrokenMap."""
        file = self.file(key)
        if not file.is_file():
            return None
        try:
            with safe_open(str(file), framework="pt") as content:
                same = (content.metadata() or {}).get("key") == key.text
                values: Tensor = content.get_tensor("depth")
        except (OSError, SafetensorError) as error:
            raise BrokenMap(f"{file}: not a sound depth map ({error}); {REMEDY}") from error
        if not same or values.dtype != torch.float16 or values.shape != (key.tokens,) or not in_range(values):
            raise BrokenMap(f"{file}: not the depth map that its name says; {REMEDY}")
        return values

    def write(self, key: MapKey, values: Tensor) -> None:
        assert values.shape == (key.tokens,) and values.dtype == torch.float16
        with atomic_write(self.file(key)) as temporary:
            save_file({"depth": values.contiguous()}, str(temporary), metadata={"key": key.text})


REMEDY = "run the command again, which makes it anew before it starts"


def in_range(values: Tensor) -> bool:
    """False for NaN too."""
    return bool(((values >= 0) & (values <= 1)).all())


def source_name(fingerprint: str, input_size: int) -> str:
    """An estimator's name in a key: the same weights at another input size give other maps."""
    return f"{fingerprint}@{input_size}"


COLUMNS = ("image_path", "depth_path")
MODES = ("I;16", "I;16B", "I;16L", "I")


@dataclass(frozen=True)
class DepthFiles:
    """Which file holds the depth of which image. table: image reference → file; without one the names decide."""

    folder: Path
    table: Mapping[str, Path] | None = field(default=None, repr=False)

    @classmethod
    def at(cls, place: Path) -> DepthFiles:
        """A folder, or a CSV table with the columns image_path and depth_path."""
        if place.is_dir():
            return cls(place)
        if not place.is_file():
            raise DataError(f"{place}: no such folder or table of depth maps")
        with place.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise DataError(f"{place}, line 1: a table of depth maps has the columns {', '.join(COLUMNS)}")
            table = {row["image_path"]: place.parent / row["depth_path"] for row in rows}
        return cls(place.parent, table)

    def file(self, reference: str) -> Path:
        """The map of an image. Raises DataError where there is none."""
        named = PurePosixPath(reference)
        if self.table is not None:
            found = self.table.get(reference)
        elif named.is_absolute() or ".." in named.parts:
            found = None
        else:
            found = self.folder / named.with_suffix(".png")
        if found is None or not found.is_file():
            looked = f"in the table, or not at its place: {found}" if self.table is not None else f"at {found}"
            raise DataError(f"image {reference}: no depth map {looked}")
        return found


def inverse_depth(file: Path) -> Tensor:
    """Relative inverse depth (height, width), near = large, from a 16-bit PNG of distances in any unit.

    0 means not measured and counts as farthest. Raises DataError for other kinds of images.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in MODES:
                raise DataError(f"{file}: a depth map is a 16-bit grey PNG; this is {image.mode}")
            distance = torch.from_numpy(np.asarray(image).astype(np.float32))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{file}: not a readable depth map ({error})") from error
    measured = distance > 0
    if not bool(measured.any()):
        raise DataError(f"{file}: no pixel of it is measured (all are 0)")
    inverse = torch.where(measured, 1 / distance, torch.inf)
    return torch.where(measured, inverse, inverse.min())
