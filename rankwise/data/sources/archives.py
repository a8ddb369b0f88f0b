"""Official archives, opened with care: only the named files come out, into a folder of our own.

    data.tar.bz2 ── unpacked(archive, ["dev.jsonl", "dev.tables.jsonl", "dev.db"]) ──▶ archives/<print>/dev.jsonl …

An archive is input like any other: one that names a place outside (`../x`, `/x`, links), or that would unpack to far
more than any of our data sets, is refused whole before a byte is written.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any
from zlib import error as ZlibError

from filelock import FileLock

from rankwise.errors import DataError, need
from rankwise.files.atomic import atomic_folder, fingerprint

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with atomic_folder(folder) as temporary, _readable(archive):
                _unpack(archive, frozenset(wanted), temporary)
    return folder


def cache() -> Path:
    """Where unpacked archives are kept; nothing there is needed once it is gone."""
    own, general = os.environ.get("RANKWISE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(general or "~/.cache").expanduser() / "rankwise"


def _unpack(archive: Path, wanted: frozenset[str], folder: Path) -> None:
    name = archive.name.lower()
    read = _seven_zip if name.endswith(".7z") else _zip if name.endswith(".zip") else _tar
    read(archive, wanted, folder)


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
