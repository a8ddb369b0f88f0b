"""Laws of the plan file: it round-trips, and is read strictly for one model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.core.plan import FORMAT, FORMER, PlannedSite, RankPlan
from rankwise.core.site import Site, describe, pattern
from rankwise.errors import DataError
from rankwise.files.plan import PLAN_FILE, find_plan, read_plan, write_plan
from rankwise.models.adapt import lora_config
from rankwise.options.sections import LoraSection

SITES = {
    path: describe(path, shape, tower)
    for path, shape, tower in [
        ("model.layers.0.self_attn.q_proj", (32, 32), "language"),
        ("model.layers.0.mlp.up_proj", (48, 32), "language"),
        ("model.layers.1.self_attn.q_proj", (32, 32), "language"),
        ("model.layers.1.mlp.up_proj", (48, 32), "language"),
        ("visual.blocks.0.attn.q_proj", (16, 16), "vision"),
    ]
}

planned = st.builds(
    PlannedSite,
    site=st.sampled_from(list(SITES.values())),
    rank=st.integers(0, 16),
    r_raw=st.none() | st.integers(0, 99),
    energy_retained=st.none() | st.floats(0, 1),
    decay_rate=st.none() | st.floats(0, 50),
    stable_rank=st.none() | st.floats(0, 99),
    entropy_rank=st.none() | st.floats(0, 99),
    saturated=st.booleans(),
    clipped=st.none() | st.sampled_from(["min", "max"]),
    method=st.sampled_from(["exact", "sketch", "zero delta"]),
)
plans = st.builds(
    RankPlan,
    sites=st.lists(planned, min_size=1, max_size=5, unique_by=lambda row: row.site.path)
    .filter(lambda rows: any(row.rank for row in rows))
    .map(tuple),
    model_name=st.text(max_size=8),
    use_rslora=st.booleans(),
    alpha_over_rank=st.sampled_from([0.5, 1.0, 2.0, 3.3]),
    description=st.text(max_size=8),
    metadata=st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2),
)


def by_path(plan: RankPlan) -> dict[str, PlannedSite]:
    return {row.site.path: row for row in plan.sites}


@given(plan=plans, with_model=st.booleans())
def test_a_plan_read_back_is_the_same_plan(
    tmp_path_factory: pytest.TempPathFactory, plan: RankPlan, with_model: bool
) -> None:
    """From the model's sites as from those that the file records; sites of rank 0 stay in the analysed matrices."""
    file = write_plan(tmp_path_factory.mktemp("plan") / "plan.json", plan)
    found = read_plan(file, SITES if with_model else None)
    assert by_path(found) == by_path(plan)
    assert (found.parameters, found.kept_fraction) == (plan.parameters, plan.kept_fraction)
    for name in ("model_name", "use_rslora", "alpha_over_rank", "description", "metadata", "ranks", "alpha_pattern"):
        assert getattr(found, name) == getattr(plan, name), name


def minimal(**content: Any) -> dict[str, Any]:
    return {"layer_ranks": {"q_proj": 8, "up_proj": 4}, **content}


def read(tmp_path: Path, content: dict[str, Any], sites: dict[str, Site] | None = SITES) -> RankPlan:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(content))
    return read_plan(file, sites)


def test_the_documented_minimal_form_expands_over_the_language_tower_only(tmp_path: Path) -> None:
    plan = read(tmp_path, {"description": "by hand", **minimal()})
    assert plan.ranks == {path: 8 if "q_proj" in path else 4 for path in SITES if not path.startswith("visual")}
    with pytest.raises(DataError, match="no site shapes; read the plan together with its model"):
        read(tmp_path, minimal(), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer_ranks": {"q_prj": 8}}, "no projection q_prj; it has q_proj, up_proj"),
        (minimal(layer_rank={}), r"unknown fields \['layer_rank'\]"),
        (minimal(format="rankwise-rank-plan/3"), "format"),
        (
            minimal(format="rankwise-rank-plan/1", use_rslora=True),
            "/1 took from each site's own rank; make the plan again",
        ),
        ({"layer_ranks": {"q_proj": 2.5}}, "rank of q_proj is 2.5; a rank is a whole number"),
        ({"layer_ranks": {"q_proj": -1}}, "whole number"),
        ({"layer_ranks": {"q_proj": True}}, "whole number"),
        ({"layer_ranks": {"q_proj": "8"}}, "whole number"),
        ({"layer_ranks": ["q_proj"]}, "layer_ranks must be an object"),
        ({}, "neither rank_pattern nor layer_ranks"),
        (minimal(layer_metadata={"q_proj": "all"}), "layer_metadata of q_proj must be a list"),
        (minimal(alpha_over_rank="two"), "alpha_over_rank must be a number above 0"),
        (minimal(use_rslora="yes"), "use_rslora must be true or false"),
        (
            {"rank_pattern": {"^model\\.layers\\.7\\.self_attn\\.q_proj$": 4}},
            "nearest: model.layers.[01].self_attn.q_proj",
        ),
        ({"rank_pattern": {"q_proj": 4}}, "no site q_proj"),
    ],
)
def test_what_is_not_a_plan_for_this_model_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content)
    assert "plan.json" in str(caught.value)


