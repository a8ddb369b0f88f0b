"""Divergence between two ways of running one model, and the noise floor: that between known-good ways.

    reference: log p, all tokens ─┐
    other: log p of its top k ────┴─ compare ──▶ Position* ──▶ Divergence(mean, p99, max KL, flips …)

    reference (float32, one row at a time) ── against ──▶ the other attention kernel · rows padded together
                                                          float16 throughout · bfloat16 throughout
                                                          Q8_0 in every linear layer and expert
                                                          ──▶ Floor ── × k ──▶ Thresholds

A runtime gives its k likeliest tokens only. All others are one bin on both sides, so the KL here never exceeds the
true one (data-processing inequality); with k of some dozens what is lost is far below what is measured.

A runtime is held to `k` times the largest divergence of the known-good ways that its file's form explains
(`EXPLAINS`). A q8_0 file cannot be closer than the same rounding in transformers is; an f16 file has no such excuse,
so a fault of the conversion shows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankwise.device.parity.cases import Case
from rankwise.device.parity.known_good import PATHS
from rankwise.device.parity.reference import HFReference, distance, embedded, forced
from rankwise.device.parity.routing import Place, Rerouted, chosen, limit_beside, rerouted
from rankwise.errors import need
from rankwise.evaluate.bootstrap import wilson

WEAK = "weak"
REST = 1e-6  # mass below which "all other tokens" says nothing: 1 − Σ of single-precision probabilities


@dataclass(frozen=True)
class Position:
    """Divergence at one token of an answer.

    kl: nats, reference from other. first, other_first: the likeliest token of each; other_first is -1 where nothing
    is known. margin: log p of the reference's first token less that of its second. margin_difference: how far the
    other side is from that margin, infinite where it does not name both tokens. case: whose answer it is; number: of
    the token in it.
    """

    kl: float
    first: int
    other_first: int
    margin: float
    margin_difference: float
    case: str = ""
    number: int = 0

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
        return effective(self.kl)

    @property
    def flips(self) -> tuple[Position, ...]:
        """Positions where the top-1 token differs."""
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
        """Flips where the reference's margin exceeds this: no ties."""
        return tuple(flip for flip in self.flips if flip.margin > margin)

    def of(self, cases: Sequence[str]) -> Divergence:
        return Divergence(tuple(position for position in self.positions if position.case in cases))

    def but(self, places: Collection[Place]) -> Divergence:
        return Divergence(tuple(one for one in self.positions if (one.case, one.number) not in places))

    def only(self, places: Collection[Place]) -> Divergence:
        return Divergence(tuple(one for one in self.positions if (one.case, one.number) in places))

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
    return Divergence(tuple(place(row, top, case, number) for number, (row, top) in enumerate(rows)))


def joined(parts: Sequence[Divergence]) -> Divergence:
    return Divergence(tuple(position for part in parts for position in part.positions))


def place(row: Tensor, top: Mapping[int, float], case: str, number: int = 0) -> Position:
    """One place. row: (vocabulary,) float64."""
    (first, second), gap = leaders(row)
    known = first in top and second in top
    difference = abs(top[first] - top[second] - gap) if known else math.inf
    other = max(top, key=top.__getitem__) if top else -1
    return Position(divergence(row, top), first, other, gap, difference, case, number)


def leaders(row: Tensor) -> tuple[tuple[int, int], float]:
    """The two likeliest tokens and how far apart they are in nats."""
    best = torch.where(row.isnan(), -math.inf, row).topk(2)
    first, second = best.indices.tolist()
    return (first, second), float(best.values[0] - best.values[1])


def divergence(row: Tensor, top: Mapping[int, float]) -> float:
    """KL in nats over the tokens that both sides name, and one bin for all others. row: NaN where not known."""
    ids = [token for token in top if 0 <= token < len(row)]
    log_p, log_q = row[ids].double().numpy(), np.array([top[token] for token in ids], dtype=np.float64)
    known = ~np.isnan(log_p)
    return float(binned_kl(log_p[known], log_q[known]))


