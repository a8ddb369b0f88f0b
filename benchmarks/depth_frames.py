"""Depth at image tokens, checked by a second computation on real RGB-D frames, and drawn for drawn scenes.

Ten frames say that the mechanism works (files load, each token gets the depth of its part of the image), no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from vision_workload import processor as qwen_processor

from rankwise.core.geometry import normalised
from rankwise.data.depth.maps import DepthCache, DepthFiles, DepthMaps, image_grids
from rankwise.data.depth.prepare import fill
from rankwise.data.images import ImageReader
from rankwise.models.load import load_processor

SHOWN = 4
PIXELS = 512 * 512  # most pixels that the Qwen2.5-VL processor of the check leaves a frame


def frame_lines(folder: Path) -> list[str]:
    """A paragraph on the frames of this folder: what their tokens got, against block means in float64."""
    files = DepthFiles.at(next(folder.glob("*.csv")))
    assert files.table is not None
    with tempfile.TemporaryDirectory() as cache:
        reader = ImageReader(folder)
        maps = DepthMaps(reader, qwen_processor(PIXELS), DepthCache(Path(cache)), control="file", files=files)
        fill(maps, list(files.table), maps.own_map)
        found = {name: maps.for_image(name).double().numpy() for name in files.table}
        worst, tokens = 0.0, set()
        for name, values in found.items():
            (grid,) = image_grids(maps.processor, *reader.size(name))
            tokens.add(f"{grid.rows} × {grid.columns}")
            expected = block_means(nearness(files.file(name)), grid.rows, grid.columns).ravel()
            worst = max(worst, float(np.abs(values - expected).max()))
    return [
        "## Real frames",
        "",
        f"{len(found)} measured RGB-D frames through `--depth_control file` and a Qwen2.5-VL processor, "
        f"{' or '.join(sorted(tokens))} tokens each; all values are finite and in [0, 1]. Largest difference from "
        f"block means of inverse depth, computed apart in float64: {worst:.1g} (float16 rounds by up to {2**-12:.1g}). "
        "Maps load and reach their tokens; about real scenes ten frames say nothing more.",
        "",
    ]


def nearness(file: Path) -> NDArray[np.float64]:
    """Inverse depth stretched to [0, 1], from the file's own numbers."""
    distance = np.asarray(Image.open(file)).astype(np.float64)
    inverse = 1 / np.where(distance > 0, distance, distance.max())
    return (inverse - inverse.min()) / (inverse.max() - inverse.min())


def block_means(values: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """The mean of every pixel that a block touches."""
    height, width = values.shape
    found = np.empty((rows, columns))
    for row in range(rows):
        top, bottom = row * height // rows, -(-(row + 1) * height // rows)
        for column in range(columns):
            left, right = column * width // columns, -(-(column + 1) * width // columns)
            found[row, column] = values[top:bottom, left:right].mean()
    return found


def draw_tokens(work: Path, out: Path) -> Path:
    """Picture, depth map and the depth of its 16 tokens, for a few test scenes."""
    names = [f"test-{number}.png" for number in range(SHOWN)]
    maps = DepthMaps(
        ImageReader(work / "images"),
        load_processor(str(work / "base")),
        DepthCache(work / "cache"),
        control="file",
        files=DepthFiles.at(work / "maps"),
    )
    fill(maps, names, maps.own_map)
    figure = Figure(figsize=(2.1 * SHOWN, 6.2), layout="constrained")
    axes = figure.subplots(3, SHOWN, squeeze=False)
    for number, name in enumerate(names):
        tokens = maps.for_image(name).float().view(4, 4)
        seen = torch.tensor(np.asarray(maps.reader.open(name)))
        show(axes[:, number], [seen, normalised(maps.own_map(name)), tokens])
    for axis, label in zip(axes[:, 0], ("picture", "depth (white: near)", "at its 16 tokens"), strict=True):
        axis.set_ylabel(label)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out


def show(axes: Sequence[Any], layers: Sequence[torch.Tensor]) -> None:
    for axis, values in zip(axes, layers, strict=True):
        axis.imshow(values.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
