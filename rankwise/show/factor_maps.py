"""One image's channels on its token grid: original and approximations, and what each of those misses.

plot_channels({"original": X, "ResMLP": net, "SVD": svd}, (16, 16), folder / "spatial_0.png")
plot_channel_errors(…)                       # the same, minus the first: |error|
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rankwise.page.canvas import INK, colormap, new_figure, save
from rankwise.page.text import clip

CELL, LABELS, BAR = 0.95, 1.0, 0.75  # inches
Grid = tuple[int, int]


def plot_channels(shown: Mapping[str, Tensor], grid: Grid, path: Path | str, title: str = "") -> Path:
    """A row per member, a column per channel; each channel has one colour scale, whose ends stand below it.

    Args:
        shown: name → (T, C), the original first.
        grid: (rows, columns) of the T tokens, row-major.
    """
    figure, axes = panels(len(shown), next(iter(shown.values())).shape[1], grid, title)
    for channel in range(axes.shape[1]):
        maps = [spread(matrix[:, channel], grid) for matrix in shown.values()]
        low, high = min(float(one.min()) for one in maps), max(float(one.max()) for one in maps)
        for axis, one in zip(axes[:, channel], maps, strict=True):
            axis.imshow(one, cmap=colormap(), vmin=low, vmax=high, interpolation="nearest")
        axes[-1, channel].set_xlabel(f"{low:.1f} to {high:.1f}", fontsize=7, color=INK)
    label_rows(axes, list(shown))
    return save(figure, path)


def plot_channel_errors(shown: Mapping[str, Tensor], grid: Grid, path: Path | str, title: str = "") -> Path:
    """|member − original| of every member but the first, all on one scale that begins at 0."""
    (_, original), *others = shown.items()
    errors = {name: (matrix - original).abs() for name, matrix in others}
    figure, axes = panels(len(errors), original.shape[1], grid, title, bar=BAR)
    top = max(float(one.max()) for one in errors.values()) or 1.0
    for row, matrix in enumerate(errors.values()):
        for channel, axis in enumerate(axes[row]):
            drawn = spread(matrix[:, channel], grid)
            image = axis.imshow(drawn, cmap=colormap(), vmin=0.0, vmax=top, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.set_label("|error|", fontsize=8, color=INK)
    label_rows(axes, list(errors))
    return save(figure, path)


def panels(rows: int, channels: int, grid: Grid, title: str, bar: float = 0.0) -> tuple[Any, Any]:
    """Bare axes (rows, channels), the channels' numbers above them."""
    height = CELL * grid[0] / grid[1]
    figure, found = new_figure(LABELS + bar + CELL * channels, 0.72 + 0.96 * rows * height, channels, rows)
    axes = np.reshape(np.array(found, dtype=object), (rows, channels))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for channel, axis in enumerate(axes[0]):
        axis.set_title(f"channel {channel}", fontsize=8, color=INK)
    figure.suptitle(clip(title, 110), fontsize=9, color=INK, x=0.01, ha="left").set_parse_math(False)
    return figure, axes


def spread(tokens: Tensor, grid: Grid) -> Any:
    """(T,) on the grid."""
    return tokens.reshape(grid).cpu().numpy()


def label_rows(axes: Any, names: list[str]) -> None:
    for axis, name in zip(axes[:, 0], names, strict=True):
        label = axis.set_ylabel(clip(name, 24), rotation=0, ha="right", va="center", fontsize=8, color=INK)
        label.set_parse_math(False)
