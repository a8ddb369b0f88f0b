"""Names of images that stay when a folder grows: what was named once keeps its name, by its pixels.

    labels.jsonl, ledger.jsonl of earlier runs ── of_folder ──▶ ImageIds ── claim(photo, pixels' hash) ──▶ 00017_beach

A new image is named by its place among all images and its file; where an earlier image has that name, by its content
too (`00017_beach-3fa9c1d2`). So no name ever means two images, and none changes because others came.

    originals/00017_IMG_2041.jpeg     a few of the files as they were, metadata (place, camera) included

What validation and golden vectors start from: the data set's own pictures have the device's size, which any resizer
passes on, so with them alone nobody could tell whether an app scales, turns and pads a photo as training saw it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rankwise.data.device import FILE as DEVICE
from rankwise.data.device import DeviceTarget, changes, read_target
from rankwise.data.images import ImageReader
from rankwise.data.pixels import kind_of, suffix_of
from rankwise.data.split import in_turn
from rankwise.files.atomic import atomic_write
from rankwise.labels.coco import Photo

TABLE, FOLDER = "labels.jsonl", "originals"
NAME = re.compile(r"\d{5,}_[\w.-]*")
ORIGINAL = re.compile(rf"{FOLDER}/{NAME.pattern}")
MOST = 32  # as many as the parity ladder asks about
MOST_BYTES = 64 * 2**20
AMONG = 200  # pictures that are looked at


class ImageIds:
    """The names of a data set. known: id → hash of the pixels; originals: paths below the data set; both of earlier
    runs. reserved: a new image does not get one of the known names."""

    def __init__(
        self, known: Iterable[tuple[str, str]] = (), originals: Iterable[str] = (), *, reserved: bool = True
    ) -> None:
        self.known: dict[str, str] = {}
        self.reserved = reserved
        self.originals = frozenset(path for path in originals if ORIGINAL.fullmatch(path))
        self._free: dict[str, list[str]] = {}
        self._claimed: dict[str, str] = {}
        for name, sha256 in known:
            if NAME.fullmatch(name) and name not in self.known:
                self.known[name] = sha256
                self._free.setdefault(sha256, []).append(name)

    @classmethod
    def of_folder(cls, folder: Path, target: DeviceTarget, asked: Iterable[tuple[str, str]] = ()) -> ImageIds:
        """Those of the table of an earlier run, and of answers that were paid for. Of a run for another device all
        pixels were others: its names are free."""
        table, same = folder / TABLE, not (folder / DEVICE).is_file() or read_target(folder) == target
        rows = list(_rows(table))
        named = [(str(row["image_id"]), str(row["image_sha256"])) for row in rows]
        originals = [str(row["source_path"]) for row in rows if row.get("source_path")]
        return cls([*named, *asked], originals, reserved=same)

    def claim(self, photo: Photo, sha256: str) -> str:
        """The id of an image; the same however often it is asked for."""
        if photo.reference not in self._claimed:
            self._claimed[photo.reference] = self._chosen(photo, sha256)
        return self._claimed[photo.reference]

    def _chosen(self, photo: Photo, sha256: str) -> str:
        names = self._free.get(sha256, [])
        if names:
            own = photo.id.split("_", 1)[1]
            name = next((name for name in names if name.split("_", 1)[1] == own), names[0])
            names.remove(name)
            return name
        return f"{photo.id}-{sha256[:8]}" if self.reserved and photo.id in self.known else photo.id


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table that name an image; broken lines name none, since the table is about to be replaced."""
    for line in table.read_bytes().split(b"\n") if table.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"image_id", "image_sha256"} <= row.keys():
            yield row


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
