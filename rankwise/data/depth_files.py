"""Measured depth from files, in place of estimated depth: 16-bit PNG, far = large, 0 = not measured.

--depth_maps DIR           DIR/kitchen/17.png belongs to the image kitchen/17.jpg
--depth_maps pairs.csv     image_path,depth_path, both relative to the table's folder
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rankwise.errors import DataError

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
