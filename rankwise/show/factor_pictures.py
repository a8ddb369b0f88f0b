"""What the report draws of features: curves of each network, the comparison's plots, the model's answers.

contents ── feature_pictures ──▶ (folder, name, caption, what draws it into a file)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.show.contents import Contents
from rankwise.show.downstream import plot_downstream
from rankwise.show.factor_curves import plot_factor_training
from rankwise.show.factor_plots import PLOTS
from rankwise.train.epoch_history import best_row

CURVES, DOWNSTREAM = "train_val_loss_comparison", "downstream"
Drawn = tuple[str, str, str, Callable[[Path], Any]]


def feature_pictures(contents: Contents) -> Iterator[Drawn]:
    for where, rows in contents.histories:
        caption = "Training and validation error by epoch; learning rate below"
        yield where, CURVES, caption, partial(plot_factor_training, rows, best_epoch=best_row(rows)["epoch"])
    for where, comparison in contents.factors:
        for name, (plot, caption) in PLOTS.items():
            yield where, name, caption, partial(plot, comparison)
    for where, answers in contents.downstream:
        caption = "How far the model's answers move when factors stand in for its features"
        yield where, DOWNSTREAM, caption, partial(plot_downstream, answers)
