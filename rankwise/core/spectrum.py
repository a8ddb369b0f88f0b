"""Singular values of a delta with its exact energy. A spectrum refuses a question that it cannot answer.

Notation: Δ is m×n with singular values σ₁ ≥ σ₂ ≥ …; energy E(k) = Σ_{i≤k} σᵢ² / ‖Δ‖²_F.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """Certified bounds of a number."""

    low: float
    high: float


class Undecided(ValueError):
    """The computed part of a spectrum cannot decide the question; the exact spectrum can."""


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values (float64, descending), the shape, and the exact total energy ‖Δ‖²_F.

    `residual` bounds the spectral norm of what the values leave out: ‖Δ − QQᵀΔ‖₂ for a sketch with basis Q,
    0 where the values are exact. With it (Weyl's inequality for QQᵀΔ, which is a compression of Δ)
    Ê(k) ≤ E(k) ≤ Ê(k) + k·residual²/‖Δ‖²_F. `residual_square` bounds ‖RRᵀ‖_F of that remainder R, and with it the same
    difference by √k·residual_square: closer where the tail falls off. `excess` is another bound of Σ_{i≤k}σᵢ² −
    Σ_{i≤k}σ̂ᵢ², where one was computed, and `rounding` what float32 arithmetic may have added to or taken from E(k).
    `complete` says that no singular value is missing.
    """

    values: Tensor
    energy_total: float
    shape: tuple[int, int]
    residual: float = 0.0
    method: str = "exact"
    complete: bool = False
    excess: Tensor | None = None
    rounding: float = 0.0
    residual_square: float = math.inf

    def __post_init__(self) -> None:
        assert self.values.dim() == 1 and self.values.dtype == torch.float64, "values: float64 vector"
        assert self.energy_total >= 0, "energy is a sum of squares"

    @property
    def is_zero(self) -> bool:
        return self.energy_total == 0.0

    def __len__(self) -> int:
        return len(self.values)

    def cumulative(self) -> Tensor:
        """Ê(k) for k = 1 … len(self), clipped at 1 against rounding."""
        if self.is_zero:
            return torch.ones_like(self.values)
        return (self.values.square().cumsum(0) / self.energy_total).clamp(max=1.0)

    def upper(self) -> Tensor:
        """Certified upper bound of E(k) for k = 1 … len(self)."""
        if self.is_zero:
            return torch.ones_like(self.values)
        return (self.cumulative() + self.missed() / self.energy_total).clamp(max=1.0)

    def missed(self) -> Tensor:
        """Certified upper bound of Σ_{i≤k} (σᵢ² − σ̂ᵢ²) for k = 1 … len(self): no more than all that is left."""
        ranks = torch.arange(1, len(self) + 1, dtype=torch.float64)
        missed = torch.minimum(ranks * self.residual**2, ranks.sqrt() * self.residual_square)
        left = self.energy_total * (1 + self.rounding) - float(self.values.square().sum())
        missed = missed.clamp(max=max(0.0, left))
        return missed if self.excess is None else torch.minimum(missed, self.excess)

    def missed_each(self) -> Tensor:
        """Certified upper bound of σᵢ² − σ̂ᵢ² (never negative) for i = 1 … len(self)."""
        return self.missed().clamp(max=self.residual**2)

    def energy(self, k: int) -> Interval:
        """Bounds of E(k). Beyond the computed values only a complete spectrum answers."""
        if k <= 0 or self.is_zero:
            return Interval(float(self.is_zero), float(self.is_zero))
        if k > len(self) and not self.complete:
            raise Undecided(f"energy at rank {k}: only {len(self)} of {min(self.shape)} values were computed")
        index = min(k, len(self)) - 1
        low, high = float(self.cumulative()[index]), float(self.upper()[index])
        return Interval(max(0.0, low - self.rounding), min(1.0, high + self.rounding))

    def require_refined(self) -> None:
        """Undecided where a closer bound can be had for one more multiplication: for who compares whole curves."""
        if not self.complete and self.excess is None:
            raise Undecided("only the coarse bound was computed")

    def rank_bounds(self, threshold: float) -> tuple[int, int]:
        """Certified least and greatest value of r = min{k: E(k) ≥ threshold}.

        A bound above len(self) means only "more than the computed values reach".
        """
        if self.is_zero:
            return 0, 0
        lower, upper = self.cumulative(), self.upper()
        slack = 1e-12  # float64 rounding of the sums
        surely = int((lower - self.rounding < threshold - slack).sum()) + 1
        possibly = int((upper + self.rounding < threshold - slack).sum()) + 1
        if self.complete:
            surely = min(surely, len(self))
        return min(possibly, surely), surely

    def rank_for(self, threshold: float, least: int = 1, most: int | None = None) -> int:
        """Least k with E(k) ≥ threshold, clipped to [least, most]. Raises Undecided where the bounds differ."""
        most = most if most is not None else min(self.shape)
        low, high = self.rank_bounds(threshold)
        if high > len(self) and most > len(self) and not self.complete:
            raise Undecided(f"energy {threshold} is not reached within the {len(self)} computed values")
        clipped = {min(max(low, least), most), min(max(high, least), most)}
        if len(clipped) > 1:
            raise Undecided(f"energy {threshold} is reached at a rank between {low} and {high}")
        return clipped.pop()

    def saturated(self, threshold: float, max_rank: int) -> bool:
        """Whether the threshold is certainly not reached within `max_rank` values."""
        return not self.is_zero and self.rank_bounds(threshold)[0] > max_rank

    @property
    def stable_rank(self) -> float | None:
        """‖Δ‖²_F / σ₁² (Rudelson and Vershynin): at most the rank, and insensitive to small values.

        None where noise removal left no direction standing: the energy is spread too evenly to tell.
        """
        top = float(self.values[0]) if len(self) else 0.0
        if top == 0.0:
            return 0.0 if self.is_zero else None
        return self.energy_total / top**2

    @property
    def decay_rate(self) -> float:
        """−ln(σ_k/σ_0) with k = min(10, n − 1), counted from 0; infinite where σ_k is 0."""
        k = min(10, len(self) - 1)
        if self.is_zero or k < 1:
            return 0.0
        ratio = float(self.values[k] / self.values[0])
        return -math.log(ratio) if ratio > 0 else math.inf

    @property
    def entropy_rank(self) -> float | None:
        """exp of the entropy of σ²/Σσ² (Roy and Vetterli's effective rank); None where values are missing or bounds."""
        total = self.values.square().sum()
        if not self.complete or self.residual or total == 0.0:
            return 0.0 if self.is_zero else None
        share = self.values.square() / total
        share = share[share > 0]
        return float(torch.exp(-(share * share.log()).sum()))

    def without_noise(self, energy: float) -> Spectrum:
        """The spectrum after removing white noise of known total energy (in the units of ‖Δ‖²_F).

        Each value is shrunk as is optimal for the Frobenius norm under white noise of level σ = √(energy/mn)
        (Gavish and Donoho 2017, "Optimal shrinkage of singular values"), and the energy loses the noise's. Bounds stay
        bounds: the shrunk square f(x) of x = σᵢ² is convex, grows no faster than x, and f(x)/x grows with x, so that
        what the values miss of Σσᵢ² bounds what the shrunk ones miss. Where these outweigh the energy that is left (the
        noise was less than this), they are the total, and what is not known of it goes into `rounding`.
        """
        m, n = max(self.shape), min(self.shape)
        unit = energy / n  # level²·m
        if unit == 0.0 or self.is_zero:
            return self
        squares, reach = self.values.square(), self.values.square() + self.missed_each()
        shrunk, highest = (shrunk_squares(x / unit, n / m) * unit for x in (squares, reach))
        # f(x)/x beyond the values
        share = float(highest[-1] / reach[-1]) if reach[-1] > 0 and not self.complete else 0.0
        beyond = share * max(0.0, self.energy_total - float(squares.sum()))
        missed = min((1 - share) * float(self.missed()[-1]), float((highest - shrunk).sum()))
        total = max(self.energy_total - energy, float(shrunk.sum()))
        most = max(total, float(shrunk.sum()) + beyond + missed)
        return replace(
            self,
            values=shrunk.sqrt(),
            energy_total=total,
            rounding=self.rounding * self.energy_total / total + most / total - 1 if total else 0.0,
            method=f"{self.method}, noise removed",
            complete=self.complete or share == 0.0,  # the missing values are smaller still, so they are noise as well
        )

    def cut(self, rule: str) -> Spectrum:
        """The values above a noise floor estimated from the spectrum itself; the rest counts as noise.

        gavish-donoho: τ = ω(β)·median(σ), ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43 (2014, unknown noise level).
        marchenko-pastur: the bulk's upper edge σ(√m + √n), σ from the median value of the bulk.
        Both need every value: Undecided from a truncated spectrum.
        """
        if not self.complete:
            raise Undecided(f"--noise-floor {rule} needs every singular value: add --exact")
        m, n = max(self.shape), min(self.shape)
        beta, median = n / m, float(self.values.median())
        omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        if rule == "gavish-donoho":
            floor = omega * median
        else:  # median(σ) = level·√m·√μ(β), and ω(β) = λ(β)/√μ(β) with λ the optimal hard threshold
            optimal = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
            floor = median * omega / optimal * (1 + math.sqrt(beta))
        kept = self.values[self.values > floor]
        if not len(kept):
            kept = self.values[:1]
        return replace(self, values=kept, energy_total=float(kept.square().sum()), method=f"{self.method}, {rule}")


