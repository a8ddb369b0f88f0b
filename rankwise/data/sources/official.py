"""Official files: download them on request (`--download`), unpack their archives with care.

    Download(url, sha256, size) ── fetch(download, folder) ──▶ folder/corpus.7z, checked
    data.tar.bz2 ── unpacked(archive, ["dev.jsonl", "dev.tables.jsonl", "dev.db"]) ──▶ archives/<print>/dev.jsonl …

A transfer that is cut goes on where it stopped, within a run and in the next one (`.corpus.7z.part`). What arrives
with another checksum is deleted, and an error: those bytes are not the data set.

An archive is input like any other: one that names a place outside (`../x`, `/x`, links), or that would unpack to far
more than any of our data sets, is refused whole before a byte is written.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
import time
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.parse import urlsplit
from zlib import error as ZlibError

from filelock import FileLock

from rankwise.errors import DataError, ServiceError, need
from rankwise.files.atomic import about_to_write, atomic_folder, cache, explained, fingerprint, sha256

LARGEST = 4 * 2**30  # bytes that an archive may unpack to; MultiNLI, the largest one known, has about 1.2 GiB
MOST_MEMBERS = 10_000
SUFFIXES = (".7z", ".zip", ".tar", ".tar.bz2", ".tar.gz", ".tgz", ".tar.xz")


@dataclass(frozen=True)
class Member:
    """A file or folder in an archive; `size` in bytes, as stated there. plain: neither folder nor link nor device."""

    name: str
    size: int
    plain: bool

    @property
    def base(self) -> str:
        return PurePosixPath(self.name).name


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def unpacked(archive: Path, wanted: Collection[str]) -> Path:
    """A folder with those of the `wanted` file names that the archive holds, whatever folders they are in there.

    The folder is kept in the cache ($RANKWISE_CACHE, else ~/.cache/rankwise) under the archive's fingerprint, so that
    an archive is opened once. DataError for an archive that is broken, hostile, or has none of the names.
    """
    key = hashlib.sha256("\n".join([fingerprint(archive), *sorted(wanted)]).encode()).hexdigest()[:16]
    return unpacked_into(archive, wanted, cache() / "archives" / key)


def unpacked_into(archive: Path, wanted: Collection[str], folder: Path) -> Path:
    """`unpacked` into a folder that is not there yet; it appears whole or not at all."""
    if not folder.is_dir():
        about_to_write()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            name = archive.name.lower()
            read = _seven_zip if name.endswith(".7z") else _zip if name.endswith(".zip") else _tar
            with atomic_folder(folder) as temporary, _readable(archive):
                read(archive, frozenset(wanted), temporary)
    return folder


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    """What the libraries raise about a broken archive (bz2: an OSError without a number), as a DataError."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, ZlibError, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); is the download complete?") from error
    except OSError as error:
        if error.errno is not None:  # a full disk, a missing permission: not the archive's fault
            raise
        raise DataError(f"{archive}: cannot be unpacked ({error}); is the download complete?") from error


# --- what may come out -------------------------------------------------------------------------------------------


def _checked(archive: Path, members: Iterator[Member], wanted: frozenset[str]) -> list[Member]:
    """The wanted members. DataError at the first member that leads outside, and once the whole gets too large."""
    chosen: dict[str, Member] = {}
    total = 0
    for count, member in enumerate(members, 1):
        total += member.size
        _refuse_outside(archive, member)
        if total > LARGEST or count > MOST_MEMBERS:
            raise DataError(
                f"{archive}: would unpack to more than {LARGEST / 2**30:g} GiB or {MOST_MEMBERS:,} files; that is no "
                "data set of ours. If you trust it, unpack it yourself and pass the folder"
            )
        if member.base in wanted and not member.name.startswith("__MACOSX/"):
            if not member.plain:
                raise DataError(f"{archive}: {member.name} is not a plain file; the archive is refused")
            if member.base in chosen:
                raise DataError(f"{archive}: has {member.base} twice ({chosen[member.base].name}, {member.name})")
            chosen[member.base] = member
    if not chosen:
        raise DataError(f"{archive}: holds none of {', '.join(sorted(wanted))}")
    return list(chosen.values())


def _refuse_outside(archive: Path, member: Member) -> None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0]:
        raise DataError(f"{archive}: the member {member.name!r} leads outside the archive; it is refused whole")


def _copy(source: IO[bytes], target: Path, member: Member) -> None:
    """At most as many bytes as were declared: a member that holds more is a trap, one that holds fewer is cut."""
    left = member.size
    with target.open("wb") as file:
        while left and (block := source.read(min(left, 2**20))):
            file.write(block)
            left -= len(block)
    if left or source.read(1):
        raise DataError(f"{member.name}: is not of the size that the archive states; it is refused")


# --- the three kinds ---------------------------------------------------------------------------------------------


def _tar(archive: Path, wanted: frozenset[str], folder: Path) -> None:
    with tarfile.open(archive) as file:
        headers: dict[str, tarfile.TarInfo] = {}
        for member in _checked(archive, _tar_members(file, headers, folder), wanted):
            file.extract(headers[member.name].replace(name=member.base), folder, filter="data")


def _tar_members(file: tarfile.TarFile, headers: dict[str, tarfile.TarInfo], folder: Path) -> Iterator[Member]:
    for header in file:
        headers[header.name] = header
        tarfile.data_filter(header, str(folder))  # raises for links and names that lead outside, and for devices
        yield Member(header.name, header.size, header.isreg())


