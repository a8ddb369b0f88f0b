"""`rankwise features compare`: what it writes, on which images, what it refuses, and its part of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factor_folders import CHANNELS, RANK, TOKENS, history, make_cache, make_run, matrices

from rankwise.cli import main
from rankwise.errors import DataError, UsageError
from rankwise.features import page as pages
from rankwise.features.answers import NOTHING, ORIGINAL
from rankwise.features.approximation import by_basis, normalised, shared_basis
from rankwise.features.cache import open_cache
from rankwise.features.compare import run
from rankwise.features.dataset import split_of
from rankwise.features.measures import GRAM, OF_FACTORS, PCA, RANDOMIZED, SVD, relative_error
from rankwise.features.page import against_pca, closeness_table, cost_table, storage_words, verdict
from rankwise.features.trained import save_factorizer
from rankwise.files.atomic import write_json
from rankwise.options.features import FactorCompareConfig
from rankwise.page import canvas
from rankwise.page.blocks import table_lines
from rankwise.report.report import build_report

BASELINES = [SVD, GRAM, RANDOMIZED, PCA]
QUICK = {"batch_size": 4, "repeats": 1, "sweep": [2, RANK, 8], "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 24 images, another of 6 of which one is the same picture, and two networks, compared on both."""
    root = tmp_path_factory.mktemp("compare")
    cache = make_cache(root / "cache", matrices(24))
    shared = [cache.groups[0], *(f"other {i}" for i in range(5))]
    make_cache(root / "other", matrices(6, seed=9), groups=shared, name="drawing")
    make_run(root / "results", cache, "MLP", refine=True)
    net = make_run(root / "results", cache, "AdaLoRA")
    net.mask_ranks(torch.tensor([True, True, True, False]))
    save_factorizer(net, root / "results" / "AdaLoRA")
    run(FactorCompareConfig(results_dir=str(root / "results"), ood=str(root / "other"), **QUICK))
    return root


@pytest.fixture(scope="module")
def content(made: Path) -> dict[str, Any]:
    return json.loads((made / "results" / "comparison.json").read_text())


def rows_of(source: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in source["rows"] if not row["refined"]}


def test_every_method_has_every_measure_with_its_interval(content: dict[str, Any]) -> None:
    assert content["networks"] == ["AdaLoRA", "MLP"] and content["rank"] == RANK
    for source in content["sources"]:
        assert list(rows_of(source)) == [*BASELINES, "AdaLoRA", "MLP"]
        assert [row["method"] for row in source["rows"] if row["refined"]] == ["MLP"]
        for row in rows_of(source).values():
            for name in OF_FACTORS:
                estimate = row[name]
                assert estimate["low"] <= estimate["mean"] + 1e-12 and estimate["mean"] <= estimate["high"] + 1e-12


def test_the_svd_is_the_floor_on_both_sources(content: dict[str, Any]) -> None:
    for source in content["sources"]:
        rows = rows_of(source)
        for name in (SVD, GRAM):
            assert abs(rows[name]["excess_error"]["mean"]) < 1e-5
        for name, row in rows.items():
            assert row["excess_error"]["mean"] >= -1e-5, name
            assert row["relative_error"]["mean"] >= rows[SVD]["relative_error"]["mean"] - 1e-6, name


