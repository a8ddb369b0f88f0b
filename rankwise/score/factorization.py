"""Ways to factorize feature matrices, and how close each comes: one protocol for baselines and networks.

    methods = [*baselines(rank, basis, generator), network(net)]
    best    = optimum(batches)                          # the SVD's errors, at every rank
    for row in measure(methods, batches, best): row.values["excess_error"].mean()

Everything gets the same normalised X (B, T, D) and is scored there. What each method costs: `factor_cost.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rankwise.core.approximation import best_errors, by_basis, by_gram, by_randomized, by_svd, singular_values
from rankwise.core.closeness import cosine, excess_error, explained_energy, mse, principal_angles, relative_error
from rankwise.core.factors import Factors
from rankwise.nets.factorize.factorizer import Factorizer

Batches = Callable[[], Iterable[Tensor]]
SVD, GRAM, RANDOMIZED, PCA = "SVD", "Gram", "randomized SVD", "shared PCA"
OF_FACTORS = ("mse", "relative_error", "explained_energy", "excess_error", "cosine", "principal_angle")
OF_REFINED = ("mse", "relative_error", "explained_energy", "cosine")


@dataclass(frozen=True)
class Method:
    """One way from X (B, T, D) to factors of rank r.

    learned: it was trained on other matrices. `parameters`: numbers it needs beside X.
    flops: per matrix, a multiplication and an addition counted as two; see `factor_cost.counted`.
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
    """How close one method came to each of n matrices: measure → (n,), float64, by the names of `core.closeness`.

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

    acting = own if net.rank_mask is None else int(net.rank_mask.sum())
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
