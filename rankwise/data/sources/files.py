"""Which file a `--data-path` means: a file, a folder of official files, an archive, or a data set of the hub."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from os import stat_result
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rankwise.data.example import Example, View
from rankwise.data.sources.archives import is_archive, unpacked
from rankwise.data.sources.rows import Build, RowFile, again, as_object, identity_of, json_samples, located
from rankwise.errors import DataError

HUB_ID = re.compile(r"(hf://)?(?P<id>[\w.-]+/[\w.-]+)")
DATA_SUFFIXES = set(".csv .json .jsonl .ndjson .tsv .txt .parquet .7z .bz2 .zip .gz .tgz .tar".split())


@dataclass(frozen=True)
class Sought:
    """The official names of what is looked for, best first; `what` is for messages.

    archives: official archives that hold such a file. companions: suffixes of files that belong beside it and are
    fetched or unpacked with it where they exist.
    """

    what: str
    names: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        return (*self.names, *self.archives)

    def beside(self, name: str) -> list[str]:
        """Names of the companions of a file."""
        return [str(Path(name).with_suffix(suffix)) for suffix in self.companions]

    @property
    def members(self) -> list[str]:
        """File names that are taken out of an archive."""
        files = {Path(name).name for name in self.names}
        return sorted(files | {companion for name in files for companion in self.beside(name)})


def find_file(path: str | Path, sought: Sought) -> Path:
    """The file that `path` means; an archive is unpacked, a hub data set asked for the official names.

    A path that exists is never taken for a hub id, and neither is one with the suffix of a data file.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _opened(_in_folder(local, sought), sought)
    if local.exists():
        return _opened(local, sought)
    hub = HUB_ID.fullmatch(str(path))
    if hub and local.suffix not in DATA_SUFFIXES and sought.names:
        return _opened(_on_hub(hub["id"], sought), sought)
    raise DataError(f"{local} does not exist; pass the path of a data file, or of the folder that holds it")


def first_of(folder: Path, names: Collection[str]) -> Path | None:
    """The first of the names that the folder holds."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _opened(file: Path, sought: Sought) -> Path:
    if not is_archive(file) or not sought.names:
        return file
    folder = unpacked(file, sought.members)
    found = first_of(folder, [Path(name).name for name in sought.names])
    if found is None:
        raise DataError(f"{file} lacks {sought.what}")
    return found


def _in_folder(folder: Path, sought: Sought) -> Path:
    found = first_of(folder, sought.all_names)
    if found:
        return found
    if not sought.names:
        raise DataError(f"{folder} is a folder; pass the path of the file that holds {sought.what}")
    names = ", ".join(sought.all_names)
    raise DataError(f"{folder} lacks {sought.what}: looked for {names}; pass the file itself if its name differs")


def _on_hub(repository: str, sought: Sought) -> Path:
    reasons = []
    for name in sought.all_names:
        try:
            file = Path(hf_hub_download(repository, name, repo_type="dataset"))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        for companion in sought.beside(name) if name in sought.names else []:
            _fetched_too(repository, companion)
        return file
    tried = "\n    ".join(reasons)
    raise DataError(
        f"no file or folder {repository}, and {sought.what} could not be fetched from the hub data set of that name:"
        f"\n    {tried}\n  Without a network, pass the path of the official file."
    )


def _fetched_too(repository: str, name: str) -> None:
    """Fetch a companion where the hub has it; a source that cannot do without says so when it reads."""
    try:
        hf_hub_download(repository, name, repo_type="dataset")
    except (HfHubHTTPError, OSError):
        return


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
