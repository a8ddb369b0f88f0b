"""From two weights to a delta, from a delta to its spectrum.

    delta = subtract(base, tuned)                                   # float32, exact energy, what rounding did to it
    spectrum = measure(delta, up_to=128, question=lambda s: s.rank_for(0.9, 4, 128))

The fast path is a randomized range finder (Halko, Martinsson and Tropp 2011, algorithm 4.4) with a certificate;
where the certificate does not decide the caller's question, the exact path answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rankwise.core.rounding import Digits, rounded
from rankwise.core.spectrum import Spectrum, Undecided

BLOCK = 1 << 18  # entries converted at a time: stays in the cache, and bounds the memory beside the delta itself
PERMUTED = 1 << 20  # entries up to which the null is measured rather than predicted
OVERSAMPLE = 10  # Halko et al. recommend 5 to 10
SMALL_SIDE = 4  # a matrix whose short side is within 4× the sketch's width is faster to do exactly
# Of the bound of what a sketch leaves out: vectors, and powers of RRᵀ that they span (with the 0th).
PROBES, STEPS = 16, 4
FAILURE = 1e-6  # a third of the probability that any of these bounds of a run is too low, for any spectra
UNDECIDED = "exact, undecided by the sketch"
ROUNDING = 2e-6  # of E(k) by a sketch in float32: up to 3e-7 was seen on flat, polynomial and low-rank spectra

Question = Callable[[Spectrum], object]


@dataclass(frozen=True)
class Delta:
    """Tuned − base of one matrix, float32 (m, n), with its exact energies and what 16-bit rounding did.

    `unchanged` is the share of entries that are equal in both; `stored_as` the format that the tuned values went
    through, None where nothing tells; `rounding_energy` the expected ‖·‖²_F of that rounding (0 for float32), and
    `base_rounding` what the base's own adds if it is a rounded copy, too (see `core.rounding`).
    """

    matrix: Tensor
    energy: float
    base_energy: float
    unchanged: float
    rounding_energy: float
    stored_as: str | None
    base_rounding: float = 0.0

    @property
    def relative_change(self) -> float:
        """‖Δ‖_F / ‖W‖_F; infinite where the base is zero and the delta is not."""
        if self.base_energy == 0:
            return math.inf if self.energy else 0.0
        return math.sqrt(self.energy / self.base_energy)

    @property
    def noise_share(self) -> float:
        """Expected share of the delta's energy that is rounding of the tuned weights, at most 1."""
        return min(1.0, self.rounding_energy / self.energy) if self.energy else 0.0

    @property
    def noise_share_both(self) -> float:
        """The same if the base is a rounded copy as well, at most 1."""
        return min(1.0, (self.rounding_energy + self.base_rounding) / self.energy) if self.energy else 0.0


