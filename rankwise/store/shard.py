"""One safetensors file: its header checked against its size, its tensors as views of the mapped file.

The tensors are file-backed pages that the kernel may drop and read again, not anonymous memory: a model
larger than the machine's memory can be walked through. Nothing may be written into them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.errors import DataError

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
class Entry:
    """Where one tensor lies in its file: `start` and `end` are byte offsets from the start of the file."""

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
            raise DataError(f"{path}: not a sound safetensors file ({error}); fetch or save it again") from error

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


def read_entries(path: Path) -> dict[str, Entry]:
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
        raise DataError(f"{path}: cut off within its header ({size:,} bytes); fetch or save it again")
    entries = parse_header(path, header)
    expected = max((entry.end for entry in entries.values()), default=LENGTH_BYTES + length)
    if expected != size:
        raise DataError(
            f"{path}: {size:,} bytes where its header describes {expected:,}: cut off or altered; "
            "fetch or save it again"
        )
    return entries


def parse_header(path: Path, header: bytes) -> dict[str, Entry]:
    """Entries in the order of their bytes; DataError where a row does not describe a tensor."""
    base = LENGTH_BYTES + len(header)
    try:
        rows = {key: row for key, row in json.loads(header).items() if key != "__metadata__"}
        entries = {key: _entry(row, base) for key, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a safetensors header ({error!r}); fetch or save it again") from error
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _entry(row: dict[str, Any], base: int) -> Entry:
    start, end = row["data_offsets"]
    entry = Entry(tuple(row["shape"]), DTYPES[row["dtype"]], base + start, base + end)
    if math.prod(entry.shape) * entry.dtype.itemsize != end - start:
        raise ValueError(f"{end - start} bytes do not make {entry.shape} of {entry.dtype}")
    return entry
