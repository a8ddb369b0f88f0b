"""The networks that predict A from a matrix's rows and B from its columns: `--arch ResMLP`, `MLP` and `AdaLoRA`.

    X (B, T, D) ── rows    (T of D numbers) ── row_net ──▶ A  (B, T, r)
                └─ columns (D of T numbers) ── col_net ──▶ Bᵀ (B, D, r)

                  row_net                              col_net                        (widths at T = 256, D = 2048)
ResMLP, AdaLoRA   D ─▶ 1024 ─▶ 1024 ─▶ r               T ─▶ 1024 ─▶ 1024 ─▶ r         the middle layer residual
MLP               D ─▶ 1024 ─▶ 256 ─▶ r                T ─▶ 512 ─▶ 256 ─▶ r

A net that sees a channel's column alone cannot tell which channel it is, so it could not even learn a basis that all
images share. Therefore each place has numbers of its own: an offset that is added to the net's input, and a bias of its
output. They cost T·D + (places)·r parameters per net, and next to no arithmetic.

AdaLoRA's layers are P·Λ·Q (Zhang et al. 2023, arXiv 2303.10512), and its rank channels have a scale and a mask:
A·B = Σ_k  A_raw[:, k] · lora_E[k] · mask[k] · B[k, :]. A rank allocator scores them and takes the least important out.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.core.factors import Factors
from rankwise.features.nets.base import Factorizer, FactorizerSettings, width

OFFSET = 0.02  # start values of the offsets, small beside the features' 1
RIGHT = 0.2  # size of a start product's entries beside the features' 1; A starts at 1, where its orthogonality wants it
WIDTH = 1024
ROW_WIDTHS, COLUMN_WIDTHS = (1024, 256), (512, 256)
AFTER_GELU = 2**0.5  # GELU halves the mean square, about; the next layer makes up for it
LAYER_RANK = 2  # rank of a layer, in multiples of the factors' rank: its share of a full layer's cost is small then


class PerPlace(nn.Module):
    """net (…, places, inputs) → (…, places, r), with an offset per place before it and a bias per place after it.

    scale: standard deviation of the biases' start values.
    """

    def __init__(self, net: nn.Module, places: int, inputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.net = net
        self.offset = nn.Parameter(torch.randn(places, inputs) * OFFSET)
        self.bias = nn.Parameter(torch.randn(places, rank) * scale)

    def forward(self, x: Tensor) -> Tensor:
        predicted: Tensor = self.net(x + self.offset)
        return predicted + self.bias


class RowsAndColumns(Factorizer):
    """Base of all three. The last layers have no ReLU, which would force factors without negative numbers."""

    def __init__(self, settings: FactorizerSettings) -> None:
        super().__init__(settings)
        tokens, channels, rank = settings.tokens, settings.channels, settings.rank
        self.row_net = PerPlace(self.net(channels, 1.0), tokens, channels, rank, scale=0.0)
        right = RIGHT / rank**0.5
        self.col_net = PerPlace(self.net(tokens, right, columns=True), channels, tokens, rank, scale=right)

    @abstractmethod
    def net(self, inputs: int, gain: float, *, columns: bool = False) -> nn.Module:
        """The net on rows (…, D) → (…, r), or on columns (…, T) → (…, r); gain: size of its outputs at the start."""

    def factor(self, features: Tensor) -> tuple[Factors, Tensor]:
        activation = self.row_net(features).float()
        right = self.col_net(features.mT).float().mT
        return Factors(self.scale_channels(activation), right), activation

    def scale_channels(self, activation: Tensor) -> Tensor:
        """A with whatever scales its rank channels."""
        return activation


def scaled_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer whose outputs start `gain` times as large as its inputs; no bias at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualNet(nn.Module):
    """inputs → width → width → r, the middle layer a residual block behind layer normalisation and GELU.

    Input, the skipped block and output make a linear map, so that a linear factorization is there from the first step,
    and the size of a column (which the normalisation inside takes away) still reaches the output.
    """

    def __init__(self, inner: nn.Module, block: nn.Module, outer: nn.Module, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.LayerNorm(hidden)
        self.block = block
        self.dropout = nn.Dropout(dropout)
        self.outer = outer

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.inner(x)
        hidden = hidden + self.dropout(self.block(F.gelu(self.norm(hidden))))
        out: Tensor = self.outer(hidden)
        return out


class LowRankProjSymmetric(RowsAndColumns):
    """`ResMLP` as documented, but for the ReLU behind its last layers."""

    name = "ResMLP"

    def net(self, inputs: int, gain: float, *, columns: bool = False) -> nn.Module:
        hidden = width(WIDTH, inputs)
        inner, block = scaled_linear(inputs, hidden, 1.0), nn.Linear(hidden, hidden)
        outer = scaled_linear(hidden, self.settings.rank, gain)
        return ResidualNet(inner, block, outer, hidden, self.settings.dropout)


class LowRankProjMLP(RowsAndColumns):
    """`MLP` as documented, but for the ReLU behind its last layers: GELU, dropout between layers, none at the end."""

    name = "MLP"

    def net(self, inputs: int, gain: float, *, columns: bool = False) -> nn.Module:
        layers: list[nn.Module] = []
        size = inputs
        for hidden in (width(documented, inputs) for documented in (COLUMN_WIDTHS if columns else ROW_WIDTHS)):
            layers.append(scaled_linear(size, hidden, AFTER_GELU if layers else 1.0))
            layers += [nn.GELU(), nn.Dropout(self.settings.dropout)]
            size = hidden
        return nn.Sequential(*layers, scaled_linear(size, self.settings.rank, gain * AFTER_GELU))


class SVDLinear(nn.Module):
    """y = P·Λ·Q·x + bias, (…, inputs) → (…, outputs), of rank k.

    Names and shapes are the paper authors': lora_A = Q (k, inputs), lora_E = the diagonal of Λ (k, 1), lora_B = P
    (outputs, k). There is no frozen weight beside it. P and Q start orthonormal and `orthogonality` holds them there,
    so that Λ reads as singular values; Λ starts so that outputs vary `gain` times as much as inputs.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, gain: float = 1.0) -> None:
        super().__init__()
        rank = min(rank, inputs, outputs)
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_E = nn.Parameter(torch.full((rank, 1), gain * (outputs / rank) ** 0.5))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if not self.lora_A.is_meta:
            nn.init.orthogonal_(self.lora_A)
            nn.init.orthogonal_(self.lora_B)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A * self.lora_E), self.lora_B, self.bias)

    def weight(self) -> Tensor:
        """The dense weight (outputs, inputs)."""
        return self.lora_B @ (self.lora_A * self.lora_E)

    def orthogonality(self) -> Tensor:
        """(‖PᵀP − I‖_F² + ‖QQᵀ − I‖_F²) / 2k², a number: the same weight whatever the layer's size."""
        unit = torch.eye(self.rank, device=self.lora_A.device, dtype=self.lora_A.dtype)
        left, right = self.lora_B.mT @ self.lora_B, self.lora_A @ self.lora_A.mT
        return ((left - unit).square().sum() + (right - unit).square().sum()) / (2 * self.rank**2)

    def extra_repr(self) -> str:
        return f"{self.lora_A.shape[1]}, {self.lora_B.shape[0]}, rank={self.rank}"