def _zip(archive: Path, wanted: frozenset[str], folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        headers = {header.filename: header for header in file.infolist()}
        members = (Member(name, header.file_size, _plain(header)) for name, header in headers.items())
        for member in _checked(archive, members, wanted):
            with file.open(headers[member.name]) as source:
                _copy(source, folder / member.base, member)


def _plain(header: zipfile.ZipInfo) -> bool:
    """Unix keeps the kind of a file in the upper half of the attributes; 0o10 is a plain one, 0 says nothing."""
    return not header.is_dir() and (header.external_attr >> 28) in (0, 0o10)


def _seven_zip(archive: Path, wanted: frozenset[str], folder: Path) -> None:
    """By named targets: py7zr refuses to extract everything from the official corpus.7z, for its first member `.`."""
    py7zr: Any = need("py7zr", extra="data")
    errors = py7zr.exceptions
    broken = (errors.ArchiveError, errors.PasswordRequired, errors.AbsolutePathError, lzma.LZMAError)
    try:
        with py7zr.SevenZipFile(archive, max_extract_size=LARGEST) as file, TemporaryDirectory(dir=folder) as inside:
            listed = file.list()
            members = (Member(i.filename, i.uncompressed, not i.is_directory and not i.is_symlink) for i in listed)
            chosen = _checked(archive, members, wanted)
            file.extract(inside, targets=[member.name for member in chosen])
            for member in chosen:
                os.replace(Path(inside) / member.name, folder / member.base)
    except broken as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); is the download complete?") from error


ATTEMPTS = 5
WAIT = 1.0  # seconds before the second attempt; doubled before each later one
TIMEOUT = (10, 60)  # seconds to connect, and between two blocks
BLOCK = 2**16  # bytes; at most so many are lost when a transfer is cut
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Download:
    """One official file. sha256 of its content, in hexadecimal; size in bytes."""

    url: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


def fetch(download: Download, folder: Path) -> Path:
    """The file in the folder, fetched unless it is there; checked either way.

    DataError where the content is not the official one: a fetched file is deleted, one that was there before is left
    alone. ServiceError where the file cannot be had. Several processes may ask at once: one fetches.
    """
    pooch: Any = need("pooch", extra="data")
    about_to_write()
    file = folder / download.name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{download.name}.lock"), explained(file):
        if file.exists():
            _check_present(file, download)
            return file
        pooch.get_logger().setLevel("WARNING")
        try:
            pooch.retrieve(
                download.url,
                known_hash=f"sha256:{download.sha256}",
                fname=file.name,
                path=folder,
                downloader=Resuming(download, folder / f".{download.name}.part"),
            )
        except ValueError as error:
            raise DataError(
                f"{download.url}: the downloaded file has not the checksum of the official {download.name} "
                f"({download.sha256[:16]}…) and was deleted; get the file from elsewhere and put it into {folder}"
            ) from error
    return file


def _check_present(file: Path, download: Download) -> None:
    if file.stat().st_size != download.size or sha256(file) != download.sha256:
        raise DataError(
            f"{file} is not the official file (its sha256 is not {download.sha256[:16]}…), and --download overwrites "
            "nothing: move it away, or leave --download out to read it as it is"
        )


@dataclass
class Resuming:
    """A downloader for pooch that keeps what has arrived in `part` and asks for the rest only."""

    download: Download
    part: Path

    def __call__(self, url: str, output_file: str | Path, pooch: Any) -> None:
        """Fetch into `output_file`. Raises ServiceError after ATTEMPTS; `part` then stays for the next run."""
        requests: Any = need("requests", extra="data")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                self._continue(requests, url)
            except requests.exceptions.RequestException as error:
                reason = str(error)
                status = getattr(error.response, "status_code", None)
                if status is not None and status not in TRY_AGAIN:
                    break
                continue
            if self._arrived() >= self.download.size:
                self.part.replace(output_file)
                return
            reason = "the transfer was cut"
        raise ServiceError(
            f"{url} could not be fetched ({reason}); {self._arrived():,} of {self.download.size:,} bytes have arrived. "
            "Run it again to go on from there, or fetch the file in another way and put it into "
            f"{self.part.parent}"
        )

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, requests: Any, url: str) -> None:
        """One request for what is missing, appended to `part`; a server that knows no ranges sends all of it again."""
        start = self._arrived()
        # Compressed on the way, a range would be one of other bytes.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416:  # more has arrived than there is: nothing of it can be right
                self.part.unlink()
                return
            answer.raise_for_status()
            blocks = answer.iter_content(BLOCK)
            first = next(blocks, b"")
            if answer.status_code != 206:
                refuse_error_page(requests, answer, first, self.download.name)
            with self.part.open("ab" if answer.status_code == 206 else "wb") as file:
                for block in self._no_more_than_expected(chain([first], blocks), file.tell()):
                    file.write(block)

    def _no_more_than_expected(self, blocks: Iterable[bytes], arrived: int) -> Iterator[bytes]:
        """Blocks up to one beyond the known size: the checksum will refuse it, and an endless answer ends."""
        for block in blocks:
            yield block
            arrived += len(block)
            if arrived > self.download.size:
                return


def refuse_error_page(requests: Any, answer: Any, first: bytes, name: str) -> None:
    """An error page with status 200 is no part of a file: nothing of it is kept, and the file is asked for again. No
    official file begins like a page."""
    kind = answer.headers.get("Content-Type", "")
    told = kind.startswith("application/json") and not name.endswith(".json")
    if told or kind.startswith("text/html") or first.lstrip().startswith(b"<"):
        raise requests.exceptions.RequestException(f"the server sent a page that is not the file: {first[:80]!r}")
