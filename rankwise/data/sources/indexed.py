"""A big JSON Lines file as a sequence of samples that are parsed when they are asked for.

    rows.jsonl ── one pass that checks every row ──▶ 24 bytes a sample: where its line starts, its line, its number

Behind the same interface as samples in memory, so that nothing after it knows which it has.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from os import stat_result
from pathlib import Path

from rankwise.data.example import Example, View
from rankwise.data.sources.rows import Build, RowFile, again, as_object, identity_of, json_samples, located
from rankwise.errors import DataError

LARGE = 64 * 2**20  # bytes; from here on a JSON Lines file is indexed and not held: its objects would be ten times that


@dataclass(frozen=True, eq=False)
class IndexedSamples(View):
    """Samples of a JSON Lines file by the places of their lines. repeated: of those whose id occurred before.

    The file must stay as it was: DataError once its size or time differs. Copies of this object (in the workers of a
    data loader) open the file for themselves.
    """

    path: Path
    build: Build
    version: tuple[int, int]
    starts: array[int] = field(repr=False)
    lines: array[int] = field(repr=False)
    numbers: array[int] = field(repr=False)
    repeated: frozenset[int] = field(default=frozenset(), repr=False)

    def __len__(self) -> int:
        return len(self.starts)

    def made(self, index: int) -> Example:
        row = as_object(json.loads(self._line(self.starts[index])))
        number = self.numbers[index]
        identity = identity_of(row, self.path, number)
        if index in self.repeated:
            identity = again(identity, number)
        return located(self.build(identity, row), self.lines[index])

    def _line(self, start: int) -> str:
        with self.path.open("rb") as stream:
            if _version(self.path.stat()) != self.version:
                raise DataError(f"{self.path} has changed since it was checked; start again")
            stream.seek(start)
            return stream.readline().decode("utf-8-sig")


def indexed(source: RowFile, build: Build) -> IndexedSamples:
    """Parse and check every row once; bad ones are rejected as in memory. The source's file must be JSON Lines."""
    version = _version(source.path.stat())
    starts, lines, numbers = array("Q"), array("Q"), array("Q")
    repeated: set[int] = set()
    for sample in json_samples(source, build):
        repeated |= {len(starts)} if source.again else set()
        starts.append(source.start)
        lines.append(sample.line)
        numbers.append(source.number)
    return IndexedSamples(source.path, build, version, starts, lines, numbers, frozenset(repeated))


def _version(status: stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
