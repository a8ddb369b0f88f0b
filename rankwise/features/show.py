"""rankwise features show: one test image's channels, original, network and SVD, and what the two miss.

rankwise features show --arch ResMLP --image_idx 0 --results_dir results
results/<arch> + its cache's test images ──▶ <arch>/spatial_0.png (3 × 8 maps) and spatial_error_0.png (2 × 8)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import UsageError, need
from rankwise.evaluate.generate import pick_device
from rankwise.features.approximation import by_svd
from rankwise.features.cache import FeatureCache
from rankwise.features.dataset import cached, read_split
from rankwise.features.measures import SVD, cosine, excess_error, mse, network, relative_error
from rankwise.features.trained import Network, networks
from rankwise.options.features import FactorShowConfig, canonical
from rankwise.page import canvas
from rankwise.page.text import clip

CELL, LABELS, BAR = 0.95, 1.0, 0.75  # inches
Grid = tuple[int, int]
ORIGINAL = "original"


def run(config: FactorShowConfig) -> tuple[Path, Path]:
    """Draw and print; returns both pictures."""
    check(config)
    found = networks(config.results_dir, [config.arch])[0]
    cache = found.cache_or(config.features)
    grid, assumed = grid_of(cache, config.channels)
    place = test_place(read_split(found.folder, cache).test, config.image_idx, cache)
    shown = approximations(found, next(cached(cache, [place])), rank_of(config.rank, found), config.device)
    for line in [assumed, f"{cache.ids[place]} (test image {config.image_idx}, on normalised features)"]:
        print(line) if line else None
    for line in errors(shown):
        print(line)
    title = f"{cache.ids[place]} · normalised features"
    few = {name: matrix[:, : config.channels] for name, matrix in shown.items()}
    pictures = targets(found.folder, config.image_idx)
    plot_channels(few, grid, pictures[0], title)
    plot_channel_errors(few, grid, pictures[1], title)
    print(f"{pictures[0]}\n{pictures[1]}")
    return pictures


def describe(config: FactorShowConfig) -> list[str]:
    folder = Path(config.results_dir) / canonical(config.arch)
    pictures = " and ".join(map(str, targets(folder, config.image_idx)))
    return [f"approximate test image {config.image_idx} with {folder} and the SVD", f"write {pictures}"]


def check(config: FactorShowConfig) -> None:
    need("matplotlib", extra="plots")


def plot_channels(shown: Mapping[str, Tensor], grid: Grid, path: Path | str, title: str = "") -> Path:
    """A row per member, a column per channel; each channel has one colour scale, whose ends stand below it.

    Args:
        shown: name → (T, C), the original first.
        grid: (rows, columns) of the T tokens, row-major.
    """
    figure, axes = maps_of(len(shown), next(iter(shown.values())).shape[1], grid, title)
    for channel in range(axes.shape[1]):
        maps = [spread(matrix[:, channel], grid) for matrix in shown.values()]
        low, high = min(float(one.min()) for one in maps), max(float(one.max()) for one in maps)
        for axis, one in zip(axes[:, channel], maps, strict=True):
            axis.imshow(one, cmap=canvas.colormap(), vmin=low, vmax=high, interpolation="nearest")
        axes[-1, channel].set_xlabel(f"{low:.1f} to {high:.1f}", fontsize=7, color=canvas.INK)
    label_rows(axes, list(shown))
    return canvas.save(figure, path)


def plot_channel_errors(shown: Mapping[str, Tensor], grid: Grid, path: Path | str, title: str = "") -> Path:
    """|member − original| of every member but the first, all on one scale that begins at 0."""
    (_, original), *others = shown.items()
    errors = {name: (matrix - original).abs() for name, matrix in others}
    figure, axes = maps_of(len(errors), original.shape[1], grid, title, bar=BAR)
    top = max(float(one.max()) for one in errors.values()) or 1.0
    for row, matrix in enumerate(errors.values()):
        for channel, axis in enumerate(axes[row]):
            drawn = spread(matrix[:, channel], grid)
            image = axis.imshow(drawn, cmap=canvas.colormap(), vmin=0.0, vmax=top, interpolation="nearest")
    canvas.colour_bar(figure, image, axes, "|error|", fraction=0.02, pad=0.01)
    label_rows(axes, list(errors))
    return canvas.save(figure, path)


def maps_of(rows: int, channels: int, grid: Grid, title: str, bar: float = 0.0) -> tuple[Any, Any]:
    """Bare axes (rows, channels), the channels' numbers above them."""
    height = CELL * grid[0] / grid[1]
    figure, found = canvas.panels(LABELS + bar + CELL * channels, 0.72 + 0.96 * rows * height, channels, rows)
    axes = np.reshape(np.array(found, dtype=object), (rows, channels))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        canvas.bare(axis)
    for channel, axis in enumerate(axes[0]):
        axis.set_title(f"channel {channel}", fontsize=8, color=canvas.INK)
    canvas.name_figure(figure, clip(title, 110), size=9)
    return figure, axes


