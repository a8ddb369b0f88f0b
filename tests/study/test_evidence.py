"""The statistics of a study: intervals that cover, tests that are exact where that is known, words that follow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rankwise.study.evidence import Effect, assay_works, by_group, decides, further_seeds, holm, judge, measure_effect

WEIGHTS = np.full(40, 20.0)


def simulated(
    generator: np.random.Generator, mean: float, seeds: int, groups: int, by_seed: float, by_item: float, noise: float
) -> np.ndarray:
    """Summed differences of groups of 20 tokens: a mean, a shift per seed, one per group, and noise."""
    shifts = generator.normal(0, by_seed, (seeds, 1)) + generator.normal(0, by_item, (1, groups))
    return 20.0 * (mean + shifts + generator.normal(0, noise, (seeds, groups)))


@pytest.mark.parametrize(("by_seed", "by_item"), [(0.05, 0.0), (0.0, 0.2), (0.04, 0.2)])
def test_95_percent_intervals_cover_about_95_percent(by_seed: float, by_item: float) -> None:
    """Whether seeds or items make the spread, with 8 seeds. Crossed resampling may only err on the wide side."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        sums = simulated(generator, 0.03, 8, 40, by_seed, by_item, 0.05)
        low, high = measure_effect(sums, WEIGHTS, resamples=400, seed=trial).interval()
        covered += low <= 0.03 <= high
    assert 0.925 <= covered / 400 <= 1.0


def test_with_spread_between_seeds_alone_it_is_the_t_test() -> None:
    per_seed = np.random.default_rng(2).normal(0.02, 0.05, 10)
    effect = measure_effect(np.outer(per_seed, WEIGHTS), WEIGHTS, resamples=20_000)
    known = stats.ttest_1samp(per_seed, 0.0)
    assert effect.degrees == pytest.approx(9, rel=0.01)
    assert effect.error == pytest.approx(stats.sem(per_seed), rel=0.03)
    assert effect.p_difference == pytest.approx(known.pvalue, rel=0.1)
    assert effect.half_width() == pytest.approx((known.confidence_interval().high - per_seed.mean()), rel=0.03)


def test_the_estimate_is_a_ratio_of_sums() -> None:
    """Long answers count by their tokens, not once each."""
    effect = measure_effect(np.array([[2.0, 30.0], [4.0, 30.0]]), np.array([1.0, 9.0]))
    assert effect.estimate == pytest.approx(66 / 20)


def test_equal_runs_are_certainly_equivalent() -> None:
    effect = measure_effect(np.zeros((4, 40)), WEIGHTS)
    assert effect.error == 0
    assert judge({"a vs a": effect}, 0.02)["a vs a"].word == "equivalent"


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        measure_effect(np.zeros((1, 40)), WEIGHTS)


def test_items_are_summed_within_their_group() -> None:
    values = np.array([[1.0, 2.0, 4.0, 8.0]])
    assert by_group(values, ["b", "a", "b", "c"]).tolist() == [[5.0, 2.0, 8.0]]


def test_holm_by_hand() -> None:
    """0.01·4, 0.013·3 < 0.04 so 0.04 again, 0.03·2, 0.4·1."""
    assert holm([0.03, 0.01, 0.4, 0.013]) == pytest.approx([0.06, 0.04, 0.4, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_only_raises_p_values_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert all(a <= b for a, b in zip(np.array(adjusted)[order], np.array(adjusted)[order][1:], strict=False))


def effect_of(estimate: float, error: float, seeds: int = 8, share_of_seeds: float = 1.0) -> Effect:
    variance = error**2
    return Effect(estimate, error, 7.0, seeds, 200, share_of_seeds * variance, (1 - share_of_seeds) * variance)


@pytest.mark.parametrize(
    ("estimate", "error", "word"),
    [
        (-0.05, 0.005, "better"),
        (0.05, 0.005, "worse"),
        (0.001, 0.004, "equivalent"),
        (-0.008, 0.001, "equivalent"),  # real, and smaller than anything of interest
        (-0.02, 0.02, "undecided"),
    ],
)
def test_the_words(estimate: float, error: float, word: str) -> None:
    assert judge({"one": effect_of(estimate, error)}, 0.02)["one"].word == word


def test_where_more_is_better_the_words_turn_round() -> None:
    assert judge({"one": effect_of(-0.05, 0.005)}, 0.02, lower_is_better=False)["one"].word == "worse"


@given(st.floats(-0.1, 0.1), st.floats(1e-4, 0.1), st.floats(1e-3, 0.1))
def test_equivalence_is_the_90_percent_interval_within_delta(estimate: float, error: float, delta: float) -> None:
    effect = effect_of(estimate, error)
    low, high = effect.interval(0.9)
    if min(abs(low + delta), abs(high - delta)) > 1e-9:
        assert (effect.p_equivalence(delta) < 0.05) == (-delta < low and high < delta)


@given(st.floats(-0.1, 0.1), st.floats(1e-4, 0.1), st.floats(1e-3, 0.05))
def test_a_half_width_of_half_delta_always_decides_a_single_contrast(
    estimate: float, error: float, delta: float
) -> None:
    effect = effect_of(estimate, error)
    if decides([effect], delta):
        assert judge({"one": effect}, delta)["one"].word != "undecided"


def test_more_contrasts_never_make_a_verdict_easier() -> None:
    effect = effect_of(-0.03, 0.01)
    assert judge({"one": effect}, 0.02)["one"].word == "better"
    many = judge({"one": effect} | {f"null {i}": effect_of(0.015, 0.02) for i in range(5)}, 0.02)
    assert many["one"].word == "undecided"


def test_the_number_of_further_seeds_is_what_it_takes() -> None:
    """Simulated with as many as it says, the half-width is near δ/2."""
    generator = np.random.default_rng(3)
    effect = measure_effect(simulated(generator, 0.0, 8, 200, 0.03, 0.02, 0.05), np.full(200, 20.0))
    more = further_seeds(effect, 0.02)
    assert more is not None and more > 4
    later = [
        measure_effect(simulated(generator, 0.0, 8 + more, 200, 0.03, 0.02, 0.05), np.full(200, 20.0)).half_width()
        for _ in range(20)
    ]
    assert np.median(later) == pytest.approx(0.01, rel=0.35)


def test_seeds_cannot_decide_what_the_items_leave_open() -> None:
    effect = effect_of(0.0, 0.02, share_of_seeds=0.1)
    assert further_seeds(effect, 0.02) is None
    assert judge({"one": effect}, 0.02)["one"].more_seeds is None


def test_wider_errors_ask_for_more_seeds() -> None:
    needed = [further_seeds(effect_of(0.0, error), 0.02) for error in (0.006, 0.012, 0.024)]
    assert needed == sorted(needed) and len(set(needed)) == 3


def test_an_assay_works_only_where_the_bad_plan_is_worse() -> None:
    assert assay_works([effect_of(0.05, 0.01)])
    assert not assay_works([effect_of(-0.05, 0.01)])
    assert not assay_works([effect_of(0.01, 0.02), effect_of(-0.01, 0.02)])
