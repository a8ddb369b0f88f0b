"""The report's part on features: the training of each network, the comparison, the model's answers.

contents, drawings ── feature_blocks ──▶ (kinds of stage, folder, blocks)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.features.downstream_page import HEADER, RIGHT_ALIGNED, cells, on_what, reading
from rankwise.features.history import best_row
from rankwise.features.page import comparison_blocks
from rankwise.features.plots import PLOTS
from rankwise.page.blocks import Block, Table, Words
from rankwise.page.text import plural, printable
from rankwise.show.contents import Contents
from rankwise.show.drawing import Drawings
from rankwise.show.factor_reading import CURVES, DOWNSTREAM

TRAIN, COMPARE, ANSWERS = "features train", "features compare", "features downstream"


def feature_blocks(contents: Contents, drawings: Drawings) -> list[tuple[tuple[str, ...], str, list[Block]]]:
    """(kinds of stage that make it, folder, blocks)."""
    found: list[tuple[tuple[str, ...], str, list[Block]]] = []
    for where, rows in contents.histories:
        found.append(((TRAIN,), where, [Words(trained(where, rows)), *drawings.of(where, CURVES)]))
    for where, comparison in contents.factors:
        drawn = [picture for name in PLOTS for picture in drawings.of(where, name)]
        found.append(((COMPARE,), where, comparison_blocks(comparison, drawn)))
    for where, answers in contents.downstream:
        found.append(((ANSWERS,), where, [*answer_blocks(answers), *drawings.of(where, DOWNSTREAM)]))
    return found


def trained(where: str, rows: Sequence[dict[str, Any]]) -> str:
    """ResMLP: 20 epochs; kept with validation MSE 0.412 at epoch 17, where the relative error is 0.642."""
    kept = best_row(rows)
    name = "" if where == "." else f"{printable(where, 80)}: "
    said = (
        f"{name}{plural(len(rows), 'epoch')}; kept with validation MSE {kept['val_mse']:.4g} at epoch {kept['epoch']}"
    )
    if kept.get("val_rel_f") is not None:
        said += f", where the relative error is {kept['val_rel_f']:.4f}"
    ranks = [row["effective_rank"] for row in rows]
    return said + (f"; effective rank {ranks[0]} → {ranks[-1]}." if ranks[0] != ranks[-1] else ".")


def answer_blocks(answers: Mapping[str, Any]) -> list[Block]:
    rows = [[printable(cell, 80) for cell in cells(row)] for row in answers["rows"]]
    return [
        Words(printable(on_what(answers))),
        Table(HEADER, rows, first_number=RIGHT_ALIGNED),
        *(Words(printable(line)) for line in reading(answers)),
        *(Words(f"Note: {printable(note)}.") for note in answers["notes"]),
    ]
