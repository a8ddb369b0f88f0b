"""A checkpoint as named, lazy tensors, whatever files hold it. First step of `ranks`, `extract` and `merge`.

    base = open_checkpoint(resolve("org/model"))
    for key in base:
        base.tensor(key)        # safetensors: a view of the mapped file, in no one's anonymous memory

Every file is checked against its header, and every key of an index against its shard, before this returns.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.core.site import is_expert, nearest, unwrapped
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import about_to_write, digest_of, fingerprints, read_object
from rankwise.files.gguf import is_gguf, unpacked
from rankwise.files.pickled import SUFFIXES, load_pickle

LENGTH_BYTES = 8
PREFETCH_BYTES = 2**20  # Linux reads no more than a few MiB for one request, whatever its length
POINTER = b"version https://git-lfs"
DTYPES = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class TensorRange:
    """Position of one tensor in its file: `start` and `end` are byte offsets from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


class Shard:
    """An open safetensors file. Raises DataError, naming the file, where it is missing, cut or altered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_entries(path)
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: not a valid safetensors file ({error}); fetch or save it again") from error

    def tensor(self, key: str) -> Tensor:
        """A view of the mapped file; nothing is read before its elements are."""
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def prefetch(self, key: str) -> None:
        """Ask the kernel to read the tensor's bytes ahead, without waiting for them (a no-op off Linux)."""
        if not hasattr(os, "posix_fadvise"):
            return
        entry = self.entries[key]
        with open(self.path, "rb") as file:
            for start in range(entry.start, entry.end, PREFETCH_BYTES):
                length = min(PREFETCH_BYTES, entry.end - start)
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def read_entries(path: Path) -> dict[str, TensorRange]:
    """The tensors that a header names, in the order of their bytes, once it agrees with the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(LENGTH_BYTES)
            length = struct.unpack("<Q", head)[0] if len(head) == LENGTH_BYTES else size
            header = file.read(length) if LENGTH_BYTES + length <= size else None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if head == POINTER[:LENGTH_BYTES]:
        raise DataError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    if header is None:
        raise DataError(f"{path}: truncated within its header ({size:,} bytes); fetch or save it again")
    entries = parse_header(path, header)
    expected = max((entry.end for entry in entries.values()), default=LENGTH_BYTES + length)
    if expected != size:
        raise DataError(
            f"{path}: {size:,} bytes where its header describes {expected:,}: truncated or altered; "
            "fetch or save it again"
        )
    return entries


def parse_header(path: Path, header: bytes) -> dict[str, TensorRange]:
    """Entries in the order of their bytes; DataError where a row does not describe a tensor."""
    base = LENGTH_BYTES + len(header)
    try:
        rows = {key: row for key, row in json.loads(header).items() if key != "__metadata__"}
        entries = {key: _entry(row, base) for key, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a safetensors header ({error!r}); fetch or save it again") from error
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _entry(row: dict[str, Any], base: int) -> TensorRange:
    start, end = row["data_offsets"]
    entry = TensorRange(tuple(row["shape"]), DTYPES[row["dtype"]], base + start, base + end)
    if math.prod(entry.shape) * entry.dtype.itemsize != end - start:
        raise ValueError(f"{end - start} bytes do not make {entry.shape} of {entry.dtype}")
    return entry


SAFETENSORS = ".safetensors"
INDEX = ".index.json"
# In transformers' order of preference; safetensors before pickles.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SAVED_DELTAS = "deltas.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
IN_PLACE = "hf://"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one model. Tensors must not be written into: they may be views of the files.

    `path` is what was opened, `files` the weight files below it. A key lies either in a shard (safetensors)
    or among the `loaded` tensors (pickles). A tensor's name here is its key in the file without the wrappers of
    training frameworks (`core.site.unwrapped`); `stored` has the keys.
    """

    path: Path
    files: tuple[Path, ...]
    shards: Mapping[str, Shard] = field(default_factory=dict, repr=False)
    loaded: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def stored(self) -> dict[str, str]:
        """Name → key in the file. DataError where two keys have one name."""
        return unwrapped([*self.shards, *self.loaded], self.path)

    def keys(self) -> list[str]:
        return list(self.stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __len__(self) -> int:
        return len(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the tensor."""
        key = self._key(name)
        return self.shards[key].entries[key].shape if key in self.shards else tuple(self.loaded[key].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored type, without reading the tensor."""
        key = self._key(name)
        return self.shards[key].entries[key].dtype if key in self.shards else self.loaded[key].dtype

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        key = self._key(name)
        return self.shards[key].path if key in self.shards else self.files[0]

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU; safetensors: a view whose pages are read when they are used."""
        key = self._key(name)
        return self.shards[key].tensor(key) if key in self.shards else self.loaded[key]

    def prefetch(self, name: str) -> None:
        """Prefetch the tensor's bytes from the disk while the caller does other work."""
        key = self._key(name)
        if key in self.shards:
            self.shards[key].prefetch(key)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """config.json beside the weights, None where there is none."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return read_object(folder / "config.json") if (folder / "config.json").is_file() else None

    def _key(self, name: str) -> str:
        if name not in self.stored:
            near = ", ".join(nearest(name, self.stored)) or "none"
            raise DataError(f"{self.path}: no tensor {name!r} (nearest names: {near})")
        return self.stored[name]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a folder, a single weight file, or a shard index.

    DataError, naming the file, for anything missing, cut off, altered, or that would need code to load.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if any((path / place / SAVED_DELTAS).is_file() for place in ("", "deltas")) and not (path / NAMES[0]).is_file():
        raise DataError(f"{path}: holds deltas of `rankwise finetune`, not a checkpoint; give it as --deltas {path}")
    weights = weights_of(path) if path.is_dir() else path
    if weights.name.endswith(INDEX):
        return _open_index(path, weights)
    if weights.suffix == SAFETENSORS:
        shard = Shard(weights)
        return Checkpoint(path, (weights,), shards=dict.fromkeys(shard.entries, shard))
    if weights.suffix in SUFFIXES:
        return Checkpoint(path, (weights,), loaded=load_pickle(weights))
    raise DataError(f"{weights}: unknown type of weight file (known: {SAFETENSORS}, {', '.join(SUFFIXES)})")


def weights_of(folder: Path) -> Path:
    """The weight file or index of a folder: the standard names first, else the only weight file there is."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in (SAFETENSORS, *SUFFIXES))
    indices = sorted(folder.glob(f"*{INDEX}"))
    for candidates in (indices, [file for file in found if file.suffix == SAFETENSORS], found):
        if len(candidates) == 1 and candidates[0].name not in ADAPTER_NAMES:
            return candidates[0]
    if any(file.name in ADAPTER_NAMES for file in found):
        raise DataError(f"{folder}: holds a LoRA adapter, not a checkpoint; give it as --adapter")
    names = ", ".join(file.name for file in found) or "none"
    raise DataError(f"{folder}: which weights are meant? No {NAMES[0]} and no index; weight files there: {names}")


def _open_index(path: Path, index: Path) -> Checkpoint:
    """All shards of an index, each key found in the shard that the index names for it."""
    places = _weight_map(index)
    files = {name: index.parent / name for name in dict.fromkeys(places.values())}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        lost = sorted((key for key, place in places.items() if place in missing), key=lambda key: not is_expert(key))
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise DataError(
            f"{index.parent}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)} (with {shown})"
        )
    checkpoint = _open_shards(path, files, places)
    there = {*checkpoint.shards, *checkpoint.loaded}
    absent = [f"{key} ({place})" for key, place in places.items() if key not in there]
    if absent:
        shown = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        raise DataError(f"{index}: {len(absent)} tensors are not in the shard that the index names: {shown}")
    return checkpoint


def _open_shards(path: Path, files: dict[str, Path], places: dict[str, str]) -> Checkpoint:
    if all(name.endswith(SAFETENSORS) for name in files):
        shards = {name: Shard(file) for name, file in files.items()}
        found = {key: shards[place] for key, place in places.items() if key in shards[place].entries}
        return Checkpoint(path, tuple(files.values()), shards=found)
    pickles = {name: load_pickle(file) for name, file in files.items()}
    tensors = {key: pickles[place][key] for key, place in places.items() if key in pickles[place]}
    return Checkpoint(path, tuple(files.values()), loaded=tensors)


def _weight_map(index: Path) -> dict[str, str]:
    """tensor → file name of an index; DataError where it is not one, or leaves its own folder."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise DataError(f"{index}: weight_map (tensor name → file name) is missing")
    for name in set(places.values()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{index}: weight_map names {name!r}, a file outside its folder")
    return places


def resolve(name_or_path: Path | str, revision: str | None = None, *, code: bool = False) -> Path:
    """A local path, or the local copy of a hub model (`org/name`), downloaded where it is not there yet; of a model in
    one GGUF file the folder that it is unpacked to.

    Only weights, configuration and tokenizer files are fetched; Python files only with `code`, which whoever asks
    for it must have pinned to a revision. DataError where there is neither.
    """
    local = Path(name_or_path).expanduser()
    if local.exists():
        if revision is not None:
            raise UsageError(f"{local} is a local path: a revision applies to hub ids only")
        return unpacked(local) if is_gguf(local) else local
    refuse_absent(local)
    name = str(name_or_path)
    if name.startswith(IN_PLACE):
        raise UsageError(f"{name}: reading a model in place on the hub is not supported; as ORG/NAME it is downloaded")
    if not HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such file or folder (and not a hub id of the form org/name)")
    wanted = [*HUB_FILES, "*.py"] if code else HUB_FILES
    folder = _download(name, revision, wanted)
    if not any(folder.glob("*.safetensors")):
        folder = _download(name, revision, [*wanted, "*.bin"])
    return folder


def refuse_absent(path: Path) -> None:
    """DataError for a link to something that is not there: of hub models no link is made."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there; fetch that or correct the link")


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """huggingface_hub's snapshot folder. Imported here: local files are read without it."""
    about_to_write()
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{name}: no such local path, and not available from the Hugging Face hub{at} ({reason}). Check "
            "the spelling, the network and (gated models) `hf auth login`, or give a downloaded copy's path."
        ) from error


def base_files(folder: Path) -> list[Path]:
    """Configuration and weights of a model folder."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [folder / "config.json", *weights]


def model_fingerprint(folder: Path) -> str:
    """One digest of a model's configuration and weights: what else lies in its folder does not change it."""
    return digest_of(fingerprints(base_files(folder)))


@dataclass(frozen=True)
class Weight:
    """Location of a matrix: its key, and for fused tensors its block among row blocks, which are equal or of these
    sizes."""

    key: str
    part: tuple[int, int] = (0, 1)
    sizes: tuple[int, ...] = ()

    def read(self, checkpoint: Checkpoint) -> Tensor:
        return self.blocks(checkpoint.tensor(self.key))[self.part[0]]

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """All blocks of the tensor that this is one of."""
        return tensor.split(self.sizes) if self.sizes else tensor.chunk(self.part[1]) if self.part[1] > 1 else (tensor,)
