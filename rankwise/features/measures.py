"""Ways to factorize feature matrices, and how close each comes: one protocol for baselines and networks.

    methods = [*baselines(rank, basis, generator), network(net)]
    best    = optimum(batches)                          # the SVD's errors, at every rank
    for row in measure(methods, batches, best): row.values["excess_error"].mean()

Everything gets the same normalised X (B, T, D) and is scored there. What each method costs is measured too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rankwise.core.factors import Factors
from rankwise.evaluate.bootstrap import intervals
from rankwise.features.approximation import best_errors, by_basis, by_gram, by_randomized, by_svd, singular_values
from rankwise.features.nets.base import Factorizer

TINY = 1e-30
ROUNDING = 1e-5


def mse(features: Tensor, approximation: Tensor) -> Tensor:
    """Mean squared error of the entries."""
    return (features - approximation).square().mean((-2, -1))


def relative_error(features: Tensor, approximation: Tensor) -> Tensor:
    missed, whole = frobenius(features - approximation), frobenius(features)
    return missed / whole.clamp(min=TINY)


def explained_energy(relative: Tensor) -> Tensor:
    """1 − relative_error². Below zero where the approximation is worse than none."""
    return 1 - relative.square()


def excess_error(relative: Tensor, best: Tensor) -> Tensor:
    """relative_error / (that of the truncated SVD at equal rank) − 1: 0 is the optimum, 0.05 is 5 % above it.

    Errors below 1e-5 count as that: a matrix whose own rank is no higher has an optimum of 0, and what float32 leaves
    of it (1e-7 to 1e-5 by any method) is rounding, not excess.
    """
    return relative.clamp(min=ROUNDING) / best.clamp(min=ROUNDING) - 1


def cosine(features: Tensor, approximation: Tensor) -> Tensor:
    """Mean over the tokens of the cosine between a token and its approximation."""
    return F.cosine_similarity(features, approximation, dim=-1).mean(-1)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles in radians (…, r), ascending, between the row spaces of two right factors (…, r, D).

    From the singular values of the product of two orthonormal bases (Björck and Golub 1973). Rows that are linearly
    dependent span less than r directions; the missing ones count as whatever QR completes them with.
    """
    one, other = (torch.linalg.qr(right.double().mT).Q for right in (first, second))
    cosines: Tensor = torch.linalg.svdvals(one.mT @ other)
    return cosines.clamp(-1, 1).acos()


