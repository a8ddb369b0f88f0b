"""A whole study at its smallest: registered, tuned, grown, read once, resumed; and what it refuses."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from tiny import tiny_llama
from transformers import LlamaForCausalLM

from rankwise import cli
from rankwise.core.allocate import TOLERANCE, equalise, is_equal, spent
from rankwise.core.phase import bind, returns
from rankwise.core.schedule import parse_schedule, permuted_form, random_form, reversed_form
from rankwise.core.site import Site, describe
from rankwise.data.example import Example, Examples, Turn
from rankwise.data.split import Sizes, divided
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import digest
from rankwise.files.ledger import Ledger
from rankwise.options.sections import DataSection, ModelSection
from rankwise.options.study import GridSection, ProbeSection, StudyConfig
from rankwise.report.report import build_report
from rankwise.study import command as stage
from rankwise.study import execution
from rankwise.study.arms import compress_pairs, ranks_within, schedule_of, type_means
from rankwise.study.design import design_study
from rankwise.study.registration import DEVIATIONS, FILE, TEST_READ, Registration
from rankwise.train.together.starts import random_start, row_order, scales_of
from rankwise.train.together.train import Arm, train_together

ARMS = ["uniform", "energy", "shuffled", "inverted"]


def small(base: Path, data: Path, out: Path, **changes: Any) -> StudyConfig:
    """Two arms' worth of everything: 2 to 3 seeds, 2 points, 2 steps."""
    config = StudyConfig(
        model=ModelSection(model_name=str(base)),
        data=DataSection(task="e2e_nlg", data_path=str(data)),
        probe=ProbeSection(probe_rows=16, probe_steps=4, probe_batch_size=4, probe_learning_rate=1e-2),
        **{"grid": GridSection(grid_low=1e-3, grid_high=1e-2, grid_points=2, grid_growth=1, tuning_seeds=1)}
        | {"train_size": 30, "dev_size": 5, "test_size": 6, "budgets": ["uniform:3"], "arms": ARMS}
        | {"steps": 2, "batch_size": 4, "first_seeds": 2, "more_seeds": 1, "most_seeds": 3, "resamples": 200}
        | {"smallest_effect": 1e-6, "output_dir": str(out), "device": "cpu"}
        | changes,
    )
    return config


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    stage.run(small(base, data, out))
    return out


def content(folder: Path) -> dict[str, Any]:
    """study.json without the times of the registration."""
    study = json.loads((folder / "study.json").read_text())
    study["registration"].pop("time")
    return study


def test_every_arm_has_the_budgets_parameters(finished: Path) -> None:
    rows = content(finished)["arms"]
    budget = next(row["parameters"] for row in rows if row["arm"] == "uniform")
    assert [row["arm"] for row in rows] == ARMS
    assert all(abs(row["parameters"] - budget) <= TOLERANCE * budget for row in rows)


def test_it_is_registered_before_the_first_run(finished: Path) -> None:
    first = json.loads((finished / FILE).read_text())
    assert first["sha256"] == digest(first["content"]) == content(finished)["registration"]["sha256"]
    assert {"smallest_effect", "primary", "grid_points", "first_seeds", "inputs", "test_size"} <= set(first["content"])
    assert (finished / FILE).stat().st_mtime_ns < (finished / "runs.jsonl").stat().st_mtime_ns


def test_seeds_grow_to_the_cap_and_tuning_seeds_are_others(finished: Path) -> None:
    keys = [row["key"] for row in Ledger(finished).rows.values()]
    seeds = {purpose: {key["seed"] for key in keys if key["purpose"] == purpose} for purpose in ("tune", "report")}
    assert len(seeds["report"]) == 3 and not seeds["tune"] & seeds["report"]
    assert content(finished)["seeds"] == {"reported": 3, "stopped": "the cap of 3 seeds", "tuning": 1}