def binned_kl(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…,): KL(p ‖ q) in nats over the tokens of the last axis, and one bin for all others.

    Summed as Σ p·log(p/q) − p + q: equal to KL for distributions, and no bin is negative, so that the rounding of the
    masses does not drown it.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p, rest_q = (np.maximum(1 - one.sum(-1), REST) for one in (p, q))
    with np.errstate(invalid="ignore"):  # 0·log 0
        named: NDArray[np.float64] = (np.where(p > 0, p * (log_p - log_q), 0.0) - p + q).sum(-1)
    found: NDArray[np.float64] = named + rest_p * np.log(rest_p / rest_q) - rest_p + rest_q
    return found


def top_of(log_probs: Tensor, count: int) -> list[dict[int, float]]:
    """(places, vocabulary) → the `count` likeliest tokens of every place, as a runtime would tell them."""
    best = log_probs.topk(min(count, log_probs.shape[-1]), -1)
    return [
        dict(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


# --- the floor -------------------------------------------------------------------------------------------------------

K = 10.0  # in KL: about 3 in logits. Sound exports of the demos' models come out at 0.6 to 3 floors
FALSE_ALARMS = 0.005  # of sound files, where a floor rests on so few places that chance alone exceeds k
FEWEST = 2.0  # places; on one alone chance has no bound worth the name
TOP = 64  # tokens whose log-probabilities are compared at each place
# What arithmetic alone explains: float32 logits that were summed in another order and written as decimals.
LEAST_KL, LEAST_MARGIN, LEAST_DISTANCE = 1e-7, 2e-3, 1e-4
EXPLAINS = {
    "f32": ("attention", "padded", "float16"),  # llama.cpp computes in half precision here and there, whatever the file
    "f16": ("attention", "padded", "float16"),
    "bf16": ("attention", "padded", "bfloat16"),
    "q8_0": ("attention", "padded", "float16", "q8_0"),
}


@dataclass(frozen=True)
class Thresholds:
    """Limits for a runtime. kl_*: nats. margin: nats; where the reference is less sure than this, another
    likeliest token is a tie. agreement: least top-1 agreement, as asked for. k: how many floors they are.
    embeddings: relative distance of a picture's embeddings. apart: places that another choice of experts moves by more,
    in near_ties of so many choices: not held to these limits, and counted."""

    kl_mean: float
    kl_p99: float
    kl_max: float
    margin: float
    agreement: float | None = None
    k: float = K
    embeddings: float = math.inf
    apart: frozenset[Place] = frozenset()
    near_ties: int = 0

    def as_dict(self) -> dict[str, float | None]:
        return {name: value for name, value in asdict(self).items() if name not in ("apart", "near_ties")}

    @property
    def note(self) -> str:
        """The limits as multiples of the noise floor. Above K only large faults exceed them."""
        return f"k = {self.k:.3g}" if self.k <= K else f"{WEAK}: k = {self.k:.3g}"


@dataclass(frozen=True)
class Floor:
    """Divergence of every known-good path from the reference, by its name; and the largest relative distance of its
    embeddings of pictures. routing: of a mixture of experts, by the names of paths that a form explains, what the near
    ties among their roundings decide."""

    paths: Mapping[str, Divergence]
    embeddings: Mapping[str, float] = field(default_factory=dict)
    routing: Mapping[tuple[str, ...], Rerouted] = field(default_factory=dict)

    def thresholds(self, form: str, k: float = K, agreement: float | None = None) -> Thresholds:
        """Those for a file form (`f16`, `q8_0` …): k times the largest floor that the form explains, and never less
        than arithmetic explains. Margins scale like the root: KL is quadratic in the logits' difference.

        Where the floor rests on few places, k is what chance explains (`chance`): a handful of items shows only large
        faults.
        """
        names = EXPLAINS.get(form.lower(), tuple(self.paths))
        known = [self.paths[name] for name in names if name in self.paths]
        routing, apart = self.routing.get(tuple(names)), frozenset[Place]()
        if routing and known:
            apart = routing.apart(limit_beside([kl for one in known for kl in one.kl], LEAST_KL, k))
            known = [settled for one in known if (settled := one.but(apart)).positions]
        k = max(k, chance(max(known, key=lambda one: one.mean).effective)) if known else k
        distance = max((self.embeddings.get(name, 0.0) for name in names), default=0.0)

        def largest(figure: str) -> float:
            return max((getattr(one, figure) for one in known), default=0.0)

        return Thresholds(
            kl_mean=max(LEAST_KL, k * largest("mean")),
            kl_p99=max(LEAST_KL, k * largest("p99")),
            kl_max=max(LEAST_KL, k * largest("max")),
            margin=max(LEAST_MARGIN, math.sqrt(k) * largest("margin_difference")),
            agreement=agreement,
            k=k,
            embeddings=max(LEAST_DISTANCE, math.sqrt(k) * distance),
            apart=apart,
            near_ties=routing.near_ties if routing else 0,
        )

    def of(self, cases: Sequence[str]) -> Floor:
        """The floor of some of the cases."""
        routing = {names: one.of(cases) for names, one in self.routing.items()}
        return Floor({name: one.of(cases) for name, one in self.paths.items()}, self.embeddings, routing)

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "kl_mean": one.mean,
                "kl_p99": one.p99,
                "kl_max": one.max,
                "margin": one.margin_difference,
                "top1_agreement": one.agreement,
                "embeddings": self.embeddings.get(name, 0.0),
            }
            for name, one in self.paths.items()
        }


