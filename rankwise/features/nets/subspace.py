"""`Subspace`: our own network. A learned start, then what no network can guess: a step of subspace iteration, computed.

    Ω (T, r), learnt ──▶ G·Ω ── orth ──▶ Q₁ ── (G − s·m·I)·Q₁, orth ──▶ Q₂ ──▶ A = Q₂,  B = Q₂ᵀX
    G = X·Xᵀ (T, T)                       m: mean eigenvalue that Q₁ leaves out; s in (0, 1): learnt

Multiplying by G − s·m·I damps the directions that are to be left out, whose eigenvalues lie around m, more than G alone
does: the polynomial filter of Chebyshev iteration (Saad 2011, chapter 7.4) with an interval that is measured in each
matrix. So one step suffices where plain iteration takes two or three. Everything but two products of X is small, and
nothing needs an eigendecomposition, which is what an exact factorization spends most of its time on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankwise.core.factors import Factors
from rankwise.features.nets.base import Factorizer, FactorizerSettings

STEPS = 1
SHIFT = 0.8  # of the mean eigenvalue left out: above 1 a wanted direction may be damped too
# The span of the start does not depend on its size, so its size sets the pace: at the usual 1e-4, Adam moves an entry
# by a hundredth of it in a step. The logits of the shifts are kept in hundreds for the same reason.
START_SIZE, PACE = 0.01, 100.0
AT_ONCE = 16  # matrices: what lies between their products then stays in memory that is used again, a tenth of the time
TOLERANCE = 1e-3  # of QᵀQ − I: what it costs an approximation is of its square
DIAGONAL_SHIFT = 1e-6  # of the trace of the Gram matrix: some ten times what float32 rounds
BLOCK = 32  # smallest Cholesky factor that is inverted whole
ROUGH = 1.0  # a basis that the next step multiplies again need only be well conditioned


class Subspace(Factorizer):
    """The subspace of the tokens that holds most energy, from a learned start and `steps` unrolled iterations.

    Works on the shorter side: where T > D, on the channels. With one step some 3 to 5 % above the optimum's error, on
    pictures of other sources too: it looks at the matrix itself.
    """

    name = "Subspace"

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


def orthonormal(columns: Tensor, exact: bool = False, tolerance: float = TOLERANCE) -> Tensor:
    """Orthonormal basis Q (B, m, r) of the span of each (B, m, r), r ≤ m.

    Cholesky QR loses orthogonality like ε·κ², with κ the condition of the columns scaled to length 1 (Higham 2002,
    section 19.9). A matrix for which that is above the tolerance gets it with a shift, which conditions it, and then
    again without (Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa 2020). One whose columns are dependent even so
    goes to Householder's QR. exact: all do (it has a gradient everywhere, too).
    """
    if exact:
        basis: Tensor = torch.linalg.qr(columns).Q
        return basis
    basis, right = cholesky_basis(columns, tolerance)
    if bool(right.all()):
        return basis
    hard = columns[~right]
    conditioned, _ = cholesky_basis(hard, tolerance, DIAGONAL_SHIFT)
    again, sound = cholesky_basis(conditioned, tolerance)
    if not bool(sound.all()):
        again[~sound] = torch.linalg.qr(hard[~sound]).Q
    basis[~right] = again
    return basis


def cholesky_basis(columns: Tensor, tolerance: float, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """(columns·L⁻ᵀ with L·Lᵀ their shifted Gram matrix, whether its columns are orthonormal within the tolerance)."""
    gram = columns.mT @ columns
    squares = gram.diagonal(dim1=-2, dim2=-1)
    if shift:
        squares += shift * squares.sum(-1, keepdim=True)
    inverse = inverse_cholesky(gram)
    condition = (inverse.square() * squares[..., None, :]).sum((-2, -1))  # ‖L⁻¹·D‖_F², at least κ² / r
    right = condition * torch.finfo(gram.dtype).eps < tolerance  # false for what is no number
    right &= (inverse.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    return columns @ inverse.mT, right


def inverse_cholesky(gram: Tensor) -> Tensor:
    """L⁻¹ (B, r, r) of gram = L·Lᵀ, by halves down to blocks of BLOCK.

    With [[G₁₁, ·], [G₂₁, G₂₂]]: L₂₁ = G₂₁·L₁₁⁻ᵀ, and L₂₂ belongs to G₂₂ − L₂₁·L₂₁ᵀ. Where a matrix is not positive, a
    number on the diagonal is not positive or not finite.
    """
    size = gram.shape[-1]
    if size <= BLOCK:
        lower, _ = torch.linalg.cholesky_ex(gram)
        unit = torch.eye(size, dtype=gram.dtype, device=gram.device).expand_as(lower)
        inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return inverse
    half = size // 2
    first = inverse_cholesky(gram[..., :half, :half])
    below = gram[..., half:, :half] @ first.mT
    second = inverse_cholesky(gram[..., half:, half:] - below @ below.mT)
    whole = torch.zeros_like(gram)
    whole[..., :half, :half], whole[..., half:, half:] = first, second
    whole[..., half:, :half] = -second @ (below @ first)
    return whole
