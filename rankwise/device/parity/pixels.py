"""Images as in training, compared with the device's preprocessing: four other sides.

    sent             what this client sends, made anew of the source
    Skia             the source as Skia decodes, turns and scales it, where it imports
    app              what the app says it sent: PNG files, or SHA-256 of the raw RGB
    android_canvas   Android's software canvas, whose weights are sixteenths: accepted of an app, else for information

    FOLDER/00-device.png …            an app's pictures, named as the case's picture
    FOLDER/sha256_rgb.json            {"00-device.png": "5b0c…"}

Skia is the library that decodes, turns and scales pictures on Android. Its side shares nothing with `data/device.py`:
the letterbox is computed anew, and the EXIF note is Skia's own reading (of PNG files, whose note Skia does not read,
Pillow's).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from rankwise.core.geometry import letterbox
from rankwise.data.pixels import BLACK, Unreadable, flattened
from rankwise.device.parity.cases import Case, SourceImage, decoded
from rankwise.device.parity.reference import Observed, Pixels, named
from rankwise.errors import DataError, UsageError, need
from rankwise.files.atomic import read_if_there

HASHES = "sha256_rgb.json"
MENTIONED = 3
LIMIT = 1  # of 255: the same sum, rounded in another order
SYSTEM = "the system libraries libGL and libEGL (Debian, Ubuntu: apt-get install libgl1 libegl1)"


@dataclass(frozen=True)
class Apart:
    """Two pictures of one size: largest and mean difference of a value, share of pixels that differ, and whether they
    do so in the picture itself, or in its black margin only."""

    most: int
    mean: float
    share: float
    inside: bool


Compared = list[tuple[Observed, Apart | None]]


@dataclass(frozen=True)
class Side:
    """Another side's version of the pictures. found: what it has, picture by picture; None where the number, the size
    or the hash is another."""

    name: str
    found: Compared

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
        mean = float(np.mean([one.mean for one in self.known] or [0.0]))
        return {
            f"{self.name}_pictures": len(self.found),
            f"{self.name}_largest_difference": max((one.most for one in self.known), default=0),
            f"{self.name}_mean_difference": round(mean, 4),
        }


def sent_by_us(pictured: Sequence[Observed]) -> Side:
    """Every sent picture against the expected one."""
    found: Compared = []
    for one in pictured:
        sent = [np.asarray(decoded(image)) for image in one.case.images]
        same = len(sent) == len(one.expected.pixels)
        pairs = zip(sent, one.expected.pixels, strict=False)
        found += [(one, apart(*pair)) for pair in pairs] if same else [(one, None)]
    return Side("sent", found)


def seen_by_skia(pictured: Sequence[Observed]) -> Side:
    """Every source as Skia renders it; those that it cannot decode are left out."""
    return Side(
        "Skia", [] if unavailable() else remade(pictured, lambda one, case: skia_pixels(one.content, case.size))
    )


def drawn_on_canvas(pictured: Sequence[Observed]) -> Side:
    return Side("android_canvas", remade(pictured, on_canvas))


def told_by_app(pictured: Sequence[Observed]) -> Side:
    """Every picture that the app hands over: as expected, or as Android's software canvas scales the source."""
    found: Compared = []
    for one in pictured:
        for told, source, expected in zip(one.handed, one.case.sources, one.expected.pixels, strict=False):
            if told is not None:
                canvas = on_canvas(source, one.case)
                found.append((one, nearest(told, [expected] if canvas is None else [expected, canvas])))
    return Side("app", found)


def remade(pictured: Sequence[Observed], make: Callable[[SourceImage, Case], Pixels | None]) -> Compared:
    """Every source as `make` shows it against what is expected of it; those of which it makes None are left out."""
    pairs = [
        (one, make(source, one.case), expected)
        for one in pictured
        for source, expected in zip(one.case.sources, one.expected.pixels, strict=False)
    ]
    return [(one, apart(found, expected)) for one, found, expected in pairs if found is not None]


def nearest(told: Pixels | str, right: Sequence[Pixels]) -> Apart | None:
    """Difference to the nearest expected image. For a hash only equality is known."""
    if isinstance(told, str):
        return Apart(0, 0.0, 0.0, False) if told.lower() in map(sha256_rgb, right) else None
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


