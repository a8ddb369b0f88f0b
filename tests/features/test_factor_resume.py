"""Training of factors that stops and goes on: the same bits, the same rows, and no other run."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from factor_runs import ALLOCATOR, STEPS, config_of, equal, final_weights, history, results, table, trained, untimed
from safetensors.torch import load_file
from tiny_features import tiny_cache
from transformers import TrainerCallback

from rankwise.errors import DataError, Interrupted, UsageError
from rankwise.features import job, train
from rankwise.options.features import AllocatorSection, FactorTrainConfig
from rankwise.train.checkpoints import checkpoints


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("features") / "cache").path


@pytest.fixture
def make(cache: Path, tmp_path: Path) -> Any:
    """A config on the tiny cache."""
    return functools.partial(config_of, cache, tmp_path)


# --- going on ------------------------------------------------------------------------------------------------------


class Signal(TrainerCallback):
    """Sends this process SIGTERM at the beginning of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def signalled(step: int, *given: Any) -> Any:
    trainer, rows = job.trainer_of(*given)
    trainer.add_callback(Signal(step))
    return trainer, rows


@pytest.fixture(scope="module")
def straight(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of four epochs, with dropout and the allocator."""
    return trained(adaptive(cache, tmp_path_factory.mktemp("straight")))


def adaptive(cache: Path, place: Path, **given: Any) -> FactorTrainConfig:
    return config_of(cache, place, arch="AdaLoRA", allocator=ALLOCATOR, **{"epochs": 4, **given})


@pytest.mark.parametrize("step", [6, 8, 15])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    cache: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """In an epoch, at its last step, and while ranks have gone."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "trainer_of", lambda *given: signalled(step, *given))
        with pytest.raises(Interrupted, match=f"--resume --epochs {4 - step // STEPS}") as raised:
            trained(adaptive(cache, tmp_path))
    assert raised.value.exit_code == 143
    folder = trained(adaptive(cache, tmp_path, resume=True, epochs=4 - step // STEPS))
    assert untimed(folder) == untimed(straight)
    assert equal(final_weights(folder), final_weights(straight))
    assert equal(load_file(folder / "best_model.safetensors"), load_file(straight / "best_model.safetensors"))
    assert (folder / "effective_rank.csv").read_text() == (straight / "effective_rank.csv").read_text()
    assert results(folder) == results(straight)


def test_resume_trains_so_many_epochs_more(cache: Path, straight: Path, tmp_path: Path) -> None:
    """The schedule of the ranks stays that of the first run; after it the ranks stay."""
    folder = tmp_path / "results" / "AdaLoRA"
    shutil.copytree(straight, folder)
    trained(adaptive(cache, tmp_path, resume=True, epochs=2))
    rows = history(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert untimed(folder)[:4] == untimed(straight)
    assert {row["effective_rank"] for row in rows[4:]} == {2}
    steps = [row["step"] for row in table(folder / "effective_rank.csv")]
    assert steps == list(range(1, 6 * STEPS + 1))


def test_a_row_without_its_checkpoint_is_made_again(cache: Path, straight: Path, tmp_path: Path) -> None:
    """Killed after the evaluation of an epoch, or while its checkpoint was being written."""
    folder = tmp_path / "results" / "AdaLoRA"
    shutil.copytree(straight, folder)
    (checkpoints(folder)[0] / "rankwise_manifest.json").unlink()
    trained(adaptive(cache, tmp_path, resume=True, epochs=1))
    assert untimed(folder) == untimed(straight)
    assert equal(final_weights(folder), final_weights(straight))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"rank": 3}, "rank: 4 in the checkpoint, 3 now"),
        ({"batch_size": 4}, "per_device_train_batch_size: 8 in the checkpoint, 4 now"),
        ({"seed": 7}, "seed: 42 in the checkpoint, 7 now"),
        ({"lambda_B": 0.5}, "lambda_B: 0.0001 in the checkpoint, 0.5 now"),
        ({"lambda_ortho": 0.5}, "lambda_ortho: 0.001 in the checkpoint, 0.5 now"),
        ({"dropout": 0.3}, "dropout: 0.1 in the checkpoint, 0.3 now"),
        ({"lr": 1e-3}, "learning_rate: 0.01 in the checkpoint, 0.001 now"),
        ({"allocator": AllocatorSection()}, "use_rank_allocator: True in the checkpoint, False now"),
        ({"arch": "MLP", "allocator": AllocatorSection()}, "neither a complete checkpoint nor best_model.safetensors"),
    ],
)
def test_another_run_is_not_resumed(
    cache: Path, straight: Path, tmp_path: Path, change: dict[str, Any], shown: str
) -> None:
    config = dataclasses.replace(adaptive(cache, straight.parents[1], resume=True, epochs=1), **change)
    with pytest.raises(UsageError) as raised:
        trained(dataclasses.replace(config, log_dir=str(tmp_path)))
    assert shown in str(raised.value)


def test_other_features_are_not_resumed_with(straight: Path, tmp_path: Path) -> None:
    other = tiny_cache(tmp_path / "other", seed=5).path
    config = adaptive(other, straight.parents[1], resume=True, epochs=1)
    with pytest.raises(UsageError, match="features: "):
        trained(config)


def test_without_a_checkpoint_the_best_network_goes_on(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(make(arch="MLP", epochs=2))
    before = untimed(folder)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    with pytest.raises(UsageError, match="dropout"):
        trained(make(arch="MLP", epochs=1, dropout=0.0, resume=True))
    capsys.readouterr()
    trained(make(arch="MLP", epochs=2, resume=True))
    assert "fresh optimizer" in capsys.readouterr().out
    rows = history(folder)
    assert untimed(folder)[:2] == before
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["train_mse"] < rows[0]["train_mse"]
    assert (folder / "training_log.until_epoch_2.csv").is_file()
    trained(make(arch="MLP", epochs=1, resume=True))
    assert [row["epoch"] for row in history(folder)] == [1, 2, 3, 4, 5], "a checkpoint of that run goes on as well"


@pytest.mark.parametrize("content", ["{}", '[{"epoch": 1}]', "[1]"])
def test_a_best_network_with_a_broken_history_is_an_error(make: Any, content: str) -> None:
    folder = trained(make(arch="MLP", epochs=1))
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / "history.json").write_text(content)
    with pytest.raises(DataError, match=r"history\.json"):
        trained(make(arch="MLP", epochs=1, resume=True))
    (folder / "history.json").unlink()
    with pytest.raises(UsageError, match="--epochs 0"):
        trained(make(arch="MLP", epochs=0, resume=True))


def test_an_earlier_run_is_in_the_way_until_it_may_go(make: Any) -> None:
    with pytest.raises(UsageError, match="neither a complete checkpoint"):
        trained(make(arch="MLP", resume=True))
    folder = trained(make(arch="MLP", epochs=2))
    with pytest.raises(UsageError, match="--overwrite"):
        trained(make(arch="MLP", epochs=1))
    with pytest.raises(UsageError, match="leave one of them out"):
        trained(make(arch="MLP", resume=True, overwrite=True))
    trained(make(arch="MLP", epochs=1, overwrite=True))
    assert [row["epoch"] for row in history(folder)] == [1]
