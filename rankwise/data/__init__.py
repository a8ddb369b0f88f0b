"""From files on disk to batches: sources read, `render` makes tokens and labels, `collate` pads, `split` divides.

files ── sources.load ──▶ Example* ── split, subset ──▶ Example* ── Renderer ──▶ Rendered* ── Collator ──▶ batch
images ── ImageReader ── Sight ── expansion (image tokens) ──▲ · inputs (pixels) ───────────────▲
"""

from __future__ import annotations

from rankwise.data.collate import Collator
from rankwise.data.example import Example, Examples, Turn, one_per_prompt
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.packing import PackedDataset
from rankwise.data.render import Rendered, Renderer
from rankwise.data.rendered import Checked, RenderedDataset, check_samples
from rankwise.data.sight import Sight
from rankwise.data.sources import load
from rankwise.data.split import Split, recorded_split, split_groups, subset

__all__ = [
    "BadImage",
    "Checked",
    "Collator",
    "Example",
    "Examples",
    "ImageReader",
    "PackedDataset",
    "Rendered",
    "RenderedDataset",
    "Renderer",
    "Sight",
    "Split",
    "Turn",
    "check_samples",
    "load",
    "one_per_prompt",
    "recorded_split",
    "split_groups",
    "subset",
]
