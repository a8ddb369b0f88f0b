"""Where a sample's pictures come from: a path below one folder, a data URL or, if allowed, the internet.

    reader = ImageReader(Path("data/images"))
    reader.open("train/17.jpg")                      # RGB, upright, fully decoded
    reader.open("data:image/png;base64,iVBORw0…")
    reader.open("../secret.png")                     # BadImage: it leads out of the folder

A data set is input from somewhere else: by default it can name nothing outside its folder and call nobody.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import Image

from rankwise.data.example import Example, View
from rankwise.data.pixels import WHITE, Colour, Unreadable, picture, upright_size
from rankwise.data.remote import Refused, fetched
from rankwise.errors import DataError

DATA_URL = re.compile(r"data:(?P<type>image/[\w.+-]+)(;[\w-]+=[^;,]*)*;base64,", re.IGNORECASE)
SCHEME = re.compile(r"(?P<name>[a-z][a-z0-9+.-]+)://|(?P<bare>data|file):", re.IGNORECASE)


PIECE = 4096  # bytes


class BadImage(DataError):
    """A picture that can't be used; the message names it and the reason."""


@dataclass(frozen=True)
class ImageReader:
    """Pictures by the references of a data set.

    folder: where relative paths start. beside: folders in which absolute paths may lie as well. allow_outside: paths
    may lead out of all of them (absolute, `..`, links). allow_urls: http(s) URLs of public hosts
    are fetched, once, into the cache; `file:` URLs are read as the paths they name.
    max_pixels: more in one picture are refused before it is decoded; 60 million is Isaac's own limit. background: what
    transparency is laid on.

    All methods raise BadImage.
    """

    folder: Path
    allow_outside: bool = False
    allow_urls: bool = False
    max_pixels: int = 60_000_000
    background: Colour = WHITE
    beside: tuple[Path, ...] = ()

    def also(self, folder: Path) -> ImageReader:
        """The same, for absolute paths into this folder as well."""
        return replace(self, beside=(*self.beside, folder))

    def open(self, reference: str) -> Image.Image:
        """The picture in RGB, upright (EXIF), fully decoded. See `pixels.picture`."""
        with self._stream(reference) as stream:
            return picture(stream, self.max_pixels, self.background)

    def content(self, reference: str) -> bytes:
        """The file as it is stored."""
        with self._stream(reference) as stream:
            return stream.read()

    def size(self, reference: str) -> tuple[int, int]:
        """(width, height) of what `open` returns, from the header alone."""
        with self._stream(reference) as stream:
            return upright_size(stream, self.max_pixels)

    def digest(self, reference: str) -> str:
        """SHA-256 of the file's content, in hexadecimal."""
        with self._stream(reference) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]

    def mark(self, reference: str) -> bytes:
        """Size and a piece from the middle of the file: enough to tell pictures apart without reading all of them."""
        with self._stream(reference) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - PIECE) // 2)
            return size.to_bytes(8, "little") + stream.read(PIECE)

    @contextmanager
    def _stream(self, reference: str) -> Iterator[BinaryIO]:
        try:
            with self._opened(reference) as stream:
                yield stream
        except (Unreadable, Refused) as reason:
            raise BadImage(f"image {shown(reference)} {reason}") from reason
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise BadImage(f"image {shown(reference)} cannot be read: {error}") from error

    def _opened(self, reference: str) -> BinaryIO:
        scheme = SCHEME.match(reference)
        if scheme is None:
            return self._file(reference)
        name = (scheme["name"] or scheme["bare"]).lower()
        if name == "data":
            return io.BytesIO(_embedded(reference))
        if name not in ("http", "https", "file"):
            raise Refused(f"is a {name} URL; paths, data URLs and http(s) URLs can be read")
        if not self.allow_urls:
            raise Refused("is a URL, and URLs are refused; pass --allow-urls, or a copy of the file below the folder")
        return self._file(_local(reference)) if name == "file" else fetched(reference).open("rb")

    def _file(self, path: str) -> BinaryIO:
        root = os.path.realpath(self.folder)
        real = os.path.realpath(os.path.join(root, path))
        roots = [root, *(os.path.realpath(folder) for folder in self.beside)]
        if not self.allow_outside and all(os.path.commonpath([each, real]) != each for each in roots):
            raise Refused(
                f"leads out of the image folder {self.folder}, to {real}; pass --allow-outside if that is meant"
            )
        if not os.path.exists(real):
            raise Refused(f"is not there: no file {real} (paths start in --image_folder, {self.folder})")
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise Refused(f"is no file: {real}")
        if not os.path.getsize(real):
            raise Refused(f"is empty: {real} has no bytes")
        return open(real, "rb")


@dataclass(frozen=True)
class Placed(View):
    """Samples whose relative paths start in a folder of their own, as absolute ones."""

    whole: Sequence[Example]
    folder: Path

    def __len__(self) -> int:
        return len(self.whole)

    def made(self, index: int) -> Example:
        example, root = self.whole[index], os.path.realpath(self.folder)
        images = (each if SCHEME.match(each) else os.path.join(root, each) for each in example.images)
        return replace(example, images=tuple(images))


def shown(reference: str) -> str:
    """A reference as messages name it: a data URL by its beginning."""
    return reference if len(reference) <= 200 else f"{reference[:60]}… ({len(reference):,} characters)"


def _embedded(reference: str) -> bytes:
    """The bytes of a data URL."""
    head = DATA_URL.match(reference)
    if head is None:
        raise Refused("is a data URL, but not data:image/…;base64,…")
    try:
        content = base64.b64decode(unquote_to_bytes(reference[head.end() :].strip()), validate=True)
    except binascii.Error as error:
        raise Refused(f"is not valid base64 ({error})") from error
    if not content:
        raise Refused("is empty: the data URL holds no bytes")
    return content


def _local(reference: str) -> str:
    parts = urlsplit(reference)
    if parts.netloc not in ("", "localhost"):
        raise Refused(f"is a file URL of another machine ({parts.netloc})")
    return url2pathname(parts.path)
