"""`rankwise features show`: which maps are drawn, on which grid and scales, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factor_folders import CHANNELS, RANK, TOKENS, make_cache, make_run, matrices
from PIL import Image

from rankwise.cli import main
from rankwise.errors import DataError, UsageError
from rankwise.features import show
from rankwise.features.approximation import by_svd, normalised
from rankwise.features.cache import FeatureCache, open_cache
from rankwise.features.dataset import split_of
from rankwise.features.show import run
from rankwise.options.features import FactorShowConfig
from rankwise.page import canvas


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("show")
    make_run(root / "results", make_cache(root / "cache", matrices(24)), "MLP")
    return root


def config(made: Path, **changes: Any) -> FactorShowConfig:
    return FactorShowConfig(**{"arch": "MLP", "results_dir": str(made / "results"), "device": "cpu", **changes})


def drawn(monkeypatch: pytest.MonkeyPatch, asked: FactorShowConfig) -> list[Any]:
    kept: list[Any] = []
    monkeypatch.setattr(canvas, "save", lambda figure, path: kept.append(figure))
    run(asked)
    return kept


def maps(figure: Any) -> list[Any]:
    return [axis.images[0] for axis in figure.axes if axis.images]


def test_three_rows_of_eight_channels_and_two_of_their_errors(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(made / "cache")
    place = split_of(cache, 42).test[1]
    whole = normalised(cache[place])
    channels, errors = drawn(monkeypatch, config(made, image_idx=1))
    shown, missed = maps(channels), maps(errors)
    assert len(shown) == 3 * 8 and len(missed) == 2 * 8
    svd = by_svd(whole, RANK).product()
    for channel in range(8):
        original, net, optimal = (shown[row * 8 + channel] for row in range(3))
        assert np.allclose(original.get_array(), whole[:, channel].reshape(4, 4), atol=1e-6)
        assert np.allclose(optimal.get_array(), svd[:, channel].reshape(4, 4), atol=1e-4)
        assert np.allclose(missed[channel].get_array(), abs(net.get_array() - original.get_array()), atol=1e-5)
        assert original.get_clim() == net.get_clim() == optimal.get_clim()
        low, high = original.get_clim()
        every = np.stack([one.get_array() for one in (original, net, optimal)])
        assert (low, high) == (pytest.approx(every.min()), pytest.approx(every.max()))
    assert len({one.get_clim() for one in shown}) == 8
    (scale,) = {one.get_clim() for one in missed}
    assert scale[0] == 0 and scale[1] == pytest.approx(max(one.get_array().max() for one in missed))
    assert cache.ids[place] in channels.get_suptitle()
    rows = [axis.get_ylabel() for axis in channels.axes if axis.get_ylabel()]
    assert rows == ["original", "MLP (r = 4)", "SVD (r = 4)"]
    assert [axis.get_title() for axis in channels.axes[:8]] == [f"channel {channel}" for channel in range(8)]


def test_the_map_has_tokens_row_by_row() -> None:
    figure, axes = show.maps_of(1, 1, (2, 3), "")
    tokens = torch.arange(6.0)
    assert show.spread(tokens, (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert axes.shape == (1, 1) and figure is not None


@pytest.mark.usefixtures("drawn_pictures")
def test_files_and_words(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "show", "--arch", "mlp", "--results_dir", str(made / "results"), "--channels", "3"]) == 0
    told = capsys.readouterr().out
    cache = open_cache(made / "cache")
    assert f"{cache.ids[split_of(cache, 42).test[0]]} (test image 0" in told
    assert told.count("relative error") == 2 and "excess 0.00 %" in told
    for name in ("spatial_0.png", "spatial_error_0.png"):
        with Image.open(made / "results" / "MLP" / name) as picture:
            assert picture.width > picture.height > 200


def test_the_dry_run_draws_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["features", "show", "--arch", "MLP", "--image_idx", "1", "--results_dir", str(made / "results")]
    assert main([*words, "--dry-run"]) == 0
    assert "spatial_1.png" in capsys.readouterr().out
    assert not (made / "results" / "MLP" / "spatial_1.png").exists()


def test_a_lower_rank_is_that_of_both(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, _ = drawn(monkeypatch, config(made, rank=2))
    assert [axis.get_ylabel() for axis in channels.axes if axis.get_ylabel()][1:] == ["MLP (r = 2)", "SVD (r = 2)"]
    cache = open_cache(made / "cache")
    whole = normalised(cache[split_of(cache, 42).test[0]])
    expected = by_svd(whole, 2).product()[:, 0].reshape(4, 4)
    assert np.allclose(maps(channels)[16].get_array(), expected, atol=1e-4)


def run_folder(root: Path, cache: FeatureCache) -> Path:
    make_run(root / "results", cache, "MLP")
    return root


def test_tokens_that_make_a_square_are_drawn_as_one_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "cache", matrices(9), grid=None)
    run(config(run_folder(tmp_path, cache)))
    assert "names no grid: 16 tokens are drawn as 4 × 4" in capsys.readouterr().out


def test_without_a_grid_or_a_square_there_is_no_map(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", matrices(9, tokens=12), grid=None)
    with pytest.raises(UsageError, match=r"does not record the grid of its 12 tokens.*no square"):
        run(config(run_folder(tmp_path, cache)))


def test_a_grid_that_is_no_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "cache", matrices(9, tokens=12), grid=(3, 4))
    channels, _ = drawn(monkeypatch, config(run_folder(tmp_path, cache), channels=2))
    assert [one.get_array().shape for one in maps(channels)] == [(3, 4)] * 6


@pytest.mark.parametrize("index", [-1, 2, 100])
def test_an_image_that_is_not_there(made: Path, index: int) -> None:
    with pytest.raises(UsageError, match="test images 0 to 1"):
        run(config(made, image_idx=index))


def test_what_else_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--channels"):
        run(config(made, channels=0))
    with pytest.raises(UsageError, match=f"these features have {CHANNELS}"):
        run(config(made, channels=CHANNELS + 1))
    with pytest.raises(UsageError, match=f"--rank {TOKENS + 1}: .* has only .* channels"):
        run(config(made, rank=TOKENS + 1))
    with pytest.raises(UsageError, match="--device is auto, cpu or cuda, got tpu"):
        run(config(made, device="tpu"))
    with pytest.raises(DataError, match="no trained network"):
        run(config(made, arch="ResMLP"))
    make_cache(tmp_path / "other", matrices(9, seed=4), name="drawing")
    with pytest.raises(DataError, match="another feature cache"):
        run(config(made, features=str(tmp_path / "other")))


def test_another_network_after_its_cache_has_gone(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", matrices(9))
    run_folder(tmp_path, cache)
    (tmp_path / "cache").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="give it as --features"):
        run(config(tmp_path))
    assert run(config(tmp_path, features=str(tmp_path / "moved")))[0].is_file()