def row_blocks(matrix: Tensor, entries: int = BLOCK) -> Iterator[slice]:
    rows = max(1, entries // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, start + rows)


def energy_of(matrix: Tensor) -> float:
    """‖·‖²_F, accumulated in float64 block by block."""
    total = 0.0
    for rows in row_blocks(matrix):
        total += block_energy(matrix[rows])
    return total


def block_energy(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def subtract(base: Tensor, tuned: Tensor, out: Tensor | None = None) -> Delta:
    """The delta of two matrices of equal shape and any float types, subtracted in float32, block by block, into `out`
    if given.

    Its energy is exact; the base's, of which only a ratio is reported, sums float32 norms of blocks.
    """
    matrix = torch.empty(base.shape, dtype=torch.float32, device=base.device) if out is None else out
    changed, energy, base_energy = 0, 0.0, 0.0
    base_digits, tuned_digits = Digits(base.dtype), Digits(tuned.dtype)
    for rows in row_blocks(matrix):
        before, after, block = base[rows].float(), tuned[rows].float(), matrix[rows]
        torch.sub(after, before, out=block)
        base_digits.see(before, block)
        tuned_digits.see(after, block)
        energy += block_energy(block)  # here, while the block is in the cache
        base_energy += float(torch.linalg.vector_norm(before)) ** 2
        changed += int(torch.count_nonzero(block))
    stored_as, noise = rounded(tuned, tuned_digits.format)
    # float32 weights have trained from these very values; a rounded result may have come from others
    base_noise = rounded(base, base_digits.format)[1] if noise else 0.0
    return Delta(
        matrix=matrix,
        energy=energy,
        base_energy=base_energy,
        unchanged=1 - changed / max(1, matrix.numel()),
        rounding_energy=noise,
        stored_as=stored_as,
        base_rounding=base_noise,
    )


def same_as_stored(before: Tensor, after: Tensor) -> bool:
    """Whether the tuned values equal the base's, cast to the tuned tensor's type.

    In float32 over a bf16 base every difference counts, however far below bf16's spacing: it is what was trained.
    """
    return torch.equal(before.to(after.dtype), after)


def energy_between(before: Tensor, after: Tensor) -> float:
    """‖after − before‖²_F of two matrices of one shape, block by block, but for what is `same_as_stored`."""
    total = 0.0
    for rows in row_blocks(before):
        if not same_as_stored(before[rows], after[rows]):
            total += block_energy(after[rows].float() - before[rows].float())
    return total


def from_difference(matrix: Tensor, base_energy: float = 0.0) -> Delta:
    """A delta that was saved directly, without rounding loss (in 16 bits, 3e-6 of its energy)."""
    stored_as, matrix = str(matrix.dtype).removeprefix("torch."), matrix.float()
    unchanged = 1 - int(torch.count_nonzero(matrix)) / max(1, matrix.numel())
    return Delta(matrix, energy_of(matrix), base_energy, unchanged, 0.0, stored_as)


def measure(
    delta: Delta,
    up_to: int,
    question: Question,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
    matrices: int = 1,
) -> Spectrum:
    """The spectrum that answers `question`, which raises Undecided where it cannot be answered.

    The first `up_to` values are found; `exact` finds all. matrices: how many a run sketches, whose bounds are to hold
    all together but for a probability of 3·FAILURE. Raises ValueError for entries that are not finite.
    """
    matrix = delta.matrix
    if not math.isfinite(delta.energy):
        raise ValueError("the delta has entries that are NaN or infinite")
    if delta.energy == 0.0:
        return zero_spectrum((matrix.shape[0], matrix.shape[1]), up_to)
    if exact or is_small(matrix.shape, up_to):
        return exact_spectrum(matrix, delta.energy)
    sketched = sketch(matrix, delta.energy, up_to, generator, matrices)
    for spectrum in (sketched.coarse, sketched.spectrum, sketched.refined):
        try:
            answered = spectrum()
            question(answered)
        except Undecided:
            continue
        return answered
    return exact_spectrum(matrix, delta.energy, method=UNDECIDED)


def is_small(shape: Sequence[int], up_to: int) -> bool:
    """Whether a matrix is measured faster exactly than by a sketch of so many values."""
    return min(shape) <= SMALL_SIDE * (up_to + OVERSAMPLE)


def zero_spectrum(shape: tuple[int, int], up_to: int) -> Spectrum:
    return Spectrum(torch.zeros(min(up_to, *shape), dtype=torch.float64), 0.0, shape, complete=True)


def exact_spectrum(matrix: Tensor, energy: float, method: str = "exact") -> Spectrum:
    """Every singular value: eigenvalues of the smaller Gram matrix, in float64.

    The Gram matrix squares the condition number, which costs digits of values below 1e-8·σ₁ and nothing that
    an energy can see.
    """
    values = gram_values(wide_side(matrix)).cpu()
    return Spectrum(values, energy, (matrix.shape[0], matrix.shape[1]), method=method, complete=True)


@dataclass(frozen=True)
class Sketch:
    """A randomized basis Q (m, q) of the short side of a wide matrix (m ≤ n), with QᵀΔ (q, n).

    `left_over` is ‖Δ − QQᵀΔ‖_F, which costs nothing; a bound of the spectral norm takes a few multiplications, and a
    third one takes one more by the whole basis.
    """

    wide: Tensor
    basis: Tensor
    projected: Tensor
    values: Tensor
    left_over: float
    energy: float
    shape: tuple[int, int]
    up_to: int
    generator: torch.Generator | None = None
    known_bounds: tuple[float, float] | None = None
    matrices: int = 1

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Upper bounds of ‖R‖₂ and ‖RRᵀ‖_F, R = Δ − QQᵀΔ."""
        if self.known_bounds is not None:
            return self.known_bounds
        norm, square = residual_norms(self.wide, self.basis, self.projected, self.generator, self.matrices)
        return float(norm), float(square)

    @cached_property
    def residual(self) -> float:
        """Upper bound of ‖Δ − QQᵀΔ‖₂."""
        return min(self.left_over, self.bounds[0])

    def coarse(self) -> Spectrum:
        values = self.values[: self.up_to].cpu()
        return Spectrum(values, self.energy, self.shape, residual=self.left_over, method="sketch", rounding=ROUNDING)

    def spectrum(self) -> Spectrum:
        return replace(self.coarse(), residual=self.residual, residual_square=self.bounds[1])

    def refined(self) -> Spectrum:
        """The same values with a closer bound, for one more multiplication by Δ.

        In the basis [Q, Q⊥] the Gram matrix ΔΔᵀ is [[H, Eᵀ], [E, W]] with ‖W‖₂ ≤ residual². An eigenvalue λ ≥ θ_k of
        it is one of H + Eᵀ(λ − W)⁻¹E ≤ H + EᵀE/(θ_k − residual²), so that by Ky Fan the first k exceed their Ritz
        values θ together by at most Σ_{i≤k} λᵢ(EᵀE)/(θ_k − residual²): quadratic in what the sketch misses.
        """
        image = self.wide @ self.projected.T
        off_block = image - self.basis @ (self.basis.T @ image)
        missed = gram_values(off_block.T).square().cumsum(0)[: self.up_to]
        gap = self.values.square()[: self.up_to] - self.residual**2
        excess = torch.where(gap > 0, missed / gap.clamp(min=1e-300), math.inf).cpu()
        return replace(self.spectrum(), excess=excess, method="sketch, refined bound")


def sketch(
    matrix: Tensor, energy: float, up_to: int, generator: torch.Generator | None = None, matrices: int = 1
) -> Sketch:
    """The leading `up_to` values from a randomized basis of the short side, with a bound on the rest.

    matrices: as for `measure`.
    """
    wide = wide_side(matrix)
    basis = range_basis(wide, min(up_to + OVERSAMPLE, wide.shape[0]), power_iterations=1, generator=generator)
    projected = basis.T @ wide
    values = gram_values(projected)
    shape = (matrix.shape[0], matrix.shape[1])
    return Sketch(
        wide, basis, projected, values, left_over(energy, values), energy, shape, up_to, generator, None, matrices
    )


def sketches(
    stack: Tensor, energies: Sequence[float], up_to: int, generator: torch.Generator | None = None, matrices: int = 1
) -> list[Sketch]:
    """The sketches of matrices of one shape, (b, m, n), made together, with the bounds of their residuals.

    matrices: as for `measure`.
    """
    wide = wide_side(stack)
    basis = range_basis(wide, min(up_to + OVERSAMPLE, wide.shape[1]), power_iterations=1, generator=generator)
    projected = basis.mT @ wide
    values, bounds = gram_values(projected), residual_norms(wide, basis, projected, generator, matrices)
    shape = (stack.shape[1], stack.shape[2])
    parts = zip(wide, basis, projected, values, energies, *(each.tolist() for each in bounds), strict=True)
    return [
        Sketch(w, q, p, v, left_over(energy, v), energy, shape, up_to, generator, (norm, square))
        for w, q, p, v, energy, norm, square in parts
    ]


def wide_side(matrix: Tensor) -> Tensor:
    """(…, m, n) or its transpose, whichever has m ≤ n."""
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def left_over(energy: float, values: Tensor) -> float:
    """‖Δ − QQᵀΔ‖_F by the values of QᵀΔ."""
    return math.sqrt(max(0.0, energy - float(values.square().sum())) + ROUNDING * energy)


def range_basis(wide: Tensor, width: int, power_iterations: int, generator: torch.Generator | None) -> Tensor:
    """Orthonormal basis Q (…, m, width) of the leading left subspace of wide matrices (…, m, n), m ≤ n.

    Power iterations are orthonormalised on the short side only, which is where the cost is small.
    """
    size = (*wide.shape[:-2], wide.shape[-1], width)
    image = wide @ torch.randn(size, generator=generator, dtype=wide.dtype, device=wide.device)
    basis: Tensor = torch.linalg.qr(image).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(wide @ (wide.mT @ basis)).Q
    return basis


def gram_values(wide: Tensor) -> Tensor:
    """Singular values of (…, q, n) matrices, q ≤ n, float64, descending: Gram matrices, summed block by block."""
    gram = torch.zeros(*wide.shape[:-1], wide.shape[-2], dtype=torch.float64, device=wide.device)
    columns = max(1, BLOCK // math.prod(wide.shape[:-1]))
    for start in range(0, wide.shape[-1], columns):
        block = wide[..., start : start + columns].double()
        gram.addmm_(block, block.mT) if wide.dim() == 2 else gram.baddbmm_(block, block.mT)
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(-1).clamp(min=0).sqrt()


def residual_norms(
    wide: Tensor, basis: Tensor, projected: Tensor, generator: torch.Generator | None, matrices: int = 1
) -> tuple[Tensor, Tensor]:
    """Upper bounds of ‖R‖₂ and ‖RRᵀ‖_F, R = Δ − QQᵀΔ, which is never formed. Of one matrix, or a batch.

    The first is the largest Ritz value of RRᵀ in the block Krylov space of random vectors (it nears ‖R‖₂² from below),
    times what it can be short of, see `safety`. The second comes from the same vectors: of b Gaussian z the mean S of
    ‖RRᵀz‖² has the mean ‖RRᵀ‖²_F, and it is below S + 2√(t/b)·‖R‖₂²·‖RRᵀ‖_F but for a probability of e^{−t} (Laurent
    and Massart 2000, for Σ λᵢ⁴ χ²ᵢ with Σ λᵢ⁸ ≤ λ₁⁴ Σ λᵢ⁴). Each of `matrices` gets an equal part of FAILURE, so that
    by the union bound all of them hold together but for 3·FAILURE.
    """
    probe = torch.randn(*wide.shape[:-1], PROBES, generator=generator, dtype=wide.dtype, device=wide.device)
    blocks: list[Tensor] = []
    images: list[Tensor] = []
    square = torch.zeros(())
    for step in range(STEPS):
        for _ in range(2):  # once leaves float32's rounding of the first pass
            for known in (basis, *blocks):
                probe = probe - known @ (known.mT @ probe)
        block, scale = torch.linalg.qr(probe)
        blocks.append(block)
        images.append(wide.mT @ block - projected.mT @ (basis.mT @ block))
        if step + 1 < STEPS:
            probe = wide @ images[-1] - basis @ (projected @ images[-1])
        if step == 0:
            square = (probe @ scale).double().square().sum((-2, -1)) / PROBES
    norm = safety(wide.shape[-2], matrices) * gram_values(torch.cat(images, -1).mT)[..., 0]
    spread = math.sqrt(-math.log(FAILURE / matrices) / PROBES) * norm**2
    return norm, spread + (spread**2 + square).sqrt()


def safety(m: int, matrices: int = 1) -> float:
    """‖R‖₂ ÷ the square root of that Ritz value is at most this, whatever R (m, n), for each of so many matrices, but
    for a probability of 2·FAILURE that any of them exceeds it.

    Let ω (m, b) be the b Gaussian vectors in the basis of R's left singular vectors, ω₁ the row of the largest.
    Combined with the weights ω₁ they give one vector with components |ω₁|² ~ χ²_b there and independent N(0, 1)
    elsewhere, times |ω₁|. For a polynomial q of degree k − 1, its image under q(RRᵀ) lies in the Krylov space; with
    the Chebyshev polynomial q(λ) = T_{2k−1}(s)/s, λ = (1 − ε)(1 − s²)λ₁, the Ritz value is below (1 − ε)λ₁ only where
    χ²_b / χ²_{m−1} < 1 / sinh²((2k − 1)·artanh √ε): the argument of Kuczyński and Woźniakowski (1992, "Estimating the
    largest eigenvalue by the power and Lanczos algorithms with a random start") for a block. The tails: P(χ²_b < x) ≤
    (x/2)^{b/2}/Γ(b/2 + 1), and P(χ²_m > m + 2√(mt) + 2t) ≤ e^{−t} (Laurent and Massart 2000).
    """
    failure = FAILURE / matrices
    t = -math.log(failure)
    least = 2 * (failure * math.gamma(PROBES / 2 + 1)) ** (2 / PROBES)
    most = m + 2 * math.sqrt(m * t) + 2 * t
    return math.cosh(math.asinh(math.sqrt(most / least)) / (2 * STEPS - 1))


def null_edge(delta: Delta, generator: torch.Generator | None = None) -> float:
    """Largest singular value of a matrix with this delta's entries and no structure.

    Small matrices are permuted and measured; for the rest the Marchenko–Pastur edge of independent entries of
    the same energy, level·(√m + √n), which the permuted matrix tends to.
    """
    m, n = delta.matrix.shape
    if delta.matrix.numel() > PERMUTED:
        return marchenko_pastur_edge(delta.energy, (m, n))
    flat = delta.matrix.reshape(-1)
    order = torch.randperm(flat.numel(), generator=generator, device=flat.device)
    permuted = flat[order].reshape(m, n)
    return float(exact_spectrum(permuted, delta.energy).values[0])


def marchenko_pastur_edge(energy: float, shape: tuple[int, int]) -> float:
    """Largest singular value to expect of an (m, n) matrix of independent entries with this ‖·‖²_F in all."""
    m, n = shape
    return math.sqrt(energy / (m * n)) * (math.sqrt(m) + math.sqrt(n))
