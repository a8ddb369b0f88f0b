"""Gain kept: how much of a fine-tune's loss improvement survives truncation to a plan.

kept(plan) = (L(base) − L(base + Δ truncated to the plan)) / (L(base) − L(base + Δ)), on held-out text, against a
uniform rank and shuffled plans with the same number of parameters. The one number that a reader of a plan wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.allocate import inverted, shuffled, uniform
from rankwise.core.factors import leading_svd
from rankwise.core.site import Site

Ranks = Mapping[Site, int]
Losses = Callable[[nn.Module], tuple[Tensor, Tensor]]
Triplets = tuple[Tensor, Tensor, Tensor]
SHUFFLES = 8
RESAMPLES = 1000


@dataclass(frozen=True)
class Arm:
    """Share of the gain that one assignment of ranks keeps, with its 95 % interval over held-out items."""

    name: str
    parameters: int
    loss: float
    kept: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """Losses in nats per token. `margin`: 95 % interval of kept(plan) − kept(uniform), paired over items.

    `defined` is False where the fine-tune's own gain is not clearly above 0: no share of it means anything then.
    """

    base_loss: float
    tuned_loss: float
    items: int
    tokens: int
    gain_low: float
    gain_high: float
    margin: tuple[float, float] | None = None
    arms: tuple[Arm, ...] = field(default_factory=tuple)

    @property
    def defined(self) -> bool:
        return self.gain_low > 0

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def shuffles(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.name.startswith("shuffled"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Where the gain is not defined there are no shares of it, only the losses."""
        shares: dict[str, Any] = {} if self.defined else {"arms": [], "margin": None}
        losses = {arm.name: arm.loss for arm in self.arms}
        return asdict(self) | shares | {"defined": self.defined, "losses": losses}


@contextmanager
def moved(model: nn.Module, moves: Mapping[Site, Tensor]) -> Iterator[nn.Module]:
    """The model with (out, in) matrices added to its sites' weights; put back bit for bit afterwards."""
    kept = {site: model.get_parameter(f"{site.path}.weight").detach().clone() for site in moves}
    try:
        with torch.no_grad():
            for site, move in moves.items():
                weight = model.get_parameter(f"{site.path}.weight")
                weight.add_((move.T if site.transposed else move).to(weight))
        yield model
    finally:
        with torch.no_grad():
            for site, before in kept.items():
                model.get_parameter(f"{site.path}.weight").copy_(before)


def arms_of(plan: Ranks, generator: torch.Generator, shuffles: int = SHUFFLES) -> dict[str, Ranks]:
    """The plan, and what it must beat at the same number of parameters."""
    parameters = sum(site.parameters(rank) for site, rank in plan.items())
    arms: dict[str, Ranks] = {"plan": plan, "uniform": uniform(list(plan), parameters), "inverted": inverted(plan)}
    return arms | {f"shuffled {i + 1}": shuffled(plan, generator) for i in range(shuffles)}


def truncations(deltas: Mapping[Site, Tensor], arms: Mapping[str, Ranks]) -> dict[Site, Triplets]:
    """Of every delta, as many singular triplets as the most generous arm takes."""
    most = {site: max(ranks[site] for ranks in arms.values()) for site in deltas}
    return {site: leading_svd(delta, most[site]) for site, delta in deltas.items()}


def at_ranks(triplets: Mapping[Site, Triplets], ranks: Ranks) -> dict[Site, Tensor]:
    """The deltas cut to these ranks."""
    moves = {}
    for site, (u, values, vt) in triplets.items():
        rank = ranks[site]
        moves[site] = (u[:, :rank] * values[:rank]) @ vt[:rank]
    return moves


def gain_kept(
    model: nn.Module, deltas: Mapping[Site, Tensor], arms: Mapping[str, Ranks], losses: Losses, seed: int
) -> Gain:
    """Measure every arm on the same items.

    Args:
        model: the base model, in evaluation mode.
        deltas: site → dense delta (m, n).
        arms: name → ranks over the same sites.
        losses: model → (summed negative log-likelihood per item, scored tokens per item).
        seed: of the bootstrap over items.
    """
    triplets = truncations(deltas, arms)
    base, tokens = losses(model)
    with moved(model, deltas):
        tuned, _ = losses(model)
    results = {}
    for name, ranks in arms.items():
        with moved(model, at_ranks(triplets, ranks)):
            results[name] = losses(model)[0]
    return summarise(base, tuned, tokens, results, arms, seed)


def summarise(
    base: Tensor, tuned: Tensor, tokens: Tensor, results: Mapping[str, Tensor], arms: Mapping[str, Ranks], seed: int
) -> Gain:
    """Ratios of sums, and percentile bootstrap intervals over items: the same resamples for every arm."""
    total = float(tokens.sum())
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(base), (RESAMPLES, len(base)), generator=generator)
    whole = (base - tuned)[picks].sum(1)
    per_token = whole / tokens[picks].sum(1)
    rows = []
    for name, nll in results.items():
        low, high = interval((base - nll)[picks].sum(1) / whole)
        kept = float((base - nll).sum() / (base - tuned).sum())
        spent = sum(site.parameters(rank) for site, rank in arms[name].items())
        rows.append(Arm(name, spent, float(nll.sum()) / total, kept, low, high))
    gain_low, gain_high = interval(per_token)
    margin = None
    if {"plan", "uniform"} <= set(results):
        margin = interval((results["uniform"] - results["plan"])[picks].sum(1) / whole)
    return Gain(
        base_loss=float(base.sum()) / total,
        tuned_loss=float(tuned.sum()) / total,
        items=len(base),
        tokens=int(total),
        gain_low=gain_low,
        gain_high=gain_high,
        margin=margin,
        arms=tuple(rows),
    )


def interval(samples: Tensor) -> tuple[float, float]:
    """95 % percentile interval."""
    bounds = torch.quantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(bounds[0]), float(bounds[1])