def frobenius(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return norm


def stored_numbers(tokens: int, channels: int, rank: int) -> tuple[int, int]:
    """(numbers of the factors, r(T + D); of the matrix, T·D)."""
    return rank * (tokens + channels), tokens * channels


def break_even_rank(tokens: int, channels: int) -> int:
    """The largest rank at which factors take no more numbers than the matrix: ⌊TD/(T+D)⌋, 227 for 256 × 2048."""
    return tokens * channels // (tokens + channels)


Batches = Callable[[], Iterable[Tensor]]
SVD, GRAM, RANDOMIZED, PCA = "SVD", "Gram", "randomized SVD", "shared PCA"
OF_FACTORS = ("mse", "relative_error", "explained_energy", "excess_error", "cosine", "principal_angle")
OF_REFINED = ("mse", "relative_error", "explained_energy", "cosine")


@dataclass(frozen=True)
class Method:
    """One way from X (B, T, D) to factors of rank r.

    learned: it was trained on other matrices. `parameters`: numbers it needs beside X.
    flops: per matrix, a multiplication and an addition counted as two; see `counted`.
    shared_right: B is the same for all matrices, so it is stored once.
    effective_rank: where a network's mask lets fewer than r channels act.
    refine: the whole approximation (B, T, D) after the product, whose rank may be higher; scored apart.
    """

    name: str
    factorize: Callable[[Tensor], Factors]
    learned: bool = False
    parameters: int = 0
    flops: int | None = None
    shared_right: bool = False
    effective_rank: int | None = None
    refine: Callable[[Tensor], Tensor] | None = None

    def stored(self, tokens: int, channels: int, rank: int) -> int:
        """Numbers that one matrix's factors take."""
        return (self.effective_rank or rank) * (tokens if self.shared_right else tokens + channels)


@dataclass(frozen=True, eq=False)
class Closeness:
    """Errors of one method on each of n matrices: measure → (n,), float64, by the names in OF_FACTORS.

    `principal_angle` is the mean angle in radians between its row space and that of the truncated SVD. A refined
    output has no rank, so it has neither that nor an excess.
    """

    method: str
    rank: int
    values: Mapping[str, Tensor]
    refined: bool = False


def baselines(rank: int, basis: Tensor, generator: torch.Generator | None = None) -> list[Method]:
    """What a network has to be compared with: the optimum three ways, and one basis (≥ rank, D) for all matrices."""
    leading = basis[:rank]
    return [
        Method(SVD, partial(by_svd, rank=rank)),
        Method(GRAM, partial(by_gram, rank=rank)),
        Method(RANDOMIZED, partial(by_randomized, rank=rank, generator=generator)),
        Method(PCA, partial(by_basis, basis=leading), learned=True, parameters=leading.numel(), shared_right=True),
    ]


def network(net: Factorizer, name: str | None = None, rank: int | None = None) -> Method:
    """A trained network as a method; at a lower rank than its own it gives the leading channels of each matrix."""
    own = net.settings.rank
    net.eval()

    @torch.no_grad()
    def factorize(features: Tensor) -> Factors:
        factors = net(features).factors
        return factors if rank is None or rank >= own else leading_channels(factors, rank)

    @torch.no_grad()
    def refine(features: Tensor) -> Tensor:
        refined: Tensor | None = net(features).refined
        assert refined is not None, "a network with refine gives a refined output"
        return refined

    acting = net.current_effective_rank()
    return Method(
        name or net.settings.arch,
        factorize,
        learned=True,
        parameters=sum(one.numel() for one in net.parameters()),
        effective_rank=acting if acting < min(own, rank or own) else None,
        refine=refine if net.settings.refine and (rank is None or rank >= own) else None,
    )


def leading_channels(factors: Factors, rank: int) -> Factors:
    """The `rank` channels k of each matrix whose rank-one terms a_k·b_k have the most energy."""
    energy = torch.linalg.vector_norm(factors.left, dim=-2) * torch.linalg.vector_norm(factors.right, dim=-1)
    chosen = energy.argsort(dim=-1, descending=True, stable=True)[..., :rank]
    left = factors.left.take_along_dim(chosen[..., None, :], -1)
    return Factors(left, factors.right.take_along_dim(chosen[..., None], -2))


def optimum(batches: Batches) -> Tensor:
    """Relative error (n, k) of the truncated SVD of every matrix at rank 1 … k = min(T, D), float64."""
    return torch.cat([best_errors(singular_values(batch)).cpu() for batch in batches()])


def measure(methods: Sequence[Method], batches: Batches, best: Tensor) -> list[Closeness]:
    """Every method on every matrix of the batches (B, T, D), which are normalised.

    Args:
        best: of the same matrices in the same order, from `optimum`.

    Returns:
        A row per method, followed by one of its refined output where it has one.
    """
    found: dict[tuple[str, bool], list[dict[str, Tensor]]] = {}
    ranks: dict[str, int] = {}
    start = 0
    for batch in batches():
        optimal = best[start : start + len(batch)]
        start += len(batch)
        spaces: dict[int, Tensor] = {}
        for method in methods:
            factors = method.factorize(batch)
            ranks[method.name] = factors.rank
            if factors.rank not in spaces:
                spaces[factors.rank] = by_gram(batch.double(), factors.rank).right
            values = of_factors(batch, factors, optimal, spaces[factors.rank], method.effective_rank)
            found.setdefault((method.name, False), []).append(values)
            if method.refine:
                found.setdefault((method.name, True), []).append(of_product(batch, method.refine(batch)))
    return [
        Closeness(name, ranks[name], {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, refined)
        for (name, refined), parts in found.items()
    ]


def of_factors(
    batch: Tensor, factors: Factors, best: Tensor, space: Tensor, acting: int | None = None
) -> dict[str, Tensor]:
    """All measures of a batch; `space` (B, r, D) spans the row spaces of the truncated SVD.

    acting: how many channels a mask leaves; the others are no part of the product's row space.
    """
    values = of_product(batch, factors.product())
    at_rank = best[:, min(factors.rank, best.shape[-1]) - 1]
    right = leading_channels(factors, acting).right if acting else factors.right
    angles = principal_angles(right, space).mean(-1).cpu()
    return {**values, "excess_error": excess_error(values["relative_error"], at_rank), "principal_angle": angles}


def of_product(batch: Tensor, approximation: Tensor) -> dict[str, Tensor]:
    relative = relative_error(batch, approximation)
    values = {
        "mse": mse(batch, approximation),
        "relative_error": relative,
        "explained_energy": explained_energy(relative),
        "cosine": cosine(batch, approximation),
    }
    return {name: one.double().cpu() for name, one in values.items()}


def sweep(
    ranks: Sequence[int],
    batches: Batches,
    best: Tensor,
    basis: Tensor,
    networks: Mapping[str, Factorizer],
    generator: torch.Generator | None = None,
) -> dict[str, list[float | None]]:
    """Mean relative error of every method at each rank; None where a network has fewer channels.

    The SVD's comes from the singular values. A network is trained for one rank: its curve shows how it degrades as
    channels are masked, those with the least energy first.
    """
    methods = {rank: swept(rank, basis, networks, generator) for rank in ranks}
    errors: dict[tuple[str, int], list[Tensor]] = {}
    for batch in batches():
        for rank, same in methods.items():
            for method in same:
                error = relative_error(batch, method.factorize(batch).product()).double().cpu()
                errors.setdefault((method.name, rank), []).append(error)
    means = {key: float(torch.cat(parts).mean()) for key, parts in errors.items()}
    optimal: list[float | None] = [float(best[:, rank - 1].mean()) for rank in ranks]
    names = (GRAM, RANDOMIZED, PCA, *networks)
    return {SVD: optimal} | {name: [means.get((name, rank)) for rank in ranks] for name in names}


def swept(
    rank: int, basis: Tensor, networks: Mapping[str, Factorizer], generator: torch.Generator | None
) -> list[Method]:
    known = [one for one in baselines(rank, basis, generator) if one.name != SVD]
    return known + [network(net, name, rank) for name, net in networks.items() if net.settings.rank >= rank]


@dataclass(frozen=True)
class Timing:
    """Seconds per matrix: the fastest and the slowest pass."""

    seconds: float
    slowest: float


def eigh_flops(n: int) -> int:
    """All eigenvalues and eigenvectors of a symmetric n × n matrix."""
    return 9 * n**3


def svd_flops(m: int, n: int) -> int:
    """Thin SVD with both sides: Golub–Reinsch or R-SVD, whichever takes less."""
    m, n = max(m, n), min(m, n)
    return min(14 * m * n**2 + 8 * n**3, 6 * m * n**2 + 20 * n**3)


def qr_flops(m: int, n: int) -> int:
    """Householder QR of m × n (m ≥ n) with the thin Q formed."""
    m, n = max(m, n), min(m, n)
    return 2 * (2 * m * n**2 - 2 * n**3 // 3)


def lapack_counts() -> dict[Any, Any]:
    """Operation → count from the shape of its first argument (…, m, n): what FlopCounterMode takes."""

    def batched(count: Any) -> Any:
        return lambda shape, *rest, out_shape=None, **named: prod(shape[:-2]) * count(*shape[-2:])

    ops = torch.ops.aten
    return {
        ops._linalg_eigh: batched(lambda n, _: eigh_flops(n)),
        ops._linalg_svd: batched(svd_flops),
        ops.linalg_qr: batched(qr_flops),
    }


def counted(methods: Sequence[Method], batch: Tensor) -> list[Method]:
    """The methods with their `flops` per matrix, from one pass over the batch (B, T, D) each."""
    return [replace(method, flops=flops(method, batch)) for method in methods]


def flops(method: Method, batch: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=lapack_counts()) as counter:
        method.factorize(batch)
    total: int = counter.get_total_flops()
    return round(total / len(batch))


def timings(methods: Sequence[Method], batch: Tensor, repeats: int) -> dict[str, Timing]:
    """Seconds per matrix of every method on the same batch (B, T, D).

    One pass each to warm up; then every method takes its turn in each of the repeats, so that whatever else slows
    the machine hits all alike.
    """
    for method in methods:
        pass_seconds(method, batch)
    passes: dict[str, list[float]] = {method.name: [] for method in methods}
    for _ in range(repeats):
        for method in methods:
            passes[method.name].append(pass_seconds(method, batch) / len(batch))
    return {name: Timing(min(found), max(found)) for name, found in passes.items()}


def pass_seconds(method: Method, batch: Tensor) -> float:
    settle(batch.device)
    started = time.perf_counter()
    with torch.no_grad():
        method.factorize(batch)
    settle(batch.device)
    return time.perf_counter() - started


def settle(device: torch.device) -> None:
    """Synchronize with the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


Array = NDArray[np.float64]
Estimate = dict[str, float | None]


def summary(found: Closeness, groups: Sequence[str], seed: int = 42) -> dict[str, Estimate]:
    """Mean over the matrices of every measure, with the interval of a bootstrap over images (None for one image)."""
    names = list(found.values)
    estimates = estimated(np.stack([array(found.values[name]) for name in names]), groups, seed)
    return dict(zip(names, estimates, strict=True))


def paired(first: Closeness, second: Closeness, groups: Sequence[str], measure: str, seed: int = 42) -> dict[str, Any]:
    """first − second of a measure on the same matrices."""
    difference = array(first.values[measure]) - array(second.values[measure])
    (estimate,) = estimated(difference[None], groups, seed)
    return {"network": first.method, "against": second.method, "measure": measure, **estimate}


def estimated(values: Array, groups: Sequence[str], seed: int) -> list[Estimate]:
    """Means of k rows (k, n) with their intervals. An image counts with all its matrices."""
    order = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    places = np.array([order[group] for group in groups])
    counts = np.bincount(places).astype(float)
    sums = np.stack([np.bincount(places, weights=row) for row in values])

    def means(drawn: NDArray[np.intp]) -> Array:
        found: Array = sums[:, drawn].sum(-1) / counts[drawn].sum(-1)
        return found

    spans: Sequence[tuple[float | None, float | None]] = intervals(means, len(order), seed=seed) or [
        (None, None)
    ] * len(values)
    return [
        {"mean": float(row.mean()), "low": low, "high": high} for row, (low, high) in zip(values, spans, strict=True)
    ]


def array(values: Tensor) -> Array:
    found: Array = values.double().cpu().numpy()
    return found
