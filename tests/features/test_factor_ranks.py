"""Ranks that fall while a network of factors trains, and several processes that train one."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from factor_runs import ALLOCATOR, RANK, STEPS, config_of, history, results, table, trained, trainer_of, untimed
from tiny_features import tiny_cache, tiny_matrices
from torch import Tensor
from transformers import TrainerCallback

from rankwise.core.rank_budget import RankBudget
from rankwise.errors import UsageError
from rankwise.features.approximation import normalised
from rankwise.features.history import best_row
from rankwise.features.trained import load_factorizer
from rankwise.options.features import AllocatorSection
from rankwise.train.selection import Patience


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("features") / "cache").path


@pytest.fixture
def make(cache: Path, tmp_path: Path) -> Any:
    """A config on the tiny cache."""
    return functools.partial(config_of, cache, tmp_path)


# --- ranks that fall -----------------------------------------------------------------------------------------------


def test_ranks_fall_on_schedule_and_stay_gone(make: Any, tmp_path: Path) -> None:
    trainer, allocation = trainer_of(make(arch="AdaLoRA", epochs=4, allocator=ALLOCATOR))
    trainer.train()
    net = trainer.model.net
    folder = Path(trainer.args.output_dir)
    budget = RankBudget(RANK, 0.5, 5, 3, 2, 4 * STEPS)
    expected, effective = [], RANK
    for step in range(1, 4 * STEPS + 1):
        effective = budget.at(step) if budget.masks_at(step) else effective
        expected.append({"step": step, "effective_rank": effective, "budget": budget.at(step)})
    assert table(folder / "effective_rank.csv") == expected
    assert expected[-1]["effective_rank"] == 2 < RANK
    gone = ~allocation.mask
    assert int(gone.sum()) == 2
    trainer.model.eval()
    features = normalised(tiny_matrices(3, seed=9))
    found = net(features)
    assert not found.factors.left[..., gone].any(), "a masked channel gives nothing"
    assert found.factors.left[..., ~gone].any(0).any(0).all()
    for name, parameter in net.rank_parameters().items():
        state = trainer.optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state[key][gone].any(), f"{key} of {name}"
            assert state[key][~gone].any()
    assert [row["effective_rank"] for row in history(folder)][-1] == 2


def test_once_masked_nothing_moves_a_channel(make: Any) -> None:
    trainer, allocation = trainer_of(make(arch="AdaLoRA", epochs=4, allocator=ALLOCATOR, weight_decay=0.0))
    seen: list[tuple[Tensor, list[Tensor]]] = []

    def look(*_: Any, **__: Any) -> Any:
        values = [value.detach().clone() for value in trainer.model.net.rank_parameters().values()]
        seen.append((allocation.mask.clone(), values))

    callback = TrainerCallback()
    callback.on_step_end = look  # type: ignore[method-assign]
    trainer.add_callback(callback)
    trainer.train()
    pairs = list(itertools.pairwise(seen))
    assert all((~after[0] | before[0]).all() for before, after in pairs), "no channel comes back"
    for (mask, before), (_, after) in pairs:
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[~mask], new[~mask])


def test_the_kept_network_has_the_final_rank(make: Any) -> None:
    folder = trained(make(arch="AdaLoRA", epochs=4, allocator=ALLOCATOR))
    rows = history(folder)
    assert rows[0]["effective_rank"] == RANK
    best = best_row(rows)
    assert best["effective_rank"] == 2
    assert int(load_factorizer(folder).rank_mask.sum()) == 2
    found = results(folder)
    assert (found["effective_rank"], found["best_epoch"]) == (2, best["epoch"])
    assert found["excess_error_at_effective_rank"] < found["excess_error"]


def test_the_best_epoch_is_one_of_the_lowest_rank() -> None:
    """An epoch with all ranks has a lower error, which is not what was asked for."""
    rows = [
        {"epoch": n, "effective_rank": rank, "val_mse": error}
        for n, (rank, error) in enumerate([(4, 0.1), (2, 0.5), (2, 0.4), (2, 0.4)], 1)
    ]
    assert best_row(rows)["epoch"] == 3


def test_falling_ranks_neither_stop_training_nor_lower_the_rate(make: Any) -> None:
    _, allocation = trainer_of(make(arch="AdaLoRA", epochs=4, allocator=ALLOCATOR))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    patience = Patience(1)
    arguments = SimpleNamespace(metric_for_best_model="mse", greater_is_better=False)
    state = SimpleNamespace(best_metric=0.1, global_step=1)
    plateau.step(0.1)

    def stops(error: float) -> bool:
        """Whether an evaluation with this error ends training; the Trainer's own order."""
        control = SimpleNamespace(should_training_stop=False)
        allocation.on_evaluate(arguments, state, control, lr_scheduler=plateau)
        patience.on_evaluate(arguments, state, control, metrics={"eval_mse": error})
        plateau.step(error)
        state.best_metric = error if state.best_metric is None else min(error, state.best_metric)
        return control.should_training_stop

    allocation.effective = 3
    assert not stops(0.3)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert state.best_metric == 0.3
    assert stops(0.4), "at equal rank a higher error counts"
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_schedule_longer_than_the_run_is_refused_before_training(make: Any) -> None:
    config = make(arch="AdaLoRA", allocator=AllocatorSection(True, 1000, 1000, 20, 0.25))
    with pytest.raises(UsageError, match="12 optimizer steps") as raised:
        trained(config)
    assert raised.value.exit_code == 2
    folder = Path(config.results_dir) / "AdaLoRA"
    assert not (folder / "history.json").exists()
    with pytest.raises(UsageError, match="lora_E"):
        trained(make(arch="ResMLP", allocator=ALLOCATOR))


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one(make: Any, cache: Path, tmp_path: Path) -> None:
    """32 matrices in steps of 10: in the last one the first process has two, and the second none that count."""
    words = ["features", "train", "--arch", "AdaLoRA", "--features", str(cache), "--rank", "4", "--epochs", "4"]
    words += ["--results_dir", str(tmp_path / "two"), "--log_dir", str(tmp_path / "log2"), "--device", "cpu"]
    words += ["--dropout", "0", "--lr", "0.01", "--batch_size", "5", "--use_rank_allocator"]
    words += ["--allocator_init_warmup", "5", "--allocator_final_warmup", "3", "--allocator_mask_interval", "2"]
    done = processes.run("-m", "rankwise.cli", *words, "--allocator_keep_ratio", "0.5", count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 1/4:") == 1
    one = trained(make(arch="AdaLoRA", epochs=4, dropout=0.0, batch_size=10, allocator=ALLOCATOR))
    two = tmp_path / "two" / "AdaLoRA"
    for first, second in zip(untimed(one), untimed(two), strict=True):
        assert first == pytest.approx(second, rel=1e-3)
    assert table(one / "effective_rank.csv") == table(two / "effective_rank.csv")
