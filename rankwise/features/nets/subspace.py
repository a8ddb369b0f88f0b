"""`Subspace`: our own network. A learned start, then what no network can guess: a step of subspace iteration, computed.

    Ω (T, r), learnt ──▶ G·Ω ── orth ──▶ Q₁ ── (G − s·m·I)·Q₁, orth ──▶ Q₂ ──▶ A = Q₂,  B = Q₂ᵀX
    G = X·Xᵀ (T, T)                       m: mean eigenvalue that Q₁ leaves out; s in (0, 1): learnt

Multiplying by G − s·m·I damps the directions that are to be left out, whose eigenvalues lie around m, more than G alone
does: the polynomial filter of Chebyshev iteration (Saad 2011, chapter 7.4) with an interval that is measured in each
matrix. So one step suffices where plain iteration takes two or three. Everything but two products of X is small, and
nothing needs an eigendecomposition, which is what an exact factorization spends most of its time on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankwise.core.factors import Factors
from rankwise.features.approximation import TOLERANCE, orthonormal
from rankwise.features.nets.base import Factorizer, FactorizerSettings

STEPS = 1
SHIFT = 0.8  # of the mean eigenvalue left out: above 1 a wanted direction may be damped too
# The span of the start does not depend on its size, so its size sets the pace: at the usual 1e-4, Adam moves an entry
# by a hundredth of it in a step. The logits of the shifts are kept in hundreds for the same reason.
START_SIZE, PACE = 0.01, 100.0
AT_ONCE = 16  # matrices: what lies between their products then stays in memory that is used again, a tenth of the time
ROUGH = 1.0  # a basis that the next step multiplies again need only be well conditioned


class Subspace(Factorizer):
    """The subspace of the tokens that holds most energy, from a learned start and `steps` unrolled iterations.

    Works on the shorter side: where T > D, on the channels. With one step some 3 to 5 % above the optimum's error, on
    pictures of other sources too: it looks at the matrix itself.
    """

    name: ClassVar[str] = "Subspace"

    def __init__(self, settings: FactorizerSettings, steps: int = STEPS) -> None:
        super().__init__(settings)
        short = min(settings.tokens, settings.channels)
        self.start = nn.Parameter(torch.randn(short, settings.rank) * START_SIZE)
        self.shifts = nn.Parameter(torch.full((steps,), SHIFT).logit() / PACE)

    def factor(self, features: Tensor) -> tuple[Factors, Tensor]:
        turned = self.settings.tokens > self.settings.channels
        short = (features.mT if turned else features).float()
        # Under autocast the Gram matrix itself would be rounded to bf16, which drowns its small directions.
        with quick_products(not self.training), torch.autocast(features.device.type, enabled=False):
            basis = torch.cat([self.basis(part @ part.mT) for part in short.split(AT_ONCE)])
            image = basis.mT @ short
        factors = Factors(image.mT, basis.mT) if turned else Factors(basis, image)
        return factors, factors.left

    def basis(self, gram: Tensor) -> Tensor:
        """Orthonormal basis (B, m, r) of the leading subspace of Gram matrices (B, m, m)."""
        energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        basis = orthonormal(gram @ self.start, self.training, ROUGH if len(self.shifts) else TOLERANCE)
        for step, share in enumerate((PACE * self.shifts).sigmoid(), start=1):
            image = gram @ basis
            left_out = (energy - (basis * image).sum((-2, -1))).clamp(min=0) / max(1, gram.shape[-1] - basis.shape[-1])
            smallest = ROUGH if step < len(self.shifts) else TOLERANCE
            basis = orthonormal(
                torch.addcmul(image, basis, (share * left_out)[:, None, None], value=-1), self.training, smallest
            )
        return basis


@contextmanager
def quick_products(on: bool) -> Iterator[None]:
    """Inside, float32 products may round their inputs to bf16 or TF32 (sums and results stay float32), where the
    processor is faster so. The subspace does not suffer: rounding a matrix moves its leading directions by next to
    nothing, while rounding its Gram matrix would drown the small ones."""
    before = torch.get_float32_matmul_precision()
    if on:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
