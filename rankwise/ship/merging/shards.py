"""A checkpoint written tensor by tensor: split into files like save_pretrained's, one tensor in memory at a time.

safetensors' own writer wants a whole file's tensors at once, which for 5 GB files is 5 GB of merged weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from rankwise.errors import UsageError
from rankwise.files.atomic import write_json
from rankwise.files.checkpoint import DTYPES, LENGTH_BYTES

PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is still to be made."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def shard_bytes(text: str, flag: str = "--max_shard_size") -> int:
    """ "5GB" → bytes. UsageError, naming the flag, for what is no size."""
    try:
        size = int(convert_file_size_to_int(text))
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(f"{flag} takes a number with KB, MB or GB, such as 5GB; got {text!r}")
    return size


def write_shards(
    folder: Path, entries: Sequence[Entry], tensor: Callable[[str], Tensor], max_shard_size: str
) -> list[Path]:
    """Write every entry's tensor to `folder`, in one file or several with their index. Returns the files."""
    by_key = {entry.key: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_key,
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern=PATTERN,
        max_shard_size=shard_bytes(max_shard_size),
    )
    for name, keys in split.filename_to_tensors.items():
        write_file(folder / name, [by_key[key] for key in keys], tensor)
    files = [folder / name for name in split.filename_to_tensors]
    if split.is_sharded:
        files.append(write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}))
    return files


def write_file(path: Path, entries: Sequence[Entry], tensor: Callable[[str], Tensor]) -> None:
    """One safetensors file: length, header, then the tensors' bytes; wide types first, so that all are aligned."""
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        end = offset + entry.bytes
        header[entry.key] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            made = tensor(entry.key).contiguous()
            assert (tuple(made.shape), made.dtype) == (entry.shape, entry.dtype), entry.key
            file.write(made.reshape(-1).view(torch.uint8).numpy().data)
