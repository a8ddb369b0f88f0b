"""Legacy pickle weights (.bin, .pt, .pth, .tar): read with `weights_only=True`, so no code in them runs."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import DataError

SUFFIXES = (".bin", ".pt", ".pth", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model")
PICKLE_ERRORS = (pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError)
BROKEN = (*PICKLE_ERRORS, RuntimeError, EOFError, OSError)

logger = logging.getLogger(__name__)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, wrappers `state_dict` and `model` taken off.

    Zip archives (torch.save since 1.6) are memory-mapped. Older files are read whole, and a warning says so.
    DataError where the file is missing or broken, needs code to load, or holds no tensors.
    """
    content = unwrap(_load(path))
    tensors = {key: value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(list(map(str, content))[:5]) or "nothing"
        raise DataError(f"{path}: no tensors in it (top-level keys: {found}); a state dict is expected")
    return tensors


def load_tensor(path: Path) -> Tensor:
    """The one tensor that `torch.save(tensor, path)` has written. DataError as `load_pickle`, and for anything else."""
    content = _load(path)
    if not isinstance(content, Tensor):
        raise DataError(f"{path}: expected one tensor, found a {type(content).__name__}")
    return content.detach()


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict inside training checkpoints such as {"epoch": …, "state_dict": {…}}."""
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            return content
        content = inner
    return {}


def _load(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)
        if not mapped:
            size = path.stat().st_size / 2**20
            logger.warning("%s: legacy pickle, loaded into memory as a whole (%.1f MiB)", path, size)
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except BROKEN as error:
        raise DataError(f"{path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """torch's long advice (which includes switching the protection off) cut to what matters."""
    refused = re.search(r"(?:GLOBAL|global) (?:`)?([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"loading it would run code from the file ({refused[1]}), which is never done; "
            "save its weights alone as safetensors, with the program that made it"
        )
    if isinstance(error, FileNotFoundError | PermissionError):
        return f"cannot be read: {error.strerror}"
    if isinstance(error, pickle.UnpicklingError):
        return "not a valid PyTorch weights file (its pickle is broken); fetch or save it again"
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"not a valid PyTorch weights file ({first[:160]}); fetch or save it again"
