"""The ladder of `advise`: which trials to run next, given those that are finished, and what they have decided.

    A  learning rates at the largest rank, grown at an edge, and one refinement        one seed
    B  the smaller ranks, each at the best rate and its two neighbours                 one seed
    C  every rank's best once more                                                     second seed
    D  other placements of the chosen rank's parameters, at its rate                   one seed
    E  the best of them and uniform rank, compared once on rows kept back for that     two fresh seeds

Every rung needs the one before. The budget is asked before each: a rung that does not fit is not begun. Trials that the
bench has made already cost nothing, so a climb that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from rankwise.errors import DivergedError
from rankwise.study.advice import (
    UNIFORM,
    Rank,
    Rates,
    TrialLosses,
    TrialRun,
    find_rank,
    find_rates,
    first_grid,
    growth,
    refinement,
    smallest_effect,
)
from rankwise.study.evidence import Effect, Verdict, judge

LETTERS = "ABCDE"
GROWN, NEIGHBOURS, FRESH = 3, 3, 2


@dataclass(frozen=True)
class Rungs:
    """What is climbed.

    grid: learning rates of the first rung; beyond an edge it goes on by `ratio`. ranks: descending. placements: beside
    uniform rank. seeds: the first for rungs A, B and D, the second for C, two further ones for E.
    """

    grid: tuple[float, ...]
    ratio: float
    ranks: tuple[int, ...]
    placements: tuple[str, ...]
    seeds: tuple[int, int, int, int]
    delta: float | None

    def counts(self) -> dict[str, int]:
        """Trials of each rung where no grid has to grow."""
        smaller = len(self.ranks) - 1
        per_rung = [len(self.grid) + 1, NEIGHBOURS * smaller, len(self.ranks), len(self.placements), 2 * FRESH]
        return dict(zip(LETTERS, per_rung, strict=True))


class TrialBench(Protocol):
    """Where trials are run and scored."""

    def run(self, trials: Sequence[TrialRun], rung: str) -> None:
        """Ask for trials: those that are not finished yet are trained and scored."""

    def can_place(self, trial: TrialRun) -> bool:
        """Whether a trial's placement can spend as many parameters as uniform rank."""

    def affords(self, rung: str, trials: int) -> bool:
        """Whether so many trials fit into the time that is left, or the rung was begun before."""

    @property
    def choose(self) -> TrialLosses:
        """Losses on the rows that decide, of the trials asked for so far and no others: a climb that goes on must see
        what it saw the first time."""

    def confirm(self, trials: Sequence[TrialRun]) -> TrialLosses:
        """Losses of these trials on the rows that decide nothing but the last comparison; read once."""


@dataclass
class Conclusions:
    """What the climb has decided; what stayed None was not reached.

    rung: the last one that was climbed. rates: by rank. best: by rank, the best arm. tried: other placements against
    uniform rank, on the rows that decide; too_small: those that cannot spend its parameters. challenger: the best of
    those tried, and placement the verdict on it. loss: of the advised arm on the rows kept back.
    """

    rung: str = ""
    gain: Effect | None = None
    delta: float = math.nan
    rates: dict[int, Rates] = field(default_factory=dict)
    best: dict[int, TrialRun] = field(default_factory=dict)
    rank: Rank | None = None
    tried: dict[str, Effect] = field(default_factory=dict)
    too_small: list[str] = field(default_factory=list)
    challenger: str | None = None
    placement: Verdict | None = None
    loss: Effect | None = None

    @property
    def learnt(self) -> bool:
        """Whether the gain is above 0 by its interval; else nothing that follows means anything."""
        return self.gain is not None and self.gain.interval()[0] > 0

    @property
    def tested(self) -> TrialRun:
        """The advised arm at its best rate: a smaller rank only by its bound, another placement only by its verdict."""
        rank = self.rank.by_bound if self.rank is not None else max(self.best)
        better = self.placement is not None and self.placement.word == "better"
        return replace(self.best[rank], placement=self.challenger if better and self.challenger else UNIFORM)

    @property
    def advised(self) -> TrialRun:
        """The arm to train: what was tested, at the middle of the rates that are as good."""
        return replace(self.tested, learning_rate=self.rates[self.tested.rank].advised)


def climb(ladder: Rungs, bench: TrialBench) -> Conclusions:
    """Up to the last rung that the time reaches. DivergedError where no learning rate trains at all."""
    found = Conclusions()
    stages = dict(zip(LETTERS, (find_the_rate, find_the_ranks, repeat_the_best, try_placements, compare), strict=True))
    for (rung, stage), count in zip(stages.items(), ladder.counts().values(), strict=True):
        if rung != "A" and not (found.learnt and bench.affords(rung, count)):
            break
        stage(ladder, bench, found)
        found.rung = rung
    return found


