"""Laws of ranks: the documented order and numbers, bounds that hold, budgets that are kept and spent best."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import generator
from torch import Tensor

from rankwise.core.allocate import (
    Rule,
    by_budget,
    by_threshold,
    decreasing,
    invert,
    parse_budget,
    plan_of,
    round_rank,
    shape_classes,
    shuffle,
    smooth,
    spectral_gains,
    uniform,
)
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site, describe
from rankwise.core.spectrum import Spectrum, Undecided
from rankwise.errors import UsageError
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites
from rankwise.ranks.decide import repeatability, spearman

SHARED_SHAPES = [(8, 8), (8, 4), (12, 6), (16, 16)]


def site(layer: int, shape: tuple[int, int] = (256, 256), name: str = "self_attn.q_proj") -> Site:
    return describe(f"model.layers.{layer}.{name}", shape, "language")


def flat(rank: int, shape: tuple[int, int] = (256, 256), scale: float = 1.0) -> Spectrum:
    """A complete spectrum whose energy rule at 0.9 asks for exactly `rank`: geometric, all of it within `rank`."""
    values = torch.zeros(min(shape), dtype=torch.float64)
    values[:rank] = scale
    return Spectrum(values, rank * scale**2, shape, complete=True)


def ranks_of(rows: tuple[PlannedSite, ...]) -> list[int]:
    return [row.rank for row in rows]


def test_the_documented_smoothing_example() -> None:
    assert smooth([4, 8, 16, 32, 64, 128], 0.8) == [34, 35, 36, 40, 46, 59]


@given(ranks=st.lists(st.integers(1, 128), min_size=1), factor=st.floats(0, 1))
def test_smoothing_pulls_towards_the_mean(ranks: list[int], factor: float) -> None:
    result = smooth(ranks, factor)
    assert min(ranks) <= min(result)
    assert max(result) <= max(ranks)
    assert max(result) - min(result) <= (1 - factor) * (max(ranks) - min(ranks)) + 1
    assert smooth(ranks, 0.0) == ranks


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        ("none", {0: 0, 5: 5, 127: 127}),
        ("power-of-two", {0: 0, 1: 1, 3: 4, 5: 4, 6: 8, 11: 8, 12: 16, 95: 64, 96: 128}),
        ("multiple-of-8", {0: 0, 3: 0, 4: 8, 11: 8, 12: 16, 20: 24, 99: 96, 100: 104}),
    ],
)
def test_rounding_goes_to_the_nearest_and_ties_go_up(rule: str, pairs: dict[int, int]) -> None:
    assert {rank: round_rank(rank, rule) for rank in pairs} == pairs


def test_the_order_is_bounds_then_smoothing_then_rounding_then_bounds() -> None:
    """2 and 200 are clipped to 4 and 100 before the mean is taken (52); the rounded 64 is not smoothed again."""
    spectra = {site(0): flat(2), site(1): flat(200)}
    rule = Rule(1.0, 4, 100, smoothing=0.5)
    assert ranks_of(by_threshold(spectra, rule)) == [28, 76]
    rounded_rule = Rule(1.0, 4, 100, smoothing=0.5, round="power-of-two")
    assert ranks_of(by_threshold(spectra, rounded_rule)) == [32, 64]
    upper = Rule(1.0, 4, 100, smoothing=0.0, round="power-of-two")
    assert ranks_of(by_threshold(spectra, upper)) == [4, 100], "128 is over the bound again"


def test_reasons_are_recorded() -> None:
    spectra = {site(0): flat(2), site(1): flat(20), site(2): flat(200)}
    rows = by_threshold(spectra, Rule(1.0, 4, 100, smoothing=0.0))
    assert [(row.r_raw, row.rank, row.clipped, row.saturated) for row in rows] == [
        (2, 4, "min", False),
        (20, 20, None, False),
        (200, 100, "max", True),
    ]
    assert [row.energy_retained for row in rows] == pytest.approx([1.0, 1.0, 0.5])


def test_a_pair_larger_than_its_matrix_is_never_planned() -> None:
    small = site(0, (16, 16))
    (row,) = by_threshold({small: flat(16, (16, 16))}, Rule(1.0, 12, 128, smoothing=0.0))
    assert row.rank == small.largest_rank == 8, "the limit wins over --min_rank too"
    assert row.clipped == "⌊mn/(m+n)⌋ = 8"
    assert row.parameters <= small.size


@given(shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), data=st.data())
def test_bounds_hold_whatever_the_options(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    spectra = {
        site(index, shape): flat(data.draw(st.integers(1, min(shape))), shape) for index, shape in enumerate(shapes)
    }
    least, most = sorted(data.draw(st.tuples(st.integers(0, 30), st.integers(1, 30))))
    rule = Rule(
        0.9,
        least,
        most,
        smoothing=data.draw(st.floats(0, 1)),
        round=data.draw(st.sampled_from(["none", "power-of-two", "multiple-of-8"])),
        per=data.draw(st.sampled_from(["site", "type"])),
    )
    for row in by_threshold(spectra, rule):
        assert min(least, row.site.largest_rank) <= row.rank <= min(most, row.site.largest_rank)


def test_per_type_is_the_median_of_the_clipped_ranks_without_smoothing() -> None:
    spectra = {site(i): flat(rank) for i, rank in enumerate([1, 8, 200])} | {site(0, name="mlp.up_proj"): flat(50)}
    rows = by_threshold(spectra, Rule(1.0, 4, 100, smoothing=0.8, per="type"))
    assert ranks_of(rows) == [8, 8, 8, 50]


def test_types_are_places_not_names() -> None:
    """GPT-2 calls two projections c_proj; they are not smoothed into each other, nor are towers."""
    paths = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "visual.h.0.attn.c_proj"]
    spectra = {describe(path, (256, 256)): flat(rank) for path, rank in zip(paths, [4, 64, 8, 80, 100], strict=True)}
    assert ranks_of(by_threshold(spectra, Rule(1.0, 1, 128, smoothing=1.0))) == [6, 72, 6, 72, 100]


def test_a_zero_delta_gets_the_least_rank_and_says_so() -> None:
    zero = Spectrum(torch.zeros(8, dtype=torch.float64), 0.0, (256, 256), complete=True)
    (row,) = by_threshold({site(0): zero}, Rule())
    assert (row.rank, row.r_raw, row.method, row.clipped) == (4, 0, "zero delta", "min")
    (row,) = by_threshold({site(0): zero}, Rule(min_rank=0, round="power-of-two"))
    assert row.rank == 0


def test_undecided_spectra_are_refused() -> None:
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    loose = Spectrum(values, 20.0, (256, 256), residual=1.5)
    with pytest.raises(Undecided):
        by_threshold({site(0): loose}, Rule(0.7, 1, 3))
    (row,) = by_threshold({site(0): loose}, Rule(0.7, 3, 3))
    assert row.rank == 3, "both ends of the interval clip to one rank"
    assert row.energy_retained == pytest.approx(14 / 20), "what is certain of it"


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0.0},
        {"threshold": 1.1},
        {"threshold": float("nan")},
        {"min_rank": 9, "max_rank": 8},
        {"min_rank": -1},
        {"min_rank": 0, "max_rank": 0},
        {"smoothing": 1.5},
        {"round": "up"},
        {"per": "layer"},
    ],
)
def test_rules_that_mean_nothing_are_usage_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Rule(**wrong)


def test_budgets_as_they_are_written() -> None:
    sites = [site(0, (10, 30)), site(1, (20, 20))]
    assert parse_budget("1000", sites) == parse_budget("1e3", sites) == 1000
    assert parse_budget("uniform:3", sites) == 3 * 40 + 3 * 40
    assert parse_budget("50%", sites) == 350
    for wrong in ("many", "uniform:x", "x%", "0", "-5", "uniform:0", "inf", "nan", ""):
        with pytest.raises(UsageError, match="--budget"):
            parse_budget(wrong, sites)


gains_of = st.lists(
    st.tuples(st.sampled_from(SHARED_SHAPES), st.lists(st.integers(0, 50), min_size=4, max_size=4)),
    min_size=1,
    max_size=3,
)


def as_gains(rows: list[tuple[tuple[int, int], list[int]]], ordered: bool) -> dict[Site, Tensor]:
    return {
        site(index, shape): torch.tensor(sorted(gains, reverse=True) if ordered else gains, dtype=torch.float64)
        for index, (shape, gains) in enumerate(rows)
    }


def parameters(ranks: dict[Site, int]) -> int:
    return sum(s.parameters(rank) for s, rank in ranks.items())


def total(gains: dict[Site, Tensor], ranks: dict[Site, int]) -> float:
    return sum(float(gains[s][:rank].sum()) for s, rank in ranks.items())


@settings(max_examples=150)
@given(rows=gains_of, budget=st.integers(0, 300), least=st.integers(0, 2))
def test_a_budget_is_kept_and_spent_as_well_as_possible(
    rows: list[tuple[tuple[int, int], list[int]]], budget: int, least: int
) -> None:
    """Against every affordable plan: short of the best by no more than one further rank is worth."""
    gains, rule = as_gains(rows, ordered=True), Rule(min_rank=least, max_rank=4)
    minima = sum(s.parameters(rule.least(s)) for s in gains)
    if budget < minima:
        with pytest.raises(UsageError, match="--min_rank"):
            by_budget(gains, budget, rule)
        return
    ranks = by_budget(gains, budget, rule)
    choices = [range(rule.least(s), rule.most(s) + 1) for s in gains]
    plans = [dict(zip(gains, chosen, strict=True)) for chosen in itertools.product(*choices)]
    spent = parameters(ranks)
    assert spent <= budget
    assert all(rule.least(s) <= rank <= rule.most(s) for s, rank in ranks.items())
    growing = [s for s in gains if ranks[s] < rule.most(s)]
    next_gains = [float(gains[s][ranks[s]]) for s in growing]
    best = max(total(gains, plan) for plan in plans if parameters(plan) <= budget)
    assert best - total(gains, ranks) <= max(next_gains, default=0.0) + 1e-9
    if len({s.shape for s in gains}) == 1:
        assert total(gains, ranks) == best
    unspent = [s for s in growing if s.parameters(1) <= budget - spent]
    assert all(float(gains[s][ranks[s]]) == 0 for s in unspent), "nothing affordable and useful is left"


def test_it_is_gain_per_parameter_that_counts() -> None:
    """Two cheap directions of 9 before one of 10 at twice the price."""
    large, small = site(0, (16, 16)), site(1, (8, 8))
    gains = {large: torch.tensor([10.0, 0.0]), small: torch.tensor([9.0, 9.0])}
    assert by_budget(gains, 32, Rule(min_rank=0, max_rank=2)) == {large: 0, small: 2}


def test_gains_that_grow_are_judged_by_what_they_lead_to() -> None:
    """Loss shares need not fall with σ: the second direction is worth taking the first for."""
    first, second = site(0, (8, 8)), site(1, (8, 8))
    gains = {first: torch.tensor([0.0, 10.0, 0.0, 0.0]), second: torch.tensor([4.0, 3.0, 0.0, -1.0])}
    assert by_budget(gains, 32, Rule(min_rank=0, max_rank=4)) == {first: 2, second: 0}
    assert by_budget(gains, 64, Rule(min_rank=0, max_rank=4)) == {first: 2, second: 2}
    assert by_budget(gains, 999, Rule(min_rank=0, max_rank=4))[second] == 2, "a direction that costs loss is not taken"


@given(gains=st.lists(st.floats(-5, 5), max_size=12))
def test_pooling_keeps_totals_and_never_rises(gains: list[float]) -> None:
    pooled = decreasing(torch.tensor(gains, dtype=torch.float64))
    assert len(pooled) == len(gains)
    assert bool((pooled.diff() <= 1e-9).all())
    assert float(pooled.sum()) == pytest.approx(sum(gains), abs=1e-9)
    assert bool((pooled.cumsum(0) >= torch.tensor(gains, dtype=torch.float64).cumsum(0) - 1e-9).all())


@pytest.mark.parametrize(("rule", "allowed"), [("multiple-of-8", {4, 8, 16, 24, 32}), ("power-of-two", {4, 8, 16, 32})])
def test_rounding_is_the_allocator_s_step(rule: str, allowed: set[int]) -> None:
    spectra = {site(i): flat(64, scale=1.0 + i) for i in range(3)}
    ranks = by_budget(spectral_gains(spectra), parse_budget("uniform:18", spectra), Rule(max_rank=32, round=rule))
    assert set(ranks.values()) <= allowed
    assert len(set(ranks.values())) > 1


def test_normalising_makes_sites_of_different_size_of_change_equal() -> None:
    spectra = {site(0): flat(16, scale=100.0), site(1): flat(16, scale=1.0)}
    rule, budget = Rule(min_rank=0), parse_budget("uniform:8", spectra)
    assert list(by_budget(spectral_gains(spectra), budget, rule).values()) == [16, 0]
    assert list(by_budget(spectral_gains(spectra, "site"), budget, rule).values()) == [8, 8]


plans = st.lists(st.tuples(st.sampled_from(SHARED_SHAPES), st.integers(0, 4)), min_size=1, max_size=12).map(
    lambda rows: {site(index, shape): rank for index, (shape, rank) in enumerate(rows)}
)


@given(ranks=plans, seed=st.integers(0, 99))
def test_nulls_have_the_plan_s_parameters(ranks: dict[Site, int], seed: int) -> None:
    for null in (shuffle(ranks, generator(seed)), invert(ranks)):
        assert parameters(null) == parameters(ranks)
        for members in shape_classes(ranks):
            assert sorted(null[s] for s in members) == sorted(ranks[s] for s in members)
    for members in shape_classes(ranks):
        pairs = [(ranks[s], invert(ranks)[s]) for s in members]
        assert all(a[1] >= b[1] for a in pairs for b in pairs if a[0] < b[0]), "inverted is the wrong way round"


@given(ranks=plans)
def test_uniform_spends_what_the_plan_spends_but_for_less_than_one_rank(ranks: dict[Site, int]) -> None:
    even = uniform(list(ranks), parameters(ranks))
    left = parameters(ranks) - parameters(even)
    growing = [s for s, rank in even.items() if rank < s.largest_rank]
    assert left >= 0
    assert not growing or left < sum(s.parameters(1) for s in growing)
    assert len({even[s] for s in growing}) <= 2
    assert all(rank <= s.largest_rank for s, rank in even.items())


def test_kept_fraction_of_a_layer_of_the_documented_model(shared_data: Path) -> None:
    """Attention 32 and MLP 64 on Qwen2.5-VL-7B: 5,046,272 of 233,046,016 parameters a layer, times 28 layers."""
    model = meta_model(str(shared_data / "model_configs" / "Qwen2.5-VL-7B-Instruct"))
    sites = [found for found in model_sites(model).values() if found.tower == "language"]
    plan = RankPlan(tuple(PlannedSite(s, 32 if s.kind == "attention" else 64) for s in sites))
    assert plan.parameters == 28 * 5_046_272
    assert plan.kept_fraction == pytest.approx(5_046_272 / 233_046_016, rel=1e-12)


def test_parameters_of_rank_four_on_tinyllama(shared_data: Path) -> None:
    sites = model_sites(meta_model(str(shared_data / "model_configs" / "TinyLlama-1.1B-Chat-v1.0")))
    plan = RankPlan(tuple(PlannedSite(found, 4) for found in sites.values()))
    assert plan.parameters == 3_153_920
    assert 2 * len(plan.ranks) == 308, "an A and a B each"


def test_a_plan_made_of_ranks_explains_them() -> None:
    spectra = {site(0): flat(10), site(1): flat(20)}
    plan = plan_of({site(0): 5, site(1): 20}, spectra)
    assert [row.energy_retained for row in plan.sites] == pytest.approx([0.5, 1.0])


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = generator(0)
    for _ in range(10):
        first, second = torch.randint(0, 6, (2, 20), generator=draw).tolist()
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_repeatability_within_types_is_not_fooled_by_types() -> None:
    """MLP needs more than attention in both probes, but within each type the second probe says the opposite."""
    sites = [site(i) for i in range(4)] + [site(i, name="mlp.up_proj") for i in range(4)]
    first = dict(zip(sites, [1, 2, 3, 4, 51, 52, 53, 54], strict=True))
    second = dict(zip(sites, [4, 3, 2, 1, 54, 53, 52, 51], strict=True))
    overall, within = repeatability(first, second)
    assert overall is not None
    assert overall > 0.5
    assert within == pytest.approx(-1.0)
