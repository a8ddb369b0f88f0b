"""A feature cache, opened: N matrices (T, D), read from the disk one at a time.

    <cache>/index.json                  what there is: shards with sizes and sha256, ids, groups, grid, model, …
    <cache>/features-00000.safetensors  {"features": (rows, T, D)}

`index.json` is written last, so a folder without one holds no finished cache. A shard is compared with its sha256 when
it is first read. A folder of the older `features_{i}.pt`, one matrix a file, is opened too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.errors import DataError
from rankwise.files.atomic import digest_of, sha256
from rankwise.files.document import Document
from rankwise.files.pickled import load_tensor

NAME = re.compile(r"features_(?P<number>\d+)\.pt")
CACHE = Document("index.json", "rankwise-features/1", "a feature cache", "rankwise features capture")
INDEX, RECIPE = CACHE.name, "capture.json"
KEY, SHOWN = "features", 8
AGAIN = "capture it again (`rankwise features capture` makes what is missing)"
REMOVE = "delete it and run the same `rankwise features capture` again, which makes only what is missing"


@dataclass(frozen=True)
class ModelOrigin:
    """The model whose features these are. fingerprint: of its files' content."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class FeatureCache:
    """Matrices of equal shape, in the order of their pictures: `len(cache)`, `cache[place]` → (T, D) as stored.

    ids: the picture's name, with `#k` for its k-th tile. groups: SHA-256 of the picture as the model saw it: equal
    pictures are one group. grid: (rows, columns) of the tokens, row-major, where known. spectrum: the singular values
    of every matrix once normalised, where they are known (synthetic). left_out: pictures that could not be read, or
    files that are missing, with the reasons. fingerprint: of the content, wherever it lies.
    """

    path: Path
    tokens: int
    channels: int
    grid: tuple[int, int] | None
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    model: ModelOrigin | None
    source: str
    fingerprint: str
    files: ShardFiles | LegacyFiles = field(repr=False, compare=False)
    spectrum: tuple[float, ...] | None = field(default=None, repr=False)
    left_out: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Tensor:
        if not 0 <= place < len(self):
            raise IndexError(f"{self.path} has {len(self)} matrices, there is no number {place}")
        return self.files.read(place)

    def notes(self) -> list[str]:
        """A sentence about pictures that it lacks, where some were left out or files are missing."""
        if not self.left_out:
            return []
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.left_out[:SHOWN])
        more = f"; and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
        return [f"note: {self.path} has {len(self)} matrices, and these are not among them: {shown}{more}"]


def open_cache(path: Path | str) -> FeatureCache:
    """The cache of a folder: ours, or `features_{i}.pt` files.

    DataError where there is none, where it is unfinished or damaged, and for a shard that is missing or cut.
    """
    folder = Path(path)
    if (folder / INDEX).is_file():
        return indexed(folder, CACHE.read(folder))
    if (folder / RECIPE).is_file():
        raise DataError(f"{folder}: its capture has not finished ({INDEX} is missing): run the same command again")
    if folder.is_dir() and legacy_files(folder):
        return from_legacy(folder)
    raise DataError(
        f"{folder}: no feature cache ({INDEX}, or features_0.pt and so on, are looked for); make one with "
        "`rankwise features capture --model … --images …`"
    )


def indexed(folder: Path, index: Mapping[str, Any]) -> FeatureCache:
    try:
        shape = (whole(index["tokens"]), whole(index["channels"]))
        shards = ShardFiles(folder, index["shards"], shape)
        cache = FeatureCache(
            folder,
            tokens=shape[0],
            channels=shape[1],
            grid=tuple(index["grid"]) if index["grid"] else None,
            ids=tuple(index["ids"]),
            groups=tuple(index["groups"]),
            model=ModelOrigin(**index["model"]) if index["model"] else None,
            source=index["source"],
            fingerprint=content_fingerprint(index),
            files=shards,
            spectrum=tuple(index["spectrum"]) if index["spectrum"] else None,
            left_out=tuple((name, reason) for name, reason in index["left_out"]),
        )
        if not len(cache.ids) == len(cache.groups) == len(shards.places):
            raise DataError(f"{folder / INDEX}: {len(cache.ids)} ids for {len(shards.places)} matrices; {AGAIN}")
        shards.check()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / INDEX}: not what `rankwise features capture` writes: {error!r}") from error
    return cache


