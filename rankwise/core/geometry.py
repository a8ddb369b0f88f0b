"""From an image's size to its tokens: pure arithmetic, each rule the one that a family's processor follows.

    (height, width) ── bounded_size, tile_counts … ──▶ Grid (box, rows, columns) ── pooled(map, grid) ──▶ (tokens,)

A change of one pixel or one rounding here and a depth value stands at the wrong token; tests compare every rule with
the processors themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EDGE = 1e-6  # of a pixel: a product such as (2/3)·51 must not open a pixel more than it touches


@dataclass(frozen=True)
class Grid:
    """Image tokens on a grid, row-major, and the part of the image that they show.

    box: (left, top, right, bottom) in fractions of the image's width and height.
    """

    box: tuple[float, float, float, float]
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


WHOLE = (0.0, 0.0, 1.0, 1.0)


def pooled(values: Tensor, grid: Grid) -> Tensor:
    """A map (height, width) averaged over each token of a grid: (tokens,) float32, row-major.

    A tile takes its crop of the whole image's map, with every pixel that it touches.
    """
    height, width = values.shape
    left, top, right, bottom = grid.box
    rows = slice(math.floor(top * height + EDGE), math.ceil(bottom * height - EDGE))
    columns = slice(math.floor(left * width + EDGE), math.ceil(right * width - EDGE))
    crop = values[rows, columns][None, None].float()
    return functional.adaptive_avg_pool2d(crop, (grid.rows, grid.columns)).flatten()


def bounded_size(height: int, width: int, factor: int, fewest: int, most: int) -> tuple[int, int]:
    """(height, width) in the Qwen-VL families: multiples of `factor`, of about the same shape, with `fewest` to `most`
    pixels. Halves round to even, as Python's round does and so the families' processors."""
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > most:
        shrink = math.sqrt(height * width / most)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif tall * wide < fewest:
        grow = math.sqrt(fewest / (height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def tile_counts(height: int, width: int, longest: int, tile: int, limit: int = 4096) -> tuple[int, int]:
    """(rows, columns) of the square tiles that SmolVLM and Idefics3 cut an image into; (0, 0) where it stays whole.

    The longest side becomes `longest`, the other follows and is made even; a side above `limit` is cut down to it;
    then both are stretched up to multiples of `tile`.
    """
    wide = width >= height
    height, width = with_longest(height, width, longest)
    height, width = (height + height % 2, width) if wide else (height, width + width % 2)
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > limit:
        height, width = with_longest(height, width, limit)
    height, width = with_longest(height, width, math.ceil(max(height, width) / tile) * tile)
    rows, columns = max(math.ceil(height / tile), 1), max(math.ceil(width / tile), 1)
    return (0, 0) if rows == columns == 1 else (rows, columns)


def with_longest(height: int, width: int, longest: int) -> tuple[int, int]:
    """The longest side as given, the other cut to a whole number, by the family's own float quotient: an exact one
    may fall on the other side of a tile's edge."""
    ratio = width / height
    return (int(longest / ratio), longest) if width >= height else (longest, int(longest * ratio))


def tiled(rows: int, columns: int, side: int) -> tuple[Grid, ...]:
    """Tiles of side² tokens, row-major, then the whole image again; without tiles the whole image alone."""
    tiles = [
        Grid((column / columns, row / rows, (column + 1) / columns, (row + 1) / rows), side, side)
        for row in range(rows)
        for column in range(columns)
    ]
    return (*tiles, Grid(WHOLE, side, side))


def centre_crop(height: int, width: int, shortest: int, crop: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box that is left when the shortest side is resized to `shortest` and (height, width) `crop` is cut from the
    middle, as CLIP's processor does. The crop must fit into the resized image."""
    long = int(shortest * max(height, width) / min(height, width))
    tall, wide = (shortest, long) if width >= height else (long, shortest)
    top, left = int((tall - crop[0]) / 2), int((wide - crop[1]) / 2)
    return left / wide, top / tall, (left + crop[1]) / wide, (top + crop[0]) / tall


def estimator_size(height: int, width: int, shortest: int, multiple: int = 14, stretch: int = 8) -> tuple[int, int]:
    """(height, width) at which Depth Anything V2 looks at an image: the shape is kept, the shorter side becomes
    `shortest`, both sides are multiples of `multiple`, none below `shortest`.

    A side above `stretch` · shortest is cut down to that, so that a strip of an image does not fill the memory.
    """
    scale = shortest / min(height, width)
    tall, wide = (min(multiple_near(side * scale, multiple, shortest), stretch * shortest) for side in (height, width))
    return tall, wide


def multiple_near(value: float, multiple: int, least: int) -> int:
    """The nearest multiple, or the next one up where that is below `least`."""
    nearest = round(value / multiple) * multiple
    return nearest if nearest >= least else math.ceil(value / multiple) * multiple


def scaled_blocks(height: int, width: int, block: int, fewest: int, most: int) -> tuple[int, int]:
    """(rows, columns) of blocks that an image covers in Isaac: each side rounded up to whole blocks of `block` pixels.

    Where that gives too few or too many blocks, the image is scaled uniformly, by the least s > 1 that reaches
    `fewest` or the greatest s < 1 that keeps to `most`. s · side is rounded up again, so the counts change only where
    s · side crosses a multiple of `block`; the search goes from one crossing to the next, in whole numbers.
    """
    rows, columns = -(-height // block), -(-width // block)
    while rows * columns < fewest:
        crossing = rows * width - columns * height  # sign: whether the rows or the columns overflow first
        rows, columns = rows + (crossing <= 0), columns + (crossing >= 0)
    while rows * columns > most:
        crossing = (rows - 1) * width - (columns - 1) * height
        rows, columns = rows - (crossing >= 0), columns - (crossing <= 0)
    return rows, columns


@dataclass(frozen=True)
class Letterbox:
    """An image scaled to fit a square and set in its middle: the scaled size and its top left corner, in pixels."""

    width: int
    height: int
    left: int
    top: int


def letterbox(width: int, height: int, size: int) -> Letterbox:
    """Position of an image of this size in a square of `size` pixels, as the phone app computes it.

    The factor and both products are single precision and cut down to whole pixels; the longest side is `size` by
    definition (its product can come out as 255.99998, which would leave a line of padding).
    """
    sides = torch.tensor([width, height], dtype=torch.float32)
    wide, tall = (max(1, int(side)) for side in sides * (size / sides).min())
    wide, tall = (size if width >= height else wide), (size if height >= width else tall)
    return Letterbox(wide, tall, (size - wide) // 2, (size - tall) // 2)


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
    """Depth from vertical position alone: far at the top, near at the bottom, the same for every image."""
    return torch.linspace(0, 1, RAMP_ROWS)[:, None]


def constant(grids: Sequence[Grid]) -> Tensor:
    """One value at every token: the encoding without any information."""
    return torch.full((sum(grid.tokens for grid in grids),), CONSTANT, dtype=torch.float16)


def permuted(values: Tensor, grids: Sequence[Grid], seed: int) -> Tensor:
    """The image's own values, permuted over the tokens of its grid: the distribution without the positions.

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
