"""The part of a report that is about gradient norms: numbers, sentences, pictures."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.page.blocks import Block, Folded, Picture, Table, Words
from rankwise.page.text import number
from rankwise.show.gradient_series import GradientTables
from rankwise.show.gradient_summary import NAMES, gradient_summary, sentences

GRADIENT_PLOTS = ("gradient_norms", "layer_heatmap", "layer_comparison", "gradient_evolution", "lora_factors")
SHOWN = 2  # pictures; the others are folded


def gradient_blocks(tables: GradientTables, pictures: Sequence[Picture]) -> list[Block]:
    """A table of the groups, what stands out in words, and the pictures."""
    found = gradient_summary(tables.groups, tables.layers)
    rows = [
        (NAMES[name], *(number(row[key]) for key in ("mean", "std", "min", "max")), f"{row['peak_step']:,}")
        for name, row in found["groups"].items()
    ]
    header = ("gradient norm", "mean", "std", "min", "max", "peak at step")
    folded = [Folded("Layers, moments and LoRA factors", pictures[SHOWN:])] if pictures[SHOWN:] else []
    table = Table(header, rows, note="Before clipping, over the steps at which the group trained.")
    return [table, Words(" ".join(sentences(found))), *pictures[:SHOWN], *folded] if rows else []
