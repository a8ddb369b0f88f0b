"""What the commands on features leave in a results folder, read and drawn for the report.

comparison.json ──▶ comparison · <arch>/history.json ──▶ rows by epoch · downstream.json ──▶ table
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.features.downstream_page import FORMAT as DOWNSTREAM_FORMAT
from rankwise.features.downstream_page import JSON as DOWNSTREAM_FILE
from rankwise.features.downstream_page import plot_downstream
from rankwise.features.history import HISTORY, best_row
from rankwise.features.plots import PLOTS, plot_factor_training
from rankwise.features.words import FILE, FORMAT, PARTS
from rankwise.files.atomic import read_json
from rankwise.page.text import is_number
from rankwise.show.contents import Contents

BY_EPOCH = ("epoch", "train_mse", "val_mse", "lr", "effective_rank")
DOWNSTREAM_PARTS = ("rows", "notes", "settings", "shapes")
Rows = Sequence[dict[str, Any]]
CURVES, DOWNSTREAM = "train_val_loss_comparison", "downstream"
Drawn = tuple[str, str, str, Callable[[Path], Any]]


def read_comparisons(files: Sequence[Path]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Comparisons of factorizations; `rankwise compare` calls its own file so too."""
    yield from whole(files, FILE, FORMAT, PARTS)


def read_downstream(files: Sequence[Path]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    yield from whole(files, DOWNSTREAM_FILE, DOWNSTREAM_FORMAT, DOWNSTREAM_PARTS)


def read_histories(files: Sequence[Path]) -> Iterator[tuple[Path, Rows]]:
    """Epochs of networks that predict factors; other programs' histories look different and are passed over."""
    for path in files:
        content = read_json(path) if path.name == HISTORY else None
        if isinstance(content, list) and content and all(is_epoch(row) for row in content):
            yield path, content


def is_epoch(row: Any) -> bool:
    return isinstance(row, dict) and all(is_number(row.get(name)) for name in BY_EPOCH)


def whole(
    files: Sequence[Path], name: str, form: str, parts: Sequence[str]
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Files of this name and format. DataError for one that lacks a part."""
    for path in files:
        content = read_json(path) if path.name == name else None
        if not isinstance(content, dict) or content.get("format") != form:
            continue
        missing = [part for part in parts if part not in content]
        if missing:
            raise DataError(f"{path}: not whole, it lacks {', '.join(missing)}; run the command that wrote it again")
        yield path, content


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
