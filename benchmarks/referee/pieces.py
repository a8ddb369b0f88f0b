"""A folder in pieces of at most 40 MB, for where large files do not travel, and back.

    python benchmarks/referee/pieces.py split FOLDER PIECES
    python benchmarks/referee/pieces.py join PIECES FOLDER

PIECES gets part.000, part.001 … of one tar file, and pieces.json with the SHA-256 of each.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

SIZE, LIST = 40_000_000, "pieces.json"


class Pieces(io.RawIOBase):
    """A file that is written in pieces."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.left, self.hashes = folder, size, b"", dict[str, str]()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.left += data
        while len(self.left) >= self.size:
            self.cut()
        return len(data)

    def cut(self) -> None:
        piece, self.left = self.left[: self.size], self.left[self.size :]
        name = f"part.{len(self.hashes):03d}"
        (self.folder / name).write_bytes(piece)
        self.hashes[name] = hashlib.sha256(piece).hexdigest()


def split(folder: Path, pieces: Path, wanted: Callable[[str], bool] = lambda name: True, size: int = SIZE) -> None:
    """The files of a folder whose relative path is wanted. What PIECES held of an earlier time is replaced."""
    pieces.mkdir(parents=True, exist_ok=True)
    for old in pieces.glob("part.*"):
        old.unlink()
    stream = Pieces(pieces, size)
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            if wanted(name := path.relative_to(folder).as_posix()):
                archive.add(path, name)
    if stream.left:
        stream.cut()
    (pieces / LIST).write_text(json.dumps(stream.hashes, indent=1))


def are_here(folder: Path) -> bool:
    return (folder / LIST).is_file()


def join(pieces: Path, folder: Path) -> None:
    """ValueError, naming it, for a piece that is missing or is another."""
    found = dict[str, bytes]()
    for name, told in json.loads((pieces / LIST).read_text()).items():
        found[name] = (pieces / name).read_bytes() if (pieces / name).is_file() else b""
        if hashlib.sha256(found[name]).hexdigest() != told:
            raise ValueError(f"{pieces / name}: missing, or not the piece that {LIST} names")
    with tarfile.open(fileobj=io.BytesIO(b"".join(found.values()))) as archive:
        archive.extractall(folder, filter="data")


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in ("split", "join"):
        sys.exit(__doc__)
    (split if sys.argv[1] == "split" else join)(Path(sys.argv[2]), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
