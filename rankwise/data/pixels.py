"""From the bytes of a picture to RGB, or a reason why not. `images` adds where the bytes come from.

What a file is, its content says, not its suffix. Nothing is guessed: a file that is cut, moves, or has more pixels than
allowed is refused, and an unknown range of grey (float or 32-bit pixels) too.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

# Without the formats that run other programs (EPS), hold several sizes (ICO) or are documents (PDF).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
UPRIGHT = {  # EXIF orientation → what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)
SQUARE = 0.05  # sides that differ by less count as a square
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Colour = tuple[int, int, int]
_warnings_lock = threading.Lock()  # `catch_warnings` changes the whole process


class Unreadable(Exception):
    """Why bytes are no picture that can be used."""


def picture(stream: BinaryIO, max_pixels: int, background: Colour = WHITE) -> Image.Image:
    """The picture, upright, in RGB, fully decoded.

    background: what transparency is laid on; white as the processors of Qwen-VL and Idefics3 do, black on a phone.
    16-bit grey is scaled to 8 bits; CMYK and palettes are converted. A photograph that carries a second picture (MPO)
    is its first one. Raises Unreadable.
    """
    with _explained():
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise Unreadable("cannot be checked: something in this process set Pillow's LOAD_TRUNCATED_IMAGES")
        image = _header(stream, max_pixels)
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise Unreadable("has several frames or pages; save the one that is meant as a picture of its own")
        image.load()
        return flattened(image, background)


def flattened(image: Image.Image, background: Colour) -> Image.Image:
    """An opened picture in RGB, upright by its EXIF note, transparency on `background`; without metadata, so that
    nothing turns it again. Raises Unreadable where nothing says which value is white."""
    turned = _orientation(image)
    image = _rgb(image, background)
    image = image.transpose(UPRIGHT[turned]) if turned in UPRIGHT else image
    image.info.clear()
    return image


def upright_size(stream: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """(width, height) of what `picture` returns, from the header. Raises Unreadable."""
    with _explained():
        image = _header(stream, max_pixels)
        if image.format == "PNG" and "exif" not in image.info and _mentions_exif(stream):
            image.load()  # a PNG may tell its orientation behind the pixels
        width, height = image.size
        return (height, width) if _orientation(image) in ON_ITS_SIDE else (width, height)


def kind_of(image: Image.Image) -> str:
    """ "tall RGB", "wide L turned" …: of an opened file, from its header."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    shape = "square" if abs(width - height) <= SQUARE * max(width, height) else "wide" if width > height else "tall"
    return f"{shape} {image.mode}{' turned' if turned else ''}"


def is_picture(file: BinaryIO | Path) -> bool:
    """Whether a file begins like a picture that can be read."""
    Image.init()
    try:
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]):
            return True
    except Image.DecompressionBombError:
        return True  # what is wrong with it, its reader says
    except BROKEN:
        return False


def suffix_of(content: bytes) -> str:
    """What a picture file is, by its content: .png, .jpeg, .webp …"""
    with Image.open(io.BytesIO(content)) as image:
        return f".{str(image.format).lower()}"


def _header(stream: BinaryIO, max_pixels: int) -> Image.Image:
    Image.init()
    image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    width, height = image.size
    if width * height > max_pixels:
        raise Unreadable(
            f"has {width} × {height} = {width * height:,} pixels, the limit is {max_pixels:,}; make it smaller"
        )
    if not width * height:
        raise Unreadable(f"has no pixels ({width} × {height})")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for upright. Pillow turns TIFF by itself. EXIF data that cannot be read tell nothing."""
    if image.format == "TIFF":
        return 1
    try:
        # Not the PNG class's own, which decodes first.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except BROKEN:
        return 1


def _mentions_exif(stream: BinaryIO) -> bool:
    position = stream.tell()
    stream.seek(0)
    found = b"eXIf" in stream.read()
    stream.seek(position)
    return found


def _rgb(image: Image.Image, background: Colour) -> Image.Image:
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, background), seen).convert("RGB")
    return _eight_bits(image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: white stays white, and nothing is clipped."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:
        return image.convert("I").point(lambda grey: grey * (255 / 65535) + 0.5).convert("L")
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "float"
        raise Unreadable(f"has {kind} pixels, and nothing says which value is white; save it with 8 or 16 bits")
    return image


@contextmanager
def _explained() -> Iterator[None]:
    """Pillow's complaints as reasons; its warnings (metadata, size) are not for the user: what matters is refused."""
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:
        raise Unreadable(f"is not a picture that Pillow can read (known: {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"is a decompression bomb: {error}") from error
    except BROKEN as error:
        raise Unreadable(f"is broken or cut short ({type(error).__name__}: {error})") from error