def sha256_rgb(pixels: Pixels) -> str:
    """Of the bytes R G B, row by row from the top left: what an app can compute without a PNG library."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()).hexdigest()


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
    share = np.mean([one.share for one in known])
    said = f"{start} by up to {max(one.most for one in known)} of 255 ({share:.1%} of them)"
    if not any(one.inside for one in known):
        return f"{said}, in the black margin only: the padding has another colour; the target pads with black"
    return (
        f"{said}, in the picture itself: another filter (antialiased, LANCZOS …), another place, EXIF or transparency "
        f"treated otherwise, or a lossy file; {CAUSES[side.name]}"
    )


def not_measured(skia: Side) -> str:
    """Why nothing independent stands on the other side, and what would: a client compared with itself proves nothing,
    nor does a picture that every resizer passes on."""
    hand = "hand over what the app sends (--app_pixels)"
    if unavailable():
        return f"nothing independent to compare with: {unavailable()}; or {hand}"
    if not skia.found:
        return f"Skia reads none of these files (TIFF, AVIF …); {hand}"
    return (
        "all pictures have the device's size already, so that any resizer passes them on: keep originals (`rankwise "
        f"label` does), or {hand}"
    )


# --- the app ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AppPixels:
    """A folder of them. hashes: by name, of pictures without a file."""

    folder: Path
    hashes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path | str, cases: Iterable[Case]) -> AppPixels:
        """DataError where the folder has none of the cases' pictures."""
        place = Path(folder)
        found = cls(place, read_if_there(place / HASHES))
        names = [source.name for case in cases for source in case.sources]
        if not any(name in found.hashes or (place / name).is_file() for name in names):
            wanted = ", ".join(names[:MENTIONED]) or "no case has a picture"
            raise DataError(f"{place}: no image from the app; expected PNG files or {HASHES} with {wanted} …")
        return found

    def of(self, source: SourceImage) -> Pixels | str | None:
        """(height, width, 3), or a hash; None where the app gives neither."""
        file = self.folder / source.name
        return np.asarray(decoded(file.read_bytes())) if file.is_file() else self.hashes.get(source.name)


# --- Skia ------------------------------------------------------------------------------------------------------------


@cache
def unavailable() -> str:
    """Why Skia cannot be asked here; "" where it can."""
    try:
        need("skia", extra="device")
    except UsageError as error:
        return f"{error}, and takes {SYSTEM}"
    return ""


def skia_pixels(content: bytes, size: int | None, canvas: bool = False) -> Pixels | None:
    """A picture file as Skia shows it: (size, size, 3) letterboxed on black, or on white in its own size for None. None
    for a file that Skia does not decode (TIFF, AVIF …).

    canvas: the arithmetic of Skia's native 32-bit bitmaps, weights in sixteenths, which Android's software canvas has;
    else that of all other bitmaps, weights as floats.
    """
    skia = need("skia", extra="device")
    image = skia_image(skia, content)
    if image is None:
        return None
    width, height = (size, size) if size else (image.width(), image.height())
    left, top, wide, tall = letterboxed(image.width(), image.height(), size) if size else (0, 0, width, height)
    drawn = surface(skia, width, height, canvas)
    bitmap = image.makeColorTypeAndColorSpace(order(skia, canvas), None) if canvas else image
    with drawn as onto:
        onto.clear(skia.ColorBLACK if size else skia.ColorWHITE)
        bilinear = skia.SamplingOptions(skia.FilterMode.kLinear)
        onto.drawImageRect(bitmap, skia.Rect.MakeXYWH(left, top, wide, tall), bilinear)
    found: Pixels = drawn.toarray(colorType=skia.kRGBA_8888_ColorType)[..., :3]
    return found


