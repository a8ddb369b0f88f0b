"""Skia as the other side of the pixels: the library that decodes, turns and scales pictures on Android.

    file's bytes ── Skia's codec ── its origin's matrix ── drawImageRect, bilinear ──▶ (size, size, 3)

Nothing here is shared with `data/device.py`: the letterbox is computed anew, and the EXIF note is Skia's own reading
(of PNG files, whose note Skia does not read, Pillow's).
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from rankwise.core.geometry import letterbox
from rankwise.device.parity.reference import Pixels
from rankwise.errors import UsageError, need

SYSTEM = "the system libraries libGL and libEGL (Debian, Ubuntu: apt-get install libgl1 libegl1)"


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
    image = decoded(skia, content)
    if image is None:
        return None
    width, height = (size, size) if size else (image.width(), image.height())
    left, top, wide, tall = letterboxed(image.width(), image.height(), size) if size else (0, 0, width, height)
    drawn = surface(skia, width, height, canvas)
    with drawn as onto:
        onto.clear(skia.ColorBLACK if size else skia.ColorWHITE)
        bilinear = skia.SamplingOptions(skia.FilterMode.kLinear)
        onto.drawImageRect(as_bitmap(skia, image, canvas), skia.Rect.MakeXYWH(left, top, wide, tall), bilinear)
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


def decoded(skia: Any, content: bytes) -> Any:
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


def as_bitmap(skia: Any, image: Any, canvas: bool) -> Any:
    """The same pixels in the order that decides which arithmetic draws them."""
    return image.makeColorTypeAndColorSpace(order(skia, canvas), None) if canvas else image


def surface(skia: Any, width: int, height: int, canvas: bool = False) -> Any:
    return skia.Surface.MakeRaster(skia.ImageInfo.Make(width, height, order(skia, canvas), skia.kPremul_AlphaType))


def order(skia: Any, native: bool) -> Any:
    """RGBA or BGRA: the native one of this build of Skia, or the other."""
    own = skia.Surface(1, 1).imageInfo().colorType()
    known = (skia.kRGBA_8888_ColorType, skia.kBGRA_8888_ColorType)
    return own if native else next(one for one in known if one != own)


STEPS = 16  # positions between two pixels
SPAN = 127  # pixels of a line that Skia computes from one start; the rounding of the start shows
Places = NDArray[np.int64]


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