def one_site(rank: int, **content: Any) -> dict[str, Any]:
    return {"rank_pattern": {pattern("model.layers.0.self_attn.q_proj"): rank}, **content}


def test_a_plan_for_other_shapes_is_refused(tmp_path: Path) -> None:
    rows = [{"path": "model.layers.0.self_attn.q_proj", "shape": [64, 64]}]
    with pytest.raises(DataError, match=r"\(64, 64\) in the plan and \(32, 32\) in the model"):
        read(tmp_path, one_site(4, layer_metadata={"q_proj": rows}))


def test_a_rank_above_the_matrix_is_cut_and_says_so(tmp_path: Path) -> None:
    (row,) = read(tmp_path, one_site(100)).sites
    assert (row.rank, row.clipped) == (32, "100 is above min(m, n) = 32")


def test_rank_zero_leaves_the_site_out(tmp_path: Path) -> None:
    plan = read(tmp_path, {"layer_ranks": {"q_proj": 0, "up_proj": 4}})
    assert set(plan.ranks.values()) == {4}
    assert not any("q_proj" in key for key in plan.rank_pattern)


def test_scales_that_the_plan_cannot_keep_are_refused(tmp_path: Path) -> None:
    key = pattern("model.layers.0.self_attn.q_proj")
    assert read(tmp_path, one_site(4, alpha_pattern={key: 8})).alpha_pattern == {key: 8}
    assert read(tmp_path, one_site(4, alpha_pattern={key: 4}, alpha_over_rank=1)).alpha(4) == 4
    for alphas in ({key: 16}, {"^other$": 8}, {key: None}):
        with pytest.raises(DataError, match="alpha_pattern gives"):
            read(tmp_path, one_site(4, alpha_pattern=alphas))


def test_rslora_by_hand_in_a_written_plan_takes_no_alpha_pattern(tmp_path: Path) -> None:
    """The pattern that was written beside plain LoRA's scale is what is refused, not its agreement with the ranks."""
    written = {**one_site(4), "format": FORMAT, "alpha_pattern": {pattern("model.layers.0.self_attn.q_proj"): 8.0}}
    assert read(tmp_path, written).scale(4) == 2
    with pytest.raises(
        DataError, match=r"one alpha, alpha_over_rank \(2\) × the largest rank, so alpha_pattern does not apply"
    ):
        read(tmp_path, written | {"use_rslora": True})
    assert read(tmp_path, written | {"use_rslora": True, "alpha_pattern": {}}).scale(4) == 4


def test_the_former_format_means_the_same_without_rslora(tmp_path: Path) -> None:
    assert read(tmp_path, one_site(4, format=FORMER)).scale(4) == 2


@given(plan=plans)
def test_one_scale_at_every_site(plan: RankPlan) -> None:
    if plan.use_rslora:
        assert plan.alpha_pattern == {}
        alpha = plan.alpha_over_rank * max(plan.ranks.values(), default=1)
        assert {plan.alpha(rank) for rank in plan.ranks.values()} <= {alpha}
        assert all(plan.scale(rank) == pytest.approx(alpha / rank**0.5) for rank in plan.ranks.values())
    else:
        scales = {alpha / plan.rank_pattern[key] for key, alpha in plan.alpha_pattern.items()}
        assert all(abs(scale - plan.alpha_over_rank) < 1e-12 for scale in scales)


@given(paths=st.lists(st.text("ab.01_-+", min_size=1, max_size=8), min_size=2, max_size=5, unique=True))
def test_patterns_match_one_path_each_even_with_a_free_prefix(paths: list[str]) -> None:
    """PEFT matches `.*(\\.|^)pattern$`-like: an anchored full path must match itself and nothing else."""
    for path in paths:
        matching = [other for other in paths if re.match(rf"(.*\.)?({pattern(path)})$", other)]
        assert matching == [path]


def test_a_plan_is_found_in_its_run_folder(tmp_path: Path) -> None:
    plan = RankPlan((PlannedSite(SITES["model.layers.0.mlp.up_proj"], 4),))
    file = write_plan(tmp_path / PLAN_FILE, plan)
    assert find_plan(tmp_path) == find_plan(file) == file
    with pytest.raises(DataError, match="no rank plan here"):
        find_plan(tmp_path / "elsewhere")


def test_a_regex_of_all_sites_matches_them_and_no_others() -> None:
    plan = RankPlan(tuple(PlannedSite(s, 8) for s in SITES.values() if s.tower == "language"))
    target = lora_config(plan, LoraSection()).target_modules
    assert [path for path in SITES if re.fullmatch(target, path)] == list(plan.ranks)
