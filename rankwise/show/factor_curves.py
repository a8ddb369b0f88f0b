"""The picture of training a network of factors: its errors by epoch, and what drove them below.

plot_factor_training(read_json(run / "history.json"), run / "train_val_loss_comparison.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.page.canvas import (
    BLUE,
    GREY,
    INK,
    YELLOW,
    legend,
    log_ticks,
    name_axes,
    new_figure,
    plain,
    save,
    whole_ticks,
)

DOTS = 12  # epochs up to which every point is marked


def plot_factor_training(rows: Sequence[Mapping[str, Any]], path: Path | str, best_epoch: int | None = None) -> Path:
    """MSE in training and validation by epoch; below it the learning rate, and the effective rank where it changed.

    Args:
        rows: of `history.json`.
        path: file to write.
        best_epoch: the epoch whose network was kept; marked.

    Raises:
        DataError: there is no epoch.
    """
    if not rows:
        raise DataError("the history holds no epoch")
    epochs = [row["epoch"] for row in rows]
    figure, axes = new_figure(7.2, 4.6, rows=2)
    above, below = axes.flat
    draw(above, epochs, [row["train_mse"] for row in rows], "training", BLUE, "-")
    draw(above, epochs, [row["val_mse"] for row in rows], "validation", INK, "--")
    for row in rows:
        if row["epoch"] == best_epoch:
            label = f"kept: {row['val_mse']:.4g} at epoch {best_epoch}"
            above.plot([best_epoch], [row["val_mse"]], color=INK, linestyle="", marker="D", markersize=7, label=label)
    above.set_yscale("log")
    log_ticks(above.yaxis)
    name_axes(above, "", "MSE of A·B")
    legend(above, loc="upper right")
    draw(below, epochs, [row["lr"] for row in rows], "learning rate", GREY, "-")
    below.set_yscale("log")
    log_ticks(below.yaxis)
    name_axes(below, "epoch", "learning rate")
    draw_ranks(below, epochs, [row["effective_rank"] for row in rows])
    for axis in (above, below):
        whole_ticks(axis.xaxis)
    return save(figure, path)


def draw(axis: Any, epochs: Sequence[int], values: Sequence[float], name: str, colour: str, style: str) -> None:
    dots = "o" if len(epochs) <= DOTS else None
    axis.plot(epochs, values, color=colour, linestyle=style, linewidth=1.5, marker=dots, markersize=3, label=name)


def draw_ranks(axis: Any, epochs: Sequence[int], ranks: Sequence[int]) -> None:
    """On an axis of its own at the right; nothing where the rank never changed."""
    if len(set(ranks)) == 1:
        return
    other = axis.twinx()
    plain(other)
    other.grid(False)
    other.spines[["left", "top"]].set_visible(False)
    other.spines["right"].set(visible=True, color=GREY)
    draw(other, epochs, ranks, "effective rank", YELLOW, "-.")
    other.set_ylim(0, max(ranks) * 1.05)
    other.set_ylabel("effective rank", fontsize=9, color=INK)
    axis.spines[["right", "top"]].set_visible(False)
    lines = [*axis.get_lines(), *other.get_lines()]
    other.legend(lines, [line.get_label() for line in lines], fontsize=8, framealpha=0.85, edgecolor="none")
