"""The pictures that features are captured of, and the shards of their features.

    open_pictures("photos/")              photos/a.jpg, photos/2024/b.png … in name order
    open_pictures("val.parquet")          its image column: {"bytes", "path"} as `datasets` writes it, or bytes
    open_pictures("org/name:test")        a saved data set's folder, or a hub id, with a split
    PictureShards(…).made(shard, step)    the matrices of one shard of them

Every picture is decoded as anywhere else (data/pixels.py): upright, RGB, bombs and broken files refused by name.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rankwise.core.geometry import Grid
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.pixels import WHITE, Colour, Unreadable, picture
from rankwise.errors import DataError, need
from rankwise.evaluate.generate import pick_device
from rankwise.features.cache import ModelOrigin
from rankwise.features.cache_writer import CacheRecipe, Matrices, shard_places
from rankwise.features.encoder import Eye, Preparation, picture_digest
from rankwise.files.atomic import digest_of, fingerprint
from rankwise.labels.images import SUFFIXES
from rankwise.models.load import torch_dtype
from rankwise.options.features import CaptureConfig

SAVED = ("dataset_info.json", "dataset_dict.json")  # in a folder that `datasets` has saved
EXTRA = "data"
Step = Callable[[int], object]  # told how many more pictures are done


def open_pictures(where: str, background: Colour = WHITE) -> FolderPictures | TablePictures:
    """The pictures of a folder, a parquet file or a data set, transparency on `background`. DataError where there are
    none. Names are unique; `open(place)` raises BadImage; `digest(count)` is that of the first ones."""
    path = Path(where)
    if path.is_file() and path.suffix == ".parquet":
        return of_parquet(path, background)
    if path.is_dir() and not any((path / name).is_file() for name in SAVED):
        return of_folder(path, background)
    if path.is_file():
        raise DataError(f"{path}: a folder of images, a parquet file or a data set is expected")
    return of_dataset(where, background)


@dataclass(frozen=True)
class FolderPictures:
    """Image files below a folder; names are their paths in it."""

    names: tuple[str, ...]
    reader: ImageReader

    def open(self, place: int) -> Image.Image:
        return self.reader.open(self.names[place])

    def digest(self, count: int) -> str:
        return digest_of([(name, fingerprint(self.reader.folder / name)) for name in self.names[:count]])


def of_folder(folder: Path, background: Colour) -> FolderPictures:
    found = [
        file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    names = sorted(file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts))
    if not names:
        raise DataError(f"{folder}: no images in it ({', '.join(sorted(SUFFIXES))})")
    return FolderPictures(tuple(names), ImageReader(folder, background=background))


@dataclass
class TablePictures:
    """Rows of a table with an image column. column: place → {"bytes", "path"} or bytes; content: its fingerprint."""

    where: str
    names: Sequence[str]
    column: Any
    content: str
    reader: ImageReader

    def open(self, place: int) -> Image.Image:
        name, value = self.names[place], self.column(place)
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if content:
            try:
                return picture(io.BytesIO(content), self.reader.max_pixels, self.reader.background)
            except Unreadable as reason:
                raise BadImage(f"image {name} (row {place} of {self.where}) {reason}") from reason
        path = value.get("path") if isinstance(value, Mapping) else None
        if not path:
            raise BadImage(f"image {name} (row {place} of {self.where}) is empty")
        return self.reader.open(path)

    def digest(self, count: int) -> str:
        return digest_of([self.content, count])


def of_parquet(path: Path, background: Colour) -> TablePictures:
    parquet = need("pyarrow.parquet", extra=EXTRA)
    try:
        column = ParquetColumn(parquet.ParquetFile(path), path)
        paths = column.paths()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a sound parquet file ({error})") from error
    names, content = row_names(path.stem, paths), fingerprint(path)
    return TablePictures(str(path), names, column, content, ImageReader(path.parent, background=background))


@dataclass
class ParquetColumn:
    """The image column of a parquet file; one row group is held at a time."""

    file: Any
    path: Path
    held: tuple[int, Any] = field(default=(-1, None), repr=False)

    def __post_init__(self) -> None:
        self.name = image_column({one.name: str(one.type) for one in self.file.schema_arrow}, self.path)
        counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        self.places = [(group, row) for group, count in enumerate(counts) for row in range(count)]

    def __call__(self, place: int) -> Any:
        group, row = self.places[place]
        if self.held[0] != group:
            try:
                self.held = group, self.file.read_row_group(group, columns=[self.name]).column(self.name)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.path}: row group {group} cannot be read ({error})") from error
        return self.held[1][row].as_py()

    def paths(self) -> list[str | None]:
        """The `path` of every row, without reading the bytes of the pictures."""
        if "struct" not in str(self.file.schema_arrow.field(self.name).type):
            return [None] * len(self.places)
        rows = self.file.read(columns=[f"{self.name}.path"]).column(self.name).to_pylist()
        return [row.get("path") if row else None for row in rows]


def image_column(types: Mapping[str, str], where: Path | str) -> str:
    """The column that holds pictures: a struct with bytes, else binary; the one named image where several do."""
    structs = [name for name, kind in types.items() if kind.startswith("struct") and "bytes: " in kind]
    found = structs or [name for name, kind in types.items() if kind in ("binary", "large_binary")]
    if not found:
        raise DataError(f"{where}: no column of images; it has {', '.join(types) or 'none'}")
    return "image" if "image" in found else found[0]


def of_dataset(where: str, background: Colour) -> TablePictures:
    """A data set saved by `datasets`, or of the hub; `:SPLIT` behind it says which split."""
    datasets = need("datasets", extra=EXTRA)
    name, _, split = where.partition(":")
    path = Path(name)
    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name)
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(f"{where}: no folder, parquet file or data set of this name ({first_line(error)})") from error
    rows = one_split(loaded, split, where)
    found = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not found:
        raise DataError(f"{where}: no column of images; it has {', '.join(rows.features)}")
    chosen = "image" if "image" in found else found[0]
    raw = rows.select_columns([chosen]).cast_column(chosen, datasets.Image(decode=False))
    names = row_names(path.name, [None] * len(raw))
    content = str(rows._fingerprint)
    reader = ImageReader(path, background=background)
    return TablePictures(where, names, lambda place: raw[place][chosen], content, reader)


def one_split(loaded: Any, split: str, where: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    chosen = split or (next(iter(loaded)) if len(loaded) == 1 else "")
    if chosen not in loaded:
        name = where.partition(":")[0]
        raise DataError(f"{where}: which split? {', '.join(f'{name}:{one}' for one in loaded)}")
    return loaded[chosen]


def row_names(stem: str, paths: Sequence[str | None]) -> list[str]:
    """A row's own path where it is the only one of that name, else its number."""
    counts = Counter(paths)
    return [path if path and counts[path] == 1 else f"{stem}-{place:06d}" for place, path in enumerate(paths)]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass
