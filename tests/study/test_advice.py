"""Decisions of `advise` on losses whose truth is known."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest

from rankwise.errors import DivergedError
from rankwise.study.advice import (
    LENGTH_EXPONENT,
    SeedNoise,
    TrialLosses,
    TrialRun,
    effect,
    find_rank,
    find_rates,
    first_grid,
    further_seeds,
    growth,
    long_run,
    prior_rate,
    refinement,
    smallest_effect,
    upper_bound,
)
from rankwise.study.climb import Rungs, climb

GROUPS, TOKENS = 80, 40.0
LADDER = Rungs(
    tuple(first_grid(1e-3, 5, 2.5)), 2.5, (16, 4, 1), ("attention_only", "mlp_only", "energy"), (1, 2, 3, 4), None
)


@dataclass
class Truth:
    """A bench whose trials lose what a formula says, plus noise of seed, arm and item."""

    loss: Callable[[TrialRun], float]
    seed_noise: float = 0.0
    arm_noise: float = 0.0
    item_noise: float = 0.0
    budget: int = 1000
    base_loss: float = 3.0
    draw: int = 0
    made: dict[TrialRun, np.ndarray] = field(default_factory=dict)
    asked: list[TrialRun] = field(default_factory=list)
    rungs: list[str] = field(default_factory=list)
    too_small: tuple[str, ...] = ()
    kept_back: Callable[[TrialRun], float] = lambda trial: 0.0  # added to losses on the rows kept back
    confirmed: list[TrialRun] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.items = np.random.default_rng(self.draw).normal(0, 1, GROUPS)

    def noise(self, *what: object) -> np.random.Generator:
        return np.random.default_rng([self.draw, *(zlib.crc32(repr(each).encode()) for each in what)])

    def sums(self, trial: TrialRun, part: str = "choose") -> np.ndarray:
        mean = self.loss(trial)
        mean += self.seed_noise * self.noise("seed", trial.seed).normal()
        mean += self.arm_noise * self.noise(trial).normal()
        return TOKENS * (mean + self.items + self.item_noise * self.noise(trial, part).normal(size=GROUPS))

    def run(self, trials: Sequence[TrialRun], rung: str) -> None:
        self.asked += trials
        for trial in trials:
            if trial not in self.made:
                self.made[trial] = self.sums(trial)
                self.rungs.append(rung)

    def can_place(self, trial: TrialRun) -> bool:
        return trial.placement not in self.too_small

    def affords(self, rung: str, trials: int) -> bool:
        return len(self.made) + trials <= self.budget

    @property
    def choose(self) -> TrialLosses:
        return TrialLosses(
            {trial: self.made[trial] for trial in self.asked},
            np.full(GROUPS, TOKENS),
            TOKENS * (self.base_loss + self.items),
        )

    def confirm(self, trials: Sequence[TrialRun]) -> TrialLosses:
        self.confirmed += trials
        sums = {trial: self.sums(trial, "confirm") + TOKENS * self.kept_back(trial) for trial in trials}
        return replace(self.choose, sums=sums)


def bowl(optimum: float = 1e-3, curvature: float = 0.05, **excess: float) -> Callable[[TrialRun], float]:
    """Loss 1 at the optimum, quadratic in log rate; excess: by `rank4`, `energy`, …"""

    def loss(trial: TrialRun) -> float:
        above = excess.get(f"rank{trial.rank}", 0.0) + excess.get(trial.placement, 0.0)
        return 1 + curvature * math.log(trial.learning_rate / optimum) ** 2 + above

    return loss


def test_the_vertex_of_a_parabola_is_its_minimum() -> None:
    curve = {rate: bowl(1.3e-3)(TrialRun(16, rate, 1)) for rate in first_grid(1e-3, 5, 2.5)}
    found = find_rates(curve, delta=1e-9, gain=1.0)
    assert found.vertex == pytest.approx(1.3e-3, rel=1e-6)
    assert found.best == found.advised == 1e-3
    assert found.within == (1e-3,)


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([1.0, 2.0, 3.0], "edge"),
        ([math.inf, 1.0, 2.0], "diverged"),
        ([2.0, 1.0, math.inf], "diverged"),
        ([1.0, 1.0, 1.0], "edge"),
    ],
)
def test_where_there_is_no_parabola_the_reason_is_given(losses: list[float], why: str) -> None:
    found = find_rates(dict(zip([1e-4, 1e-3, 1e-2], losses, strict=True)), delta=1e-9, gain=1.0)
    assert found.vertex is None
    assert why in found.why


def test_the_middle_of_the_rates_within_delta_is_advised() -> None:
    curve = dict(zip([1e-5, 1e-4, 1e-3, 1e-2, 1e-1], [2.0, 1.01, 1.0, 1.02, 1.3], strict=True))
    found = find_rates(curve, delta=0.1, gain=1.0)
    assert found.within == (1e-4, 1e-3, 1e-2)
    assert found.advised == 1e-3
    assert find_rates(curve, delta=0.015, gain=1.0).within == (1e-4, 1e-3)
    assert find_rates(curve, delta=0.015, gain=1.0).advised == 1e-4, "of two equally near the middle, the lower"


def test_a_gap_ends_the_set() -> None:
    curve = dict(zip([1e-5, 1e-4, 1e-3], [1.0001, 2.0, 1.0], strict=True))
    assert find_rates(curve, delta=0.01, gain=1.0).within == (1e-3,)


@pytest.mark.parametrize("beyond", [math.inf, 5.0])
def test_the_last_rate_before_a_cliff_is_never_advised(beyond: float) -> None:
    curve = dict(zip([1e-5, 1e-4, 1e-3, 1e-2], [1.2, 1.004, 1.0, beyond], strict=True))
    for delta in (0.01, 0.001):
        found = find_rates(curve, delta, gain=1.0)
        assert found.cliff == 1e-2
        assert found.best == 1e-3
        assert found.advised == 1e-4


def test_a_longer_run_widens_the_rates_downwards_and_takes_the_middle() -> None:
    curve = dict(zip([1e-4, 1e-3, 1e-2, 1e-1], [2.0, 1.0, 1.005, 1.8], strict=True))
    rates = find_rates(curve, delta=0.01, gain=2.0)
    assert (rates.within, rates.advised, rates.highest) == ((1e-3, 1e-2), 1e-3, 1e-2)
    same = long_run(rates, short=40, steps=40)
    assert (same.learning_rate, same.low, same.high) == (1e-3, 1e-3, 1e-2)
    longer = long_run(rates, short=40, steps=40 * 16)
    assert longer.low == pytest.approx(1e-3 * 16**LENGTH_EXPONENT, rel=0.05) and longer.high == 1e-2
    assert longer.learning_rate == pytest.approx(math.sqrt(longer.low * longer.high), rel=0.05)
    assert longer.low < longer.learning_rate < longer.high


def test_a_longer_run_too_keeps_off_the_last_rate_before_a_cliff() -> None:
    curve = dict(zip([1e-5, 1e-4, 1e-3, 1e-2], [1.2, 1.004, 1.0, math.inf], strict=True))
    for delta in (0.01, 0.001):
        found = long_run(find_rates(curve, delta, gain=1.0), short=40, steps=400)
        assert found.high == 1e-4 > found.learning_rate > found.low


def test_the_refinement_lies_half_a_step_towards_the_better_neighbour() -> None:
    curve = dict(zip([1e-4, 1e-3, 1e-2], [1.5, 1.0, 1.2], strict=True))
    assert refinement(curve) == pytest.approx(10**-2.5, rel=0.02)
    assert refinement(curve | {1e-2: math.inf}) == pytest.approx(10**-3.5, rel=0.02)
    assert refinement({1e-4: 1.0, 1e-3: 2.0}) == pytest.approx(10**-3.5, rel=0.02)


def test_a_grid_grows_beyond_the_edge_that_is_best() -> None:
    assert growth({1e-4: 1.0, 1e-3: 2.0}, 10) == 1e-5
    assert growth({1e-4: 2.0, 1e-3: 1.0}, 10) == 1e-2
    assert growth({1e-4: 2.0, 1e-3: 1.0, 1e-2: 2.0}, 10) is None
    assert growth({1e-4: math.inf, 1e-3: math.inf}, 10) == 1e-5


def test_pooled_noise_is_that_of_the_runs_not_of_seeds_or_arms() -> None:
    found = []
    for draw in range(200):
        truth = Truth(lambda trial: trial.rank / 7, seed_noise=0.5, arm_noise=0.02, draw=draw)
        truth.run([TrialRun(rank, 1e-3, seed) for rank in (16, 4, 1) for seed in (1, 2)], "C")
        noise = truth.choose.noise
        assert noise is not None and noise.degrees == 2
        found.append(noise.variance)
    assert np.mean(found) == pytest.approx(0.02**2, rel=0.25)


def test_noise_needs_two_arms_with_two_seeds_each() -> None:
    truth = Truth(bowl())
    truth.run([TrialRun(16, 1e-3, 1), TrialRun(16, 1e-3, 2), TrialRun(4, 1e-3, 1)], "C")
    assert truth.choose.noise is None


def accepted(excess: float, delta: float, draws: int, **noise: float) -> float:
    """Share of climbs to rung C in which rank 1 is advised though it loses `excess` against rank 16."""
    count = 0
    for draw in range(draws):
        truth = Truth(bowl(rank1=excess), draw=draw, **noise)
        truth.run([TrialRun(rank, 1e-3, seed) for rank in (16, 1) for seed in (1, 2)], "C")
        truth.run([TrialRun(4, 1e-3, seed) for seed in (1, 2)], "C")
        arms = {rank: TrialRun(rank, 1e-3, 1) for rank in (16, 1)}
        count += find_rank(truth.choose, arms, delta).by_bound == 1
    return count / draws


@pytest.mark.parametrize(
    "noise",
    [{"arm_noise": 0.01}, {"item_noise": 0.1}, {"arm_noise": 0.01, "item_noise": 0.1, "seed_noise": 0.3}],
)
def test_a_rank_that_loses_delta_is_advised_in_one_of_twenty_cases(noise: dict[str, float]) -> None:
    share = accepted(0.02, 0.02, 600, **noise)
    assert share <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 600)


def test_a_rank_that_loses_nothing_is_advised_where_the_noise_allows_it() -> None:
    assert accepted(0.0, 0.02, 100, item_noise=0.02, arm_noise=0.001) > 0.95
    assert accepted(0.03, 0.02, 100, item_noise=0.02, arm_noise=0.0005) < 0.05


def test_one_seed_gives_no_rank_up() -> None:
    truth = Truth(bowl(), item_noise=0.001)
    truth.run([TrialRun(rank, 1e-3, 1) for rank in (16, 4, 1)], "B")
    found = find_rank(truth.choose, {rank: TrialRun(rank, 1e-3, 1) for rank in (16, 4, 1)}, 0.02)
    assert (found.by_bound, found.by_estimate) == (16, 1)
    assert [step.verdict for step in found.steps] == ["undecided", "undecided"]
    assert [step.bound for step in found.steps] == [None] * len(found.steps), "JSON has no infinity"
    json.dumps(asdict(found), allow_nan=False)


def test_a_rank_below_one_that_is_not_enough_is_not_advised() -> None:
    truth = Truth(bowl(rank4=0.5), arm_noise=1e-4, item_noise=1e-3)
    truth.run([TrialRun(rank, 1e-3, seed) for rank in (16, 4, 1) for seed in (1, 2)], "C")
    found = find_rank(truth.choose, {rank: TrialRun(rank, 1e-3, 1) for rank in (16, 4, 1)}, 0.02)
    assert (found.by_bound, found.by_estimate) == (16, 16)
    assert [step.verdict for step in found.steps] == ["worse", "enough"]


def test_the_seeds_that_are_foretold_bring_the_bound_to_delta() -> None:
    noise, delta = SeedNoise(0.01**2, 2), 0.02
    one = effect(np.full((2, GROUPS), 0.005 * TOKENS), np.full(GROUPS, TOKENS), noise)
    assert upper_bound(one) > delta
    more = further_seeds(one, noise, delta)
    assert more is not None
    enough = effect(
        np.full((2 + more, GROUPS), 0.005 * TOKENS), np.full(GROUPS, TOKENS), replace(noise, degrees=2 * (1 + more))
    )
    fewer = effect(
        np.full((1 + more, GROUPS), 0.005 * TOKENS), np.full(GROUPS, TOKENS), replace(noise, degrees=2 * more)
    )
    assert upper_bound(enough) <= delta < upper_bound(fewer)


def test_delta_follows_the_gain_and_is_never_below_a_hundredth() -> None:
    tokens = np.full(GROUPS, TOKENS)
    assert smallest_effect(effect(np.full((1, GROUPS), 3 * TOKENS), tokens, None), None) == pytest.approx(0.03)
    assert smallest_effect(effect(np.full((1, GROUPS), 0.1 * TOKENS), tokens, None), None) == 0.01
    assert smallest_effect(effect(np.full((1, GROUPS), 3 * TOKENS), tokens, None), 0.5) == 0.5


def test_the_priors_rates_are_the_published_ones() -> None:
    assert prior_rate("llama", 2000) == (5e-4, True)
    assert prior_rate("llama", 4096)[0] == pytest.approx(5e-4 * (2000 / 4096) ** 0.78)
    assert prior_rate("qwen3", 4096) == (pytest.approx(5e-4 * (2000 / 4096) ** 0.08), True)
    assert prior_rate("gpt_neox", 1000) == (pytest.approx(5e-4 * 2**0.4), False)


def test_the_whole_ladder_is_climbed_in_order_and_the_bowls_bottom_advised() -> None:
    truth = Truth(bowl(1.2e-3, rank1=0.3, energy=0.1), arm_noise=1e-4, item_noise=0.01)
    found = climb(LADDER, truth)
    assert found.rung == "E"
    assert [truth.rungs.count(letter) for letter in "ABCDE"] == list(LADDER.counts().values())
    assert truth.rungs == sorted(truth.rungs)
    assert found.advised.rank == 4
    assert abs(math.log(found.advised.learning_rate / 1.2e-3)) < math.log(2.5) / 2
    assert found.advised.placement == "uniform"
    assert found.placement is not None and found.placement.word == "equivalent"
    assert found.loss is not None and found.loss.estimate == pytest.approx(1 + truth.items.mean(), abs=0.02)


def test_another_placement_is_advised_where_it_is_better() -> None:
    truth = Truth(bowl(energy=-0.2), arm_noise=1e-3, item_noise=0.01)
    found = climb(LADDER, truth)
    assert found.challenger == found.advised.placement == "energy"
    assert {trial.seed for trial in truth.confirmed if trial.placement == "energy"} == {3, 4}


def test_a_placement_that_cannot_spend_the_parameters_is_left_out() -> None:
    truth = Truth(
        bowl(energy=-0.2, attention_only=-0.5), item_noise=0.01, arm_noise=1e-3, too_small=("attention_only",)
    )
    found = climb(LADDER, truth)
    assert found.too_small == ["attention_only"]
    assert set(found.tried) == {"mlp_only", "energy"}
    assert found.challenger == "energy"


def test_rows_kept_back_decide_the_last_comparison_and_nothing_before_it() -> None:
    """They say the opposite of those that decide: small ranks lose there, and the challenger wins."""

    def opposite(trial: TrialRun) -> float:
        return 0.5 * (trial.rank < 16) - 0.3 * (trial.placement != "uniform")

    noise = {"arm_noise": 1e-4, "item_noise": 0.01}
    for budget in (15, 18, 22):
        agreeing = climb(LADDER, Truth(bowl(energy=0.01), budget=budget, **noise))
        opposed = climb(LADDER, Truth(bowl(energy=0.01), budget=budget, kept_back=opposite, **noise))
        assert (opposed.rank, opposed.best, opposed.rates) == (agreeing.rank, agreeing.best, agreeing.rates)
        assert (opposed.tried, opposed.challenger) == (agreeing.tried, agreeing.challenger)
        assert opposed.loss is not None and agreeing.loss is not None
        assert opposed.loss.estimate != pytest.approx(agreeing.loss.estimate, abs=0.1)
    assert agreeing.placement is not None and agreeing.placement.word == "equivalent"
    assert opposed.placement is not None and opposed.placement.word == "better"


@pytest.mark.parametrize(
    ("budget", "rung"), [(0, "A"), (6, "A"), (11, "A"), (12, "B"), (15, "C"), (18, "D"), (22, "E")]
)
def test_a_rung_that_the_time_does_not_reach_is_not_begun(budget: int, rung: str) -> None:
    truth = Truth(bowl(), arm_noise=1e-4, item_noise=0.01, budget=budget)
    found = climb(LADDER, truth)
    assert found.rung == rung
    assert (found.rank is None) == (rung == "A")
    assert found.advised.rank == (16 if rung in "AB" else 1)
    assert (found.loss is None) == (rung in "AB")


def test_the_grid_grows_three_times_at_most_and_the_edge_is_told() -> None:
    truth = Truth(bowl(1.0))
    found = climb(LADDER, truth)
    assert (
        len([trial for trial in truth.made if trial.rank == 16 and trial.seed == 1 and trial.placement == "uniform"])
        == 9
    )
    assert found.rates[16].at_edge
    assert found.rates[16].vertex is None


def test_nothing_learnt_ends_the_climb() -> None:
    truth = Truth(lambda trial: 3.0, item_noise=0.1)
    found = climb(LADDER, truth)
    assert found.rung == "A" and not found.learnt
    assert set(truth.rungs) == {"A"}


def test_where_every_rate_diverges_lower_ones_are_tried_and_then_it_ends() -> None:
    truth = Truth(lambda trial: math.inf)
    with pytest.raises(DivergedError, match="every learning rate diverged"):
        climb(LADDER, truth)
    assert len(truth.made) == 8
    assert min(trial.learning_rate for trial in truth.made) == pytest.approx(1e-3 / 2.5**5, rel=0.05)


def test_an_arm_that_diverges_for_its_second_seed_gives_way_to_the_next_best() -> None:
    def loss(trial: TrialRun) -> float:
        return math.inf if (trial.rank, trial.seed, trial.learning_rate) == (4, 2, 1e-3) else bowl()(trial)

    found = climb(LADDER, Truth(loss, arm_noise=1e-4, item_noise=0.01, budget=15))
    assert found.rung == "C"
    assert found.best[4].learning_rate == 4e-4
    assert found.best[16].learning_rate == 1e-3
    assert found.advised.rank == 16


def test_a_rank_that_always_diverges_for_its_second_seed_is_out() -> None:
    def loss(trial: TrialRun) -> float:
        return math.inf if (trial.rank, trial.seed) == (4, 2) else bowl()(trial)

    found = climb(LADDER, Truth(loss, arm_noise=1e-4, item_noise=0.01, budget=15))
    assert set(found.best) == set(found.rates) == {16, 1}
    assert found.rank is not None and [step.rank for step in found.rank.steps] == [1]
    with pytest.raises(DivergedError, match="one of two seeds"):
        climb(LADDER, Truth(lambda trial: math.inf if trial.seed == 2 else bowl()(trial), item_noise=0.01))


def test_a_rank_that_diverges_at_all_of_its_rates_is_out() -> None:
    found = climb(LADDER, Truth(lambda t: math.inf if t.rank == 4 else bowl()(t), arm_noise=1e-4, item_noise=0.01))
    assert (found.rung, set(found.best), set(found.rates)) == ("E", {16, 1}, {16, 1})


def test_a_rate_that_diverges_for_a_fresh_seed_is_not_advised() -> None:
    steady = climb(LADDER, Truth(bowl(), arm_noise=1e-4, item_noise=0.01)).advised

    def loss(trial: TrialRun) -> float:
        return math.inf if trial.seed == 4 and trial.placement == "uniform" else bowl()(trial)

    found = climb(LADDER, Truth(loss, arm_noise=1e-4, item_noise=0.01))
    assert found.rung == "E" and found.advised.rank == steady.rank
    assert found.advised.learning_rate < found.best[steady.rank].learning_rate == found.rates[steady.rank].cliff


def test_fresh_seeds_that_all_diverge_confirm_nothing() -> None:
    """The loss stays that of rung C, and no placement is advised."""

    def loss(trial: TrialRun) -> float:
        return math.inf if trial.seed > 2 and trial.placement == "uniform" else bowl(energy=-0.2)(trial)

    found = climb(LADDER, Truth(loss, arm_noise=1e-4, item_noise=0.01))
    assert (found.rung, found.challenger, found.placement) == ("E", "energy", None)
    assert found.advised.placement == "uniform" and found.loss is not None and math.isfinite(found.loss.estimate)


def test_a_climb_that_was_interrupted_ends_the_same() -> None:
    whole = Truth(bowl(1.2e-3, rank1=0.3), arm_noise=1e-3, item_noise=0.05)
    expected = climb(LADDER, whole)
    for stop in (3, 9, 16):
        cut = Truth(bowl(1.2e-3, rank1=0.3), arm_noise=1e-3, item_noise=0.05)
        cut.run(list(whole.made)[:stop], "before")
        cut.asked.clear()
        assert climb(LADDER, cut) == expected
        assert cut.rungs.count("before") == stop
        assert len(cut.made) == len(whole.made)