def spread(tokens: Tensor, grid: Grid) -> Any:
    """(T,) on the grid."""
    return tokens.reshape(grid).cpu().numpy()


def label_rows(axes: Any, names: list[str]) -> None:
    for axis, name in zip(axes[:, 0], names, strict=True):
        label = axis.set_ylabel(clip(name, 24), rotation=0, ha="right", va="center", fontsize=8, color=canvas.INK)
        label.set_parse_math(False)


def grid_of(cache: FeatureCache, channels: int) -> tuple[Grid, str]:
    """The token grid; of a cache that has none, a square where the tokens make one, and a line that says so."""
    if channels > cache.channels:
        raise UsageError(f"--channels {channels}: these features have {cache.channels}")
    if cache.grid:
        return cache.grid, ""
    side = round(cache.tokens**0.5)
    if side * side != cache.tokens:
        raise UsageError(
            f"{cache.path} does not record the grid of its {cache.tokens} tokens, and they form no square: "
            "no map can be drawn. Capture the features again with `rankwise features capture`, which records the grid"
        )
    return (side, side), f"{cache.path} names no grid: {cache.tokens} tokens are drawn as {side} × {side}"


def test_place(places: tuple[int, ...], index: int, cache: FeatureCache) -> int:
    if not 0 <= index < len(places):
        raise UsageError(f"--image_idx {index}: {cache.path} has test images 0 to {len(places) - 1}")
    return places[index]


def rank_of(asked: int | None, found: Network) -> int:
    if asked is not None and asked > found.rank:
        raise UsageError(f"--rank {asked}: {found.folder.name} has only {found.rank} channels")
    return asked or found.rank


def approximations(found: Network, features: Tensor, rank: int, device: str) -> dict[str, Tensor]:
    """Original, the network's product and the SVD's, (T, D) each, of normalised features (1, T, D).

    The rank is the SVD's. A network of more channels gives its leading ones.
    """
    where = pick_device(device)
    whole = features.to(where)
    learned = network(found.net.to(where), rank=rank if rank < found.rank else None)
    name = f"{found.folder.name} (r = {min(rank, found.rank)})"
    with torch.no_grad():
        made = {name: learned.factorize(whole).product(), f"{SVD} (r = {rank})": by_svd(whole, rank).product()}
    return {ORIGINAL: whole[0].cpu()} | {key: product[0].cpu() for key, product in made.items()}


def errors(shown: Mapping[str, Tensor]) -> list[str]:
    """A line of measures for each approximation; excess is over the last, the SVD."""
    original, *_ = shown.values()
    relative = {name: relative_error(original, made) for name, made in shown.items() if name != ORIGINAL}
    *_, optimal = relative.values()
    return [
        f"  {name:<20} relative error {float(error):.4f}   excess {100 * float(excess_error(error, optimal)):.2f} %   "
        f"mse {float(mse(original, shown[name])):.4f}   cosine {float(cosine(original, shown[name])):.4f}"
        for name, error in relative.items()
    ]


def targets(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"spatial_{index}.png", folder / f"spatial_error_{index}.png"
