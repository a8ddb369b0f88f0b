"""Images beside the sequence instead of in it (Llama 3.2 Vision): which tokens look at which image's tiles.

The mask goes by the ids of the whole batch, so it is made anew for them, by transformers' own rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from rankwise.errors import UsageError

CROSSED = "cross_attention_mask"


def crossed(found: Mapping[str, Tensor], ids: Tensor, images: Sequence[int], image_id: int) -> dict[str, Tensor]:
    """The mask for ids (batch, length); found: tensors of the images; images: how many each row has.

    UsageError for rows with different numbers of images: in transformers' model the tokens before an image look at all
    images of the batch, padding included, so that a row would get other logits in a batch than alone.
    """
    if len(set(images)) > 1:
        raise UsageError(
            f"the model takes images by {CROSSED}, and rows with {min(images)} and {max(images)} images in one batch "
            "would change each other: use a batch size of 1, or rows with equally many images"
        )
    tiles = found["aspect_ratio_mask"]
    looking = [get_cross_attention_token_mask(row, image_id) for row in ids.tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(
        looking, tiles.sum(-1).tolist(), max_num_tiles=tiles.shape[-1], length=ids.shape[1]
    )
    return {CROSSED: torch.from_numpy(mask)}
