"""The optional refinement: a small residual network on each token of the reconstruction.

    A·B (B, T, D) ── LayerNorm ─ D→256 ─ GELU ─ 256→D ──▶ + A·B

Its output is no product of rank r any more, so it is scored apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 256


class Refinement(nn.Module):
    """(…, D) → (…, D). It starts close to leaving its input as it is."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        hidden = min(WIDTH, 4 * channels)
        self.norm = nn.LayerNorm(channels)
        self.inner = nn.Linear(channels, hidden)
        self.outer = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.outer.weight.mul_(0.1)
            self.outer.bias.zero_()

    def forward(self, reconstruction: Tensor) -> Tensor:
        hidden = F.gelu(self.inner(self.norm(reconstruction)))
        correction: Tensor = self.outer(self.dropout(hidden))
        return reconstruction + correction
