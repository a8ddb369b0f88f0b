"""Validated GGUF reading: metadata and tensors by name, every byte that the header promises checked to be there.

    file = GGUFFile("model-q8_0.gguf")
    file.metadata["general.architecture"]     # "llama"
    file.tensors["blk.0.attn_q.weight"]       # shape, type, place in the file
    file.tensor("blk.0.attn_q.weight")        # dequantized, float32

    read_export("exported_model").text("q8_0")  # the files of an export folder, by type

llama.cpp itself ends the process on a bad file, so this is asked first. Reading is the gguf package's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import DataError, UsageError, VerificationError, need
from rankwise.files.document import Document
from rankwise.files.lineage import EXPORT as NAME

EXPORT = Document(NAME, "rankwise-export/1", "an export", "rankwise export", ("files",))
TEXT, MMPROJ = "text", "mmproj"
# What the gguf package raises about a file that is cut off, altered or something else.
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, AssertionError)


@cache
def reader_class() -> Any:
    """The package's reader over a plain array: a vocabulary is a hundred thousand slices, and numpy takes several times
    as long for each slice of a memmap. The file stays mapped all the same."""
    gguf = need("gguf", extra="device")

    class PlainReader(gguf.GGUFReader):  # type: ignore[name-defined]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    return PlainReader


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it. shape: row-major, as PyTorch has it. type: F32, F16, BF16, Q8_0 …"""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


class GGUFFile:
    """An opened file (memory-mapped: opening a large one is quick).

    VerificationError, naming the file, where it is not a GGUF, is truncated, or names one tensor twice.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._gguf = need("gguf", extra="device")
        try:
            self._reader = reader_class()(self.path)
            self._check_places()
        except OSError as error:
            raise VerificationError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        except BROKEN as error:
            size = self.path.stat().st_size
            raise VerificationError(
                f"{self.path}: not a whole GGUF file ({size:,} bytes; {error or type(error).__name__}); was it cut "
                "off? Export it again"
            ) from error
        self._by_name = {tensor.name: tensor for tensor in self._reader.tensors}

    def _check_places(self) -> None:
        """Every tensor lies within the file, after the header; numpy would cut a short one silently."""
        size = self.path.stat().st_size
        for tensor in self._reader.tensors:
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > size:
                raise ValueError(f"the tensor {tensor.name} should end at byte {end:,}")

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Keys and values: strings, numbers, lists of them."""
        try:
            return {name: field.contents() for name, field in self._reader.fields.items()}
        except BROKEN as error:
            raise VerificationError(f"{self.path}: its metadata cannot be read ({error})") from error

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the header lists, in its order."""
        return {
            name: TensorInfo(
                name, tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, int(tensor.n_bytes)
            )
            for name, tensor in self._by_name.items()
        }

    def tensor(self, name: str) -> Tensor:
        """One tensor as float32, dequantized, in its row-major shape. VerificationError where it is absent."""
        return self._values(name, self._stored(name).data).reshape(self.tensors[name].shape)

    def part(self, name: str, number: int) -> Tensor:
        """One of the matrices that a stack holds along its first axis, likewise: of a layer's experts, say."""
        return self._values(name, self._stored(name).data[number]).reshape(self.tensors[name].shape[1:])

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor's matrices one by one: all of a stack, or the tensor itself."""
        shape = self.tensors[name].shape
        return (self.part(name, number) for number in range(shape[0])) if len(shape) == 3 else iter([self.tensor(name)])

    def _stored(self, name: str) -> Any:
        if name not in self._by_name:
            raise VerificationError(f"{self.path}: has no tensor {name}")
        return self._by_name[name]

    def _values(self, name: str, data: Any) -> Tensor:
        kind = self._by_name[name].tensor_type
        try:
            values = self._gguf.quants.dequantize(data, kind)
        except NotImplementedError as error:
            raise VerificationError(f"{self.path}: {name} has an unsupported type, {kind.name}") from error
        values = np.ascontiguousarray(values, dtype=np.float32)
        return torch.from_numpy(values.copy() if not values.flags.writeable else values)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of_architecture(self, key: str) -> Any:
        """`attention.head_count` → the value of `llama.attention.head_count`; None where it is not stated."""
        return self.metadata.get(f"{self.architecture}.{key}")


SHOWN = 4


def first_few(names: Sequence[str]) -> str:
    """For messages: a, b, c, d and 12 more."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- what llama.cpp calls a checkpoint's tensors: model.layers.0.self_attn.q_proj.weight → blk.0.attn_q.weight --------
#
# The table is the gguf package's own. Where it is silent (a model newer than the package), contents decide instead.

SUFFIXES = (".weight", ".bias")
WITHIN = ("text_model.", "language_model.")  # what a vision-language model puts before its language tower's names
ENDINGS = {"e_score_correction_bias": "e_score_correction.bias", "sinks": "sinks.weight"}
BLOCKS = ("block_count", "vision.block_count")


def gguf_names(keys: Iterable[str], file: GGUFFile) -> dict[str, str]:
    """Name in `file` → key, for the keys that the table knows under a name that the file has."""
    table = name_table(file)
    if table is None:
        return {}
    found: dict[str, str] = {}
    for key in keys:
        name = next((name for form in forms(key) if (name := table.get_name(form, SUFFIXES)) in file.tensors), None)
        if name is not None:
            found.setdefault(name, key)
    return found


def forms(key: str) -> Iterator[str]:
    """The key, what it would be if the model were its language tower alone, and what converters write for parameters
    without an ending of their own."""
    yield key
    for part in WITHIN:
        if part in key:
            yield key.replace(part, "")
            yield "model." + key.split(part, 1)[1]
    yield from (key.replace(own, theirs) for own, theirs in ENDINGS.items() if key.endswith(own))


def name_table(file: GGUFFile, blocks: int | None = None) -> Any:
    """The package's table for the file's architecture and depth [as it states it]; None where it doesn't know it."""
    gguf = need("gguf", extra="device")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    stated = next((count for key in BLOCKS if (count := file.of_architecture(key)) is not None), blocks)
    if file.architecture not in kinds or stated is None:
        return None
    return gguf.get_tensor_name_map(kinds[file.architecture], int(stated))


# --- an export folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """An export folder: its files by type, and export.json."""

    folder: Path
    content: Mapping[str, Any]

    @property
    def outtypes(self) -> tuple[str, ...]:
        return tuple(self.content["files"])

    def text(self, outtype: str) -> Path:
        """The text model's GGUF. UsageError for a type that was not exported."""
        return self.folder / str(self._files(outtype)[TEXT])

    def mmproj(self, outtype: str) -> Path | None:
        """The vision tower's and projector's GGUF; None for a text model."""
        name = self._files(outtype)[MMPROJ]
        return self.folder / name if name else None

    def _files(self, outtype: str) -> Mapping[str, Any]:
        if outtype not in self.content["files"]:
            raise UsageError(f"{self.folder}: has no {outtype} files; it has {', '.join(self.outtypes)}")
        files: Mapping[str, Any] = self.content["files"][outtype]
        return files


def read_export(folder: Path | str) -> Exported:
    """DataError for a folder that is no export, or lacks one of its files."""
    folder = Path(folder)
    content = EXPORT.read(folder)
    names = [files[kind] for files in content["files"].values() for kind in (TEXT, MMPROJ) if files.get(kind)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: lacks {', '.join(missing)}, which {NAME} lists; export again")
    return Exported(folder, content)
