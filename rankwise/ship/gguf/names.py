"""What llama.cpp calls a checkpoint's tensors: `model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`.

The table is the gguf package's own. Where it is silent (a model newer than the package), contents decide instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rankwise.errors import need
from rankwise.ship.gguf.reading import GGUFFile

SUFFIXES = (".weight", ".bias")
WITHIN = ("text_model.", "language_model.")  # what a vision-language model puts before its language tower's names
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
    """The key, and what it would be if the model were its language tower alone."""
    yield key
    for part in WITHIN:
        if part in key:
            yield key.replace(part, "")
            yield "model." + key.split(part, 1)[1]


def name_table(file: GGUFFile, blocks: int | None = None) -> Any:
    """The package's table for the file's architecture and depth [as it states it]; None where it doesn't know it."""
    gguf = need("gguf", extra="device")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    stated = next((count for key in BLOCKS if (count := file.of_architecture(key)) is not None), blocks)
    if file.architecture not in kinds or stated is None:
        return None
    return gguf.get_tensor_name_map(kinds[file.architecture], int(stated))