def explaining(forms: Sequence[str]) -> list[str]:
    """Names of the known-good paths that the floors of these forms take."""
    return [name for name in PATHS if any(name in EXPLAINS.get(form.lower(), PATHS) for form in forms)]


def effective(kl: np.ndarray) -> float:
    """Effective sample size of the mean, (Σ KL)² / Σ KL²: a few unsure places can make up nearly all of it."""
    squares = float((kl**2).sum())
    return float(kl.sum()) ** 2 / squares if squares else float(len(kl))


def chance(places: float) -> float:
    """By how much one mean KL exceeds another of the same size in FALSE_ALARMS of all cases, each resting on so many
    places: a KL is a square of noise, so the ratio of two means is F-distributed."""
    places = max(places, FEWEST)
    return float(need("scipy.stats", extra="eval").f.isf(FALSE_ALARMS, places, places))


def measure_floor(
    reference: HFReference, cases: Sequence[Case], top: int = TOP, names: Sequence[str] | None = None
) -> Floor:
    """Run the known-good paths over the same prompts and answers as the reference.

    top: tokens compared at each place, as many as of the runtime. names: of the paths; all by default. The model is
    afterwards as it was.
    """
    exact = [reference.expected(case) for case in cases]
    found: dict[str, Divergence] = {}
    distances: dict[str, float] = {}
    choices = chosen(reference.model, lambda: run(reference, reference.model, cases, 1))
    for name, (enter, batch) in PATHS.items():
        if names is not None and name not in names:
            continue
        with enter(reference.model) as model:
            if model is None:
                continue
            with choices.watching(name) if choices and batch == 1 else nullcontext():
                rows = run(reference, model, cases, batch)
            parts = zip(cases, exact, rows, strict=True)
            found[name] = joined([compare(e.log_probs, top_of(o, top), case.id) for case, e, o in parts])
            distances[name] = farthest(reference, model, cases)
    if choices is None:
        return Floor(found, distances)

    def kl(rows: Sequence[Tensor]) -> dict[Place, float]:
        parts = zip(cases, exact, rows, strict=True)
        moved = joined([compare(e.log_probs, top_of(o, top), case.id) for case, e, o in parts])
        return {(one.case, one.number): one.kl for one in moved.positions}

    ways = (*EXPLAINS.values(), tuple(choices.moved))
    return Floor(found, distances, rerouted(choices, ways, lambda: run(reference, reference.model, cases, 1), kl))


def run(reference: HFReference, model: Any, cases: Sequence[Case], batch: int) -> list[Tensor]:
    """log p along the reference's answers, `batch` rows at a time."""
    prompts = [reference.renderer.prompt(case.example) for case in cases]
    answers = [reference.expected(case).answer for case in cases]
    parts = [slice(start, start + batch) for start in range(0, len(cases), batch)]
    return [row for part in parts for row in forced(model, reference.renderer, prompts[part], answers[part])]


def farthest(reference: HFReference, model: Any, cases: Sequence[Case]) -> float:
    """Largest relative distance of the embeddings of any case's pictures; 0 where the reference keeps none."""
    found = [0.0]
    for case in cases:
        expected = reference.expected(case).embeddings
        if expected is not None:
            rows = embedded(model, reference.renderer, reference.renderer.prompt(case.example))
            assert rows is not None
            found.append(distance(rows, expected))
    return max(found)
