"""From patches to image tokens: a SigLIP2 encoder over packed images, pixel shuffle, and a projector.

    (patches, 768) ── Linear + resized positions ──▶ 27 layers, attention inside each image ──▶ layer norm
        ──▶ pixel shuffle: 2×2 patches → 1 token of 4·1152 ──▶ Linear ─ SiLU ─ Linear ──▶ (tokens, 2048)

The images of a batch, of whatever sizes, lie one behind the other in one sequence, so every weight is used once a
step whatever the batch holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip2.modeling_siglip2 import Siglip2Attention, Siglip2EncoderLayer, eager_attention_forward

from rankwise.models.isaac.configuration import IsaacConfig, IsaacVisionConfig

Sizes = Sequence[tuple[int, int]]


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions (side², width) for a grid of other size: (rows · columns, width), row-major.

    Bilinear with antialias, as SigLIP2 resizes them; in float32, since half precision has no such filter on a CPU.
    """
    side = isqrt(table.shape[0])
    square = table.float().reshape(side, side, -1).permute(2, 0, 1)[None]
    resized = functional.interpolate(square, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].flatten(1).T.to(table.dtype)


def pixel_shuffle(patches: Tensor, sizes: Sizes, factor: int) -> Tensor:
    """Blocks of factor × factor neighbours become one token: (patches, width) → (tokens, factor² · width).

    Tokens are row-major on the coarser grid. A token's channels are its block's patches one behind the other, the
    block read row by row: top left, top right, bottom left, bottom right.
    """
    width = patches.shape[-1]
    parts = []
    for image, (rows, columns) in zip(patches.split([a * b for a, b in sizes]), sizes, strict=True):
        blocks = image.view(rows // factor, factor, columns // factor, factor, width)
        parts.append(blocks.permute(0, 2, 1, 3, 4).reshape(-1, factor * factor * width))
    return torch.cat(parts)


class IsaacVisionEmbeddings(nn.Module):
    """Patches (patches, channels · size²) to vectors, with the positions of each image's grid."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor, sizes: Sizes) -> Tensor:
        count = self.position_embedding.num_embeddings
        table = self.position_embedding(torch.arange(count, device=pixel_values.device))  # called: hooks may fetch it
        resized = {size: resize_positions(table, *size) for size in set(sizes)}
        embedded: Tensor = self.patch_embedding(pixel_values.to(table.dtype))
        return embedded + torch.cat([resized[size] for size in sizes])


class IsaacVisionAttention(Siglip2Attention):
    """SigLIP2's attention, where each image of a packed sequence sees only itself."""

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, *, lengths: Sequence[int] = (), **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: (1, patches, width). lengths: patches of each image."""
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        packed = [layer(hidden_states).view(heads).transpose(1, 2).split(list(lengths), dim=2) for layer in layers]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        seen = [
            attend(self, *image, None, is_causal=False, scaling=self.scale, dropout=dropout)[0]
            for image in zip(*packed, strict=True)
        ]
        return self.out_proj(torch.cat(seen, dim=1).flatten(2)), None


class IsaacVisionLayer(Siglip2EncoderLayer):
    """A SigLIP2 layer over a packed sequence."""

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__(config)
        self.self_attn = IsaacVisionAttention(config)


class IsaacVisionEncoder(nn.Module):
    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([IsaacVisionLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: Tensor, lengths: Sequence[int]) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, lengths=lengths)
        return hidden_states


class IsaacVisionTower(PreTrainedModel):
    """Packed patches to pixel-shuffled features."""

    config_class = IsaacVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["IsaacVisionEmbeddings", "IsaacVisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: IsaacVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = IsaacVisionEmbeddings(config)
        self.encoder = IsaacVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: Tensor, sizes: Sizes) -> Tensor:
        """Features of the image tokens.

        Args:
            pixel_values: (patches, channels · size²), each patch flattened as (row, column, channel), the patches of
                an image row-major, the images one behind the other.
            sizes: rows and columns of patches of each image.

        Returns:
            (tokens, factor² · width).
        """
        hidden = self.embeddings(pixel_values, sizes)[None]
        hidden = self.encoder(hidden, [rows * columns for rows, columns in sizes])
        return pixel_shuffle(self.post_layernorm(hidden)[0], sizes, self.config.pixel_shuffle_scale_factor)


class VisionEmbedding(nn.ModuleList):
    """Tower and projector under the names of the checkpoint: 0 the tower, 1 and 3 the projector's linears."""

    def __init__(self, config: IsaacConfig) -> None:
        vision = config.vision_config
        shuffled = vision.hidden_size * vision.pixel_shuffle_scale_factor**2
        super().__init__(
            [
                IsaacVisionTower._from_config(vision),
                nn.Linear(shuffled, 4 * shuffled, bias=False),
                nn.SiLU(),
                nn.Linear(4 * shuffled, config.hidden_size, bias=False),
            ]
        )

    def forward(self, pixel_values: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Features before the projector (tokens, factor² · width) and after it (tokens, hidden)."""
        tower, *projector = self
        features = tower(pixel_values, sizes)
        projected = features
        for layer in projector:
            projected = layer(projected)
        return features, projected