def test_tuning_is_never_scored_on_test(finished: Path) -> None:
    ledger = Ledger(finished)
    for row in ledger.rows.values():
        assert len(ledger.numbers(row["key"], "dev")) == 5
        if row["key"]["purpose"] == "report":
            assert len(ledger.numbers(row["key"], "test")) == 6
        else:
            with pytest.raises(DataError, match="cannot be read"):
                ledger.numbers(row["key"], "test")


def test_deltas_of_a_run_outside_are_taken_and_said_to_be_unchecked(
    finished: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    config = small(base, data, tmp_path, arms=["uniform", "energy", "uniform+compute"], most_seeds=2)
    stage.run(replace(config, probe=ProbeSection(deltas=[str(finished / "probe" / "0")])))
    study = content(tmp_path)
    assert not (tmp_path / "probe").exists()
    assert any("not checked" in note for note in study["notes"])
    assert [row["steps"] for row in study["arms"]] == [2, 2, 2 + 4]


def test_a_broken_study_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"format": "rankwise-study/1", "verdicts": []}')
    with pytest.raises(DataError, match=r"study\.json: incomplete: assay"):
        build_report(tmp_path)


def test_the_grid_is_the_same_for_every_arm_and_grows_where_the_edge_is_best(finished: Path) -> None:
    for row in content(finished)["tuning"]:
        rates = [point["learning_rate"] for point in row["curves"]["constant"]]
        assert {1e-3, 1e-2} <= set(rates)
        assert len(rates) == 3 and row["at_edge"] == (row["learning_rate"] in (rates[0], rates[-1]))


def test_verdicts_and_assay_are_told_in_words(finished: Path) -> None:
    study, page = content(finished), (finished / "study.md").read_text()
    assert [row["contrast"] for row in study["verdicts"]] == ["energy vs uniform"]
    assert study["verdicts"][0]["verdict"] in page
    assert study["assay"][0]["against"].keys() == {"energy", "uniform"}
    assert "plans apart" in page and study["registration"]["sha256"] in page


