"""The lowest rung: the pixels that the model was trained on are those that the device makes of the picture.

    sent   what this client sends, made anew of the source
    Skia   the source as Skia decodes, turns and scales it, where it imports
    app    what the app says it sent, where it is handed over

A client that is compared with itself proves nothing: without Skia and without the app's pixels the rung is not
measured, and neither where no resizer would change the pictures.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rankwise.data.device import changes
from rankwise.data.pixels import BLACK, Unreadable, flattened
from rankwise.device.llama.runtime import Runtime
from rankwise.device.parity.cases import Case, Source, decoded, strata
from rankwise.device.parity.floor import Thresholds
from rankwise.device.parity.reference import Observed, Pixels
from rankwise.device.parity.rung import BROKEN, NO_PICTURE, NOT_MEASURED, OK, Rung, named
from rankwise.device.parity.skia_pixels import canvas_pixels, skia_pixels, unavailable
from rankwise.errors import DataError
from rankwise.files.atomic import read_object

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


NAME = "pixels"
LIMIT = 1  # of 255: the same sum, rounded in another order


@dataclass(frozen=True)
class Apart:
    """Two pictures of one size: largest and mean difference of a value, share of pixels that differ, and whether they
    do so in the picture itself, or in its black margin only."""

    most: int
    mean: float
    share: float
    inside: bool


@dataclass(frozen=True)
class Side:
    """Another side's version of the pictures. found: what it has, picture by picture; None where the number, the size
    or the hash is another."""

    name: str
    found: Sequence[tuple[Observed, Apart | None]]

    @property
    def wrong(self) -> list[Observed]:
        bad = [one for one, apart in self.found if apart is None or apart.most > LIMIT]
        return list({one.case.id: one for one in bad}.values())

    @property
    def known(self) -> list[Apart]:
        return [apart for _, apart in self.found if apart is not None]

    def measured(self) -> dict[str, Any]:
        """Numbers under this side's name; {} where it has no picture."""
        if not self.found:
            return {}
        most, mean = max((one.most for one in self.known), default=0), mean_of(one.mean for one in self.known)
        return {
            f"{self.name}_pictures": len(self.found),
            f"{self.name}_largest_difference": most,
            f"{self.name}_mean_difference": round(mean, 4),
        }


def pixels(seen: Sequence[Observed], _: Runtime, __: Thresholds) -> Rung:
    """Every side within one grey level; ok only where a side has pictures that the device changes."""
    pictured = [one for one in seen if one.expected.pixels or one.case.images]
    if not pictured:
        return Rung(NAME, NOT_MEASURED, why=NO_PICTURE)
    sent = Side("sent", [pair for one in pictured for pair in compared(one)])
    app, skia = Side("app", told_by_app(pictured)), Side("Skia", seen_by_skia(pictured))
    canvas = Side("android_canvas", drawn_on_canvas(pictured))
    changed = sum(changed_by(source, one.case) for one in pictured for source in one.case.sources)
    measured = {
        "pictures": sum(len(one.case.images) for one in pictured),
        "changed_by_the_device": changed,
        **sent.measured(),
        **skia.measured(),
        **app.measured(),
        **canvas.measured(),
        "tiles": sorted({"×".join(map(str, tile)) for one in pictured for tile in one.expected.tiles}),
        "kinds": {kind: len(ids) for kind, ids in strata([one.case for one in pictured]).items()},
    }
    limit = {f"{side.name}_largest_difference": LIMIT for side in (sent, skia, app) if side.found}
    why = next((reason(side) for side in (sent, app, skia) if side.wrong), "")
    if why:
        return Rung(NAME, BROKEN, measured, limit, why)
    if app.found or (skia.found and changed):
        return Rung(NAME, OK, measured, limit, note=proven(app, skia))
    return Rung(NAME, NOT_MEASURED, measured, limit, not_measured(skia, changed))


# --- the sides -------------------------------------------------------------------------------------------------------


def compared(one: Observed) -> list[tuple[Observed, Apart | None]]:
    """Every sent picture against the expected one."""
    sent = [np.asarray(decoded(image)) for image in one.case.images]
    if len(sent) != len(one.expected.pixels):
        return [(one, None)]
    return [(one, apart(*pair)) for pair in zip(sent, one.expected.pixels, strict=True)]


def seen_by_skia(pictured: Sequence[Observed]) -> list[tuple[Observed, Apart | None]]:
    """Every source as Skia shows it; those that it cannot decode are left out."""
    if unavailable():
        return []
    pairs = [(one, skia_pixels(source.content, one.case.size), expected) for one, source, expected in sources(pictured)]
    return [(one, apart(found, expected)) for one, found, expected in pairs if found is not None]


