"""A run goes on exactly where it stopped, only from sound checkpoints, and only if it is the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rows import equal, logged, make_trainer, resumed, weights
from tiny import tiny_llama

from rankwise.errors import DataError, UsageError
from rankwise.train.checkpoints import (
    MANIFEST,
    checkpoints,
    differences,
    find_damage,
    identity_of,
    newest_complete,
    refuse_earlier,
    resume_point,
    rotate,
    seal,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run of 12 steps with a checkpoint every 4: its folder and its weights."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = make_trainer(base, folder, save_strategy="steps", save_steps=4)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture
def stopped(straight, tmp_path: Path) -> Path:
    """The run's folder as it was after step 8."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    shutil.rmtree(folder / "checkpoint-12")
    return folder


def again(base: Path, folder: Path, **given: object):
    return make_trainer(base, folder, **{"save_strategy": "steps", "save_steps": 4, **given})


@pytest.mark.parametrize("step", [4, 8])
def test_resuming_gives_the_same_bits(base: Path, straight, stopped: Path, step: int) -> None:
    if step == 4:
        shutil.rmtree(stopped / "checkpoint-8")
    trainer = resumed(again(base, stopped))
    assert equal(weights(trainer), straight[1])
    rows = logged(stopped)
    assert [int(row["step"]) for row in rows] == list(range(1, 13)), "cut back to the checkpoint, then continued"
    expected = logged(straight[0])
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_killed_while_saving(base: Path, straight, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "checkpoint-8" / MANIFEST).unlink()
    (stopped / "checkpoint-8" / "optimizer.pt").unlink()
    assert newest_complete(stopped) == stopped / "checkpoint-4"
    assert "skipped" in capsys.readouterr().out
    assert equal(weights(resumed(again(base, stopped))), straight[1])


@pytest.mark.parametrize("damage", ["cut", "altered", "weights gone", "manifest cut"])
def test_a_damaged_checkpoint_is_skipped_and_that_is_said(
    stopped: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    newest = stopped / "checkpoint-8"
    file = newest / (MANIFEST if damage == "manifest cut" else "adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "altered":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "weights gone":
        file.unlink()
    else:
        file.write_bytes(content[:-10])
    assert newest_complete(stopped) == stopped / "checkpoint-4"
    assert f"skipped {newest}" in capsys.readouterr().out
    with pytest.raises(DataError, match="cannot be resumed from"):
        resume_point(str(newest), stopped, {})


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_missing_state_is_refused_unless_asked_for(base: Path, stopped: Path, name: str) -> None:
    (stopped / "checkpoint-8" / name).unlink()
    identity = identity_of(again(base, stopped).args)
    with pytest.raises(UsageError, match=rf"lacks {name}.*--allow_partial_resume"):
        resume_point("true", stopped, identity)
    assert resume_point("true", stopped, identity, allow_partial=True) == stopped / "checkpoint-8"


def test_another_run_is_refused_with_its_differences(base: Path, stopped: Path) -> None:
    arguments = again(base, stopped).args
    same = identity_of(arguments)
    assert resume_point("true", stopped, same) == stopped / "checkpoint-8"
    arguments.per_device_train_batch_size, arguments.learning_rate = 4, 0.5
    with pytest.raises(UsageError) as raised:
        resume_point("true", stopped, identity_of(arguments, ranks={"model.layers.0.mlp.up_proj": 8}))
    for line in (
        "per_device_train_batch_size: 2 in the checkpoint, 4 now",
        "learning_rate: 0.01 in the checkpoint, 0.5 now",
        "ranks.model.layers.0.mlp.up_proj: None in the checkpoint, 8 now",
    ):
        assert line in str(raised.value)


def test_what_may_change_and_what_may_not() -> None:
    saved = {"num_train_epochs": 2, "max_steps": 10, "seed": 1}
    assert differences(saved, saved | {"num_train_epochs": 3, "max_steps": 20}) == []
    assert len(differences(saved, saved | {"num_train_epochs": 1, "max_steps": 5, "seed": 2})) == 3
    assert differences({"max_steps": 10}, {"max_steps": -1})


def test_more_epochs_and_other_logging_go_on(base: Path, stopped: Path) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 5}
    trainer = resumed(again(base, stopped, num_train_epochs=3, logging_steps=2, save_steps=3, **evaluating))
    assert trainer.state.global_step == 18
    rows = logged(stopped)
    assert [int(row["step"]) for row in rows if row["loss"]] == [*range(1, 9), 10, 12, 14, 16, 18]
    assert [int(row["step"]) for row in rows if row["eval_loss"]] == [10, 15, 18]
    assert (stopped / "checkpoint-9").is_dir()


def test_asking_to_resume_where_nothing_is_starts_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume_point("true", tmp_path, {}) is None
    assert "from the beginning" in capsys.readouterr().out
    assert resume_point(None, tmp_path, {}) is None
    with pytest.raises(UsageError, match="no such folder"):
        resume_point(str(tmp_path / "checkpoint-7"), tmp_path, {})


def test_a_fresh_run_does_not_mix_with_an_earlier_one(stopped: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"):
        refuse_earlier(stopped, overwrite=False)
    refuse_earlier(stopped, overwrite=True)
    for checkpoint in checkpoints(stopped):
        (checkpoint / MANIFEST).unlink()
    refuse_earlier(stopped, overwrite=False)
    assert checkpoints(stopped), "what was never finished is in nobody's way, and refusing deletes nothing"


def made(folder: Path, step: int, *, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("w")
    if complete:
        seal(checkpoint, {})
    return checkpoint


def test_rotation_deletes_old_complete_checkpoints_only(tmp_path: Path) -> None:
    made(tmp_path, 5, complete=False)
    for step in (10, 20, 30, 100):
        made(tmp_path, step)
    rotate(tmp_path, None, best=None)
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path, 3, best=str(tmp_path / "checkpoint-10"))
    assert {folder.name for folder in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (5, 10, 30, 100)}
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-10"))
    assert {folder.name for folder in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (5, 10, 100)}
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-100"))
    assert {folder.name for folder in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (5, 100)}


@pytest.mark.parametrize("chooses", [True, False], ids=["the best counts", "none is chosen"])
def test_two_are_two(base: Path, tmp_path: Path, chooses: bool) -> None:
    """At a rate that makes every evaluation worse the first checkpoint is the best, and stays beside the last."""
    given = {
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    trainer = make_trainer(base, tmp_path, **given, load_best_model_at_end=chooses, learning_rate=1.0)
    trainer.train()
    best = {Path(trainer.state.best_model_checkpoint).name} if chooses else {"checkpoint-9"}
    assert "checkpoint-12" not in best, "or this shows nothing"
    assert {folder.name for folder in checkpoints(tmp_path)} == best | {"checkpoint-12"}


def test_the_manifest_lists_every_file_and_the_run(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, 3, complete=False)
    seal(checkpoint, {"seed": 1})
    content = json.loads((checkpoint / MANIFEST).read_text())
    assert content["step"] == 3
    assert content["identity"] == {"seed": 1}
    assert content["files"]["weights"]["size"] == 1
    assert find_damage(checkpoint) == []
