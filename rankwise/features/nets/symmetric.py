"""`--arch ResMLP`: a residual net on each token, and one of the same form on each channel's column.

row_net  D ─▶ 1024 ─▶ 1024 ─▶ r          col_net  T ─▶ 1024 ─▶ 1024 ─▶ r          (widths at T = 256, D = 2048)
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.features.nets.base import width
from rankwise.features.nets.subspace import RowsAndColumns, scaled_linear

WIDTH = 1024


class ResidualNet(nn.Module):
    """inputs → width → width → r, the middle layer a residual block behind layer normalisation and GELU.

    Input, the skipped block and output make a linear map, so that a linear factorization is there from the first step,
    and the size of a column (which the normalisation inside takes away) still reaches the output.
    """

    def __init__(self, inputs: int, rank: int, gain: float, dropout: float) -> None:
        super().__init__()
        hidden = width(WIDTH, inputs)
        self.inner = scaled_linear(inputs, hidden, 1.0)
        self.norm = nn.LayerNorm(hidden)
        self.block = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = scaled_linear(hidden, rank, gain)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.inner(x)
        hidden = hidden + self.dropout(self.block(F.gelu(self.norm(hidden))))
        out: Tensor = self.outer(hidden)
        return out


class LowRankProjSymmetric(RowsAndColumns):
    """`ResMLP` as documented; its last layers have no ReLU, which would force factors without negative numbers."""

    name = "ResMLP"

    def rows(self, gain: float) -> nn.Module:
        return ResidualNet(self.settings.channels, self.settings.rank, gain, self.settings.dropout)

    def columns(self, gain: float) -> nn.Module:
        return ResidualNet(self.settings.tokens, self.settings.rank, gain, self.settings.dropout)


ROW_WIDTHS, COLUMN_WIDTHS = (1024, 256), (512, 256)
AFTER_GELU = 2**0.5  # GELU halves the mean square, about; the next layer makes up for it


def stack(inputs: int, documented: tuple[int, ...], rank: int, gain: float, dropout: float) -> nn.Sequential:
    """Linear layers with GELU and dropout between them, none after the last."""
    layers: list[nn.Module] = []
    size = inputs
    for hidden in (width(wide, inputs) for wide in documented):
        layers += [scaled_linear(size, hidden, AFTER_GELU if layers else 1.0), nn.GELU(), nn.Dropout(dropout)]
        size = hidden
    return nn.Sequential(*layers, scaled_linear(size, rank, gain * AFTER_GELU))


class LowRankProjMLP(RowsAndColumns):
    """`MLP` as documented; its last layers have no ReLU, which would force factors without negative numbers."""

    name = "MLP"

    def rows(self, gain: float) -> nn.Module:
        return stack(self.settings.channels, ROW_WIDTHS, self.settings.rank, gain, self.settings.dropout)

    def columns(self, gain: float) -> nn.Module:
        return stack(self.settings.tokens, COLUMN_WIDTHS, self.settings.rank, gain, self.settings.dropout)