class PictureShards:
    """Features of pictures, `--batch_size` of them at a time."""

    config: CaptureConfig
    pictures: FolderPictures | TablePictures
    preparation: Preparation
    eye: Eye
    origin: ModelOrigin
    first: tuple[str, tuple[int, int]] | None = field(default=None, init=False)

    @property
    def count(self) -> int:
        return min(len(self.pictures.names), self.config.num_images or len(self.pictures.names))

    @cached_property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.config.dtype, trained=False, device=self.device)

    @cached_property
    def model(self) -> Any:
        return self.eye.load(self.dtype, self.device)

    @cached_property
    def recipe(self) -> CacheRecipe:
        how = self.preparation.record(self.eye.processor)
        return CacheRecipe(
            shards=len(self.places),
            dtype=self.config.cache_dtype,
            model=self.origin,
            pictures=self.pictures.digest(self.count),
            settings={
                "pictures": self.count,
                "shard_size": self.config.shard_size,
                "model_dtype": str(self.dtype).removeprefix("torch."),
                "skip_bad": self.config.skip_bad,
                **how,
            },
            source=str(self.config.images),
        )

    @property
    def places(self) -> list[range]:
        return shard_places(self.count, self.config.shard_size)

    def size(self, shard: int) -> int:
        return len(self.places[shard])

    def made(self, shard: int, step: Step) -> Matrices:
        """Raises DataError, naming the picture, where one cannot be read (unless --skip_bad), gives another number of
        tokens than the others, or features that are not finite."""
        places, rows, left_out = self.places[shard], [], []
        for start in range(0, len(places), self.config.batch_size):
            batch = places[start : start + self.config.batch_size]
            opened, bad = self.opened(batch)
            rows += self.seen(opened) if opened else []
            left_out += bad
            step(len(batch))
        return Matrices(
            torch.stack([row.features for row in rows]) if rows else None,
            tuple(row.name for row in rows),
            tuple(row.group for row in rows),
            one_grid(rows),
            tuple(left_out),
        )

    def opened(self, places: Sequence[int]) -> tuple[dict[str, Image.Image], list[tuple[str, str]]]:
        """Prepared pictures by name, and names with reasons of those that cannot be read."""
        found, bad = {}, []
        for place in places:
            name = self.pictures.names[place]
            try:
                found[name] = self.preparation.picture(self.pictures.open(place))
            except BadImage as reason:
                if not self.config.skip_bad:
                    raise DataError(f"{reason}; remove it, or pass --skip_bad to leave such pictures out") from reason
                bad.append((name, str(reason)))
        return found, bad

    def seen(self, images: dict[str, Image.Image]) -> list[NamedMatrix]:
        """The matrices of these pictures, in order."""
        laid = [self.eye.grids(image) for image in images.values()]
        counts = [len(found) if found else 1 for found in laid]
        features = self.features(images)
        if len(features) != sum(counts):
            raise DataError(
                f"{len(images)} pictures ({next(iter(images))} …) gave {len(features)} feature matrices where "
                f"{sum(counts)} were expected: how {type(self.model).__name__} divides images into tiles is unknown"
            )
        rows, rest = [], iter(features)
        for (name, image), found, count in zip(images.items(), laid, counts, strict=True):
            group = picture_digest(image)
            for tile in range(count):
                named = f"{name}#{tile}" if count > 1 else name
                matrix, seen = next(rest)
                grid = found[tile] if found else seen
                rows.append(
                    self.checked(NamedMatrix(named, group, matrix, (grid.rows, grid.columns) if grid else None))
                )
        return rows

    def features(self, images: dict[str, Image.Image]) -> list[tuple[Tensor, Grid | None]]:
        """(T, D) each, on the CPU, with its grid where the tower tells it."""
        try:
            inputs = self.eye.pixels(list(images.values()))
        except ValueError as error:
            raise DataError(f"the processor refuses a picture among {', '.join(images)}: {error}") from error
        try:
            with torch.inference_mode():
                moved = {name: value.to(self.device) for name, value in inputs.items()}
                return [(matrix.cpu(), grid) for matrix, grid in self.eye.features(self.model, moved)]
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"out of memory with {len(images)} pictures at a time; complete shards are safe: run it again with a "
                "smaller --batch_size"
            ) from error

    def checked(self, row: NamedMatrix) -> NamedMatrix:
        shape = (row.features.shape[0], row.features.shape[1])
        self.first = self.first or (row.name, shape)
        if shape != self.first[1]:
            raise DataError(
                f"{row.name} gives {shape[0]} tokens, {self.first[0]} {self.first[1][0]}: the matrices of a cache have "
                "equal shapes; leave --native out, so that pictures are stretched to one size"
            )
        if not torch.isfinite(row.features).all():
            raise DataError(f"{row.name}: the tower's features are not finite in {self.dtype}; try --dtype float32")
        return row


@dataclass(frozen=True)
class NamedMatrix:
    """One matrix with its names. grid: (rows, columns) of its tokens, where known."""

    name: str
    group: str
    features: Tensor
    grid: tuple[int, int] | None


def one_grid(rows: Sequence[NamedMatrix]) -> tuple[int, int] | None:
    """The grid of all rows; None where they differ."""
    found = {row.grid for row in rows}
    return found.pop() if len(found) == 1 else None
