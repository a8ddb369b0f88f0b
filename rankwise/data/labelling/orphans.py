"""Images of earlier runs that no row names any more: left behind by a photo that is gone, or by another selection."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from rankwise.data.labelling.image_ids import ImageIds
from rankwise.data.labelling.labelled import IMAGES, LabelledRow, pixel_hash
from rankwise.data.pixels import BROKEN


def remove_orphans(folder: Path, ids: ImageIds, rows: Iterable[LabelledRow]) -> int:
    """Delete them, and the originals that earlier tables named; how many images it were. Only a file that still holds
    what was stored under its name is deleted."""
    rows, count = tuple(rows), 0
    used = {row.image_id for row in rows}
    for image_id, sha256 in ids.known.items():
        file = folder / IMAGES / f"{image_id}.png"
        if image_id not in used and file.is_file() and _holds(file, sha256):
            file.unlink()
            count += 1
    for original in ids.originals - {row.source_path for row in rows}:
        (folder / original).unlink(missing_ok=True)
    return count


def _holds(file: Path, sha256: str) -> bool:
    try:
        with Image.open(file) as image:
            return image.mode == "RGB" and pixel_hash(image) == sha256
    except BROKEN:
        return False
