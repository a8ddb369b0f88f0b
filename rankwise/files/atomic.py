"""Files written whole or not at all, strict JSON, and fingerprints. Every stage's output passes through here.

with atomic_write(out / "ranks.csv") as temporary:
    table.to_csv(temporary)          # bears its final name only once it is complete and on the disk
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rankwise.errors import DataError, RankwiseError, UsageError
from rankwise.options.field import RepeatedName, unique

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE_TEXTS = ("No space left", "os error 28", "Disk quota exceeded", "os error 122")
UNWRITABLE = (NotADirectoryError, FileExistsError, PermissionError, IsADirectoryError, FileNotFoundError)
WHOLE = 64 * 2**20
SAMPLES, SAMPLE_BYTES = 256, 16 * 2**10


class FirstWrite(BaseException):
    """Where a rehearsal ends: the command would now write. No Exception: nothing may take it for an error."""


_rehearsing = ContextVar("rehearsing", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Run a block up to its first write: what it refuses before that, it refuses here, and nothing is made."""
    token = _rehearsing.set(True)
    try:
        yield
    except FirstWrite:
        pass
    finally:
        _rehearsing.reset(token)


def rehearsing() -> bool:
    """Whether this is a dry run, which creates, locks and downloads nothing."""
    return _rehearsing.get()


