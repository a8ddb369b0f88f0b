"""How far two ways of running one model are apart, measured on the next-token distributions behind given tokens.

    reference: log p, all tokens ─┐
    other: log p of its top k ────┴─ compare ──▶ Position* ──▶ Divergence(mean, p99, max KL, flips …)

A runtime gives its k likeliest tokens only. All others are one bin on both sides, so the KL here never exceeds the
true one (data-processing inequality); with k of some dozens what is lost is far below what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.evaluate.bootstrap import wilson

REST = 1e-6  # mass below which "all other tokens" says nothing: 1 − Σ of single-precision probabilities


@dataclass(frozen=True)
class Position:
    """One place of an answer.

    kl: nats, reference from other. first, other_first: the likeliest token of each; other_first is -1 where nothing
    is known. margin: log p of the reference's first token less that of its second. margin_difference: how far the
    other side is from that margin, infinite where it does not name both tokens. case: whose answer it is.
    """

    kl: float
    first: int
    other_first: int
    margin: float
    margin_difference: float
    case: str = ""

    @property
    def flipped(self) -> bool:
        return self.first != self.other_first


@dataclass(frozen=True)
class Divergence:
    """All places together."""

    positions: tuple[Position, ...]

    @cached_property
    def kl(self) -> np.ndarray:
        return np.array([position.kl for position in self.positions])

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def p99(self) -> float:
        return float(np.quantile(self.kl, 0.99))

    @property
    def max(self) -> float:
        return float(self.kl.max())

    @property
    def effective(self) -> float:
        """How many places the mean really rests on, (Σ KL)² / Σ KL²: a few unsure places can make up nearly all of
        it."""
        squares = float((self.kl**2).sum())
        return float(self.kl.sum()) ** 2 / squares if squares else float(len(self.positions))

    @property
    def flips(self) -> tuple[Position, ...]:
        """Places where the likeliest token is another one."""
        return tuple(position for position in self.positions if position.flipped)

    @property
    def agreement(self) -> float:
        return 1 - len(self.flips) / len(self.positions)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the agreement."""
        return wilson(len(self.positions) - len(self.flips), len(self.positions))

    @property
    def margin_difference(self) -> float:
        """Largest finite difference of a margin: what noise of this size can flip."""
        known = [one.margin_difference for one in self.positions if math.isfinite(one.margin_difference)]
        return max(known, default=0.0)

    def flips_above(self, margin: float) -> tuple[Position, ...]:
        """Flips where the reference was surer than this: no tie."""
        return tuple(flip for flip in self.flips if flip.margin > margin)

    def of(self, cases: Sequence[str]) -> Divergence:
        return Divergence(tuple(position for position in self.positions if position.case in cases))

    def as_dict(self, margin: float) -> dict[str, Any]:
        """margin: below it a flip is a tie."""
        real = self.flips_above(margin)
        return {
            "positions": len(self.positions),
            "kl_mean": self.mean,
            "kl_p99": self.p99,
            "kl_max": self.max,
            "top1_agreement": self.agreement,
            "top1_agreement_95": list(self.interval),
            "flips": len(self.flips),
            "flips_within_noise": len(self.flips) - len(real),
            "flips_beyond_noise": len(real),
            "largest_flipped_margin": max((flip.margin for flip in self.flips), default=None),
        }


def compare(log_probs: Tensor, tops: Sequence[Mapping[int, float]], case: str = "") -> Divergence:
    """Places of one answer.

    Args:
        log_probs: (places, vocabulary) of the reference; NaN where a stored reference does not know a token.
        tops: for every place token → log p, as far as the other side tells. Fewer places than the reference has are
            compared as far as they go.
    """
    rows = zip(log_probs.double(), tops, strict=False)
    return Divergence(tuple(place(row, top, case) for row, top in rows))


def joined(parts: Sequence[Divergence]) -> Divergence:
    return Divergence(tuple(position for part in parts for position in part.positions))


def place(row: Tensor, top: Mapping[int, float], case: str) -> Position:
    """One place. row: (vocabulary,) float64."""
    (first, second), gap = leaders(row)
    known = first in top and second in top
    difference = abs(top[first] - top[second] - gap) if known else math.inf
    other = max(top, key=top.__getitem__) if top else -1
    return Position(divergence(row, top), first, other, gap, difference, case)


def leaders(row: Tensor) -> tuple[tuple[int, int], float]:
    """The two likeliest tokens and how far apart they are in nats."""
    best = torch.where(row.isnan(), -math.inf, row).topk(2)
    first, second = best.indices.tolist()
    return (first, second), float(best.values[0] - best.values[1])


def divergence(row: Tensor, top: Mapping[int, float]) -> float:
    """KL in nats over the tokens that both sides name, and one bin for all others.

    Summed as Σ p·log(p/q) − p + q: equal to KL for distributions, and no bin is negative, so that the rounding of the
    masses does not drown it.
    """
    ids = [token for token in top if 0 <= token < len(row) and not bool(row[token].isnan())]
    log_p = row[ids]
    log_q = torch.tensor([top[token] for token in ids], dtype=torch.float64)
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = max(1 - float(p.sum()), REST), max(1 - float(q.sum()), REST)
    named = torch.where(p > 0, p * (log_p - log_q), 0.0) - p + q
    return float(named.sum()) + rest_p * math.log(rest_p / rest_q) - rest_p + rest_q


def top_of(log_probs: Tensor, count: int) -> list[dict[int, float]]:
    """(places, vocabulary) → the `count` likeliest tokens of every place, as a runtime would tell them."""
    best = log_probs.topk(min(count, log_probs.shape[-1]), -1)
    return [
        dict(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
