"""Where a mixture's choice of experts hangs on rounding: the near ties of its routers, and what they decide.

    reference ── Choices ──▶ by layer and token: score of the last expert chosen less that of the first that is not
    the same pair in known-good ways of running ──▶ what rounding does to that ──▶ near ties
    reference, near ties decided the other way ── against ──▶ the reference: what another choice changes, by place

Routing is discontinuous: of two experts whose scores differ by less than rounding, transformers takes one and llama.cpp
the other, and both are right. llama.cpp tells of no experts, so the reference's own rounding says where that can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rankwise.models.sites import model_sites

SPREAD = 3.0  # a margin within so many times what rounding moves it by is a near tie


@dataclass(eq=False)
class Choices(TorchFunctionMode):
    """What the routers choose while this is entered, call by call: every top k of (tokens, E) scores.

    experts: the numbers E that the model has. pairs: of each call the two experts to watch, (tokens, 2), the last
    chosen and the first not [the model's own]. ties: of each call the tokens (tokens,) for which the second is taken in
    place of the first.
    """

    experts: frozenset[int]
    pairs: Sequence[Tensor] = ()
    ties: Sequence[Tensor] = ()
    margins: list[Tensor] = field(default_factory=list)
    watched: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "topk" or not isinstance(scores := args[0], Tensor):
            return func(*args, **kwargs)
        k = kwargs.get("k", args[1] if len(args) > 1 else 0)
        if scores.dim() != 2 or scores.shape[1] not in self.experts or k >= scores.shape[1]:
            return func(*args, **kwargs)
        number, (values, indices) = len(self.watched), scores.topk(k + 1)
        pair = self.pairs[number] if self.pairs else indices[:, k - 1 :]
        self.watched.append(pair)
        self.margins.append((scores.gather(1, pair).float() @ scores.new_tensor([1.0, -1.0]).float()).cpu())
        if not self.ties:
            return func(*args, **kwargs)
        tie = self.ties[number].to(scores.device)
        for found in (values, indices):
            found[tie, k - 1] = found[tie, k]
        return torch.return_types.topk((values[:, :k], indices[:, :k]))


@dataclass(frozen=True)
class ChosenExperts:
    """The reference's choices, call by call. margins: (tokens,) each; moved: name of a known-good way → what it does to
    them."""

    experts: frozenset[int]
    pairs: tuple[Tensor, ...]
    margins: tuple[Tensor, ...]
    moved: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Whatever runs meanwhile is the known-good way of this name, on the same rows one by one."""
        with Choices(self.experts, self.pairs) as seen:
            yield
        self.moved[name] = tuple(abs(here - there) for here, there in zip(seen.margins, self.margins, strict=True))

    def ties(self, names: Sequence[str]) -> list[Tensor]:
        """By call the tokens (tokens,) whose last expert is chosen by less than these ways' rounding tells apart."""
        known = [self.moved[name] for name in names if name in self.moved]
        if not known:
            return []
        found = []
        for number, margin in enumerate(self.margins):
            moved = torch.stack([one[number] for one in known]).amax(0)
            found.append(margin <= SPREAD * torch.maximum(moved, moved.median()))
        return found if any(bool(one.any()) for one in found) else []


def expert_counts(model: Any) -> frozenset[int]:
    """How many experts the layers of a model have; empty for a dense one."""
    return frozenset(site.experts for site in model_sites(model).values() if site.experts)


Place = tuple[str, int]
"""A case's id, and the number of a token of its answer."""


@dataclass(frozen=True)
class Rerouted:
    """What the near ties of a form decide. kl: by place of the answers, how far the reference is from itself where all
    of them are decided the other way. near_ties: of how many choices (a layer's, for a token)."""

    kl: Mapping[Place, float]
    near_ties: int
    choices: int

    def apart(self, limit: float) -> frozenset[Place]:
        """The places that another choice moves by more than this."""
        return frozenset(place for place, kl in self.kl.items() if not kl <= limit)

    def of(self, cases: Sequence[str]) -> Rerouted:
        return Rerouted({place: kl for place, kl in self.kl.items() if place[0] in cases}, self.near_ties, self.choices)


def limit_beside(kl: Sequence[float], least: float, k: float) -> float:
    """What a place may be moved by and still be compared: k times the median of the floor, which a few places of
    another routing do not move."""
    ordered = sorted(one for one in kl if math.isfinite(one))
    return max(least, k * ordered[len(ordered) // 2]) if ordered else least


def chosen(model: Any, run: Callable[[], object]) -> ChosenExperts | None:
    """The model's choices of experts while it is `run`; None for a dense one, and for one that chooses otherwise."""
    experts = expert_counts(model)
    if not experts:
        return None
    with Choices(experts) as seen:
        run()
    return ChosenExperts(experts, tuple(seen.watched), tuple(seen.margins)) if seen.margins else None


def rerouted(
    choices: ChosenExperts,
    ways: Iterable[tuple[str, ...]],
    run: Callable[[], Sequence[Tensor]],
    kl: Callable[[Sequence[Tensor]], Mapping[Place, float]],
) -> dict[tuple[str, ...], Rerouted]:
    """For each of these groups of known-good ways: the reference with their near ties decided the other way.

    run: the reference as it was when it chose. kl: how far what that gives is from the reference, by place.
    """
    found = {}
    total = sum(len(margin) for margin in choices.margins)
    for names in dict.fromkeys(ways):
        ties, rows = choices.ties(names), list[Tensor]()
        if ties:
            with Choices(choices.experts, choices.pairs, ties):
                rows = list(run())
        found[names] = Rerouted(kl(rows) if rows else {}, sum(int(one.sum()) for one in ties), total)
    return found
