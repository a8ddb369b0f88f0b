"""rankwise features downstream: what replacing features costs, against small computations of the same by other ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import adapted_base
from tiny import tiny_llama
from tiny_vision import drawn_image, tiny_qwen25vl, tiny_smolvlm
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rankwise import cli
from rankwise.data.device import DeviceTarget
from rankwise.errors import DataError, UsageError
from rankwise.features.answers import (
    METRICS,
    NOTHING,
    ORIGINAL,
    WHOLE,
    Answers,
    Predictions,
    Questions,
    Replacement,
    baselines,
    compare_answers,
    connected,
    controls,
    measured,
)
from rankwise.features.approximation import by_basis, by_gram, normalised, shared_basis
from rankwise.features.cache import ModelOrigin, open_cache
from rankwise.features.cache_writer import CacheRecipe, Matrices, write_cache
from rankwise.features.dataset import SPLIT, split_of
from rankwise.features.downstream import asked, parts, ranks_of
from rankwise.features.downstream_page import answer_page
from rankwise.features.measures import PCA, RANDOMIZED, SVD
from rankwise.features.nets import build
from rankwise.features.nets.base import FactorizerSettings
from rankwise.features.trained import save_factorizer
from rankwise.files.atomic import write_json
from rankwise.files.checkpoint import model_fingerprint
from rankwise.models.adapters import save_adapter
from rankwise.models.vision_features import image_features, seeing_part
from rankwise.options.features import DownstreamConfig
from rankwise.page.blocks import into
from rankwise.page.template import markdown

ANSWERS = ("It is red.", "Two: a dog and a cat.", "red", "It is blue.")
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "smolvlm": lambda folder: tiny_smolvlm(folder, longest_edge=64),
    "qwen25vl": tiny_qwen25vl,
}


def write_rows(folder: Path, count: int = 8, without: int = 1) -> Path:
    """Questions about drawn pictures of one size, and some about nothing."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        drawn_image(number, (56, 56)).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": ANSWERS[number % len(ANSWERS)]},
        ]
        rows.append({"id": f"row {number}", "image": f"{number}.png", "conversations": turns})
    said = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hi."}]
    rows += [{"id": f"bare {number}", "conversations": said} for number in range(without)]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["smolvlm"](tmp_path_factory.mktemp("smolvlm"))


def settings(base: Path, data: Path, **more: Any) -> DownstreamConfig:
    return DownstreamConfig(model_name=str(base), data_path=str(data), device="cpu", **more)


@pytest.fixture(scope="module")
def rows(base: Path, data: Path) -> Questions:
    return asked(settings(base, data), str(base), None)[0]


def scaled(share: float) -> Replacement:
    return Replacement(f"{share:g} of it", 1, lambda features: share * features)


def compared(rows: Questions, *replacements: Replacement) -> tuple[Answers, list[Answers]]:
    return compare_answers(rows.tested.model, rows.batches(), replacements)


# --- what is measured --------------------------------------------------------------------------------------------


def test_all_ranks_change_nothing_and_no_picture_changes_much(rows: Questions) -> None:
    original, (whole, nothing) = compared(rows, *controls(4, 32))
    assert float(whole.kl.max()) < 1e-6
    assert torch.allclose(whole.loss, original.loss, atol=1e-5)
    assert torch.equal(whole.agreeing, whole.tokens)
    assert float(whole.errors.max()) < 1e-5
    assert torch.allclose(nothing.errors, torch.ones_like(nothing.errors))
    assert float((nothing.kl / nothing.tokens).mean()) > 1000 * float((whole.kl / whole.tokens).mean())


def test_the_divergence_and_the_loss_are_those_of_torch_s_own_distributions(rows: Questions) -> None:
    """Row by row, without padding, the features given to the model by hand."""
    original, (found,) = compared(rows, scaled(0.5))
    assert bool((found.kl >= 0).all())
    for place in range(3):
        before, targets = row_logits(rows, place, lambda features: features)
        after, _ = row_logits(rows, place, halved)
        first, second = (torch.distributions.Categorical(logits=each.double()) for each in (before, after))
        divergence = torch.distributions.kl_divergence(first, second).sum()
        assert float(found.kl[place]) == pytest.approx(float(divergence), rel=1e-3, abs=1e-7)
        assert float(found.loss[place]) == pytest.approx(-float(second.log_prob(targets).sum()), rel=1e-5)
        assert float(original.loss[place]) == pytest.approx(-float(first.log_prob(targets).sum()), rel=1e-5)
        assert int(found.agreeing[place]) == int((before.argmax(-1) == after.argmax(-1)).sum())
        assert int(found.tokens[place]) == len(targets)


