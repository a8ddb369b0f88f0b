"""The picture of a confusion matrix: rows are true classes, columns what was answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rankwise.page.canvas import colormap, name_axes, new_figure, readable_on, save
from rankwise.page.text import clip

CELL = 0.62  # inches
NONE = "no class"


def plot_confusion(labels: Sequence[str], counts: Sequence[Sequence[int]], path: Path, title: str = "") -> Path:
    """Counts in the cells, colour by the share of the row.

    counts: (classes, classes + 1), the last column for answers that name no class; it is left out where it is empty.
    """
    columns = [*labels, NONE] if any(row[-1] for row in counts) else list(labels)
    size = CELL * max(len(columns), 4)
    figure, axis = new_figure(size + 2.2, CELL * max(len(labels), 3) + 1.6)
    shares = [[count / max(1, sum(row)) for count in row[: len(columns)]] for row in counts]
    image = axis.imshow(shares, cmap=colormap(), vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(counts):
        for x in range(len(columns)):
            ink = readable_on(image.cmap(image.norm(shares[y][x])))
            axis.text(x, y, str(row[x]), ha="center", va="center", fontsize=9, color=ink)
    axis.set_xticks(range(len(columns)), [clip(name, 14) for name in columns], rotation=30, ha="right")
    axis.set_yticks(range(len(labels)), [clip(name, 14) for name in labels])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    name_axes(axis, "answered", "true", f"{title}: items" if title else "items")
    return save(figure, path)
