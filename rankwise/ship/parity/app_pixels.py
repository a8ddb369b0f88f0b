"""What an app made of the pictures, as it hands it over: PNG files, or SHA-256 of the raw RGB.

FOLDER/00-device.png …            named as the case's picture
FOLDER/sha256_rgb.json            {"00-device.png": "5b0c…"}
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rankwise.errors import DataError
from rankwise.files.atomic import read_object
from rankwise.ship.parity.cases import Case, Source, decoded
from rankwise.ship.parity.reference import Pixels

HASHES = "sha256_rgb.json"
MENTIONED = 3


def sha256_rgb(pixels: Pixels) -> str:
    """Of the bytes R G B, row by row from the top left: what an app can compute without a PNG library."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()).hexdigest()


@dataclass(frozen=True)
class AppPixels:
    """A folder of them. hashes: by name, of pictures without a file."""

    folder: Path
    hashes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path | str, cases: Iterable[Case]) -> AppPixels:
        """DataError where the folder has none of the cases' pictures."""
        place = Path(folder)
        found = cls(place, read_object(place / HASHES) if (place / HASHES).is_file() else {})
        names = [source.name for case in cases for source in case.sources]
        if not any(name in found.hashes or (place / name).is_file() for name in names):
            wanted = ", ".join(names[:MENTIONED]) or "no case has a picture"
            raise DataError(f"{place}: no picture of the app is there; expected PNG files or {HASHES} with {wanted} …")
        return found

    def of(self, source: Source) -> Pixels | str | None:
        """(height, width, 3), or a hash; None where the app gives neither."""
        file = self.folder / source.name
        return np.asarray(decoded(file.read_bytes())) if file.is_file() else self.hashes.get(source.name)
