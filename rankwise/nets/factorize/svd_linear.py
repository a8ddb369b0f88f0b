"""`SVDLinear`: a linear layer kept as P·Λ·Q, as AdaLoRA keeps its updates (Zhang et al. 2023, arXiv 2303.10512)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