def find_the_rate(ladder: Rungs, bench: TrialBench, found: Conclusions) -> None:
    rank, seed = ladder.ranks[0], ladder.seeds[0]
    bench.run([TrialRun(rank, rate, seed) for rate in ladder.grid], "A")
    for _ in range(GROWN):
        further = growth(bench.choose.curve(rank, UNIFORM, seed), ladder.ratio)
        if further is None:
            break
        bench.run([TrialRun(rank, further, seed)], "A")
    curve = bench.choose.curve(rank, UNIFORM, seed)
    if not any(map(math.isfinite, curve.values())):
        tried = f"{min(curve):.3g} to {max(curve):.3g}"
        raise DivergedError(f"every learning rate diverged at rank {rank} (tried {tried}); check the rows, or --rates")
    bench.run([TrialRun(rank, refinement(curve), seed)], "A")
    scores = bench.choose
    found.best[rank] = best_of(scores, rank, seed)
    found.gain = scores.gain(found.best[rank])
    found.delta = smallest_effect(found.gain, ladder.delta)
    found.rates[rank] = find_rates(scores.curve(rank, UNIFORM, seed), found.delta, found.gain.estimate)


def best_of(scores: TrialLosses, rank: int, seed: int) -> TrialRun:
    curve = scores.curve(rank, UNIFORM, seed)
    return TrialRun(rank, min(curve, key=lambda rate: (curve[rate], rate)), seed)


def find_the_ranks(ladder: Rungs, bench: TrialBench, found: Conclusions) -> None:
    """At one common rate small ranks would look worse than they are: each is tried at three. One that diverges at all
    of them is out."""
    assert found.gain is not None
    seed, best = ladder.seeds[0], found.best[ladder.ranks[0]].learning_rate
    smaller = ladder.ranks[1:]
    bench.run([TrialRun(rank, rate, seed) for rank in smaller for rate in around(best, ladder.ratio)], "B")
    for rank in smaller:
        further = growth(bench.choose.curve(rank, UNIFORM, seed), ladder.ratio)
        if further is not None:
            bench.run([TrialRun(rank, further, seed)], "B")
        curve = bench.choose.curve(rank, UNIFORM, seed)
        if any(map(math.isfinite, curve.values())):
            found.best[rank] = best_of(bench.choose, rank, seed)
            found.rates[rank] = find_rates(curve, found.delta, found.gain.estimate)
    found.rank = find_rank(bench.choose, found.best, found.delta)


def around(rate: float, ratio: float) -> list[float]:
    return first_grid(rate, NEIGHBOURS, ratio)


def repeat_the_best(ladder: Rungs, bench: TrialBench, found: Conclusions) -> None:
    """An arm that diverges for its second seed gives way to the next best one of its rank."""
    assert found.gain is not None
    seed, second = ladder.seeds[:2]
    while True:
        bench.run([replace(arm, seed=second) for arm in found.best.values()], "C")
        failed = [rank for rank, arm in found.best.items() if bench.choose.diverged(arm)]
        if not failed:
            break
        for rank in failed:
            del found.best[rank], found.rates[rank]
            curve = bench.choose.curve(rank, UNIFORM, seed)
            if any(map(math.isfinite, curve.values())):
                found.best[rank] = best_of(bench.choose, rank, seed)
                found.rates[rank] = find_rates(curve, found.delta, found.gain.estimate)
    if not found.best:
        raise DivergedError("every arm diverged for one of two seeds; give lower --rates, or a longer warm-up")
    found.rank = find_rank(bench.choose, found.best, found.delta)
    again = [replace(arm, seed=second) for arm in found.best.values()]
    found.loss = bench.confirm(again).mean(found.best[found.rank.by_bound])


def try_placements(ladder: Rungs, bench: TrialBench, found: Conclusions) -> None:
    assert found.rank is not None
    uniform = found.best[found.rank.by_bound]
    wanted = [replace(uniform, placement=name) for name in ladder.placements]
    trials = [trial for trial in wanted if bench.can_place(trial)]
    found.too_small = [trial.placement for trial in wanted if trial not in trials]
    bench.run(trials, "D")
    effects = {trial.placement: bench.choose.excess(trial, uniform) for trial in trials}
    found.tried = {name: effect for name, effect in effects.items() if effect is not None}
    found.challenger = min(found.tried, key=lambda name: found.tried[name].estimate, default=None)


def compare(ladder: Rungs, bench: TrialBench, found: Conclusions) -> None:
    """A rate that diverges for a fresh seed is advised no more; a lower one is, where one was tried."""
    assert found.rank is not None and found.gain is not None
    uniform = found.best[found.rank.by_bound]
    if found.challenger is None:
        return
    other = replace(uniform, placement=found.challenger)
    fresh = [replace(arm, seed=seed) for arm in (uniform, other) for seed in ladder.seeds[2:]]
    bench.run(fresh, "E")
    scores = bench.confirm(fresh)
    effect = scores.excess(other, uniform)
    if effect is not None:
        found.placement = judge({found.challenger: effect}, found.delta)[found.challenger]
    curve = bench.choose.curve(uniform.rank, UNIFORM, ladder.seeds[0])
    if any(map(math.isfinite, curve.values())):
        found.rates[uniform.rank] = find_rates(curve, found.delta, found.gain.estimate)
    if scores.seeds(found.tested):  # else all fresh runs of it diverged
        found.loss = scores.mean(found.tested)