def test_what_is_compared_are_the_test_images_and_the_basis_is_of_training_images(
    made: Path, content: dict[str, Any]
) -> None:
    cache = open_cache(made / "cache")
    split = split_of(cache, 42)
    first = content["sources"][0]
    assert first["ids"] == [cache.ids[place] for place in split.test]
    train, test = (normalised(torch.stack([cache[place] for place in part])) for part in (split.train, split.test))
    expected = relative_error(test, by_basis(test, shared_basis([train], RANK)).product())
    assert first["values"][PCA]["relative_error"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert rows_of(first)[PCA]["relative_error"]["mean"] == pytest.approx(float(expected.mean()), rel=1e-4)


def test_the_other_source_has_no_picture_of_the_first(content: dict[str, Any]) -> None:
    other = content["sources"][1]
    assert other["ids"] == [f"drawing_{index:03d}.png" for index in range(1, 6)]
    assert other["images"] == other["matrices"] == 5


def test_cost_storage_and_sweep(content: dict[str, Any]) -> None:
    cost = {row["method"]: row for row in content["cost"]}
    assert list(cost) == [*BASELINES, "AdaLoRA", "MLP"]
    assert all(row["flops"] > 0 and 0 < row["seconds"] <= row["slowest"] for row in cost.values())
    assert cost[PCA]["parameters"] == RANK * CHANNELS and cost[PCA]["stored"] == RANK * TOKENS
    assert cost[SVD]["stored"] == RANK * (TOKENS + CHANNELS) and cost["AdaLoRA"]["stored"] == 3 * (TOKENS + CHANNELS)
    assert content["storage"]["factors"] == RANK * (TOKENS + CHANNELS)
    assert content["storage"]["break_even_rank"] == TOKENS * CHANNELS // (TOKENS + CHANNELS)
    assert content["timing"]["device"] == "CPU" and content["timing"]["threads"] == torch.get_num_threads()
    assert content["sweep"]["ranks"] == [2, RANK, 8]
    assert set(content["sweep"]["relative_error"]) == {*BASELINES, "AdaLoRA", "MLP"}
    assert content["sweep"]["relative_error"]["MLP"][2] is None


def test_a_masked_network_is_also_held_against_the_optimum_of_its_effective_rank(content: dict[str, Any]) -> None:
    row = rows_of(content["sources"][0])["AdaLoRA"]
    assert row["rank"] == RANK and row["effective_rank"] == 3
    assert -1e-5 <= row["excess_at_effective_rank"]["mean"] < row["excess_error"]["mean"]
    assert rows_of(content["sources"][0])["MLP"]["effective_rank"] is None


def test_each_network_has_its_own_file(made: Path, content: dict[str, Any]) -> None:
    for name in ("MLP", "AdaLoRA"):
        own = json.loads((made / "results" / name / "svd_nn_comparison.json").read_text())
        source = own["sources"][0]
        assert own["arch"] == name and source["network"] == rows_of(content["sources"][0])[name]
        assert [pair["against"] for pair in source["paired"]] == [SVD, PCA]
        rows = source["per_matrix"]
        assert [row["id"] for row in rows] == content["sources"][0]["ids"]
        for row in rows:
            expected = row["relative_error"] / row["svd_relative_error"] - 1
            assert row["excess_error"] == pytest.approx(expected, abs=1e-4)
        assert (source["refined"] is not None) == (name == "MLP")


def test_the_page_the_plots_and_the_manifest(made: Path) -> None:
    results = made / "results"
    page = (results / "comparison.md").read_text()
    for expected in ("MLP, refined", "randomized SVD", "above the optimum", "plots/rank_sweep.png", "numbers"):
        assert expected in page
    for name in pages.PLOTS:
        assert (results / "plots" / f"{name}.png").is_file()
    entry = json.loads((results / "manifest.json").read_text())["stages"]["features compare"]
    assert {"features", "ood", "MLP", "AdaLoRA"} == set(entry["inputs"])
    assert json.loads((results / "resolved_config.compare.json").read_text())["sweep"] == [2, RANK, 8]


@pytest.mark.usefixtures("drawn_pictures")
def test_the_report_shows_the_comparison_the_curves_and_nothing_twice(made: Path, tmp_path: Path) -> None:
    results = made / "results"
    write_json(results / "MLP" / "history.json", history())
    (results / "MLP" / "training_log.csv").write_text("step,loss,eval_loss\n1,0.5,\n")
    page = build_report(results, tmp_path / "report.html")
    text = page.with_suffix(".md").read_text()
    assert "features compare" in text and "features train" in text
    assert "MLP: 3 epochs; kept with validation MSE 0.3667 at epoch 3" in text
    assert text.count("AdaLoRA: 3 of its 4 ranks act") == 1
    assert "nats per token" not in text
    pictures = list((tmp_path / "report_files").iterdir())
    assert min(picture.stat().st_size for picture in pictures) > 5000
    drawn = [picture.name.split("_", 1)[1] for picture in pictures]
    assert sorted(drawn) == sorted(f"{name}.png" for name in (*pages.PLOTS, "train_val_loss_comparison"))
    assert text.count(".png)") == len(drawn)


def answers_row(method: str, rank: int | None, loss: float, kl: float, network: bool = False) -> dict[str, Any]:
    spans = {"kl": [0.9 * kl, 1.1 * kl], "accuracy": [0.1, 0.9]}
    return {
        **{"method": method, "rank": rank, "network": network, "relative_error": None if rank is None else 0.4},
        **{"loss": loss, "loss_change": loss - 1.0, "kl": kl, "agreement": 0.75, "accuracy": 0.5, "intervals": spans},
    }


def test_the_report_shows_the_answers_with_factors(tmp_path: Path) -> None:
    rows = [
        answers_row(ORIGINAL, None, 1.0, 0.0),
        *(answers_row(SVD, rank, 1.0 + 1 / rank, 0.5 / rank) for rank in (2, 4)),
        answers_row("MLP", 4, 1.7, 0.6789, network=True),
        answers_row(NOTHING, None, 3.0, 1.9),
    ]
    settings = {"samples": 9, "pictures": 5, "answer_tokens": 30, "pca_basis": "from somewhere"}
    content = {"format": "rankwise-downstream/1", "rows": rows, "notes": ["left out: one"], "settings": settings}
    write_json(tmp_path / "downstream.json", {**content, "shapes": [[16, 24]], "model": {"name": "tiny"}})
    text = build_report(tmp_path).with_suffix(".md").read_text()
    assert "## features downstream" in text and "0.6789" in text and "Note: left out: one." in text
    assert "downstream.png" in text


def test_a_network_under_an_allocator_is_kept_for_its_effective_rank(tmp_path: Path) -> None:
    """The error rises while channels are taken away; the earlier, lower error is of a larger rank."""
    rows = [{**row, "effective_rank": rank} for row, rank in zip(history(3), (4, 3, 2), strict=True)]
    rows[2]["val_mse"] = 0.777
    write_json(tmp_path / "AdaLoRA" / "history.json", rows)
    text = build_report(tmp_path).with_suffix(".md").read_text()
    assert "AdaLoRA: 3 epochs; kept with validation MSE 0.777 at epoch 3" in text
    assert "effective rank 4 → 2" in text


def test_another_programs_history_is_passed_over(tmp_path: Path) -> None:
    write_json(tmp_path / "AdaLoRA" / "history.json", history())
    write_json(tmp_path / "browser" / "history.json", [{"address": "somewhere"}])
    write_json(tmp_path / "comparison.json", {"runs": []})
    assert build_report(tmp_path).with_suffix(".md").read_text().count("epochs; kept") == 1


def test_a_broken_comparison_is_named_in_the_report(tmp_path: Path) -> None:
    write_json(tmp_path / "comparison.json", {"format": "rankwise-factors/1", "rank": 3})
    with pytest.raises(DataError, match=r"comparison\.json: incomplete: .*sources.* missing"):
        build_report(tmp_path)


def test_verdicts_say_slower_and_farther_plainly(content: dict[str, Any]) -> None:
    source = content["sources"][0]
    slow = [{**row, "seconds": 0.06 if row["method"] == "MLP" else 0.02} for row in content["cost"]]
    said = verdict({**content, "cost": slow}, source, "MLP")
    assert "3× the time of the exact Gram factors: slower than exact." in said and "above the optimum" in said
    fast = [{**row, "seconds": 0.005 if row["method"] == "MLP" else 0.02} for row in content["cost"]]
    assert "4× faster than the exact Gram factors: faster" in verdict({**content, "cost": fast}, source, "MLP")
    pair = {"mean": 0.1, "low": 0.05, "high": 0.2}
    assert against_pca(pair).startswith("farther than")
    assert against_pca({**pair, "low": -0.1}).startswith("not told apart from")
    assert against_pca({"mean": -0.1, "low": -0.2, "high": -0.05}).startswith("closer than")
    assert against_pca({"mean": -0.1, "low": None, "high": None}).startswith("not told apart from")


def test_storage_says_fewer_or_more(content: dict[str, Any]) -> None:
    documented = {"rank": 128, "storage": {"factors": 294912, "matrix": 524288, "break_even_rank": 227}}
    assert "(1.8× fewer); factors take no more up to rank 227" in storage_words({**content, **documented})
    above = {"rank": 12, "storage": {"factors": 480, "matrix": 384, "break_even_rank": 9}}
    assert "(1.2× more)" in storage_words({**content, **above})


def test_the_terminal_tables_are_aligned_and_narrow(content: dict[str, Any]) -> None:
    for table in (closeness_table(content["sources"][0]), cost_table(content)):
        lines = table_lines(table)
        assert len(lines) == 1 + len(table.rows) and max(map(len, lines)) <= 100


def figures(monkeypatch: pytest.MonkeyPatch, content: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(canvas, "save", lambda figure, path: kept.setdefault(str(path), figure))
    for name, (plot, _) in pages.PLOTS.items():
        plot(content, name)
    return kept


def test_plots_hold_what_was_measured(monkeypatch: pytest.MonkeyPatch, content: dict[str, Any]) -> None:
    drawn = figures(monkeypatch, content)
    labels = [*(name for name in BASELINES if name != GRAM), "AdaLoRA", "MLP", "MLP, refined"]
    for name in ("error_histogram", "cosine_histogram"):
        axes = drawn[name].axes
        assert len(axes) == len(labels) * 2
        assert [axis.texts[0].get_text() for axis in axes[::2]] == labels
        counts = [sum(patch.get_height() for patch in axis.patches) for axis in axes]
        assert counts == [len(content["sources"][0]["ids"]), len(content["sources"][1]["ids"])] * len(labels)
    (sweep,) = drawn["rank_sweep"].axes
    curves = {line.get_label(): line.get_ydata() for line in sweep.lines}
    assert list(curves[SVD]) == content["sweep"]["relative_error"][SVD]
    assert len(curves["MLP, leading channels"]) == 2
    assert [tick.get_text().split("\n")[0] for tick in sweep.get_xticklabels()] == ["2", "4", "8"]
    (time,) = drawn["error_time"].axes
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in time.lines}
    for row in content["cost"]:
        assert points[row["method"]][0] == pytest.approx(1e3 * row["seconds"])
    low, high = time.get_ylim()
    assert all(low <= y <= high for name, (_, y) in points.items() if not name.startswith("_"))


def test_plots_of_one_image(monkeypatch: pytest.MonkeyPatch, content: dict[str, Any]) -> None:
    """No intervals, no spread."""
    first = content["sources"][0]
    rows = [
        {key: {**cell, "low": None, "high": None} if isinstance(cell, dict) else cell for key, cell in row.items()}
        for row in first["rows"]
    ]
    values = {name: {key: found[:1] for key, found in one.items()} for name, one in first["values"].items()}
    assert len(figures(monkeypatch, {**content, "sources": [{**first, "rows": rows, "values": values}]})) == 4


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(made: Path, **changes: Any) -> FactorCompareConfig:
    settings = {"results_dir": str(made / "results"), "no_plots": True, **QUICK, **changes}
    return FactorCompareConfig(**settings)


def test_a_lower_rank_gives_leading_channels_and_a_higher_one_is_refused(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    make_run(tmp_path, cache, "MLP")
    found = run(refused(made, results_dir=str(tmp_path), rank=2))
    row = rows_of(found["sources"][0])["MLP"]
    assert found["rank"] == row["rank"] == 2 and found["network_ranks"] == {"MLP": RANK}
    assert row["relative_error"]["mean"] == pytest.approx(found["sweep"]["relative_error"]["MLP"][0], rel=1e-5)
    with pytest.raises(UsageError, match=r"--rank 5: .*MLP 4"):
        run(refused(made, results_dir=str(tmp_path), rank=5))


def test_networks_of_different_ranks_need_one_rank(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    make_run(tmp_path, cache, "MLP", rank=3)
    make_run(tmp_path, cache, "ResMLP", rank=5)
    with pytest.raises(UsageError, match=r"different ranks .*give --rank 3"):
        run(refused(made, results_dir=str(tmp_path)))


def test_another_cache_than_the_one_trained_on_is_refused(made: Path) -> None:
    with pytest.raises(DataError, match=r"split\.json divides another feature cache"):
        run(refused(made, features=str(made / "other")))


def test_networks_tested_on_different_images_are_not_compared(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    make_run(tmp_path, cache, "MLP", seed=1)
    make_run(tmp_path, cache, "ResMLP", seed=2)
    with pytest.raises(DataError, match="differently"):
        run(refused(made, results_dir=str(tmp_path)))


def test_another_source_must_fit(made: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "wide", matrices(4, channels=30), name="wide")
    with pytest.raises(DataError, match=r"--ood .*30 channels; the networks take 16 × 24"):
        run(refused(made, ood=str(tmp_path / "wide")))
    with pytest.raises(DataError, match="every picture in it"):
        run(refused(made, ood=str(made / "cache")))


@pytest.mark.parametrize(("value", "told"), [(float("nan"), "not finite"), (0.0, "constant in every token")])
def test_a_matrix_that_nothing_can_be_measured_on_is_named(made: Path, tmp_path: Path, value: float, told: str) -> None:
    broken = matrices(4)
    broken[2] = value
    make_cache(tmp_path / "broken", broken, name="broken")
    with pytest.raises(DataError, match=rf"broken_002\.png .*{told}"):
        run(refused(made, ood=str(tmp_path / "broken")))


@pytest.mark.parametrize("content", ["{}", '{"features": 5}'])
def test_a_run_that_does_not_name_its_features(made: Path, tmp_path: Path, content: str) -> None:
    make_run(tmp_path, open_cache(made / "cache"), "MLP")
    (tmp_path / "MLP" / "resolved_config.json").write_text(content)
    with pytest.raises(DataError, match=r"give it as --features: .*does not name the features"):
        run(refused(made, results_dir=str(tmp_path)))


def test_over_an_exact_svd_there_is_no_excess(tmp_path: Path) -> None:
    """Matrices of rank 2: normalising adds the rank of the means, so the SVD of rank 4 has nothing to miss."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, TOKENS, 2, generator=generator), torch.randn(2, CHANNELS, generator=generator)
    cache = make_cache(tmp_path / "cache", left @ right)
    make_run(tmp_path / "results", cache, "MLP")
    content = run(refused(tmp_path, results_dir=str(tmp_path / "results"), features=str(cache.path), no_plots=False))
    assert all(row["excess_error"] is None for row in content["sources"][0]["rows"])
    told = (tmp_path / "results" / "comparison.md").read_text()
    assert "where the SVD of this rank is exact" in told
    assert (tmp_path / "results" / "plots" / "error_time.png").is_file()


def test_nothing_trained_and_wrong_numbers_are_usage_errors(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trained network"):
        run(refused(made, results_dir=str(tmp_path)))
    for name, value in (("repeats", 0), ("batch_size", 0), ("rank", 0), ("sweep", [0])):
        with pytest.raises(UsageError, match=name):
            run(refused(made, **{name: value}))
    with pytest.raises(DataError, match="no trained network"):
        run(refused(made, arch=["ResMLP"]))


def test_the_command_prints_its_plan_and_its_table(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, open_cache(made / "cache"), "MLP")
    words = ["features", "compare", "--results_dir", str(tmp_path), "--batch_size", "2", "--repeats", "1", "--no_plots"]
    assert main([*words, "--dry-run"]) == 0
    assert f"compare every network in {tmp_path} with the SVD three ways" in capsys.readouterr().out
    assert not (tmp_path / "comparison.json").exists()
    assert main([*words, "--sweep", "2"]) == 0
    told = capsys.readouterr().out
    assert "randomized SVD" in told and "than exact" in told and "comparison.json" in told
    assert not (tmp_path / "plots").exists()
