"""`--arch MLP`: plain stacks of linear layers, the cheaper of the two dense networks.

row_net  D ─▶ 1024 ─▶ 256 ─▶ r          col_net  T ─▶ 512 ─▶ 256 ─▶ r          (widths at T = 256, D = 2048)
"""

from __future__ import annotations

from torch import nn

from rankwise.nets.factorize.factorizer import width
from rankwise.nets.factorize.placed import RowsAndColumns, scaled_linear

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
