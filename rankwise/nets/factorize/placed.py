"""What the documented networks share: one net on rows, one on columns, each told which row or column it looks at.

    X (B, T, D) ── rows    (T of D numbers) ── row_net ──▶ A  (B, T, r)
                └─ columns (D of T numbers) ── col_net ──▶ Bᵀ (B, D, r)

A net that sees a channel's column alone cannot tell which channel it is, so it could not even learn a basis that all
images share. Therefore each place has numbers of its own: an offset that is added to the net's input, and a bias of its
output. They cost T·D + (places)·r parameters per net, and next to no arithmetic.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from rankwise.core.factors import Factors
from rankwise.nets.factorize.factorizer import Factorizer, FactorizerSettings

OFFSET = 0.02  # start values of the offsets, small beside the features' 1
RIGHT = 0.2  # size of a start product's entries beside the features' 1; A starts at 1, where its orthogonality wants it


class Placed(nn.Module):
    """net (…, places, inputs) → (…, places, r), with an offset per place before it and a bias per place after it.

    scale: standard deviation of the biases' start values.
    """

    def __init__(self, net: nn.Module, places: int, inputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.net = net
        self.offset = nn.Parameter(torch.randn(places, inputs) * OFFSET)
        self.bias = nn.Parameter(torch.randn(places, rank) * scale)

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = self.net(x + self.offset)
        return seen + self.bias


class RowsAndColumns(Factorizer):
    """Base of the networks that predict A from the rows and B from the columns."""

    def __init__(self, settings: FactorizerSettings) -> None:
        super().__init__(settings)
        tokens, channels, rank = settings.tokens, settings.channels, settings.rank
        self.row_net = Placed(self.rows(1.0), tokens, channels, rank, scale=0.0)
        right = RIGHT / rank**0.5
        self.col_net = Placed(self.columns(right), channels, tokens, rank, scale=right)

    @abstractmethod
    def rows(self, gain: float) -> nn.Module:
        """The net on tokens (…, D) → (…, r); gain: size of its outputs at the start."""

    @abstractmethod
    def columns(self, gain: float) -> nn.Module:
        """The net on channels' columns (…, T) → (…, r)."""

    def factor(self, features: Tensor) -> tuple[Factors, Tensor]:
        activation = self.row_net(features).float()
        right = self.col_net(features.mT).float().mT
        return Factors(self.scaled(activation), right), activation

    def scaled(self, activation: Tensor) -> Tensor:
        """A with whatever scales its rank channels."""
        return activation


def scaled_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer whose outputs start `gain` times as large as its inputs; no bias at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