class AdaptiveLowRankProjAdaLoRA(RowsAndColumns):
    """`AdaLoRA` as documented: ResMLP's nets, each layer P·Λ·Q of rank min(2r, its sides).

    `mask_ranks` takes channels out for good: their product is exactly zero from then on.
    """

    name = "AdaLoRA"

    rank_mask: Tensor

    def __init__(self, settings: FactorizerSettings) -> None:
        super().__init__(settings)
        self.lora_E = nn.Parameter(torch.ones(settings.rank, 1))
        self.rank_mask = torch.ones(settings.rank, dtype=torch.bool)

    def net(self, inputs: int, gain: float, *, columns: bool = False) -> nn.Module:
        rank, hidden = self.settings.rank, width(WIDTH, inputs)
        inner = SVDLinear(inputs, hidden, LAYER_RANK * rank)
        block = SVDLinear(hidden, hidden, LAYER_RANK * rank, gain=0.5)
        outer = SVDLinear(hidden, rank, LAYER_RANK * rank, gain)
        return ResidualNet(inner, block, outer, hidden, self.settings.dropout)

    def scale_channels(self, activation: Tensor) -> Tensor:
        return activation * (self.lora_E[:, 0] * self.rank_mask)

    def orthogonality(self) -> Tensor:
        """Mean over the SVDLinear layers of their own penalty."""
        layers = [layer for layer in self.modules() if isinstance(layer, SVDLinear)]
        return torch.stack([layer.orthogonality() for layer in layers]).mean()

    def effective_rank_mask(self) -> Tensor:
        """bool (r,), a copy: true for the rank channels that act."""
        return self.rank_mask.clone()

    @torch.no_grad()
    def mask_ranks(self, keep: Tensor) -> None:
        """Take out the channels that `keep`, bool (r,), is false for. What is out stays out, whatever `keep` says.

        Their `lora_E` becomes zero and gets no gradient any more. An optimizer with momentum still moves it, though
        never the product: zero the rows of its state for `lora_E` too.
        """
        self.rank_mask &= keep.to(self.rank_mask.device)
        self.lora_E.masked_fill_(~self.rank_mask[:, None], 0.0)

    def rank_parameters(self) -> dict[str, nn.Parameter]:
        """What an allocator scores, the rank first in each: `scale` = lora_E (r, 1), and `left`, `right` (r, …) = the
        rows of the last layers' P that make a channel of A and of B."""
        row, column = self.row_net.net.outer, self.col_net.net.outer
        assert isinstance(row, SVDLinear) and isinstance(column, SVDLinear)
        return {"scale": self.lora_E, "left": row.lora_B, "right": column.lora_B}
