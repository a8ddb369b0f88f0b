"""Folders of the older feature files: `features_0.pt`, `features_1.pt`, … each one tensor (1, T, D).

Read with `weights_only=True`: no code in them runs. A file that cannot be read is an error that names it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankwise.errors import DataError
from rankwise.files.pickled import load_tensor

NAME = re.compile(r"features_(?P<number>\d+)\.pt")


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
        return tuple(digest_of(self.read(place)) for place in range(len(self.paths)))


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


def digest_of(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.detach().contiguous().view(torch.uint8).numpy().data).hexdigest()
