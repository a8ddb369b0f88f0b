"""Training networks of factors: what is minimised, when it ends, and what is left."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factor_runs import RANK, config_of, equal, final_weights, history, results, trained
from tiny_features import CHANNELS, TOKENS, tiny_cache, tiny_matrices
from torch import Tensor, nn

from rankwise import cli
from rankwise.core.factors import Factors
from rankwise.errors import DataError, DivergedError, UsageError
from rankwise.features import objective as factorizing
from rankwise.features import train
from rankwise.features.approximation import normalised
from rankwise.features.cache import open_cache
from rankwise.features.dataset import read_split, split_of
from rankwise.features.history import plot_factor_training
from rankwise.features.nets import ARCHITECTURES, build
from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.features.objective import TERMS, FactorObjective
from rankwise.features.trained import load_factorizer
from rankwise.options.features import FactorTrainConfig


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("features") / "cache").path


@pytest.fixture
def make(cache: Path, tmp_path: Path) -> Any:
    """A config on the tiny cache."""
    return functools.partial(config_of, cache, tmp_path)


# --- what is minimised ---------------------------------------------------------------------------------------------


class Plain(Factorizer):
    """The same factors for every matrix, so that the loss can be computed by hand."""

    name = "plain"

    def __init__(self, settings: FactorizerSettings) -> None:
        super().__init__(settings)
        generator = torch.Generator().manual_seed(3)
        self.left = nn.Parameter(torch.randn(settings.tokens, settings.rank, generator=generator))
        self.right = nn.Parameter(torch.randn(settings.rank, settings.channels, generator=generator))
        self.scale = torch.arange(1.0, settings.rank + 1)

    def factor(self, features: Tensor) -> tuple[Factors, Tensor]:
        shown = self.scale if self.rank_mask is None else self.scale * self.rank_mask
        activation = self.left.expand(len(features), -1, -1)
        return Factors(activation * shown, self.right.expand(len(features), -1, -1)), activation


class Layered(Plain):
    """With a penalty on its own parameters, as AdaLoRA has."""

    def orthogonality(self) -> Tensor:
        return self.left.square().sum()


SETTINGS = FactorizerSettings("plain", TOKENS, CHANNELS, RANK)


def by_hand(net: Plain, features: Tensor, channels: list[int]) -> tuple[float, float, float]:
    """MSE, mean(B²) and ‖AᵀA/T − I‖²/r² of these channels, one entry at a time."""
    left, right = net.left.tolist(), net.right.tolist()
    error = 0.0
    for matrix in features.tolist():
        for t in range(TOKENS):
            for d in range(CHANNELS):
                entry = sum(left[t][k] * (k + 1) * right[k][d] for k in channels)
                error += (matrix[t][d] - entry) ** 2
    size = sum(right[k][d] ** 2 for k in channels for d in range(CHANNELS)) / (len(channels) * CHANNELS)
    ortho = 0.0
    for i in channels:
        for j in channels:
            ortho += (sum(left[t][i] * left[t][j] for t in range(TOKENS)) / TOKENS - (i == j)) ** 2
    return error / features.numel(), size, ortho / RANK**2


@pytest.mark.parametrize("channels", [[0, 1, 2, 3], [0, 2]])
def test_the_loss_is_the_formula(channels: list[int]) -> None:
    net = Plain(SETTINGS)
    if len(channels) < RANK:
        net.rank_mask = torch.tensor([k in channels for k in range(RANK)])
    objective = FactorObjective(net, FactorTrainConfig(lambda_B=0.3, lambda_ortho=0.7))
    features = normalised(tiny_matrices(2))
    loss = objective(features)["loss"]
    error, size, ortho = by_hand(net, features, channels)
    assert loss.item() == pytest.approx(error + 0.3 * size + 0.7 * ortho, rel=1e-5)
    terms = dict(zip(TERMS, (objective.sums / objective.counted).tolist(), strict=True))
    assert [terms["mse"], terms["b"], terms["ortho"]] == pytest.approx([error, size, ortho], rel=1e-5)


def test_orthogonality_of_layers_and_of_activations_are_weighted_apart() -> None:
    net, features = Layered(SETTINGS), normalised(tiny_matrices(2))
    error, _, columns = by_hand(net, features, [0, 1, 2, 3])
    layers = net.left.square().sum().item()
    loss = FactorObjective(net, FactorTrainConfig(lambda_B=0.0, lambda_ortho=0.7, activation_orth_regu_A=0.2))(
        features
    )["loss"]
    assert loss.item() == pytest.approx(error + 0.7 * layers + 0.2 * columns, rel=1e-5)


def test_means_are_over_matrices_not_over_batches() -> None:
    objective = FactorObjective(Plain(SETTINGS), FactorTrainConfig(lambda_B=0.0, lambda_ortho=0.0))
    features = normalised(tiny_matrices(5))
    objective(features[:4])
    objective(features[4:])
    whole = FactorObjective(objective.net, objective.options)
    whole(features)
    torch.testing.assert_close(objective.sums / 5, whole.sums / 5)


def test_weights_below_zero_are_refused() -> None:
    with pytest.raises(UsageError, match="--lambda_ortho"):
        FactorTrainConfig(lambda_ortho=-1.0)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("ResMLP", "lambda_B"),
        ("MLP", "lambda_ortho"),
        ("AdaLoRA", "lambda_ortho"),
        ("AdaLoRA", "activation_orth_regu_A"),
    ],
)
def test_every_weight_changes_what_comes_out(make: Any, tmp_path: Path, arch: str, name: str) -> None:
    found = []
    for weight in (0.0, 0.5):
        config = make(arch=arch, epochs=1, batch_size=32, results_dir=str(tmp_path / str(weight)), **{name: weight})
        found.append(final_weights(trained(config)))
    assert not equal(*found)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_network_comes_closer(make: Any, arch: str) -> None:
    """The Subspace one begins next to the optimum, from where only small steps lead on."""
    folder = trained(make(arch=arch, epochs=4, lr=1e-4 if arch == "Subspace" else 1e-2))
    rows = history(folder)
    assert min(row["train_mse"] for row in rows[1:]) < rows[0]["train_mse"]
    assert (results(folder)["excess_error"] < 0.05) == (arch == "Subspace")


def test_a_refinement_trains_and_is_logged_apart(make: Any) -> None:
    folder = trained(make(arch="MLP", refine=True, epochs=2))
    first, last = history(folder)[0], history(folder)[-1]
    assert last["train_refined"] < first["train_refined"]
    assert first["train_loss"] >= first["train_mse"] + first["train_refined"]
    found = results(folder)
    assert found["refined"]["mse"] != found["mse"]


# --- rate, patience ------------------------------------------------------------------------------------------------


def test_the_rate_halves_on_a_plateau(make: Any) -> None:
    rows = history(trained(make(arch="MLP", lr=1e-7, epochs=7, patience=0)))
    assert [row["lr"] for row in rows] == [1e-7] * 5 + [0.5e-7] * 2


def test_training_stops_without_improvement_and_may_go_on(make: Any) -> None:
    folder = trained(make(arch="MLP", lr=1e-12, dropout=0.0, epochs=9, patience=2))
    assert [row["epoch"] for row in history(folder)] == [1, 2, 3]
    assert len({row["val_mse"] for row in history(folder)}) == 1
    trained(make(arch="MLP", lr=1e-12, dropout=0.0, epochs=9, patience=2, resume=True))
    assert [row["epoch"] for row in history(folder)] == [1, 2, 3, 4, 5], "the count begins anew"


# --- files and numbers ---------------------------------------------------------------------------------------------

ROW = ("epoch", "train_loss", "train_mse", "train_b", "train_ortho", "val_mse", "val_rel_f", "val_evr", "lr", "time")
RESULTS = ("arch", "rank", "features", "images", "parameters", "mse", "relative_error", "explained_energy", "cosine")


def test_what_a_run_leaves(make: Any, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(make(arch="ResMLP", epochs=2))
    assert folder == tmp_path / "results" / "ResMLP"
    names = {"best_model.safetensors", "best_model.json", "history.json", "test_results.json", "split.json"}
    names |= {"training_log.csv", "manifest.json", "resolved_config.json", "checkpoint-4", "checkpoint-8"}
    assert names <= {path.name for path in folder.iterdir()}
    assert not (folder / "effective_rank.csv").exists()
    assert all((*ROW, "effective_rank") == tuple(row) for row in history(folder))
    entry = json.loads((folder / "manifest.json").read_text())["stages"]["features train"]
    assert {"best_model.safetensors", "history.json", "test_results.json"} <= set(entry["outputs"])
    (log,) = (tmp_path / "log").iterdir()
    assert log.name.startswith("logs_")
    assert {path.name for path in log.iterdir()} == {"config.json", "training.log", "final_summary.json"}
    lines = (log / "training.log").read_text().splitlines()
    assert [line for line in lines if "epoch 2/2:" in line and "lr 0.01" in line]
    assert json.loads((log / "config.json").read_text())["arch"] == "ResMLP"
    summary = json.loads((log / "final_summary.json").read_text())
    assert summary["test"] == results(folder)
    printed = capsys.readouterr().out
    assert "epoch 1/2: train mse" in printed
    assert "next: rankwise features compare" in printed


def test_the_test_set_is_scored_with_the_best_network(make: Any, cache: Path) -> None:
    folder = trained(make(arch="ResMLP", epochs=3))
    features = open_cache(cache)
    split = read_split(folder / "split.json", features)
    found = results(folder)
    assert set(RESULTS) | {"excess_error", "refined", "best_epoch"} <= set(found)
    net = load_factorizer(folder).eval()
    errors, ratios, squares = [], [], []
    for place in split.test:
        matrix = normalised(features[place])
        with torch.no_grad():
            approximation = net(matrix[None]).factors.product()[0]
        u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        best = matrix - (u[:, :RANK] * values[:RANK]) @ vt[:RANK]
        errors.append(float((matrix - approximation).norm() / matrix.norm()))
        ratios.append(errors[-1] / float(best.norm() / matrix.norm()) - 1)
        squares.append(float((matrix - approximation).square().mean()))
    count = len(split.test)
    assert found["images"] == count
    assert found["relative_error"] == pytest.approx(sum(errors) / count, rel=1e-5)
    assert found["mse"] == pytest.approx(sum(squares) / count, rel=1e-5)
    assert found["excess_error"] == pytest.approx(sum(ratios) / count, rel=1e-4)
    assert found["best_epoch"] == min(history(folder), key=lambda row: row["val_mse"])["epoch"]
    assert found["parameters"] == sum(one.numel() for one in build(net.settings).parameters())


def test_validation_counts_every_matrix_once(make: Any, cache: Path) -> None:
    """Four matrices in batches of three: a mean of batch means would weigh the last one three times."""
    config = make(arch="MLP", epochs=1, batch_size=3)
    folder = trained(config)
    features = open_cache(cache)
    split = read_split(folder / "split.json", features)
    net = load_factorizer(folder).eval()
    matrices = normalised(torch.stack([features[place] for place in split.val]))
    with torch.no_grad():
        errors = (net(matrices).factors.product() - matrices).square().mean((1, 2))
    assert len(split.val) == 4
    assert history(folder)[0]["val_mse"] == pytest.approx(float(errors.mean()), rel=1e-5)


def spoilt(matrices: Tensor, place: int, how: str) -> str:
    """Make a matrix one that nothing can be measured on; what is said of it."""
    if how == "constant":
        matrices[place] = torch.arange(float(TOKENS))[:, None]  # one number a token
        return "is constant in every token"
    matrices[place, 3, 5] = math.nan if how == "nan" else math.inf
    return "has values that are not finite"


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("how", ["constant", "nan", "infinity"])
@pytest.mark.parametrize("older", [False, True])
def test_features_that_nothing_can_be_measured_on_are_refused_before_training(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, how: str, older: bool
) -> None:
    """Wherever in the split they fall, all of them, by the sentence that `features compare` has."""
    matrices, whole = tiny_matrices(40), open_cache(cache)
    places = [getattr(split_of(whole, 42), part)[0], split_of(whole, 42).train[-1]]
    told = [spoilt(matrices, place, how) for place in places]
    folder = tmp_path / "broken"
    if older:
        folder.mkdir()
        for place, matrix in enumerate(matrices):
            torch.save(matrix[None].clone(), folder / f"features_{place}.pt")
    else:
        tiny_cache(folder, matrices)
    words = ["features", "train", "--arch", "MLP", "--features", str(folder), "--rank", "4", "--epochs", "1"]
    folders = ["--results_dir", str(tmp_path / "results"), "--log_dir", str(tmp_path / "log"), "--device", "cpu"]
    assert cli.main([*words, *folders]) == 3
    error = capsys.readouterr().err
    for place, reason in zip(places, told, strict=True):
        assert f"{f'features_{place}' if older else whole.ids[place]} {reason}" in error
    assert "capture them again, or without them" in error
    assert not (tmp_path / "results").exists() and not (tmp_path / "log").exists()


def test_gaps_among_older_files_are_said(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "older"
    folder.mkdir()
    for place, matrix in enumerate(tiny_matrices(20)):
        if place not in (3, 11):
            torch.save(matrix[None].clone(), folder / f"features_{place}.pt")
    trained(make(arch="MLP", epochs=1, features=str(folder)))
    assert "features_3.pt: no such file; features_11.pt: no such file" in capsys.readouterr().out


def test_a_network_whose_error_is_not_finite_is_diverged(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorizing, "mse", lambda features, made: (features - made).square().mean((-2, -1)) * math.nan)
    with pytest.raises(DivergedError) as raised:
        trained(make(arch="MLP", epochs=1))
    assert raised.value.exit_code == 4


def rows_of(ranks: list[int]) -> list[dict[str, Any]]:
    """Of a history, as far as the picture needs them."""
    return [
        {"epoch": n, "train_mse": 1 / n, "val_mse": 1.1 / n, "lr": 1e-4, "effective_rank": rank}
        for n, rank in enumerate(ranks, 1)
    ]


@pytest.mark.usefixtures("drawn_pictures")
@pytest.mark.parametrize("ranks", [[4], [4, 4, 4], [4, 3, 2]])
def test_the_curves_are_drawn(tmp_path: Path, ranks: list[int]) -> None:
    pytest.importorskip("matplotlib")
    picture = plot_factor_training(rows_of(ranks), tmp_path / "curves.png", best_epoch=1)
    assert picture.stat().st_size > 5000
    with pytest.raises(DataError, match="no epoch"):
        plot_factor_training([], tmp_path / "none.png")


def test_without_matplotlib_the_curves_are_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not train.plotted(rows_of([4]), tmp_path, 1)
    assert "train_val_loss_comparison.png is left out" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_bf16_trains_on_a_cpu(make: Any) -> None:
    rows = history(trained(make(arch="MLP", epochs=2, bf16=True)))
    assert rows[1]["train_mse"] < rows[0]["train_mse"]


def test_bf16_leaves_the_subspace_as_it_is(make: Any) -> None:
    errors = [history(trained(make(arch="Subspace", epochs=1, bf16=on, overwrite=True)))[0] for on in (True, False)]
    assert errors[0]["val_mse"] == pytest.approx(errors[1]["val_mse"], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arch": "ResMPL"}, "ResMLP"),
        ({"rank": 13}, "rank 12 at most"),
        ({"epochs": 0}, "--epochs"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("inf")}, "--lr"),
        ({"seed": -1}, "--seed"),
        ({"num_workers": -1}, "--num_workers"),
        ({"lambda_ortho": float("inf")}, "--lambda_ortho"),
        ({"patience": -1}, "--patience"),
        ({"device": "gpu"}, "--device"),
        ({"arch": "MLP", "activation_orth_regu_A": 0.1}, "AdaLoRA"),
        ({"lambda_B": -1.0}, "--lambda_B"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trained(make(**given))


def test_a_log_folder_that_is_a_file_is_refused(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--log_dir"):
        trained(make(arch="MLP", epochs=1, log_dir=str(tmp_path / "file")))


def test_the_command_line(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["features", "train", "--arch", "MLP", "--features", str(cache), "--rank", "4", "--epochs", "1"]
    words += ["--results_dir", str(tmp_path / "results"), "--log_dir", str(tmp_path / "log"), "--device", "cpu"]
    assert cli.main([*words, "--dry_run"]) == 0
    assert "would train MLP for 1 epochs" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert cli.main(words) == 0
    assert (tmp_path / "results" / "MLP" / "best_model.safetensors").is_file()
    nothing = tmp_path / "nothing"
    assert cli.main([*words[:5], str(nothing), *words[6:]]) == DataError.exit_code
    assert f"{nothing}: no such file or folder (--features)" in capsys.readouterr().err
    nothing.mkdir()
    assert cli.main([*words[:5], str(nothing), *words[6:]]) == DataError.exit_code
    assert "no feature cache" in capsys.readouterr().err
