"""Versions of what results depend on, from the metadata of what is installed: no library is imported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import cache

from rankwise import __version__

LIBRARIES = ("rankwise", "torch", "transformers", "peft")
SHOWN = (*LIBRARIES[1:], *"torchvision accelerate safetensors tokenizers huggingface_hub numpy".split())
SHOWN += ("bitsandbytes", "trl", "xllamacpp", "gguf")  # where they are installed


def version(name: str) -> str | None:
    """None where the package is not installed. Rankwise's own is that of this code, wherever it lies."""
    if name == "rankwise":
        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def versions() -> dict[str, str | None]:
    """Of LIBRARIES."""
    return {name: version(name) for name in LIBRARIES}


def installed(names: Sequence[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    return {name: found for name in names if (found := version(name))}
