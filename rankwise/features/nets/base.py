"""What a network that predicts factors is: normalised features of a batch in, their rank-r factors out, in one pass.

    features (B, T, D), normalised ── Factorizer ──▶ Factorization: factors (B, T, r) · (B, r, D), what they came from

By Eckart and Young no such product is closer than the truncated SVD of the same matrix; a network can only come near.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.core.factors import Factors
from rankwise.errors import DataError, UsageError
from rankwise.options.features import FactorTrainConfig

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


WIDEST = 4  # a hidden layer is as wide as documented, but at most so many times its input (exact from T = 256 on)


@dataclass(frozen=True)
class FactorizerSettings:
    """Settings of a network. tokens T and channels D are those of every matrix that it will take.

    refine: a small network after A·B, whose output is given beside the product and never in its place.
    Raises UsageError for a rank that no T × D matrix has, and for a dropout outside 0 ≤ p < 1.
    """

    arch: str
    tokens: int
    channels: int
    rank: int
    dropout: float = 0.1
    refine: bool = False

    def __post_init__(self) -> None:
        if min(self.tokens, self.channels) < 1:
            raise UsageError(f"matrices of {self.tokens} tokens × {self.channels} channels are empty")
        most = min(self.tokens, self.channels)
        if not 1 <= self.rank <= most:
            raise UsageError(
                f"--rank {self.rank}: matrices of {self.tokens} tokens × {self.channels} channels have rank {most} "
                f"at most; give 1 to {most}"
            )
        FactorTrainConfig(dropout=self.dropout)  # UsageError for a number out of range


@dataclass(frozen=True)
class Factorization:
    """Output of one forward pass. Only `factors` is of rank r, and is what every measure is of.

    activation: A (B, T, r) before any scale of the rank channels; the orthogonality loss is on it.
    refined: (B, T, D) where the network refines. No gradient flows from it into the factors, so that refining does not
    change them; its own error must be part of the loss.
    """

    factors: Factors
    activation: Tensor
    refined: Tensor | None = None


class Factorizer(nn.Module, ABC):
    """Base of all. A subclass implements `factor`; `forward` checks the shape and refines.

    rank_mask: bool (r,), true for the rank channels that act; None where all always do.
    """

    name: ClassVar[str]  # as --arch knows it

    rank_mask: Tensor | None

    def __init__(self, settings: FactorizerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("rank_mask", None)
        self.refinement = Refinement(settings.channels, settings.dropout) if settings.refine else None

    @abstractmethod
    def factor(self, features: Tensor) -> tuple[Factors, Tensor]:
        """Factors of normalised features (B, T, D), and the activation A (B, T, r)."""

    def forward(self, features: Tensor) -> Factorization:
        """Factorization of normalised features (B, T, D). DataError where T or D is not the network's."""
        self.require_shape(features)
        factors, activation = self.factor(features)
        refined = self.refinement(factors.product().detach()) if self.refinement else None
        return Factorization(factors, activation, refined)

    def require_shape(self, features: Tensor) -> None:
        """DataError, naming both, where features (B, T, D) are not of this network's T and D."""
        wanted = (self.settings.tokens, self.settings.channels)
        if features.ndim != 3 or tuple(features.shape[1:]) != wanted:
            found = " × ".join(map(str, features.shape[1:] if features.ndim == 3 else features.shape))
            raise DataError(
                f"the {self.name} network takes matrices of {wanted[0]} tokens × {wanted[1]} channels, and these are "
                f"{found}: its layers have these sizes. Capture the features with the same model and --image_size, or "
                "train a network on them"
            )

    def current_effective_rank(self) -> int:
        """How many rank channels act."""
        return self.settings.rank if self.rank_mask is None else int(self.rank_mask.sum())

    def orthogonality(self) -> Tensor:
        """Penalty on parameters that should be orthonormal, a number; 0 where there are none."""
        return torch.zeros((), device=next(self.parameters()).device)


def width(documented: int, inputs: int) -> int:
    """Width of a hidden layer in a network on `inputs` numbers: the documented one, at most four times the input."""
    return min(documented, WIDEST * inputs)