def test_a_killed_study_goes_on_and_ends_the_same(
    finished: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(base, data, tmp_path / "again")
    whole, made = execution.Bench.make, []

    def stopped_at_the_third(bench: execution.Bench, runs: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append([run.key for run in runs])
        whole(bench, runs)

    monkeypatch.setattr(execution.Bench, "make", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        stage.run(config)
    with (tmp_path / "again" / "runs.jsonl").open("a") as stream:
        stream.write('{"key": {"arm": "cut o')
    monkeypatch.setattr(
        execution.Bench, "make", lambda bench, runs: (made.append([run.key for run in runs]), whole(bench, runs))
    )
    stage.run(config)
    keys = [json.dumps(key, sort_keys=True) for batch in made for key in batch]
    assert len(keys) == len(set(keys)) == len(Ledger(finished))
    first, second = content(finished), content(tmp_path / "again")
    assert first == second
    made.clear()
    stage.run(config)
    assert made == [] and content(tmp_path / "again") == second


def test_another_content_is_refused_with_the_differences(finished: Path, base: Path, data: Path) -> None:
    with pytest.raises(UsageError, match=r"smallest_effect: 1e-06 → 0\.5"):
        stage.run(small(base, data, finished, smallest_effect=0.5))


def test_deviations_are_recorded_and_told(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    config = small(base, data, tmp_path, most_seeds=2)
    stage.run(config)
    read = json.loads((tmp_path / TEST_READ).read_text())
    with pytest.raises(UsageError, match="registered otherwise"):
        stage.run(replace(config, most_seeds=3))
    assert json.loads((tmp_path / TEST_READ).read_text()) == read
    stage.run(replace(config, most_seeds=3, deviation="two seeds were too few"))
    rows = Registration(tmp_path).deviations
    assert [row.get("changed") for row in rows] == [{"most_seeds": [2, 3]}, None]
    assert rows[0]["test_was_read"] and rows[1]["test_read_again"] == read["time"]
    assert "two seeds were too few" in (tmp_path / "study.md").read_text()
    assert content(tmp_path)["registration"]["sha256"] == json.loads((tmp_path / FILE).read_text())["sha256"]
    stage.run(replace(config, most_seeds=3))
    assert len((tmp_path / DEVIATIONS).read_text().splitlines()) == 2


@pytest.mark.usefixtures("drawn_pictures")
def test_the_report_shows_the_study(finished: Path, tmp_path: Path) -> None:
    page = build_report(finished, tmp_path / "page.html").read_text()
    assert "energy" in page and "uniform:3" in page and page.count("data:image/png") >= 3


def test_phases_with_their_controls(base: Path, data: Path, tmp_path: Path) -> None:
    schedule = "mlp:1 > attention"
    arms = ["static", schedule, f"reversed:{schedule}", f"random:{schedule}", f"static@{schedule}"]
    grid = GridSection(grid_points=2, tuning_seeds=1, grid_growth=0, lr_schedulers=["constant", "cosine"])
    config = small(base, data, tmp_path, kind="phases", arms=arms, steps=3, most_seeds=2)
    stage.run(replace(config, grid=grid))
    study = content(tmp_path)
    assert len(study["arms"]) == 10 and not (tmp_path / "probe").exists()
    assert [(row["first"], row["scheduler"]) for row in study["verdicts"]] == [
        (schedule, name) for name in ("constant", "cosine")
    ]


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose attention and MLP have gradients of like norm, so that `norm` has a choice."""
    folder = tiny_llama(tmp_path_factory.mktemp("even"), initializer_range=0.1)
    model = LlamaForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 2
    model.save_pretrained(folder)
    return folder


def choosing(base: Path, data: Path, out: Path, **changes: Any) -> StudyConfig:
    """A study of `norm:1` and of what replays it; phases change at once, so few steps are enough."""
    grid = GridSection(grid_low=1e-2, grid_high=1e-1, grid_points=2, tuning_seeds=2, grid_growth=1)
    arms = ["static", "yoked:norm:1", "norm:1"]
    return small(base, data, out, **{"kind": "phases", "arms": arms, "steps": 6, "grid": grid} | changes)


@pytest.fixture(scope="module")
def chosen(even: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Arm]]:
    """A finished study of `norm:1`, and every arm that was trained together with others."""
    out, stacked = tmp_path_factory.mktemp("norm"), []

    def noted(model: Any, arms: Any, *rest: Any) -> Any:
        stacked.extend(arms)
        return train_together(model, arms, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "train_together", noted)
        stage.run(choosing(even, data, out))
    return out, stacked


def test_a_yoked_arm_replays_another_seeds_choices(chosen: tuple[Path, list[Arm]]) -> None:
    folder, stacked = chosen
    rows = list(Ledger(folder).rows.values())
    made = {
        (row["key"]["purpose"], row["key"]["learning_rate"], row["key"]["seed"]): row
        for row in rows
        if row["key"]["arm"] == "norm:1"
    }
    yoked = [row["key"] for row in rows if row["key"]["arm"] == "yoked:norm:1"]
    sites = {path: describe(path, (1, 1)) for path in stacked[0].start}
    assert len(yoked) >= 2 * 2 + 3 and len({row["replay"] for row in made.values()}) > 1
    for key in yoked:
        source = key["replays"]
        assert source["seed"] != key["seed"] and abs(source["seed"] - key["seed"]) == 1
        assert key["purpose"] == "report" or source["learning_rate"] == key["learning_rate"]
        text = made[key["purpose"], source["learning_rate"], source["seed"]]["replay"]
        expected = bind(parse_schedule(text), sites, 0)
        (arm,) = [
            arm
            for arm in stacked
            if arm.active is not None
            and arm.learning_rate == key["learning_rate"]
            and list(arm.order) == row_order(30, 24, key["seed"])
        ]
        assert [arm.active(step) for step in range(6)] == [expected.active(step) for step in range(6)]


def test_choosing_is_compared_with_static_and_with_its_replay(chosen: tuple[Path, list[Arm]]) -> None:
    study = content(chosen[0])
    assert [row["contrast"] for row in study["verdicts"]] == ["norm:1 vs static", "norm:1 vs yoked:norm:1"]
    tuned = {row["arm"]: row["learning_rate"] for row in study["tuning"]}
    reported = [row["key"] for row in Ledger(chosen[0]).rows.values() if row["key"]["purpose"] == "report"]
    for key in reported:
        assert "replays" not in key or key["replays"]["learning_rate"] == tuned["norm:1"]


def test_a_killed_study_of_choices_goes_on_and_ends_the_same(
    chosen: tuple[Path, list[Arm]], even: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, left = execution.Bench.make, [6]

    def stopped(bench: execution.Bench, runs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        whole(bench, runs)

    monkeypatch.setattr(execution.Bench, "make", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage.run(choosing(even, data, tmp_path))
    assert 0 < len(Ledger(tmp_path)) < len(Ledger(chosen[0]))
    monkeypatch.undo()
    stage.run(choosing(even, data, tmp_path))
    assert content(tmp_path) == content(chosen[0])


def test_state_is_crossed_only_where_a_site_rests_and_comes_back(base: Path, data: Path, tmp_path: Path) -> None:
    comes_back, goes = "both:1 > mlp:1 > attention", "early:1 > late"
    arms = ["static", comes_back, goes, f"permuted:{goes}", f"random:{comes_back}", "norm:1", "yoked:norm:1"]
    grid = GridSection(tuning_seeds=2, phase_states=["keep", "reset"])
    primary = [f"{comes_back} vs static", f"{goes} vs static", f"{comes_back} vs {goes}", "norm:1 vs yoked:norm:1"]
    design = design_study(small(base, data, tmp_path, kind="phases", arms=arms, steps=4, grid=grid, primary=primary))
    twice = [comes_back, f"random:{comes_back}", "norm:1", "yoked:norm:1"]
    assert [each.arm for each in design.contenders if each.state == "reset"] == twice
    pairs = [(one.arm, one.state, other.arm, other.state) for one, other in design.pairs()]
    assert pairs == [
        (comes_back, "keep", "static", "keep"),
        (comes_back, "reset", "static", "keep"),
        (goes, "keep", "static", "keep"),
        (comes_back, "keep", goes, "keep"),
        (comes_back, "reset", goes, "keep"),
        ("norm:1", "keep", "yoked:norm:1", "keep"),
        ("norm:1", "reset", "yoked:norm:1", "reset"),
    ]
    labels = [design.label(each) for each in design.contenders]
    assert labels.count(goes) == 1 and f"{comes_back}, reset" in labels


SCHEDULES = (
    "both:2 > mlp:2 > attention",
    "mlp:2 > attention:2 > both",
    "all:2 > both:2 > attention",
    "early:2 > late",
    "early:2 > late:2 > early",
    "early:2 > late:2 > mlp",
    "layers 0-0:2 > layers 1-1:2 > layers 2-2",
    "layers 0-1:2 > layers 1-2:2 > layers 0-0",
    "attention early:2 > mlp:2 > attention late",
    "random both:2 > mlp:2 > attention",
    "mlp:1 > random all:1 > mlp",
)


@pytest.mark.parametrize("text", SCHEDULES)
def test_what_never_returns_never_returns(text: str) -> None:
    """The text alone never says "no" where sites of a model do rest and come back."""
    form = parse_schedule(text)
    bound = bind(form, {site.path: site for site in some_sites()}, 1)
    steps = [bound.active(step) for step in range(8)]
    back = any((steps[step] - steps[step - 1]) & frozenset().union(*steps[: step - 1]) for step in range(2, len(steps)))
    assert returns(form) >= back and returns(form, any_order=True) >= returns(form)
    assert returns(form) == back or "random" in text, "nor does it say yes for nothing"


@pytest.mark.slow
def test_two_processes_choose_what_one_chooses(
    chosen: tuple[Path, list[Arm]], even: Path, data: Path, tmp_path: Path
) -> None:
    in_processes(choosing(even, data, tmp_path / "two"), tmp_path)
    assert content(tmp_path / "two") == content(chosen[0])


def in_processes(config: StudyConfig, folder: Path) -> str:
    """The study in two processes; what they print."""
    stage.RunFolder(folder).save_config(config, "study.json")
    result = processes.run("-m", "rankwise.cli", "study", folder / "study.json", count=2)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_all_arms_of_a_study_of_plans(base: Path, data: Path, tmp_path: Path) -> None:
    config = small(base, data, tmp_path, arms=[], most_seeds=2, budgets=["uniform:2"])
    stage.run(replace(config, grid=replace(config.grid, scales=["constant", "rslora"])))
    study = content(tmp_path)
    rows = {row["arm"]: row for row in study["arms"]}
    assert len(rows) == 14
    budget = rows["uniform"]["parameters"]
    for name, row in rows.items():
        if name not in ("full", "base"):
            assert abs(row["parameters"] - budget) <= TOLERANCE * budget, name
    assert rows["base"]["parameters"] == 0 and rows["full"]["parameters"] > budget
    assert rows["uniform+compute"]["steps"] == 2 + 4
    tried = {row["arm"]: set(row["curves"]) for row in study["tuning"]}
    assert tried["uniform"] == {"constant"} and tried["energy"] == {"constant", "rslora"}
    assert any("equal in final, not trained" in note for note in study["notes"])


@pytest.mark.slow
def test_two_processes_share_the_runs_and_find_what_one_finds(base: Path, data: Path, tmp_path: Path) -> None:
    config = small(base, data, tmp_path / "one", most_seeds=2, batch_arms=4)
    stage.run(config)
    printed = in_processes(replace(config, output_dir=str(tmp_path / "two")), tmp_path)
    assert printed.count("registered") == 1, "one process speaks"
    shares = [len((tmp_path / "two" / name).read_text().splitlines()) for name in ("runs.jsonl", "runs.1.jsonl")]
    assert min(shares) > 0 and sum(shares) == len(Ledger(tmp_path / "one"))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_time_only_trains_one_batch_and_says_what_is_left(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(base, data, tmp_path, time_only=True, batch_arms=2)
    stage.run(config)
    assert "2 are done at" in capsys.readouterr().out and not (tmp_path / "study.json").exists()
    assert any("are left" in line for line in stage.describe(config))


def test_without_a_measured_rate_no_time_is_guessed(base: Path, data: Path, tmp_path: Path) -> None:
    lines = stage.describe(small(base, data, tmp_path / "none"))
    assert any("8 runs to tune" in line and "16 to 20 in all" in line for line in lines)
    assert any("not known yet" in line for line in lines)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["uniform", "enerqy"]}, "energy"),
        ({"arms": ["uniform:loss"]}, "unknown arm"),
        ({"primary": ["energy against uniform"]}, "ARM vs ARM"),
        (
            {"primary": ["loss vs uniform"]},
            r"unknown arm 'loss'.*arms are uniform, .*: add it to --arms",
        ),
        ({"first_seeds": 1}, "first_seeds"),
        ({"smallest_effect": 0.0}, "--smallest_effect is 0.0; give a number above 0"),
        ({"kind": "phases", "arms": ["static", "yoked:norm:2"]}, "name that arm as well"),
        ({"kind": "phases", "arms": ["static", "norm:2", "yoked:norm:2"]}, "tuning_seeds at least 2"),
        ({"kind": "phases", "arms": ["static", "yoked:mlp:1 > attention"]}, "can be replayed"),
        ({"kind": "phases", "arms": ["static", "static@norm:2"]}, "not known in advance"),
        ({"kind": "phases", "arms": ["static", "reversed:norm:2"]}, "needs a list of phases"),
        ({"kind": "phases", "arms": ["static", "mlp:9 > attention"]}, "9 steps before the last"),
        ({"arms": ["shuffled", "base"]}, "no primary contrast"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    base: Path, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        design_study(small(base, data, tmp_path, **changes))


def test_the_packages_studies_are_found_by_name(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ranks", "phases", "referee"):
        words = ["study", name, "--model_name", str(base), "--data_path", str(data), "-o", str(tmp_path), "--dry-run"]
        assert cli.main([*words, "--train_size", "30", "--dev_size", "5", "--test_size", "6"]) == 0
        assert "runs to tune" in capsys.readouterr().out
    assert cli.main(["study", "rank"]) == 2
    assert "ranks" in capsys.readouterr().err


SHAPES = {"q_proj": (32, 32), "k_proj": (16, 32), "gate_proj": (48, 32), "down_proj": (32, 48)}


def some_sites(layers: int = 3) -> list[Site]:
    return [
        describe(
            f"model.layers.{layer}.{'mlp' if shape[0] + shape[1] == 80 else 'self_attn'}.{name}", shape, "language"
        )
        for layer in range(layers)
        for name, shape in SHAPES.items()
    ]


def random_gains(seed: int) -> dict[Site, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        site: torch.rand(min(site.shape), generator=generator, dtype=torch.float64).sort(descending=True).values
        for site in some_sites()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_budgets_are_met_within_half_a_percent(seed: int, rank: int) -> None:
    gains = random_gains(seed)
    budget = sum(site.parameters(rank) for site in gains)
    ranks = ranks_within(gains, budget, 16)
    assert is_equal(ranks, budget) and min(ranks.values()) >= 0


def test_equal_already_stays_as_it_is_and_the_impossible_is_refused() -> None:
    gains = random_gains(0)
    ranks = dict.fromkeys(gains, 2)
    assert equalise(ranks, spent(ranks), gains, dict.fromkeys(gains, 8)) == ranks
    with pytest.raises(UsageError, match="raise the budget"):
        equalise(dict.fromkeys(gains, 0), 5, gains, dict.fromkeys(gains, 8))


def test_type_means_give_a_projection_one_worth() -> None:
    means = type_means(random_gains(1))
    queries = [gain for site, gain in means.items() if site.projection == "q_proj"]
    assert all(torch.equal(queries[0], other) for other in queries)
    assert sum(float(gain.sum()) for gain in means.values()) == pytest.approx(
        sum(float(gain.sum()) for gain in random_gains(1).values())
    )


def test_arms_share_the_leading_rows_and_the_order_of_the_data() -> None:
    sites = some_sites(1)
    narrow, wide = (random_start(dict.fromkeys(sites, rank), 7, 16) for rank in (2, 5))
    for site in sites:
        assert torch.equal(narrow[site.path][0], wide[site.path][0][:2])
        assert not narrow[site.path][1].any()
    other = random_start(dict.fromkeys(sites, 2), 8, 16)
    assert not torch.equal(other[sites[0].path][0], narrow[sites[0].path][0])
    assert row_order(10, 35, 3)[:20] == row_order(10, 20, 3)
    assert sorted(row_order(10, 10, 3)) == list(range(10))


def test_scales_agree_at_the_uniform_rank() -> None:
    sites = some_sites(1)
    reference = dict.fromkeys(sites, 4)
    ranks = dict(zip(sites, (0, 1, 4, 16), strict=True))
    paths = [site.path for site in sites[1:]]
    assert [scales_of(ranks, "constant", reference)[path] for path in paths] == [2.0, 2.0, 2.0]
    assert [scales_of(ranks, "alpha", reference)[path] for path in paths] == [8.0, 2.0, 0.5]
    assert [scales_of(ranks, "rslora", reference)[path] for path in paths] == [4.0, 2.0, 1.0]


def test_a_compressed_adapter_has_the_budget_and_the_best_product() -> None:
    sites = some_sites(1)
    generator = torch.Generator().manual_seed(0)
    pairs = {
        site: (torch.randn(8, site.shape[1], generator=generator), torch.randn(site.shape[0], 8, generator=generator))
        for site in sites
    }
    budget = sum(site.parameters(8) for site in sites)
    whole = compress_pairs(pairs, {site.path: 2.0 for site in sites}, budget)
    for site, (a, b) in pairs.items():
        left, right = whole[site.path]
        torch.testing.assert_close(right @ left, b @ a, rtol=1e-4, atol=1e-4)
    half = compress_pairs(pairs, {site.path: 2.0 for site in sites}, budget // 2)
    assert sum(a.numel() + b.numel() for a, b in half.values()) == pytest.approx(budget / 2, rel=TOLERANCE)


def test_shuffled_plans_are_fresh_for_every_seed(base: Path, data: Path, tmp_path: Path) -> None:
    config = small(base, data, tmp_path, arms=["uniform", "energy", "shuffled"], time_only=True)
    design = design_study(config)
    material = stage.load_material(config.model, config.data, config.target, config.device, stage.parts_of(config))
    registration = stage.register_study(stage.RunFolder(tmp_path), design, material)
    bench = stage.workbench(stage.RunFolder(tmp_path), design, material, registration)
    contender = next(each for each in design.contenders if each.arm == "shuffled")
    drawn = [tuple(bench.plans.ranks(contender, seed).values()) for seed in range(6)]
    assert len(set(drawn)) > 3 and drawn[0] == tuple(bench.plans.ranks(contender, 0).values())
    energy = bench.plans.ranks(replace(contender, arm="energy"), 0)
    assert all(sorted(ranks) == sorted(energy.values()) for ranks in drawn)
    rows = json.loads((tmp_path / "probe" / "0" / "deltas" / "deltas.json").read_text())["rows"]
    assert set(rows) <= {example.id for example in material.parts.train}


def test_controls_keep_what_they_should() -> None:
    form = parse_schedule("both:3 > mlp:2 > attention")
    assert str(reversed_form(form, 10)) == "attention:5 > mlp:2 > both"
    permuted = {str(permuted_form(form, 10, seed)) for seed in range(40)}
    assert len(permuted) == 5 and "both:3 > mlp:2 > attention" not in permuted
    assert permuted_form(form, 10, 1) == permuted_form(form, 10, 1)
    sites = {site.path: site for site in some_sites()}
    own, drawn = bind(form, sites, 1), bind(random_form(form), sites, 1)
    assert [len(own.active(step)) for step in range(10)] == [len(drawn.active(step)) for step in range(10)]
    assert own.active(4) != drawn.active(4)
    assert schedule_of("static", 10, 0) is None


def example(number: int, facts: str, group: str | None = None) -> Example:
    turns = (Turn("user", "Describe the place."), Turn("user", facts), Turn("assistant", f"It is {number}."))
    return Example(f"row-{number}", group or facts, turns)


def test_parts_share_no_group_and_no_near_duplicate() -> None:
    words = [f"w{i}" for i in range(40)]
    facts = [" ".join(words[i : i + 20]) for i in range(12)]
    turned = " ".join(reversed(facts[0].split()))
    pool = [example(number, text) for number, text in enumerate(facts[1:])]
    pool += [example(90, turned), example(91, facts[0].upper() + "!"), example(92, "else", group=facts[0])]
    test = Examples((example(99, facts[0]),))
    parts = divided(Examples(tuple(pool)), None, test, Sizes(6, 2, 1), random.Random(1))
    ids = {row.id for row in (*parts.train, *parts.dev)}
    assert not ids & {"row-90", "row-91", "row-92"}
    assert not {row.group for row in parts.train} & {row.group for row in parts.dev}
    assert sum(parts.removed.values()) == 3 and len(parts.train) == 6


def test_a_ledger_gives_back_what_it_took_and_reads_one_part_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    rows = [{"key": {"arm": "a", "seed": seed}, "seconds": 1.0} for seed in (1, 2)]
    ledger.add(rows, {"dev": torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), "test": torch.tensor([[5.0], [6.0]])})
    again = Ledger(tmp_path)
    assert len(again) == 2 and {"arm": "a", "seed": 2} in again and {"arm": "a", "seed": 3} not in again
    assert again.numbers({"arm": "a", "seed": 1}, "dev").tolist() == [1.0, 2.0]
    assert again.numbers({"arm": "a", "seed": 2}, "test").tolist() == [6.0]
