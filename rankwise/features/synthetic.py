"""Synthetic feature matrices with known singular values, to test methods without a model.

    X = U · diag(σ) · Vᵀ        U (T, k)  smooth over the grid or random     σ (k,)  as asked     V (D, k)

Methods see `normalised(X)`: mean 0 and variance 1 per token. That would change a spectrum, so these matrices are made
to be left alone by it: the columns of V are orthogonal to (1, …, 1), so that every token has mean 0, and U is turned by
rotations of pairs of tokens until every token has the same norm. A matrix with any given spectrum and equal row norms
exists by the theorem of Schur and Horn; the rotations are those by which Bendel and Mickey (1978) make random
correlation matrices. Σσ² = T·D, so that the variance is 1.

Exactly known, up to the rounding of what is stored: the spectrum of every matrix (and of every normalised one: the same
times (1 + 1e-5)^-½, layer normalisation's epsilon), hence the error of the optimum at every rank. And the share of the
energy that lies in directions common to all matrices: vᵢ = √shared · wᵢ + √(1 − shared) · pᵢ with the same orthonormal
w for all, and p drawn for each matrix. A basis common to all can capture no more of a matrix than that share, and
little of p, which is drawn at random.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankwise.errors import UsageError
from rankwise.features.cache_writer import CacheRecipe, Matrices, shard_places
from rankwise.features.pictures import Step

EPSILON = 1e-5  # of layer normalisation
KINDS = "power:A, exp:A, flat, rank:R"
BLOCK = 8  # neighbouring frequencies that a left singular vector mixes
EVEN = 1e-12


@dataclass(frozen=True)
class Synthetic:
    """Matrices (tokens, channels) by number: `matrix(i)` depends on the settings and i alone.

    spectrum: power:A (σᵢ = i^-A), exp:A (σᵢ = e^-A(i-1)), flat, rank:R (R equal ones). shared: in [0, 1], see above.
    smooth: left singular vectors are mixtures of neighbouring frequencies of the grid, low ones first: good to look
    at, and nearly the same subspace of the tokens in every matrix, so that whatever learns one has an easy time. The
    default draws them at random for each matrix.

    Raises UsageError where such matrices do not exist.
    """

    tokens: int = 256
    channels: int = 2048
    spectrum: str = "power:0.7"
    shared: float = 0.5
    seed: int = 42
    smooth: bool = False

    def __post_init__(self) -> None:
        decay(self.spectrum, 1)
        needed = 1 + self.rank * (2 if 0 < self.shared < 1 else 1)
        if self.channels < needed:
            raise UsageError(
                f"--shared {self.shared:g} with {self.rank} directions needs {needed} channels, there are "
                f"{self.channels}; take --shared 0 or 1, fewer tokens, or --spectrum rank:R with a smaller R"
            )

    @property
    def rank(self) -> int:
        """How many singular values are not zero."""
        most = min(self.tokens, self.channels - 1)
        kind, _, number = self.spectrum.partition(":")
        return min(most, max(1, int(amount(self.spectrum, number)))) if kind == "rank" else most

    @cached_property
    def values(self) -> Tensor:
        """σ (k,) float64, descending, of a matrix as it is: Σσ² = T·D."""
        shape = decay(self.spectrum, self.rank)
        return shape * (self.tokens * self.channels / shape.square().sum()).sqrt()

    @property
    def normalised_values(self) -> tuple[float, ...]:
        """All min(T, D) singular values of every normalised matrix."""
        known = self.values / math.sqrt(1 + EPSILON)
        return (*known.tolist(), *[0.0] * (min(self.tokens, self.channels) - self.rank))

    @property
    def grid(self) -> tuple[int, int] | None:
        side = math.isqrt(self.tokens)
        return (side, side) if side * side == self.tokens else None

    def matrix(self, number: int) -> Tensor:
        """(T, D) float32."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number + 1)
        left = even_rows(self.left(generator) * self.values)
        return (left @ self.right(generator).mT).float()

    def left(self, generator: torch.Generator) -> Tensor:
        """(T, k) float64, orthonormal columns."""
        if not self.smooth:
            return orthonormal(torch.randn(self.tokens, self.rank, generator=generator, dtype=torch.float64))
        blocks = [
            orthonormal(torch.randn(len(part), len(part), generator=generator, dtype=torch.float64))
            for part in torch.arange(self.tokens).split(BLOCK)
        ]
        block_diagonal: Tensor = torch.block_diag(*blocks)
        return (self.waves @ block_diagonal)[:, : self.rank]

    def right(self, generator: torch.Generator) -> Tensor:
        """(D, k) float64, orthonormal columns of mean 0; the shared part is the same for all matrices."""
        if self.shared == 1:
            return self.common
        own = torch.randn(self.channels, self.rank, generator=generator, dtype=torch.float64)
        own = own - own.mean(0)
        if self.shared == 0:
            return orthonormal(own)
        own = orthonormal(own - self.common @ (self.common.mT @ own))
        return math.sqrt(self.shared) * self.common + math.sqrt(1 - self.shared) * own

    @cached_property
    def common(self) -> Tensor:
        """(D, k): the directions that all matrices share."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.channels, self.rank, generator=generator, dtype=torch.float64)
        return orthonormal(drawn - drawn.mean(0))

    @cached_property
    def waves(self) -> Tensor:
        """(T, T) float64: the cosine waves of the grid (orthonormal, DCT-II), low frequencies first."""
        rows, columns = self.grid or (1, self.tokens)
        both = torch.kron(cosines(rows), cosines(columns))
        tall, wide = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
        order = (tall.square() + wide.square()).flatten().argsort(stable=True)
        return both[:, order]


@dataclass(frozen=True)
class SyntheticShards:
    """Matrices with a known spectrum; each is a picture of its own."""

    settings: Synthetic
    count: int
    shard_size: int
    dtype: str

    @property
    def recipe(self) -> CacheRecipe:
        one = self.settings
        return CacheRecipe(
            shards=len(self.places),
            dtype=self.dtype,
            model=None,
            pictures=f"{self.count} synthetic",
            settings={"shard_size": self.shard_size, **asdict(one)},
            source=f"synthetic, spectrum {one.spectrum}, shared {one.shared:g}",
            spectrum=one.normalised_values,
        )

    @property
    def places(self) -> list[range]:
        return shard_places(self.count, self.shard_size)

    def size(self, shard: int) -> int:
        return len(self.places[shard])

    def made(self, shard: int, step: Step) -> Matrices:
        matrices, names = [], []
        for place in self.places[shard]:
            matrices.append(self.settings.matrix(place))
            names.append(f"synthetic-{place:06d}")
            step(1)
        groups = tuple(hashlib.sha256(f"{self.settings.seed} {name}".encode()).hexdigest() for name in names)
        return Matrices(torch.stack(matrices), tuple(names), groups, self.settings.grid)


def decay(spectrum: str, rank: int) -> Tensor:
    """(rank,) float64: the shape of a spectrum, the first value 1."""
    kind, _, number = spectrum.partition(":")
    places = torch.arange(rank, dtype=torch.float64)
    if kind in ("power", "exp"):
        rate = amount(spectrum, number)
        return (places + 1) ** -rate if kind == "power" else (-rate * places).exp()
    if kind == "rank":
        amount(spectrum, number)
    if kind in ("flat", "rank"):
        return torch.ones(rank, dtype=torch.float64)
    raise UsageError(f"--spectrum is one of {KINDS}; got {spectrum}")


def amount(spectrum: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError as error:
        raise UsageError(f"--spectrum is one of {KINDS}; got {spectrum}") from error
    if not 0 < value < math.inf:
        raise UsageError(f"--spectrum {spectrum}: its number must be above 0")
    return value


def cosines(size: int) -> Tensor:
    """(size, size) float64, orthonormal: column f is the cosine of frequency f (DCT-II)."""
    place = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (place[:, None] + 0.5) * place[None])
    lengths: Tensor = waves.norm(dim=0)
    return waves / lengths


def orthonormal(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.qr(matrix).Q
    return found


def even_rows(matrix: Tensor) -> Tensor:
    """Rotations of pairs of rows until all have the same norm; no singular value changes.

    Each rotation makes one row right, by the smaller of the two angles that do, with the nearest row that is off in the
    other direction; so a smooth U stays nearly smooth.
    """
    rows = matrix.numpy().copy()
    wanted = (rows**2).sum() / len(rows)
    off = (rows**2).sum(1) - wanted
    for place in range(len(rows) - 1):
        others = [other for other in range(place + 1, len(rows)) if off[other] * off[place] < 0]
        if abs(off[place]) <= EVEN * wanted or not others:
            continue
        other = others[0]
        mixed = float(rows[place] @ rows[other])
        root = math.copysign(math.sqrt(mixed**2 - off[place] * off[other]), mixed)
        tangent = -off[place] / (mixed + root)
        cosine = 1 / math.sqrt(1 + tangent**2)
        first, second = rows[place].copy(), rows[other].copy()
        rows[place], rows[other] = cosine * (first + tangent * second), cosine * (second - tangent * first)
        off[other] += off[place]
        off[place] = 0.0
    return torch.from_numpy(rows)
