"""From rendered samples to one padded batch, for training: padded on the right, masked by what is padding.

transformers' own collators need a pad token and read the tokenizer's padding side; this one needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankwise.data.sight import IGNORED, Sight


@dataclass(frozen=True)
class Collator:
    """Batch of samples {input_ids, labels, sample_index, images} → tensors (batch, length), `sample_index` (samples,).

    Rows of several samples carry `position_ids`, which part them, and get no attention mask. The images of all
    samples, in order, become what the model's family takes (`Sight.seen`); they are decoded here, in the workers of
    a data loader.

    pad_id may equal the end token: attention mask and labels come from lengths. multiple_of: pad lengths up to it
    (8 suits tensor cores).
    """

    pad_id: int
    multiple_of: int = 1
    sight: Sight | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, multiple_of: int = 1, sight: Sight | None = None) -> Collator:
        """The tokenizer's pad token; without one any id will do, since it is masked."""
        pad = tokenizer.pad_token_id
        return cls(0 if pad is None else pad, multiple_of, sight)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": pad([sample["input_ids"] for sample in samples], width, self.pad_id),
            "labels": pad([sample["labels"] for sample in samples], width, IGNORED),
        }
        if "position_ids" in samples[0]:
            batch["position_ids"] = pad([sample["position_ids"] for sample in samples], width, 0)
        else:
            batch["attention_mask"] = pad([[1] * length for length in lengths], width, 0)
        if "sample_index" in samples[0]:
            batch["sample_index"] = torch.cat([torch.tensor(sample["sample_index"]).view(-1) for sample in samples])
        images = [sample.get("images", ()) for sample in samples]
        return batch | seen(self.sight, batch["input_ids"], images, batch["labels"])


def seen(
    sight: Sight | None, ids: Tensor, images: Sequence[Sequence[str]], labels: Tensor | None = None
) -> dict[str, Tensor]:
    """What a model that sees takes beside ids (batch, length): the images of all rows, and which tokens are theirs."""
    return {} if sight is None else sight.seen(ids, images, labels)


def pad(rows: Sequence[Sequence[int]], width: int, value: int, *, left: bool = False) -> Tensor:
    """Rows of ids as one tensor (rows, width), filled with `value` on the right, or on the left."""
    padded = torch.full((len(rows), width), value)
    for target, row in zip(padded, rows, strict=True):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        target[part] = torch.tensor(row, dtype=padded.dtype)
    return padded
