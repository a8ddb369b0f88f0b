"""The summary fits one screen whatever it is told, and its verdict never says more than the evidence."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import describe
from rankwise.page.text import duration, memory, percent
from rankwise.ranks import summary as module
from rankwise.ranks.choice import PURPOSE, UNIFORM, MetricChoice
from rankwise.ranks.gain import Gain, KeptGain
from rankwise.ranks.summary import HEIGHT, WIDTH, RanksSummary, distance_from_uniform, render, verdict


def plan_of(ranks: dict[str, int], shape: tuple[int, int] = (64, 64), tower: str = "language") -> RankPlan:
    return RankPlan(tuple(PlannedSite(describe(path, shape, tower), rank) for path, rank in ranks.items()))


UNEQUAL = plan_of(
    {f"layers.{i}.{name}": rank for i in range(4) for name, rank in (("q_proj", 4 + 6 * i), ("k_proj", 20))}
)
UNIFORM_PLAN = plan_of({f"layers.{i}.{name}": 16 for i in range(4) for name in ("q_proj", "k_proj")})
BASE = RanksSummary(model="tiny", plan=UNEQUAL, stored_as=("float32",), seconds=12.0, peak_memory=2**30)
BETTER: dict[str, Any] = {
    "gain_plan": 0.64,
    "gain_uniform": 0.60,
    "gain_margin": (0.01, 0.07),
    "gain_shuffles": (0.6, 0.61),
}

words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=150)
lines = st.lists(words, min_size=1, max_size=30).map(" ".join)
shares = st.none() | st.floats(0, 1)
rhos = st.none() | st.floats(-1, 1)


@st.composite
def plans(draw: st.DrawFn) -> RankPlan:
    layers, types, towers = draw(st.integers(1, 90)), draw(st.integers(1, 24)), draw(st.integers(1, 3))
    ranks = draw(st.lists(st.integers(0, 64), min_size=7, max_size=7))
    name = draw(st.sampled_from(["p{}", "a_very_long_projection_name_{}_of_some_odd_architecture_or_other"]))
    rows = [
        PlannedSite(
            describe(f"m.{layer}.{name.format(i)}", (64, 96), ("language", "vision", "projector")[layer % towers]),
            ranks[(layer + i) % 7],
        )
        for layer in range(layers)
        for i in range(types)
    ]
    return RankPlan(tuple([*rows, PlannedSite(describe("head", (9, 9)), 3)] if draw(st.booleans()) else rows))


def gain_of(losses: dict[str, float], margin: tuple[float, float] | None, low: float = 0.1) -> Gain:
    arms = tuple(KeptGain(name, 100, loss, 2 - loss, 0.0, 1.0) for name, loss in losses.items())
    return Gain(2.0, 1.0, 24, 240, low, 1.0, margin, arms)


@st.composite
def choices(draw: st.DrawFn) -> MetricChoice:
    names = ["weight", "activation", "loss", UNIFORM]
    losses = {name: draw(st.floats(-9, 11)) for name in names}
    low = draw(st.sampled_from([-0.1, 0.1]))
    margin = draw(st.none() | st.tuples(st.floats(-9, 9), st.floats(-9, 9)))
    return MetricChoice(draw(st.sampled_from(names[:3])), gain_of(losses, None, low), gain_of(losses, margin, low))


@st.composite
def summaries(draw: st.DrawFn) -> RanksSummary:
    few = st.lists(lines, max_size=6).map(tuple)
    return RanksSummary(
        model=draw(lines),
        plan=draw(plans()),
        stored_as=draw(st.sampled_from([("float32",), ("bfloat16", "float16", "float32")])),
        seconds=draw(st.floats(0, 1e6)),
        peak_memory=draw(st.integers(0, 2**45)),
        noise_share=draw(shares),
        exact_sites=draw(st.integers(0, 900)),
        saturated_sites=draw(st.integers(0, 2000)),
        energy_rank_share=draw(shares),
        budget=draw(st.none() | st.integers(1, 10**12)),
        above_null=draw(st.none() | st.integers(0, 2000)),
        rho_all=draw(rhos),
        rho_within=draw(rhos),
        gain_plan=draw(shares),
        gain_uniform=draw(shares),
        gain_shuffles=draw(st.lists(st.floats(-2, 2), max_size=9).map(tuple)),
        gain_margin=draw(st.none() | st.tuples(st.floats(-1, 1), st.floats(-1, 1))),
        gain_note=draw(st.just("") | lines),
        choice=draw(st.none() | choices()),
        next_commands=draw(st.lists(st.lists(words, min_size=1, max_size=30).map(shlex.join), max_size=6).map(tuple)),
        files=draw(few),
        warnings=draw(few),
    )


@settings(max_examples=60, deadline=None)
@given(summaries())
def test_it_always_fits_one_screen_and_always_has_a_verdict(summary: RanksSummary) -> None:
    shown = render(summary).split("\n")
    assert len(shown) <= HEIGHT == 24
    assert max(map(len, shown)) <= WIDTH == 100
    assert any(line.startswith("Verdict    ") for line in shown)
    assert any(line.startswith("median rank") for line in shown)


def test_everything_that_was_measured_is_said() -> None:
    full = replace(
        BASE,
        noise_share=0.0004,
        saturated_sites=2,
        energy_rank_share=0.52,
        budget=40_000,
        above_null=7,
        rho_all=0.97,
        rho_within=0.81,
        probes=2,
        next_commands=("rankwise train --lora-config configs/lora_rank_config.json",),
        files=("configs/lora_rank_config.json",),
        **BETTER,
    )
    shown = " ".join(render(full).split())
    for part in (
        "tiny",
        "8 sites",
        "float32",
        "12 s",
        "1.0 GiB",
        "0.040 %",
        "2 of 8 sites (25 %) saturate",
        "52 % of full rank",
    ):
        assert part in shown
    for part in (f"{UNEQUAL.parameters:,} of the budget of 40,000", "0.97 over all", "0.81 within", "7 of 8 sites"):
        assert part in shown
    for part in (
        "plan 64.0 %, uniform 60.0 %, 2 shuffles 60.0 to 61.0 %",
        "[+1.0, +7.0]",
        "rankwise train",
        "configs/lora",
    ):
        assert part in shown


def test_what_was_not_measured_says_how_to_measure_it() -> None:
    shown = render(BASE)
    assert "one probe: not known, add --probe2" in shown
    assert "not measured, add --gain DATA" in shown


def test_nearly_all_clipped_is_called_uniform_rank_and_points_to_the_budget() -> None:
    shown = " ".join(render(replace(BASE, plan=UNIFORM_PLAN, saturated_sites=8, clipped_sites=8)).split())
    assert "8 of 8 sites (100 %) saturate" in shown and "this is uniform rank. --budget N" in shown
    assert "uniform in disguise" in shown
    assert "this is uniform rank" not in render(replace(BASE, saturated_sites=5))


@pytest.mark.parametrize(("saturated", "said"), [(8, "needs at least 40 % of"), (1, "needs 40 % of")])
def test_energy_rank_of_saturated_sites_is_a_lower_bound(saturated: int, said: str) -> None:
    assert said in " ".join(render(replace(BASE, saturated_sites=saturated, energy_rank_share=0.4)).split())


def test_with_a_budget_the_bounds_are_not_blamed() -> None:
    assert "this is uniform rank" not in render(replace(BASE, saturated_sites=8, budget=10**6))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "unproven: one probe"),
        ({"rho_all": 0.95, "rho_within": 0.8}, "repeatable but unproven"),
        ({"rho_all": 0.95, "rho_within": 0.3}, "not repeatable"),
        ({"plan": UNIFORM_PLAN}, "uniform in disguise"),
        ({"plan": UNIFORM_PLAN, **BETTER}, "uniform in disguise"),
        ({"noise_share": 0.8, **BETTER}, "mostly rounding noise"),
        (BETTER, "keeps more than uniform and than all 2 shuffles, on this data; from one probe"),
        ({**BETTER, "rho_all": 0.9}, "all 2 shuffles, on this data; repeatable"),
        ({**BETTER, "rho_all": 0.9, "rho_within": 0.1}, "but another probe gives another plan"),
        ({**BETTER, "gain_shuffles": (0.6, 0.66)}, "no more than 1 of 2 shuffles"),
        ({**BETTER, "gain_shuffles": ()}, "no shuffles were run"),
        ({**BETTER, "gain_margin": (-0.01, 0.09)}, "no evidence that this plan beats uniform"),
        ({**BETTER, "gain_margin": None}, "no evidence that this plan beats uniform"),
        ({**BETTER, "gain_plan": 0.5, "gain_margin": (-0.12, -0.08)}, "keeps less than uniform"),
    ],
)
def test_verdict_in_words(changes: dict[str, Any], said: str) -> None:
    assert said in verdict(replace(BASE, **changes))


@pytest.mark.parametrize(
    ("losses", "margin", "low", "said"),
    [
        ((1.2, 1.4), (0.01, 0.3), 0.1, "`--metric loss` keeps more than uniform and than all 2 shuffles"),
        ((1.2, 1.4), (-0.01, 0.3), 0.1, "`--metric loss` is not confirmed, its gain over uniform is [-1.0, +30.0]"),
        ((1.2, 1.4), (0.01, 0.3), -0.1, "one rank everywhere: the probe's own gain touches 0"),
        ((1.4, 1.4), (0.01, 0.3), 0.1, "one rank everywhere: no metric keeps more on the items that choose"),
    ],
)
def test_verdict_of_a_chosen_metric_says_what_it_is_for(
    losses: tuple[float, float], margin: tuple[float, float], low: float, said: str
) -> None:
    arms = dict(zip(("loss", UNIFORM), losses, strict=True))
    choice = MetricChoice("loss", gain_of(arms, None), gain_of(arms, margin, low))
    found = replace(BASE, plan=UNIFORM_PLAN, choice=choice, **BETTER | {"gain_margin": margin})
    assert said in verdict(found)
    assert verdict(found).endswith(PURPOSE) and PURPOSE in " ".join(render(found).split())
    every = gain_of({"weight": 1.471, "activation": 1.475, "loss": 1.42, UNIFORM: 1.454}, None)
    shown = render(replace(found, choice=replace(choice, choosing=replace(every, items=128))))
    assert "weight 52.9 %, activation 52.5 %, loss 58.0 %, uniform 54.6 % on 128 items that choose" in shown


@settings(max_examples=100, deadline=None)
@given(summaries())
def test_verdict_claims_a_gain_only_with_an_interval_above_zero_and_every_shuffle_beaten(summary: RanksSummary) -> None:
    if verdict(summary).startswith("keeps more than uniform and"):
        assert summary.gain_plan is not None and summary.gain_margin is not None and summary.gain_margin[0] > 0
        assert all(summary.gain_plan > shuffle for shuffle in summary.gain_shuffles) and summary.gain_shuffles
        assert (summary.noise_share or 0) < module.NOISY
        assert distance_from_uniform(summary.plan) >= module.DISGUISE


def test_distance_from_uniform_counts_the_parameters_that_lie_elsewhere() -> None:
    assert distance_from_uniform(UNIFORM_PLAN) == 0
    assert distance_from_uniform(plan_of({"layers.0.q_proj": 4, "layers.1.q_proj": 12})) == pytest.approx(0.25)
    assert distance_from_uniform(plan_of({"layers.0.q_proj": 0, "layers.1.q_proj": 8})) == pytest.approx(0.5)


def test_uniform_with_small_sites_at_their_own_limit_is_still_uniform() -> None:
    big = [PlannedSite(describe(f"layers.{i}.q_proj", (64, 64)), 16) for i in range(20)]
    small = PlannedSite(describe("layers.0.k_proj", (4, 4)), 2)
    assert distance_from_uniform(RankPlan((*big, small))) < 0.01


def test_table_holds_the_median_rank_of_each_layer_range_and_type() -> None:
    ranks = {f"layers.{i}.{name}": rank for i in range(12) for name, rank in (("q_proj", i), ("up_proj", 40 - i))}
    del ranks["layers.0.up_proj"], ranks["layers.1.up_proj"]
    shown = render(replace(BASE, plan=plan_of(ranks))).split("\n")
    table = [line.split() for line in shown if line.startswith("layers ")]
    assert table[0] == ["layers", "0–1", "0"]
    assert table[-1] == ["layers", "10–11", "10", "29"]
    assert len(table) == 6


def test_towers_have_their_own_rows() -> None:
    both = (*UNEQUAL.sites, *plan_of({"visual.0.qkv": 5, "visual.1.qkv": 7}, tower="vision").sites)
    shown = render(replace(BASE, plan=RankPlan(both)))
    assert "language layers 0–1" in shown and "vision layer 0" in shown


def test_next_commands_can_be_pasted() -> None:
    """Shown whole, over several lines with a backslash where they are long, or not at all."""
    long = "rankwise train --lora-config configs/lora_rank_config.json " + "--some-flag value-number-one " * 4
    shown = render(replace(BASE, next_commands=(long.strip(), "rankwise evaluate x"))).split("\n")
    start = next(i for i, line in enumerate(shown) if line.startswith("Next"))
    text = "\n".join(line[11:] for line in shown[start:])
    assert [command.split() for command in text.replace("\\\n", "").splitlines()] == [
        long.split(),
        ["rankwise", "evaluate", "x"],
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(0.84), "0.8 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(7500), "2 h 05 min"),
        (memory(3 * 2**29), "1.5 GiB"),
        (memory(5 * 2**20), "5 MiB"),
        (percent(0.0217), "2.2 %"),
        (percent(0.000412), "0.041 %"),
        (percent(0.0), "0 %"),
        (percent(0.999), "100 %"),
    ],
)
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected
