"""Matrices on which a certificate has to decide: what a sketch misses lies where the threshold does.

Each case is a 96×144 matrix with a threshold just below or above its true E(k), and the true rank by LAPACK in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from planted import generator, truth
from torch import Tensor

from rankwise.core.measure import Delta, from_difference, measure
from rankwise.core.spectrum import Spectrum

SHAPE = (96, 144)
UP_TO = 12  # for a short side of 96 the sketch, of 22 directions, is still the fast path
RANKS = (1, 4, 8, UP_TO - 1, UP_TO - 1, UP_TO - 1)  # just below --max_rank one bound decides alone


def tails(seed: int) -> Tensor:
    """Squares of the singular values after the first, largest first: the families that defeat a sketch."""
    draw = generator(seed)
    place = torch.arange(95, dtype=torch.float64)
    flat = torch.ones(95, dtype=torch.float64)
    families: tuple[Callable[[], Tensor], ...] = (
        lambda: 1 - 0.01 * place,  # nearly flat
        lambda: torch.where(place < 43, flat, 0.01 * flat),  # as much mass behind the sketch as in it
        lambda: torch.where(place < 6, 1.0 + 1e-3 * (6 - place), 0.9 * flat),  # a cluster at the threshold
        lambda: torch.where(place < 21, flat, 0.7 * flat),  # a step just behind the sketch
        lambda: torch.linalg.svdvals(torch.randn(95, 143, generator=draw, dtype=torch.float64)).square(),  # noise
        lambda: 0.98**place,
        lambda: torch.where(place < UP_TO - 2, 3 * flat, flat),  # a cluster of which the sketch misses a little each
        lambda: torch.where(place < UP_TO, 0.9**place, 0 * flat),  # nothing missed: only float32 is in doubt
    )
    return families[seed % len(families)]()


def with_squares(squares: Tensor, seed: int, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Float32 (m, n) with these squared singular values and random directions."""
    draw = generator(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(squares), generator=draw, dtype=torch.float64)).Q for side in shape
    )
    return ((left * squares.sqrt()) @ right.T).float()


def with_energy(threshold: float, k: int, seed: int) -> Tensor:
    """A hard tail behind one value so large that E(k) is the threshold."""
    tail = tails(seed)
    first = torch.maximum((threshold * tail.sum() - tail[: k - 1].sum()) / (1 - threshold), tail[0])
    return with_squares(torch.cat([first.reshape(1), tail]), seed)


@dataclass(frozen=True)
class Case:
    matrix: Tensor
    threshold: float
    rank: int

    @property
    def delta(self) -> Delta:
        return from_difference(self.matrix)

    def rank_of(self, spectrum: Spectrum) -> int:
        return spectrum.rank_for(self.threshold, 1, UP_TO)


@cache
def cases(count: int) -> tuple[Case, ...]:
    """Hundreds of draws: every family, every rank, thresholds 2e-5 and 1e-8 beside the true energy."""
    return tuple(case_of(seed) for seed in range(count))


def case_of(seed: int) -> Case:
    k = RANKS[seed // 24 % len(RANKS)]
    matrix = with_energy((0.1, 0.9, 0.97)[seed // 8 % 3], k, seed)
    squares = truth(matrix).square()
    energies = squares.cumsum(0) / squares.sum()
    beside = (-2e-5, -2e-5, 2e-5, -1e-8, 1e-8)[seed // 144 % 5]
    threshold = float(energies[k - 1]) + beside
    return Case(matrix, threshold, min(int((energies < threshold).sum()) + 1, UP_TO))


def wrong_ranks(found: Iterable[Case]) -> Iterator[str]:
    """Cases that the product answers wrongly, whatever path it took, as they are found."""
    for index, case in enumerate(found):
        spectrum = measure(case.delta, UP_TO, case.rank_of, generator=generator(index))
        rank = case.rank_of(spectrum)
        if rank != case.rank:
            yield f"case {index}: rank {rank} by {spectrum.method}, {case.rank} in truth"