def about_to_write() -> None:
    """Call before anything is created or downloaded, and before what takes long (weights are loaded, spectra measured);
    ends a dry run."""
    if _rehearsing.get():
        raise FirstWrite


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` once the block has written it.

    The temporary keeps the suffix (writers choose formats by it). It is flushed to the disk before the
    rename and the folder after it; when the block fails it is removed and the old file stays as it was.
    """
    with atomic_files(Path(path)) as (temporary,):
        yield temporary


@contextmanager
def atomic_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """`atomic_write` for files that belong together: none is renamed before all are safely on the disk."""
    about_to_write()
    temporaries = tuple(_beside(path, "tmp") for path in paths)
    try:
        with explained(paths[0]):
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            yield temporaries
            for temporary in temporaries:
                as_created(temporary)
                flush(temporary)
            for temporary, path in zip(temporaries, paths, strict=True):
                os.replace(temporary, path)
            for folder in {path.parent for path in paths}:
                flush(folder)
    finally:
        for temporary in temporaries:
            if os.path.lexists(temporary):
                temporary.unlink()


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, and rename it to `path` once the block has filled it.

    A folder that already has the name is replaced with everything in it: it is moved aside first, moved back
    if the rename fails, and deleted last. When the block fails, it stays as it was.
    """
    about_to_write()
    path = Path(path)
    temporary = _beside(path, "tmp")
    try:
        with explained(path), named(path, temporary):
            temporary.mkdir(parents=True)
            yield temporary
            for entry in sorted(temporary.rglob("*")):
                if entry.is_file():
                    as_created(entry)
                flush(entry)
            flush(temporary)
            _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what had it is deleted only after that has reached the disk."""
    if not path.exists():
        os.replace(new, path)
        flush(path.parent)
        return
    aside = _beside(path, "old")
    os.replace(path, aside)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(aside, path)
        raise
    flush(path.parent)
    shutil.rmtree(aside)


def _beside(path: Path, role: str) -> Path:
    """A fresh hidden name in the same folder (so that a rename stays within one file system)."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.{role}{path.suffix}")


def as_created(path: Path) -> None:
    """Set permissions by the user's umask: safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named(path: Path, temporary: Path) -> Iterator[None]:
    """Name `path` in errors instead of the temporary folder, which is gone afterwards."""
    try:
        yield
    except RankwiseError as error:
        error.args = tuple(str(each).replace(str(temporary), str(path)) for each in error.args)
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn "disk full", however the library below words it, and a place that takes no file into errors that say what to
    do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UNWRITABLE) and names(error, path):
            raise UsageError(f"{path}: cannot be written there ({error.strerror}); choose another place") from error
        if not is_disk_full(error, path):
            raise
        raise DataError(
            f"{path}: no space left to write it ({free_space(path) / 2**20:,.1f} MiB free on its disk). What was "
            "there before is untouched. Free some space or choose another output folder, then run it again."
        ) from error


def names(error: OSError, path: Path) -> bool:
    """Whether an error is about this path, a folder above it or a file beside it, not about something that was read."""
    if not isinstance(error.filename, str):
        return False
    named, above = Path(error.filename).absolute(), path.absolute().parents
    if isinstance(error, FileNotFoundError):  # a folder above that cannot be made, below /proc say
        return named in above
    return named == path.absolute() or named in above or named.parent in above


def is_disk_full(error: BaseException, path: Path) -> bool:
    """Whether an error means a full disk. torch.save says "unexpected pos": there the free space decides."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    if any(text in str(error) for text in NO_SPACE_TEXTS):
        return True
    return isinstance(error, RuntimeError) and "inline_container" in str(error) and free_space(path) < 2**20


def free_space(path: Path) -> int:
    """Free bytes of the disk where `path` is or will be."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def cache() -> Path:
    """Where archives and GGUF models are kept unpacked; nothing there is needed once it is gone."""
    own, general = os.environ.get("RANKWISE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(general or "~/.cache").expanduser() / "rankwise"


def write_text(path: Path | str, text: str) -> Path:
    """Write UTF-8 text atomically; returns the path."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_or_print(path: str | None, text: str) -> None:
    """Write the text, and say where; print it where no path is given."""
    about_to_write()
    if path:
        print(f"wrote {write_text(path, text)}")
    else:
        print(text, end="")


def write_json(path: Path | str, content: Any) -> Path:
    """Write JSON atomically; returns the path. A file of a format of our own is a `document.Document`."""
    return write_text(path, json_text(content))


def json_text(content: Any, indent: int | None = 2) -> str:
    """A file's JSON. NaN and infinity are a ValueError: they are not JSON."""
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False, default=_encode) + "\n"


def _encode(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def read_json(path: Path | str) -> Any:
    """Read JSON strictly. DataError, naming file and line, for anything unreadable and for repeated keys."""
    path = Path(path)
    content = read_bytes(path)
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error
    except RepeatedName as error:
        line = _second_line(content, str(error))
        raise DataError(f"{path}, line {line}: the key {str(error)!r} appears twice in one object") from error


def read_object(path: Path | str) -> dict[str, Any]:
    """`read_json` for a file that must hold an object ({…})."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}, line 1: expected an object {{…}}, found {type(content).__name__}")
    return content


def read_if_there(path: Path | str) -> dict[str, Any]:
    """`read_object`, empty where there is no such file."""
    return read_object(path) if Path(path).is_file() else {}


def read_bytes(path: Path) -> bytes:
    """The whole file; DataError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _second_line(content: bytes, key: str) -> int:
    """Line of the key's second appearance in the text."""
    quoted = json.dumps(key, ensure_ascii=False).encode()
    second = content.find(quoted, content.find(quoted) + 1)
    return content.count(b"\n", 0, max(second, 0)) + 1


def sha256(path: Path | str) -> str:
    """SHA-256 of a file's whole content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: Any, **how: Any) -> str:
    """SHA-256 of a value as JSON, in hexadecimal. how: `json.dumps`'s options."""
    return hashlib.sha256(json.dumps(content, **how).encode()).hexdigest()


def digest(content: Any) -> str:
    """SHA-256 of a value as canonical JSON: keys sorted, no spaces, UTF-8."""
    return digest_of(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def fingerprint(path: Path | str) -> str:
    """SHA-256 of the content of a file or folder, in hexadecimal; location and times do not count.

    A file up to 64 MiB counts whole; of a larger one its size and 256 evenly spread blocks of 16 KiB, both ends
    included (a fine-tune touches all of a weight file; reading all of a 140 GB model would take minutes). A
    folder is the sorted list of its visible files' relative names, sizes and fingerprints.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
        rows = [(file.relative_to(path).as_posix(), file.stat().st_size, fingerprint(file)) for file in files]
        return digest_of(rows)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    size = path.stat().st_size
    return sha256(path) if size <= WHOLE else _sampled(path, size)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _sampled(path: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for index in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprints(files: Sequence[Path]) -> dict[str, str]:
    return {file.name: fingerprint(file) for file in files}


PLACE = ".earlier"


@dataclass(frozen=True)
class Aside:
    """Entries of a folder by patterns of their names. `take` and `put_back` are renames on one file system."""

    folder: Path
    patterns: tuple[str, ...]

    @property
    def place(self) -> Path:
        return self.folder / PLACE

    def there(self) -> list[Path]:
        return sorted({entry for pattern in self.patterns for entry in self.folder.glob(pattern)})

    def take(self) -> list[Path]:
        """Move the entries aside; returns where they were."""
        found = self.there()
        if found:
            about_to_write()
            self.place.mkdir(exist_ok=True)
        for entry in found:
            os.replace(entry, self.place / entry.name)
        return found

    def put_back(self) -> None:
        """Move them back, in place of what a run that did not begin has left; also after a process was killed."""
        if not self.place.is_dir():
            return
        about_to_write()
        for entry in self.place.iterdir():
            remove(self.folder / entry.name)
            os.replace(entry, self.folder / entry.name)
        self.place.rmdir()

    def drop(self) -> None:
        """Delete them."""
        if self.place.is_dir():
            shutil.rmtree(self.place)

    @contextmanager
    def until_dropped(self) -> Iterator[None]:
        """Entries that are still aside when the block fails are put back, and deleted when it ends."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise
        self.drop()


def remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