def test_no_picture_is_the_model_with_every_channel_at_its_token_s_mean(rows: Questions) -> None:
    _, (nothing,) = compared(rows, controls(4, 32)[1])
    for place in range(3):
        logits, targets = row_logits(rows, place, flat)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        assert float(nothing.loss[place]) == pytest.approx(float(loss), rel=1e-5)


def flat(features: Tensor) -> Tensor:
    return features.mean(-1, keepdim=True).expand_as(features)


def halved(features: Tensor) -> Tensor:
    """Half of what is normalised: the token's mean stays."""
    return (features + flat(features)) / 2


@torch.no_grad()
def row_logits(rows: Questions, place: int, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Logits at the answer's tokens, and the tokens; transformers' own argument for ready features takes the changed
    ones."""
    (batch,) = rows.batches([place])
    model, labels = rows.tested.model, batch["labels"][0, 1:]
    found = change(torch.cat(image_features(model, batch)))
    beside = ("labels", "sample_index", "pixel_values", "pixel_attention_mask")
    inputs = {name: value for name, value in batch.items() if name not in beside}
    shown = {"image": BaseModelOutputWithPooling(pooler_output=[found])}
    logits = model(**inputs, mm_encoder_outputs=shown).logits[0, :-1]
    return logits[labels != -100], labels[labels != -100]


def test_batches_do_not_change_the_numbers(rows: Questions) -> None:
    basis = shared_basis(rows.features(), 2)
    stand_ins = [*baselines(2, basis, seed=0), *controls(4, 32)]
    wanted = compared(rows, *stand_ins)[1]
    for size in (1, 3):
        for one, other in zip(wanted, compared(replace(rows, batch_size=size), *stand_ins)[1], strict=True):
            for name in ("tokens", "loss", "kl", "agreeing", "right"):
                assert torch.allclose(getattr(one, name), getattr(other, name), atol=2e-5), name
            assert float(one.errors.mean()) == pytest.approx(float(other.errors.mean()), abs=1e-5)


def test_a_worse_approximation_of_one_direction_costs_more(rows: Questions) -> None:
    _, found = compared(rows, *(scaled(share) for share in (1.0, 0.9, 0.5)))
    costs = [float(each.kl.sum()) for each in found]
    assert costs[0] < costs[1] < costs[2]
    assert [float(each.errors.mean()) for each in found] == pytest.approx([0, 0.1, 0.5], abs=1e-6)


def test_nothing_is_closer_than_the_svd_and_more_rank_is_closer(rows: Questions) -> None:
    basis = shared_basis(rows.features(), 3)
    stand_ins = [one for rank in (1, 2, 3) for one in baselines(rank, basis, seed=0)]
    found = dict(zip([(one.method, one.rank) for one in stand_ins], compared(rows, *stand_ins)[1], strict=True))
    for rank in (1, 2, 3):
        for method in (RANDOMIZED, PCA):
            assert bool((found[method, rank].errors >= found[SVD, rank].errors - 1e-5).all())
    for method in (SVD, PCA):
        errors = [float(found[method, rank].errors.mean()) for rank in (1, 2, 3)]
        assert errors[0] > errors[1] > errors[2]


def test_the_tower_runs_once_a_batch_and_all_is_left_as_it_was(rows: Questions) -> None:
    model, calls = rows.tested.model, []
    inner = seeing_part(model)
    tower = inner.visual if hasattr(inner, "visual") else inner.vision_model
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    try:
        compared(replace(rows, batch_size=4), scaled(0.5), scaled(0.9))
    finally:
        handle.remove()
    assert len(calls) == 2, "eight rows in batches of four, three runs of each"
    assert model.training
    model.eval()
    assert "get_image_features" not in vars(inner)


# --- numbers of a table ------------------------------------------------------------------------------------------


def answers(**columns: list[float]) -> Answers:
    return Answers(**{name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()})


def test_means_are_per_token_and_per_row_and_intervals_are_over_pictures() -> None:
    same = {"tokens": [2.0, 1.0, 1.0], "errors": []}
    original = answers(loss=[1.0, 0.5, 0.5], kl=[0.0] * 3, agreeing=[2, 1, 1], right=[1, 1, 0], **same)
    found = answers(loss=[3.0, 0.5, 0.5], kl=[2.0, 0.0, 0.0], agreeing=[1, 1, 1], right=[0, 1, 0], **same)
    row = measured(original, found, ["a", "b", "b"])
    wanted = {"loss": 1.0, "loss_change": 0.5, "kl": 0.5, "agreement": 0.75, "accuracy": 1 / 3}
    assert row.metrics == pytest.approx({**wanted, "accuracy_change": -1 / 3})
    assert row.method == ORIGINAL and row.rank is None and row.relative_error is None
    # a resample is a twice, each once, or b twice: kl 1, 0.5 or 0
    assert row.intervals["kl"] == pytest.approx((0, 1))
    assert row.intervals["agreement"] == pytest.approx((0.5, 1))
    assert not measured(original, found, ["a", "a", "a"]).intervals, "one picture has no spread"


def test_an_answer_is_right_when_every_token_of_it_is_the_likeliest() -> None:
    sure = torch.eye(4) * 9
    original = Predictions(sure[[0, 1, 2]], torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
    changed = Predictions(sure[[0, 3, 2]], original.targets, original.rows, 2)
    assert original.against(original, []).right.tolist() == [1, 1]
    found = changed.against(original, [])
    assert found.right.tolist() == [0, 1]
    assert found.agreeing.tolist() == [1, 1] and found.tokens.tolist() == [2, 1]


def test_intervals_are_over_the_pictures_of_the_same_rows(smolvlm: Path, tmp_path: Path) -> None:
    """Two questions about each picture, in an order that the halves do not keep."""
    data = write_rows(tmp_path, 8, without=0)
    for number in range(4):
        drawn_image(number, (56, 56)).save(tmp_path / f"{7 - number}.png")
    assert downstream(smolvlm, data, tmp_path / "r", "--ranks", "1", "--no_plots") == 0
    content = json.loads((tmp_path / "r" / "downstream.json").read_text())
    assert content["settings"]["pictures"] == 4
    rows, _ = asked(settings(smolvlm, data), str(smolvlm), None)
    order = [place for part in parts(rows, [], rank=1, seed=42)[0] for place in part.places]
    assert order != list(range(8))
    one = baselines(1, None, 42)[0]
    original, (found,) = compare_answers(rows.tested.model, rows.batches(order), [one])
    wanted = measured(original, found, [rows.groups[place] for place in order], one).record()
    assert content["rows"][2]["method"] == SVD
    found, given = content["rows"][2]["intervals"], wanted["intervals"]
    assert found.keys() == given.keys() >= {"loss", "kl"}  # one of no width is no interval
    for name, interval in given.items():
        assert found[name] == pytest.approx(interval, abs=1e-6)


def test_rows_that_share_a_picture_are_one_group() -> None:
    first, second, third, fourth = connected([["a"], ["b"], ["a", "b"], ["c"]])
    assert first == second == third != fourth


def test_equal_pictures_under_two_names_are_one(smolvlm: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path, 3, without=0)
    drawn_image(0, (56, 56)).save(tmp_path / "1.png")
    rows, _ = asked(settings(smolvlm, data), str(smolvlm), None)
    assert rows.groups[0] == rows.groups[1] != rows.groups[2]


def test_halves_share_no_picture_and_each_is_approximated_by_the_other_s_basis(rows: Questions) -> None:
    halves = rows.halves(seed=1)
    assert sorted(halves[0] + halves[1]) == list(range(8))
    assert len(halves[0]) == len(halves[1]) == 4
    divided, source = parts(rows, [], rank=2, seed=1)
    assert "half" in source
    for part, other in zip(divided, reversed(divided), strict=True):
        assert part.basis is not None
        torch.testing.assert_close(part.basis, shared_basis(rows.features(other.places), 2))
        errors = [by_basis(each, part.basis).product() - each for each in rows.features(part.places)]
        _, (found,) = compare_answers(
            rows.tested.model,
            rows.batches(part.places),
            [one for one in baselines(2, part.basis, 0) if one.method == PCA],
        )
        missed = [
            float(error.norm() / each.norm()) for error, each in zip(errors, rows.features(part.places), strict=True)
        ]
        assert found.errors.tolist() == pytest.approx(missed, rel=1e-4)
    twins = replace(rows, groups=("one",) * 8)
    ((part,), source) = parts(twins, [], rank=2, seed=1)
    assert part.basis is None and "only one picture" in source


def test_ranks_by_default_and_out_of_range() -> None:
    assert ranks_of([], [], [(16, 128)]) == [4, 8, 16]
    assert ranks_of([8, 2, 2], [], [(16, 128)]) == [2, 8]
    for bad in ([0], [17]):
        with pytest.raises(UsageError, match="ranks 1 to 16"):
            ranks_of(bad, [], [(16, 128), (8, 128)])


# --- the command -------------------------------------------------------------------------------------------------


def downstream(base: Path, data: Path, results: Path, *more: str) -> int:
    own = ["features", "downstream", str(base), "--data_path", str(data), "--results_dir", str(results)]
    return cli.main([*own, "--device", "cpu", *more])


@pytest.mark.usefixtures("drawn_pictures")
def test_the_command_writes_table_page_and_picture(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert downstream(base, data, tmp_path, "--ranks", "1,2", "--batch_size", "3") == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "downstream.json").read_text())
    assert content["format"] == "rankwise-downstream/1"
    names = [(row["method"], row["rank"]) for row in content["rows"]]
    middle = [(method, rank) for method in (SVD, RANDOMIZED, PCA) for rank in (1, 2)]
    assert names[:2] == [(ORIGINAL, None), (NOTHING, 0)]
    assert names[2:-1] == middle and names[-1][0] == WHOLE
    for row in content["rows"]:
        assert row.keys() == {"method", "rank", "network", "relative_error", "intervals", *METRICS}
        assert {"loss"} <= row["intervals"].keys() <= set(METRICS)
        for name, (low, high) in row["intervals"].items():
            assert low - 1e-9 <= row[name] <= high + 1e-9
    assert content["settings"]["samples"] == content["settings"]["pictures"] == 8
    assert content["notes"] == ["1 row of 9 left out: without a picture"]
    assert "1 row of 9 left out" in printed and "8 questions about 8 pictures" in printed
    page = (tmp_path / "downstream.md").read_text()
    assert page == markdown(answer_page(content, into(tmp_path)), tmp_path) and page.count("| SVD |") == 2
    assert (tmp_path / "downstream.png").stat().st_size > 10_000
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert stages["features downstream"]["outputs"].keys() == {"downstream", "table", "plot"}


def test_the_saved_config_gives_the_same_again(smolvlm: Path, data: Path, tmp_path: Path) -> None:
    assert downstream(smolvlm, data, tmp_path / "a", "--no_plots", "--num_samples", "3") == 0
    saved = str(tmp_path / "a" / "resolved_config.downstream.json")
    assert cli.main(["features", "downstream", saved, "--results_dir", str(tmp_path / "b")]) == 0
    first, second = (json.loads((tmp_path / name / "downstream.json").read_text()) for name in "ab")
    assert first == second and first["settings"]["samples"] == 3
    assert not (tmp_path / "b" / "downstream.png").exists()


def test_an_adapter_is_tested_on_its_base(smolvlm: Path, data: Path, tmp_path: Path) -> None:
    model = adapted_base(smolvlm)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.3)
    (tmp_path / "run").mkdir()
    save_adapter(model, tmp_path / "run", str(smolvlm))
    for model, out in ((smolvlm, "a"), (tmp_path / "run", "b")):
        assert downstream(model, data, tmp_path / out, "--no_plots") == 0
    first, second = (json.loads((tmp_path / name / "downstream.json").read_text()) for name in "ab")
    assert second["model"]["base"] == str(smolvlm) and "adapter" in second["model"].keys() - first["model"].keys()
    assert [row["relative_error"] for row in first["rows"]] == [row["relative_error"] for row in second["rows"]], (
        "the adapter is in the language tower"
    )
    assert first["rows"][0]["loss"] != second["rows"][0]["loss"]
    assert second["rows"][-1]["kl"] < 1e-6


def test_a_device_beside_the_data_makes_the_pictures(smolvlm: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path, 2)
    DeviceTarget(image_size=32, longest_edge=32).save(tmp_path)
    rows, _ = asked(settings(smolvlm, data), str(smolvlm), None)
    sight = rows.tested.renderer.sight
    assert sight is not None and sight.target is not None
    with pytest.raises(UsageError, match="prepared for its device"):
        asked(settings(smolvlm, data, image_size=32), str(smolvlm), None)
    assert asked(settings(smolvlm, data), str(smolvlm), None, 999)[0].pictures == rows.pictures, "the device decides"
    (tmp_path / "device.json").unlink()
    without = asked(settings(smolvlm, data), str(smolvlm), None)[0]
    counts = [len(list(each.features([0]))) for each in (rows, without)]
    assert counts[0] != counts[1], "32 pixels are fewer tiles than 64"


# --- networks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def results(smolvlm: Path, data: Path, tmp_path: Path) -> Path:
    return trained(tmp_path / "results", smolvlm, data, tmp_path / "cache")


def trained(
    results: Path,
    base: Path,
    data: Path,
    cache: Path,
    origin: str | None = None,
    stretched_to: int | None = None,
    shared: bool = False,
) -> Path:
    """A run folder with an untrained network of the right shape, and the cache of the same pictures. shared: the cache
    says so of the first picture, which it has thrice and thus among its training pictures."""
    rows, _ = asked(settings(base, data), str(base), None, stretched_to)
    features = torch.cat(list(rows.features()))
    model = ModelOrigin(str(base), origin or model_fingerprint(base))
    names = tuple(f"{number}" for number in range(len(features)))
    groups = tuple(rows.pictures[0]) * 3 + names[3:] if shared else names
    how = {"stretched_to": stretched_to}
    recipe = CacheRecipe(shards=1, dtype="float32", model=model, pictures="", settings=how, source="drawn")
    made = write_cache(cache, recipe, [Matrices(features, names, groups)])
    folder = results / "MLP"
    folder.mkdir(parents=True)
    save_factorizer(build(FactorizerSettings("MLP", made.tokens, made.channels, rank=2)), folder)
    split = split_of(made, seed=0)
    if shared:
        split = replace(split, train=tuple(range(len(made) - 2)), val=(len(made) - 2,), test=(len(made) - 1,))
    SPLIT.write(folder, split)
    write_json(folder / "resolved_config.json", {"features": str(cache)})
    return results


def test_a_network_stands_beside_the_baselines_of_its_rank(smolvlm: Path, data: Path, results: Path) -> None:
    assert downstream(smolvlm, data, results, "--no_plots") == 0
    content = json.loads((results / "downstream.json").read_text())
    by_name = {row["method"]: row for row in content["rows"]}
    assert by_name["MLP"]["network"] and by_name["MLP"]["rank"] == by_name[SVD]["rank"] == 2
    assert by_name["MLP"]["relative_error"] > by_name[SVD]["relative_error"]
    assert not by_name[PCA]["network"]
    differences = {row["against"]: row["kl_difference"] for row in content["paired"]}
    assert differences.keys() == {SVD, PCA}
    for name, value in differences.items():
        assert value == pytest.approx(by_name["MLP"]["kl"] - by_name[name]["kl"], abs=1e-9)
    assert all(low <= high for low, high in (row["interval"] for row in content["paired"]))
    assert (results / "downstream.md").read_text().count("\nMLP, rank 2: KL") == 2
    cache = open_cache(results.parent / "cache")
    split = split_of(cache, seed=0)
    assert content["settings"]["pca_basis"].startswith(f"basis from the {len(split.train)} training matrices")
    basis = shared_basis((normalised(cache[place])[None] for place in split.train), 2)
    rows, _ = asked(settings(smolvlm, data), str(smolvlm), None)
    missed = [float((by_basis(each, basis).product() - each).norm() / each.norm()) for each in rows.features()]
    assert by_name[PCA]["relative_error"] == pytest.approx(sum(missed) / len(missed), rel=1e-4)
    best = [float((by_gram(each, 2).product() - each).norm() / each.norm()) for each in rows.features()]
    assert by_name[SVD]["relative_error"] == pytest.approx(sum(best) / len(best), rel=1e-4)


def test_a_network_of_another_shape_is_left_out_aloud_or_refused_where_asked_for(
    smolvlm: Path, data: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_factorizer(build(FactorizerSettings("MLP", 5, 32, rank=2)), results / "MLP")
    assert downstream(smolvlm, data, results, "--no_plots") == 0
    assert "Note: MLP takes 5 tokens × 32 channels" in capsys.readouterr().out
    assert "MLP" not in {row["method"] for row in json.loads((results / "downstream.json").read_text())["rows"]}
    assert downstream(smolvlm, data, results, "--no_plots", "--arch", "mlp") == 3
    assert "5 tokens × 32 channels" in capsys.readouterr().err


def test_where_a_network_comes_from_is_said_aloud(
    smolvlm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = trained(tmp_path / "results", smolvlm, data, tmp_path / "cache", origin="0" * 64, shared=True)
    assert downstream(smolvlm, data, results, "--no_plots") == 0
    printed = capsys.readouterr().out
    assert "whose files are not this model's (000000000000… against" in printed
    assert "MLP was trained on 1 of these 8 pictures" in printed
    content = json.loads((results / "downstream.json").read_text())
    assert "half of the pictures" in content["settings"]["pca_basis"], "no basis from another model's features"


def test_pictures_are_stretched_as_for_the_network(smolvlm: Path, data: Path, tmp_path: Path) -> None:
    results = trained(tmp_path / "results", smolvlm, data, tmp_path / "cache", stretched_to=32)
    assert downstream(smolvlm, data, results, "--no_plots") == 0
    content = json.loads((results / "downstream.json").read_text())
    rows, _ = asked(settings(smolvlm, data, image_size=32), str(smolvlm), None)
    plain, _ = asked(settings(smolvlm, data), str(smolvlm), None)
    assert set(rows.pictures).isdisjoint(plain.pictures)
    best = [float((by_gram(each, 2).product() - each).norm() / each.norm()) for each in rows.features()]
    found = {row["method"]: row for row in content["rows"]}
    assert found[SVD]["relative_error"] == pytest.approx(sum(best) / len(best), rel=1e-4)


def test_a_network_whose_cache_is_gone_is_used_with_a_note(
    smolvlm: Path, data: Path, results: Path, capsys: Any
) -> None:
    (results.parent / "cache" / "index.json").unlink()
    assert downstream(smolvlm, data, results, "--no_plots") == 0
    assert "MLP: which model its features came from is not known" in capsys.readouterr().out


# --- errors ------------------------------------------------------------------------------------------------------


def test_what_cannot_work_says_why(
    smolvlm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_llama(tmp_path / "text")
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps([row for row in json.loads(data.read_text()) if "image" not in row]))
    cases = [
        (2, "takes no images", downstream(text, data, tmp_path / "r")),
        (3, "none of 1 row has an image", downstream(smolvlm, bare, tmp_path / "r")),
        (2, "ranks 1 to 4", downstream(smolvlm, data, tmp_path / "r", "--ranks", "2,5")),
        (3, "no trained network", downstream(smolvlm, data, tmp_path / "r", "--arch", "MLP")),
        (
            2,
            "--batch_size is 0; give",
            downstream(smolvlm, data, tmp_path / "r", "--batch_size", "0"),
        ),
        (2, "--data_path is missing", cli.main(["features", "downstream", str(smolvlm)])),
        (2, "needs a model", cli.main(["features", "downstream", "--data_path", str(data)])),
    ]
    printed = capsys.readouterr().err
    for code, words, got in cases:
        assert got == code, words
        assert words in printed
    assert not (tmp_path / "r" / "downstream.json").exists()


def test_a_dry_run_says_what_it_would_do(smolvlm: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert downstream(smolvlm, data, tmp_path / "r", "--dry-run") == 0
    assert "write downstream.json in" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_a_damaged_network_is_named(smolvlm: Path, data: Path, results: Path) -> None:
    (results / "MLP" / "best_model.safetensors").write_bytes(b"no")
    assert downstream(smolvlm, data, results) == DataError.exit_code
