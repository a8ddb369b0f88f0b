"""Writing a feature cache: shard after shard, each whole or not there, the index last.

    writer = CacheWriter(folder, recipe)
    writer.begin()                                   # capture.json: what this cache is being made of
    for shard in writer.missing(): writer.write(shard, matrices)
    writer.finish()                                  # index.json, once all shards are there

    killed after shard 1:  capture.json  features-00000  features-00001  ──▶  run again: features-00002 …  index.json

A shard carries its rows' names in its own header, so the index follows from the shards alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import DataError, UsageError
from rankwise.features.cache import CACHE, INDEX, KEY, RECIPE, FeatureCache, ModelOrigin, open_cache
from rankwise.files.atomic import (
    Aside,
    about_to_write,
    atomic_write,
    digest_of,
    read_if_there,
    read_object,
    sha256,
    write_json,
)
from rankwise.files.document import as_plain

HEADER = "shard"


@dataclass(frozen=True)
class CacheRecipe:
    """Everything that decides what a cache holds. Two captures with equal recipes give the same bytes.

    pictures: SHA-256 of the list of pictures; settings: how they were prepared, sizes of batches and shards, precision.
    shards: how many files there will be. source: where the pictures are, for readers; it is not compared.
    """

    shards: int
    dtype: str
    model: ModelOrigin | None
    pictures: str
    settings: Mapping[str, Any]
    source: str = field(compare=False)
    spectrum: tuple[float, ...] | None = None

    @property
    def content(self) -> dict[str, Any]:
        """What is compared on a second run."""
        kept = {name: value for name, value in asdict(self).items() if name != "source"}
        plain: dict[str, Any] = as_plain(kept)
        return plain

    @property
    def digest(self) -> str:
        return digest_of(self.content, sort_keys=True)


@dataclass(frozen=True)
class Matrices:
    """The rows of one shard: features (rows, T, D), their ids and groups, and what was left out, with the reason.

    grid: (rows, columns) of the tokens where known.
    """

    features: Tensor | None
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    grid: tuple[int, int] | None = None
    left_out: tuple[tuple[str, str], ...] = ()


def shard_places(count: int, size: int) -> list[range]:
    """Which of `count` pictures each shard of `size` is made of."""
    return [range(start, min(count, start + size)) for start in range(0, count, size)]


class CacheWriter:
    """One cache being made. Several processes may write different shards; the first begins and finishes."""

    def __init__(self, folder: Path, recipe: CacheRecipe) -> None:
        self.folder, self.recipe = folder, recipe

    def file(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    @property
    def index(self) -> Path:
        return self.folder / INDEX

    def begin(self) -> None:
        """Say what is being made. UsageError where the folder holds features made of something else."""
        there = self.index.is_file() or any(self.folder.glob("features[-_]*"))
        if there:
            self.require_same()
        about_to_write()
        for left_behind in self.folder.glob(".features-*.tmp.safetensors"):  # by a process that was killed
            left_behind.unlink()
        if not there:
            write_json(self.folder / RECIPE, {**self.recipe.content, "source": self.recipe.source})

    def require_same(self) -> None:
        if not (self.folder / RECIPE).is_file():
            raise UsageError(f"{self.folder}: holds features of unknown origin; choose another --output_dir")
        before = {name: value for name, value in read_object(self.folder / RECIPE).items() if name != "source"}
        different = changes(before, self.recipe.content)
        if different:
            raise UsageError(
                f"{self.folder}: holds features of other settings ({'; '.join(different)}); choose another "
                "--output_dir, or pass --overwrite to make these anew"
            )

    def missing(self) -> list[int]:
        """Shards still to be made. DataError for one that bears a final name and is not whole."""
        return [shard for shard in range(self.recipe.shards) if not self.is_there(shard)]

    def is_there(self, shard: int) -> bool:
        file = self.file(shard)
        if not file.is_file():
            return False
        if header_of(file).get("recipe") != self.recipe.digest:
            raise DataError(f"{file}: not a shard of this capture; delete it and run the command again")
        written = self.written.get(file.name)
        if written and sha256(file) != written:
            raise DataError(
                f"{file}: its content has changed since it was written; delete it and run the command again"
            )
        return True

    @cached_property
    def written(self) -> dict[str, str]:
        """sha256 of the shards by name, as a capture that has finished here before knows them."""
        return {row["file"]: row["sha256"] for row in read_if_there(self.index).get("shards", [])}

    def write(self, shard: int, matrices: Matrices) -> Path:
        """One shard, whole or not at all. Its bytes depend on its content alone."""
        names = {"ids": matrices.ids, "groups": matrices.groups, "grid": matrices.grid, "left_out": matrices.left_out}
        # One entry: safetensors writes several in an order of its own, different each time.
        header = {HEADER: json.dumps({"recipe": self.recipe.digest, **names})}
        rows = torch.empty(0) if matrices.features is None else matrices.features
        assert len(rows) == len(matrices.ids) == len(matrices.groups)
        stored = rows.to(getattr(torch, self.recipe.dtype)).contiguous()
        self.refuse_overflow(stored, rows, matrices.ids)
        with atomic_write(self.file(shard)) as temporary:
            save_file({KEY: stored}, str(temporary), metadata=header)
        return self.file(shard)

    def refuse_overflow(self, stored: Tensor, rows: Tensor, ids: Sequence[str]) -> None:
        """DataError naming the matrices with numbers that the precision on disk does not have."""
        lost = torch.isfinite(rows) & ~torch.isfinite(stored)
        bad = [name for name, one in zip(ids, lost, strict=True) if one.any()]
        if bad:
            raise DataError(
                f"{', '.join(bad[:8])}: features exceed the range of {self.recipe.dtype}; capture them with "
                "--cache_dtype bfloat16 or float32"
            )

    def finish(self) -> FeatureCache:
        """The index, from all shards; then the cache. DataError where they do not fit together, or hold nothing."""
        described = [describe_shard(self.file(shard)) for shard in range(self.recipe.shards)]
        filled = [row for row in described if row["rows"]]
        left_out = [entry for row in described for entry in row["left_out"]]
        if not filled:
            raise DataError(f"{self.folder}: no usable image ({len(left_out)} left out)")
        tokens, channels = one_shape(self.folder, filled)
        grids = {json.dumps(row["grid"]) for row in filled}
        ids = [name for row in filled for name in row["ids"]]
        CACHE.write(
            self.folder,
            {
                "matrices": len(ids),
                "tokens": tokens,
                "channels": channels,
                "grid": json.loads(grids.pop()) if len(grids) == 1 else None,
                "dtype": self.recipe.dtype,
                "model": self.recipe.content["model"],
                "source": self.recipe.source,
                "settings": self.recipe.content["settings"],
                "spectrum": self.recipe.spectrum,
                "shards": [{name: row[name] for name in ("file", "rows", "bytes", "sha256")} for row in filled],
                "ids": ids,
                "groups": [group for row in filled for group in row["groups"]],
                "left_out": left_out,
            },
        )
        return open_cache(self.folder)


def write_cache(folder: Path | str, recipe: CacheRecipe, shards: Iterable[Matrices]) -> FeatureCache:
    """A whole cache from matrices at hand: `recipe.shards` of them."""
    writer = CacheWriter(Path(folder), recipe)
    writer.begin()
    for shard, matrices in enumerate(shards):
        writer.write(shard, matrices)
    return writer.finish()


def replaceable(folder: Path) -> Aside:
    """A cache of ours, to be replaced. UsageError for a folder with features that `begin` did not begin."""
    cache = Aside(folder, (INDEX, "features-*.safetensors", RECIPE))
    if cache.there() and not (folder / RECIPE).is_file():
        raise UsageError(f"{folder}: --overwrite deletes what this command has made, and there is no {RECIPE} here")
    return cache


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name: was → is` of every value that differs, nested names with a dot."""
    found = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {brief(old)} → {brief(new)}")
    return found


def brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:24]}…"


def header_of(file: Path) -> dict[str, Any]:
    """The recipe's digest and the names that a shard carries. DataError where the file is damaged."""
    try:
        with safe_open(str(file), framework="pt") as content:
            carried: dict[str, Any] = json.loads((content.metadata() or {}).get(HEADER, "{}"))
            return {**carried, "shape": content.get_slice(KEY).get_shape()}
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{file}: damaged ({error}); delete it and run the command again") from error


def describe_shard(file: Path) -> dict[str, Any]:
    header = header_of(file)
    size = file.stat().st_size
    return {"file": file.name, "rows": len(header["ids"]), "bytes": size, "sha256": sha256(file), **header}


def one_shape(folder: Path, shards: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(T, D) of all shards, and names that occur once."""
    shapes = {tuple(row["shape"][1:]): row["ids"][0] for row in reversed(shards)}
    if len(shapes) > 1:
        told = ", ".join(f"{shape} ({name})" for shape, name in shapes.items())
        raise DataError(f"{folder}: features of different shapes: {told}; they must be equal")
    (shape,) = shapes
    return shape[0], shape[1]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
