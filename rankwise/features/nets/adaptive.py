"""`--arch AdaLoRA`: ResMLP's nets of `SVDLinear` layers, and a global scale of the rank channels that can be masked.

    A·B = Σ_k  A_raw[:, k] · lora_E[k] · mask[k] · B[k, :]

lora_E plays the singular values: a rank allocator scores the channels and takes the least important ones out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.features.nets.base import FactorizerSettings, width
from rankwise.features.nets.subspace import RowsAndColumns
from rankwise.features.nets.symmetric import WIDTH


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


LAYER_RANK = 2  # rank of a layer, in multiples of the factors' rank: its share of a full layer's cost is small then


class AdaptiveNet(nn.Module):
    """inputs → width → width → r as in ResMLP, each layer P·Λ·Q of rank min(2r, its sides)."""

    def __init__(self, inputs: int, rank: int, gain: float, dropout: float) -> None:
        super().__init__()
        hidden = width(WIDTH, inputs)
        self.inner = SVDLinear(inputs, hidden, LAYER_RANK * rank)
        self.norm = nn.LayerNorm(hidden)
        self.block = SVDLinear(hidden, hidden, LAYER_RANK * rank, gain=0.5)
        self.dropout = nn.Dropout(dropout)
        self.outer = SVDLinear(hidden, rank, LAYER_RANK * rank, gain)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.inner(x)
        hidden = hidden + self.dropout(self.block(F.gelu(self.norm(hidden))))
        out: Tensor = self.outer(hidden)
        return out


class AdaptiveLowRankProjAdaLoRA(RowsAndColumns):
    """`AdaLoRA` as documented. `mask_ranks` takes channels out for good: their product is exactly zero from then on."""

    name = "AdaLoRA"

    rank_mask: Tensor

    def __init__(self, settings: FactorizerSettings) -> None:
        super().__init__(settings)
        self.lora_E = nn.Parameter(torch.ones(settings.rank, 1))
        self.rank_mask = torch.ones(settings.rank, dtype=torch.bool)

    def rows(self, gain: float) -> nn.Module:
        return AdaptiveNet(self.settings.channels, self.settings.rank, gain, self.settings.dropout)

    def columns(self, gain: float) -> nn.Module:
        return AdaptiveNet(self.settings.tokens, self.settings.rank, gain, self.settings.dropout)

    def scaled(self, activation: Tensor) -> Tensor:
        return activation * (self.lora_E[:, 0] * self.rank_mask)

    def orthogonality(self) -> Tensor:
        """Mean over the SVDLinear layers of their own penalty."""
        layers = [layer for layer in self.modules() if isinstance(layer, SVDLinear)]
        return torch.stack([layer.orthogonality() for layer in layers]).mean()

    def effective_rank_mask(self) -> Tensor:
        """bool (r,), a copy: true for the rank channels that act."""
        return self.rank_mask.clone()

    def current_effective_rank(self) -> int:
        return int(self.rank_mask.sum())

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
        row, column = self.row_net.net, self.col_net.net
        assert isinstance(row, AdaptiveNet) and isinstance(column, AdaptiveNet)
        return {"scale": self.lora_E, "left": row.outer.lora_B, "right": column.outer.lora_B}
