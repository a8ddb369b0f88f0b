"""Depth values on the disk: one small file per image and token grid, made once and read by every run after.

    <folder>/3f/3f9c….safetensors      {"depth": (tokens,) float16}, its key as metadata

A file bears its name only once it is whole, so several processes may fill one folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
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
