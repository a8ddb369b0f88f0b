"""Originals of a few pictures, beside what the device makes of them: what validation and golden vectors start from.

    originals/00017_IMG_2041.jpeg     the file as it was, its metadata (place, camera) included

The data set's own pictures have the device's size, which any resizer passes on: with them alone nobody could tell
whether an app scales, turns and pads a photo as training saw it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rankwise.data.device import DeviceTarget, changes
from rankwise.data.images import ImageReader
from rankwise.data.labelling.stratified import in_turn
from rankwise.data.pixels import kind_of, suffix_of
from rankwise.store.files import atomic_write

FOLDER = "originals"
MOST = 32  # as many as the parity ladder asks about
MOST_BYTES = 64 * 2**20
AMONG = 200  # pictures that are looked at


@dataclass(frozen=True)
class Originals:
    """Where the pictures of a data set came from. references: by image id, as `reader` knows them."""

    reader: ImageReader
    references: Mapping[str, str]

    def keep(self, folder: Path, ids: Sequence[str], target: DeviceTarget) -> dict[str, str]:
        """Copy some, those that the device changes first, in turn of every kind (wide, tall; colour mode; turned).
        Returns image id → path below `folder`: at most MOST pictures, MOST_BYTES in all."""
        known = [one for one in ids[:AMONG] if one in self.references]
        passed = [one for one in known if not changes(self._content(one), target.image_size)]
        kept: dict[str, str] = {}
        room = MOST_BYTES
        for one in (*in_turn([one for one in known if one not in passed], self._kind), *passed):
            content = self._content(one)
            if len(kept) < MOST and len(content) <= room:
                kept[one] = f"{FOLDER}/{one}{suffix_of(content)}"
                room -= len(content)
                with atomic_write(folder / kept[one]) as temporary:
                    temporary.write_bytes(content)
        return kept

    def _content(self, one: str) -> bytes:
        return self.reader.content(self.references[one])

    def _kind(self, one: str) -> str:
        with Image.open(io.BytesIO(self._content(one))) as picture:
            return kind_of(picture)
