"""Positions (t, h, w) of the tokens of a sequence, and the rotary angles made of them.

            What   is   [image of 2×3 tokens]   this   ?
    t        0     1     2  2  2  2  2  2         3    4
    h        0     1     0  0  0  1  1  1         3    4
    w        0     1     0  1  2  0  1  2         3    4

Text advances t and copies it. An image takes one step of t, whatever its size; its h and w count from 0 on the grid
of its tokens. So text after an image stands one step after the image's t.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def position_ids(images: Tensor, grids: Tensor | None, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of a batch, and what to add to a token's plain position in cached generation.

    Args:
        images: (batch, length) bool, true at image tokens.
        grids: (images, 2) rows and columns of each image's tokens, in the order of the batch; None: no images.
        attended: (batch, length) bool, false at padding, which may be on either side.

    Returns:
        (3, batch, length) int64, 0 at padding; and (batch, 1) shifts, -(tokens − 1) for each image.

    Raises:
        ValueError: the grids do not fill the image tokens, or an image would run from one sequence into the next.
    """
    first, down, across = places(images, grids)
    steps = attended & (first | ~images)
    time = (steps.cumsum(-1) - 1).masked_fill(~attended, 0)
    positions = torch.stack([time, torch.where(images, down, time), torch.where(images, across, time)])
    shifts = steps.sum(-1, keepdim=True) - attended.sum(-1, keepdim=True)
    return positions, shifts


def places(images: Tensor, grids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every image token whether it is its image's first, its row and its column; each (batch, length)."""
    grids = torch.zeros(0, 2, dtype=torch.long) if grids is None else grids
    grids = grids.to(images.device)
    lengths = grids.prod(-1)
    ends = lengths.cumsum(0)
    total = int(lengths.sum())
    found = images.nonzero()
    if len(found) != total:
        raise ValueError(f"{len(found)} image tokens in the text, but the images have {total}")
    if not torch.equal(found[ends - lengths, 0], found[ends - 1, 0]):
        raise ValueError("an image's tokens run from one sequence into the next: images and texts are out of order")
    inside = torch.arange(total, device=images.device) - (ends - lengths).repeat_interleave(lengths)
    columns = grids[:, 1].repeat_interleave(lengths)
    spread = torch.zeros(3, *images.shape, dtype=torch.long, device=images.device)
    spread[:, images] = torch.stack([(inside == 0).long(), inside // columns, inside % columns])
    return spread[0].bool(), spread[1], spread[2]


def plain_positions(attention_mask: Tensor | None, batch: int, length: int, past: int) -> Tensor:
    """(batch, length) positions of the last `length` tokens of sequences without images; padding is 0."""
    if attention_mask is None:
        return torch.arange(past, past + length).expand(batch, -1)
    positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
    return positions[:, -length:]


class Rotary(nn.Module):
    """Angles of the rotary embedding from (t, h, w).

    The half-frequencies θ^(−2k/d), k < d/2, are split 2:1:1 as contiguous blocks (64 into 32, 16, 16): the first,
    fastest block turns with t, the next with h, the last with w. Where the three are equal this is Qwen3's rotary,
    bit for bit. They are computed on each call and on the CPU, as Qwen3's are: a buffer that is not saved would
    stay uninitialised after loading on the meta device.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def frequencies(self) -> Tensor:
        """(head_dim / 2,) float32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        return 1.0 / self.theta**exponents

    def axes(self) -> list[int]:
        """Which of t, h, w turns each half-frequency."""
        eighth = self.head_dim // 8
        return [0] * (2 * eighth) + [1] * eighth + [2] * eighth

    @torch.no_grad()
    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (batch, length, head_dim), in the dtype and on the device of `like`."""
        turned = positions.to(like.device)[self.axes()].permute(1, 2, 0).float()
        angles = turned * self.frequencies().to(like.device)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
