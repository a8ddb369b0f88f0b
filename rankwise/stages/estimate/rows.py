"""What an estimate counts: the training rows as they would be, or rows of the greatest length where none are given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise.data.dataset import Collator, PackedDataset, RenderedDataset
from rankwise.data.renderer_for import own_length, renderer_for
from rankwise.data.vision_inputs import Sight
from rankwise.options.commands import TrainConfig
from rankwise.score.likelihood import BESIDE
from rankwise.stages.preparing import read_split
from rankwise.stages.training import rendered


@dataclass(frozen=True)
class Rows:
    """What is trained on: real rows with their lengths, or `limit` tokens a row where none were given."""

    rows: RenderedDataset | PackedDataset | None
    pad_id: int
    sight: Sight | None
    limit: int

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.rows.lengths) if self.rows is not None else (self.limit,)

    @property
    def narrow(self) -> int:
        """Position of a row of average length, or half the limit where there are no rows."""
        average = sum(self.lengths) / len(self.lengths)
        return min(range(len(self.lengths)), key=lambda index: abs(self.lengths[index] - average))

    def batch(self, count: int, multiple_of: int, *, wide: bool) -> dict[str, Any]:
        """`count` times the longest row, or one of average length, as the model takes it."""
        if self.rows is None:
            width = self.limit if wide else max(multiple_of, self.limit // 2)
            ids = torch.ones(count, -(-width // multiple_of) * multiple_of, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        position = self.lengths.index(max(self.lengths)) if wide else self.narrow
        collated = Collator(self.pad_id, multiple_of, self.sight)([self.rows[position]] * count)
        return {name: value for name, value in collated.items() if name not in BESIDE or name == "labels"}


def rows_of(config: TrainConfig, name: str, skeleton: PreTrainedModel) -> Rows:
    """The training rows as they would be, or rows of the greatest length where none are given."""
    if not config.data.data_path:
        return Rows(None, 0, None, config.data.max_seq_length or own_length(skeleton.config))
    renderer = renderer_for(config.data, config.model, name, skeleton.config)
    _, split = read_split(config, sees_images=renderer.sight is not None)
    rows = rendered(split.train, renderer)
    chosen = PackedDataset(rows, renderer.limit) if config.packing else rows
    return Rows(chosen, renderer.tokenizer.pad_token_id or 0, renderer.sight, renderer.limit)