def whole(number: Any) -> int:
    """TypeError for what is no whole number above 0."""
    if type(number) is not int or number < 1:
        raise TypeError(f"{number!r} where a positive integer is expected")
    return number


def content_fingerprint(index: Mapping[str, Any]) -> str:
    """Of the matrices, their names and their groups; paths and the place of the cache do not enter."""
    content = [index["tokens"], index["channels"], [row["sha256"] for row in index["shards"]]]
    return digest_of([content, index["ids"], index["groups"]])


class ShardFiles:
    """The shards of a cache. Files are opened for a read and closed again, so that workers may share this."""

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> None:
        self.folder, self.rows, self.shape = folder, rows, shape
        self.places = [(shard, place) for shard, row in enumerate(rows) for place in range(row["rows"])]
        self.sound: set[int] = set()

    def check(self) -> None:
        """Every shard is there, with the size that the index knows."""
        for row in self.rows:
            file = self.folder / row["file"]
            if not file.is_file():
                raise DataError(f"{file} is missing, a shard of {row['rows']} matrices; {AGAIN}")
            if file.stat().st_size != row["bytes"]:
                raise DataError(f"{file}: {file.stat().st_size:,} bytes, {row['bytes']:,} were written; {REMOVE}")

    def read(self, place: int) -> Tensor:
        shard, row = self.places[place]
        file = self.folder / self.rows[shard]["file"]
        try:
            if shard not in self.sound and sha256(file) != self.rows[shard]["sha256"]:
                raise DataError(f"{file}: its content has changed since it was written; {REMOVE}")
            self.sound.add(shard)
            with safe_open(str(file), framework="pt") as content:
                matrix: Tensor = content.get_slice(KEY)[row]
        except (OSError, SafetensorError, IndexError) as error:  # IndexError: fewer rows than the index says
            raise DataError(f"{file}: cannot be read ({error}); {REMOVE}") from error
        if tuple(matrix.shape) != self.shape:
            raise DataError(f"{file}: matrices of {tuple(matrix.shape)}, the index says {self.shape}; {REMOVE}")
        return matrix


def from_legacy(folder: Path) -> FeatureCache:
    """Every file is read once: for its shape, and because equal features make one group."""
    files = LegacyFiles(legacy_files(folder))
    groups = files.digests()
    tokens, channels = files.shape
    side = int(tokens**0.5)
    return FeatureCache(
        folder,
        tokens=tokens,
        channels=channels,
        grid=(side, side) if side * side == tokens else None,
        ids=tuple(file.stem for file in files.paths),
        groups=groups,
        model=None,
        source=f"{len(groups)} files features_{{i}}.pt",
        fingerprint=digest_of(groups),
        files=files,
        left_out=tuple((name, "no such file") for name in gaps(files.paths)),
    )


def legacy_files(folder: Path) -> list[Path]:
    """In the order of their numbers: 2 before 10."""
    named = {file: match for file in folder.iterdir() if (match := NAME.fullmatch(file.name))}
    return sorted(named, key=lambda file: int(named[file]["number"]))


def gaps(files: Sequence[Path]) -> list[str]:
    """Names of the files that are missing between the lowest and the highest number."""
    numbers = {int(match["number"]) for file in files if (match := NAME.fullmatch(file.name))}
    return [f"features_{number}.pt" for number in range(min(numbers), max(numbers)) if number not in numbers]


class LegacyFiles:
    """One matrix a file; all of one shape."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        tokens, channels = matrix_of(self.paths[0]).shape
        self.shape = tokens, channels

    def read(self, place: int) -> Tensor:
        matrix = matrix_of(self.paths[place])
        if tuple(matrix.shape) != self.shape:
            raise DataError(f"{self.paths[place]}: {tuple(matrix.shape)}, and {self.paths[0].name} is {self.shape}")
        return matrix

    def digests(self) -> tuple[str, ...]:
        """SHA-256 of every matrix."""
        return tuple(matrix_digest(self.read(place)) for place in range(len(self.paths)))


def matrix_of(file: Path) -> Tensor:
    """(T, D). DataError for what is no such matrix."""
    tensor = load_tensor(file)
    if tensor.dim() == 3 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.numel():
        raise DataError(
            f"{file}: {tensor.dtype} of shape {tuple(tensor.shape)}; features are floats (1, tokens, channels)"
        )
    return tensor


def matrix_digest(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.detach().contiguous().view(torch.uint8).numpy().data).hexdigest()