def told_by_app(pictured: Sequence[Observed]) -> list[tuple[Observed, Apart | None]]:
    """Every picture that the app hands over: as expected, or as Android's software canvas scales the source."""
    found = []
    for one in pictured:
        for told, source, expected in zip(one.handed, one.case.sources, one.expected.pixels, strict=False):
            canvas = on_canvas(source, one.case) if told is not None else None
            if told is not None:
                found.append((one, nearest(told, [expected] if canvas is None else [expected, canvas])))
    return found


def drawn_on_canvas(pictured: Sequence[Observed]) -> list[tuple[Observed, Apart | None]]:
    """For information: how far Android's software canvas, whose weights are sixteenths, is from ours."""
    pairs = [(one, on_canvas(source, one.case), expected) for one, source, expected in sources(pictured)]
    return [(one, apart(found, expected)) for one, found, expected in pairs if found is not None]


def on_canvas(source: Source, case: Case) -> Pixels | None:
    """None where pictures are sent in their own size, or the source is none that we read."""
    if case.size is None:
        return None
    try:
        with Image.open(io.BytesIO(source.content)) as picture:
            return canvas_pixels(flattened(picture, BLACK), case.size)
    except Unreadable:
        return None


def nearest(told: Pixels | str, right: Sequence[Pixels]) -> Apart | None:
    """To the right picture that the app's is nearest to. Of a hash nothing is known but that it is equal."""
    if isinstance(told, str):
        equal = [one for one in right if sha256_rgb(one) == told.lower()]
        return apart(equal[0], equal[0]) if equal else None
    known = [found for one in right if (found := apart(told, one)) is not None]
    return min(known, key=lambda found: found.most, default=None)


def apart(sent: Pixels, expected: Pixels) -> Apart | None:
    """(height, width, 3) each."""
    if sent.shape != expected.shape:
        return None
    difference = np.abs(sent.astype(int) - expected.astype(int))
    highest = difference.max(-1)
    inside = bool((highest[expected.max(-1) > 0] > LIMIT).any())
    return Apart(int(highest.max()), float(difference.mean()), float((highest > LIMIT).mean()), inside)


def sources(pictured: Sequence[Observed]) -> Iterator[tuple[Observed, Source, Pixels]]:
    """Every picture before the device, and what is expected after it."""
    for one in pictured:
        for source, expected in zip(one.case.sources, one.expected.pixels, strict=False):
            yield one, source, expected


def changed_by(source: Source, case: Case) -> bool:
    """Whether the device does more to a picture than pass it on. What is sent in its own size is at least decoded."""
    return case.size is None or changes(source.content, case.size)


def mean_of(values: Iterable[float]) -> float:
    known = list(values)
    return float(np.mean(known)) if known else 0.0


# --- in words --------------------------------------------------------------------------------------------------------

WHOSE = {"sent": "what is sent", "app": "what the app sends", "Skia": "what Skia makes of the source"}
CAUSES = {
    "sent": "the target scales bilinearly without antialiasing, and pictures are sent as PNG; where the data set keeps "
    "its sources, another version of this program made its pictures: label it again",
    "app": "scale bilinearly (Paint.FILTER_BITMAP_FLAG) without antialiasing or mipmaps, the longest side set to the "
    "device's size, upright by the EXIF note, on black; send PNG or raw RGB",
    "Skia": "the pictures that the model was trained on are not the phone's: a fault of this program's scaling, EXIF "
    "or transparency, or of this build of Skia",
}


def reason(side: Side) -> str:
    """Which pictures differ, by how much, where, and what to look at."""
    start = f"{named(side.wrong)}: {WHOSE[side.name]} differs from the pixels that the model was trained on"
    known = [found for found in side.known if found.most > LIMIT]
    if len(side.known) < len(side.found):
        return f"{start} in the number or size of pictures, or in their SHA-256; {CAUSES[side.name]}"
    said = (
        f"{start} by up to {max(one.most for one in known)} of 255 ({mean_of(one.share for one in known):.1%} of them)"
    )
    if not any(one.inside for one in known):
        return f"{said}, in the black margin only: the padding has another colour; the target pads with black"
    return (
        f"{said}, in the picture itself: another filter (antialiased, LANCZOS …), another place, EXIF or transparency "
        f"treated otherwise, or a lossy file; {CAUSES[side.name]}"
    )


def proven(app: Side, skia: Side) -> str:
    """Whom the pixels agree with."""
    return " and ".join(side.name for side in (skia, app) if side.found)


def not_measured(skia: Side, changed: int) -> str:
    """Why nothing independent stands on the other side, and what would."""
    hand = "hand over what the app sends (--app_pixels)"
    if unavailable():
        return f"nothing independent to compare with: {unavailable()}; or {hand}"
    if not skia.found:
        return f"Skia reads none of these files (TIFF, AVIF …); {hand}"
    assert not changed
    return (
        "all pictures have the device's size already, so that any resizer passes them on: keep originals (`rankwise "
        f"label` does), or {hand}"
    )
