"""From a depth map to one number per image token, and the controls that a depth claim must be compared with.

    D (height, width) ── normalised ──▶ [0, 1] ── on_grids ──▶ (tokens,) float16

Everything downstream uses the float16 values, or a resumed run would differ from an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.core.geometry import Grid, pooled

CONTROLS = ("estimated", "off", "shuffled", "constant", "luminance", "ramp", "permuted", "file")
FLATNESS = 1e-9  # keeps a constant map from dividing by zero: it becomes 0 everywhere
CONSTANT = 0.5
RAMP_ROWS = 1024


def normalised(depth: Tensor) -> Tensor:
    """(D − min) / (max − min + 1e-9), in [0, 1]. Raises ValueError for a map with a value that is not finite.

    By image: the nearest point of every image is 1. Only the order of depths within one image is comparable.
    """
    if not bool(torch.isfinite(depth).all()):
        raise ValueError("the map holds values that are not finite")
    depth = depth.float()
    low, high = depth.min(), depth.max()
    return (depth - low) / (high - low + FLATNESS)


def on_grids(values: Tensor, grids: Sequence[Grid]) -> Tensor:
    """A map in [0, 1] at every token of an image: (tokens,) float16, in the tokens' order."""
    return torch.cat([pooled(values, grid) for grid in grids]).half()


def ramp() -> Tensor:
    """What vertical position alone would say: far at the top, near at the bottom, the same for every image."""
    return torch.linspace(0, 1, RAMP_ROWS)[:, None]


def constant(grids: Sequence[Grid]) -> Tensor:
    """One value at every token: the encoding without any information."""
    return torch.full((sum(grid.tokens for grid in grids),), CONSTANT, dtype=torch.float16)


def permuted(values: Tensor, grids: Sequence[Grid], seed: int) -> Tensor:
    """The image's own values at other tokens of the same grid: their distribution without their places.

    The order follows from the seed and the values themselves, so that an image is always permuted the same way.
    """
    content = hashlib.sha256(values.numpy().tobytes() + str(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(content[:7], "big"))
    parts = torch.split(values, [grid.tokens for grid in grids])
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])


def derangement(count: int, generator: torch.Generator) -> list[int]:
    """A random order in which no item keeps its place (one cycle through all: Sattolo's algorithm). count ≥ 2."""
    assert count > 1, count
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (1,), generator=generator))
        order[last], order[other] = order[other], order[last]
    return order
