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
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit
from urllib.request import url2pathname

from filelock import FileLock
from PIL import Image

from rankwise.data.example import Example, View
from rankwise.data.pixels import WHITE, Colour, Unreadable, is_picture, picture, upright_size
from rankwise.errors import DataError
from rankwise.files.atomic import about_to_write, atomic_write, cache

DATA_URL = re.compile(r"data:(?P<type>image/[\w.+-]+)(;[\w-]+=[^;,]*)*;base64,", re.IGNORECASE)
SCHEME = re.compile(r"(?P<name>[a-z][a-z0-9+.-]+)://|(?P<bare>data|file):", re.IGNORECASE)
PIECE = 4096  # bytes


class Refused(Exception):
    """Why a reference cannot be read; `BadImage` adds which one."""


class BadImage(DataError):
    """A picture that can't be used; the message names it and the reason."""


@dataclass(frozen=True)
class ImageReader:
    """Pictures by the references of a data set.

    folder: where relative paths start. beside: folders in which absolute paths may lie as well. allow_outside: paths
    may lead out of all of them (absolute, `..`, links). allow_urls: http(s) URLs of public hosts are fetched, once,
    into the cache; `file:` URLs are read as the paths they name. max_pixels: maximum per picture, checked before it is
    decoded; 60 million is Isaac's own limit. background: what transparency is laid on. All methods raise BadImage.
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
            raise Refused(f"leads out of the image folder {self.folder}, to {real}; if that is meant: --allow-outside")
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
    """The path that a `file:` URL names."""
    parts = urlsplit(reference)
    if parts.netloc not in ("", "localhost"):
        raise Refused(f"is a file URL of another machine ({parts.netloc})")
    return url2pathname(parts.path)


# --- pictures by http(s), fetched once into the cache, from public addresses only -----------------------------------
#
#     url ── hop by hop: resolve, check every address, connect to the one that was checked ──▶ cache/urls/<sha256>
#
# A host name is looked up once per hop and the connection goes to that very address, so that a name which changes its
# answer between the check and the connection (DNS rebinding) gains nothing. Proxies of the environment are not used:
# they would look the name up themselves.

LARGEST = 64 * 2**20  # bytes of one picture
TIMEOUT = 20.0  # seconds to connect, and between two blocks
LONGEST = 120.0  # seconds for one picture, however slowly its blocks arrive
MOST_REDIRECTS = 5
BLOCK = 2**16
SHOWN = 80  # bytes of what is no picture, in a message
REDIRECTS = {301, 302, 303, 307, 308}
HEADERS = {"User-Agent": "rankwise", "Accept": "image/*", "Accept-Encoding": "identity"}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as an IPv6 network reaches them (RFC 6052)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetched(url: str) -> Path:
    """The file of the cache that holds the picture that the URL gave; it is asked once. Raises Refused, also for what
    is no picture: an error page with status 200 is not kept, and asked for again."""
    file = cache() / "urls" / hashlib.sha256(url.encode()).hexdigest()
    if file.is_file() and is_picture(file):
        return file
    about_to_write()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file() or not is_picture(file):
            content = _content(url)
            if not is_picture(io.BytesIO(content)):
                raise Refused(f"is no picture: the server sent {content[:SHOWN].decode('utf-8', 'replace')!r}")
            with atomic_write(file) as temporary:
                temporary.write_bytes(content)
    return file


def _content(url: str) -> bytes:
    deadline = time.monotonic() + LONGEST
    for _ in range(MOST_REDIRECTS + 1):
        connection, target = _connection(url)
        try:
            connection.request("GET", target, headers=HEADERS)
            answer = connection.getresponse()
            location = answer.getheader("Location")
            if answer.status not in REDIRECTS or not location:
                return _body(answer, deadline)
            url = urljoin(url, location)
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"could not be fetched ({type(error).__name__}: {error})") from error
        finally:
            connection.close()
    raise Refused(f"is redirected more than {MOST_REDIRECTS} times")


def _body(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    if answer.status != 200:
        raise Refused(f"could not be fetched: the server answered {answer.status} {answer.reason}")
    blocks, arrived = [], 0
    while block := answer.read(BLOCK):
        blocks.append(block)
        arrived += len(block)
        if arrived > LARGEST:
            raise Refused(f"has more than {LARGEST:,} bytes")
        if time.monotonic() > deadline:
            raise Refused(f"did not arrive within {LONGEST:.0f} seconds")
    if answer.length:
        raise Refused(f"was cut: {answer.length:,} bytes did not arrive")
    return b"".join(blocks)


def _connection(url: str) -> tuple[http.client.HTTPConnection, str]:
    """A connection to the checked address, and what to ask it for."""
    parts = _checked(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    assert parts.hostname
    address = public_address(parts.hostname, port)
    kind = _PinnedTls if parts.scheme == "https" else _Pinned
    query = f"?{parts.query}" if parts.query else ""
    return kind(parts.hostname, port, address), (parts.path or "/") + query


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise Refused(f"is no URL ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(f"leads to {url!r:.80}, which is no http(s) URL")
    if parts.username or parts.password:
        raise Refused("carries a user name or password; pictures are fetched without")
    if not url.isascii() or any(character <= " " for character in url):
        raise Refused("has characters that a URL must not have; percent-encode them")
    return parts


def public_address(host: str, port: int) -> str:
    """An address of the host. Refused unless all its addresses are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Refused(f"could not be fetched: the host {host} is not known ({error})") from error
    addresses = [str(entry[4][0]) for entry in found]
    inside = [address for address in addresses if not is_public(address)]
    if inside:
        raise Refused(f"leads to {host} at {inside[0]}, which is no public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's: not private, loopback, link-local, multicast or reserved."""
    ip = _unwrapped(ipaddress.ip_address(address.split("%")[0]))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_loopback)


def _unwrapped(ip: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it stands for one."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


class _Pinned(http.client.HTTPConnection):
    """Connects to an address that was checked, and speaks to the host of the URL."""

    def __init__(self, host: str, port: int, address: str) -> None:
        super().__init__(host, port, timeout=TIMEOUT)
        self.address = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), TIMEOUT)


class _PinnedTls(_Pinned):
    """The same by https: the certificate must be the host's."""

    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