def letterboxed(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in single precision, as Kotlin's Float computes it: sides cut to whole pixels, the
    longest one `size`."""
    wide, tall = np.float32(width), np.float32(height)
    scale = min(np.float32(size) / wide, np.float32(size) / tall)
    across = size if width >= height else max(1, int(wide * scale))
    down = size if height >= width else max(1, int(tall * scale))
    return (size - across) // 2, (size - down) // 2, across, down


def skia_image(skia: Any, content: bytes) -> Any:
    """The file as a premultiplied bitmap, upright; None where no codec takes it."""
    data = skia.Data.MakeWithCopy(content)  # the codec reads it and does not keep it alive
    try:
        codec = skia.Codec.MakeFromData(data)
    except RuntimeError:
        return None
    size = codec.dimensions()
    info = skia.ImageInfo.Make(size.width(), size.height(), skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType)
    pixels = np.zeros((size.height(), size.width(), 4), np.uint8)
    if codec.getPixels(info, pixels, pixels.strides[0]) != skia.Codec.Result.kSuccess:
        return None
    image = skia.Image.MakeRasterCopy(skia.Pixmap(info, pixels, pixels.strides[0]))
    return turned(skia, image, origin_of(skia, codec, content))


def origin_of(skia: Any, codec: Any, content: bytes) -> int:
    """EXIF's orientation, 1 for upright."""
    if codec.getEncodedFormat() != skia.EncodedImageFormat.kPNG:
        return int(codec.getOrigin())
    with Image.open(io.BytesIO(content)) as picture:
        note = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return note if note in range(1, 9) else 1


def turned(skia: Any, image: Any, origin: int) -> Any:
    if origin == 1:
        return image
    width, height = (image.height(), image.width()) if origin >= 5 else (image.width(), image.height())
    upright = surface(skia, width, height)
    with upright as onto:
        onto.concat(skia.EncodedOriginToMatrix(skia.EncodedOrigin(origin), width, height))
        onto.drawImage(image, 0, 0)
    return upright.makeImageSnapshot()


def surface(skia: Any, width: int, height: int, canvas: bool = False) -> Any:
    return skia.Surface.MakeRaster(skia.ImageInfo.Make(width, height, order(skia, canvas), skia.kPremul_AlphaType))


def order(skia: Any, native: bool) -> Any:
    """RGBA or BGRA, which decides the arithmetic that draws: the native one of this build of Skia, or the other."""
    own = skia.Surface(1, 1).imageInfo().colorType()
    known = (skia.kRGBA_8888_ColorType, skia.kBGRA_8888_ColorType)
    return own if native else next(one for one in known if one != own)


# --- Android's software canvas ---------------------------------------------------------------------------------------
#
# Skia's integer arithmetic for its native 32-bit bitmaps: positions in sixteenths of a pixel, four neighbours, ÷ 256.
# Bit for bit what Skia draws (tests/data/test_skia_pixels.py). Our own rule (`data/device.py`) has exact weights; on
# photos it is within a level on the average and a dozen levels at an edge. An app's pixels may be either.

STEPS = 16  # positions between two pixels
SPAN = 127  # pixels of a line that Skia computes from one start; the rounding of the start shows
Places = NDArray[np.int64]


def on_canvas(source: SourceImage, case: Case) -> Pixels | None:
    """None where pictures are sent in their own size, or the source is none that we read."""
    if case.size is None:
        return None
    try:
        with Image.open(io.BytesIO(source.content)) as picture:
            return canvas_pixels(flattened(picture, BLACK), case.size)
    except Unreadable:
        return None


def canvas_pixels(image: Image.Image, size: int) -> Pixels:
    """A picture in RGB in a black square of `size` pixels: (size, size, 3)."""
    place = letterbox(*image.size, size)
    columns = sampled(image.width, place.width, place.left, SPAN)
    rows = sampled(image.height, place.height, place.top, 1)
    square = np.zeros((size, size, 3), np.uint8)
    inside = square[place.top : place.top + place.height, place.left : place.left + place.width]
    inside[:] = mixed(np.asarray(image, np.int64), rows, columns)
    return square


def sampled(length: int, scaled: int, start: int, span: int) -> Places:
    """(scaled,) positions of the scaled pixels in the line of `length`, in sixteenths, in Skia's single precision."""
    step = np.float32(1) / (np.float32(scaled) / np.float32(length))
    offset = -np.float32(start) * step
    number = np.arange(scaled)
    first = number - number % span
    begin = (np.float32(start) + first.astype(np.float32) + np.float32(0.5)) * step + offset
    return np.floor(STEPS * (begin.astype(np.float64) + (number % span) * float(step) - 0.5)).astype(np.int64)


def mixed(pixels: Places, rows: Places, columns: Places) -> Places:
    """The four neighbours of every place, weighted."""
    (above, below), (left, right) = neighbours(rows, len(pixels)), neighbours(columns, pixels.shape[1])
    down, across = (rows % STEPS)[:, None, None], (columns % STEPS)[None, :, None]
    both = down * across
    upper, lower = pixels[above], pixels[below]
    return (
        upper[:, left] * (256 - STEPS * (down + across) + both)
        + upper[:, right] * (STEPS * across - both)
        + lower[:, left] * (STEPS * down - both)
        + lower[:, right] * both
    ) >> 8


def neighbours(places: Places, length: int) -> tuple[Places, Places]:
    first = places // STEPS
    return np.clip(first, 0, length - 1), np.clip(first + 1, 0, length - 1)