def all_values(values: Tensor, shape: tuple[int, int], method: str) -> Spectrum:
    """The spectrum whose singular values are these: none is missing, and its energy is the sum of their squares."""
    return Spectrum(values, float(values.square().sum()), shape, method=method, complete=True)


def together(spectra: Sequence[Spectrum]) -> Spectrum:
    """The spectrum of matrices of one shape that get the same rank each (a layer's experts): σᵢ² = Σ_e σ²_{e,i}.

    So E(k) is what rank k for each keeps of the energy of all, and bounds are the sums of the single ones. As many
    values as all of them have; of a complete one those that it has not are zero.
    """
    open_ended = [len(each) for each in spectra if not each.complete]
    count = min(open_ended) if open_ended else max(map(len, spectra))
    squares, missed = torch.zeros(2, count, dtype=torch.float64)
    for each in spectra:
        known = min(count, len(each))
        squares[:known] += each.values[:known].square()
        own = each.missed()[:known]
        missed[:known] += own
        missed[known:] += own[-1]  # cumulative: behind the last value it stays
    total = sum(each.energy_total for each in spectra)
    slack = sum(each.rounding * each.energy_total for each in spectra)
    refined = all(each.complete or each.excess is not None for each in spectra)
    return Spectrum(
        values=squares.sqrt(),
        energy_total=total,
        shape=spectra[0].shape,
        residual=math.sqrt(sum(each.residual**2 for each in spectra)),
        residual_square=sum(each.residual_square for each in spectra if each.residual),
        method=", ".join(dict.fromkeys(each.method for each in spectra if not each.is_zero)) or spectra[0].method,
        complete=not open_ended,
        excess=missed if refined and open_ended else None,
        rounding=slack / total if total else 0.0,
    )


def shrunk_squares(squares: Tensor, beta: float) -> Tensor:
    """f(x) = ((x − β − 1)² − 4β)/x above the noise's edge x = (1 + √β)², 0 below; x in units of level²·max(m, n)."""
    inside = ((squares - beta - 1).square() - 4 * beta) / squares
    return torch.where(squares > (1 + math.sqrt(beta)) ** 2, inside, torch.zeros_like(squares))
