"""What a new run replaces stays until the new one has begun: a refused or failing one deletes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file
from test_finetune import restaurants
from tiny import tiny_llama
from tiny_features import tiny_cache, tiny_matrices

from rankwise import cli
from rankwise.errors import DataError, DivergedError, UsageError
from rankwise.evaluate import command as evaluate
from rankwise.features import train
from rankwise.features.synthetic import SyntheticShards
from rankwise.files.atomic import PLACE, Aside
from rankwise.options.commands import EvaluateConfig, TrainConfig
from rankwise.options.sections import ScoredData
from rankwise.train.checkpoints import MANIFEST, checkpoints
from rankwise.train.launch import earlier_run
from rankwise.train.trainer import RankwiseTrainer

Tree = dict[str, bytes]


def tree(folder: Path) -> Tree:
    """Every file below a folder but those of the lock."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".rankwise.lock")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@contextmanager
def failing_at(step: int) -> Iterator[None]:
    """Training that ends in an error within an optimizer step (from 1)."""
    right = RankwiseTrainer.training_step

    def training_step(self: RankwiseTrainer, *args: Any, **rest: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise DivergedError("as if the loss were nan")
        return right(self, *args, **rest)

    with mock.patch.object(RankwiseTrainer, "training_step", training_step):
        yield


# --- train, finetune -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restaurants(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def damaged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of the base, and weights that are cut."""
    folder = tmp_path_factory.mktemp("damaged")
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    return folder


def words(command: str, base: Path, data: Path, out: Path, *more: str) -> list[str]:
    own = f"{command} --model_name {base} --task e2e_nlg --data_path {data} -o {out} --use_cpu --logging_steps 1"
    saving = "--max_steps 2 --save_strategy steps --save_steps 1 --per_device_train_batch_size 4"
    return [*own.split(), *saving.split(), *(["--no_plots"] if command == "train" else []), *more]


@pytest.fixture(scope="module", params=["train", "finetune"])
def earlier(request: pytest.FixtureRequest, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A command, and the folder of its finished run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    more = [] if request.param == "train" else ["--subset_ratio", "1"]
    assert cli.main(words(request.param, base, data, folder, *more)) == 0
    return request.param, folder, more


def test_a_run_that_does_not_begin_deletes_nothing(
    earlier: Any, base: Path, data: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, folder, more = earlier
    again = [*more, "--overwrite_output_dir"]
    before = tree(folder)
    assert {f"checkpoint-{step}/{MANIFEST}" for step in (1, 2)} <= before.keys()
    assert cli.main(words(command, base, data, folder, *again, "--lr", "no")) == 2
    assert cli.main(words(command, base, data, folder, *again, "--optim", "nothing")) == 2
    assert cli.main(words(command, base, data, folder, *again, "--image_folder", "x")) == 2
    assert cli.main(words(command, base, data, folder, *again, "--max_seq_length", "4")) == 3
    assert cli.main(words(command, damaged, data, folder, *again)) == 3
    assert tree(folder) == before
    with failing_at(1):
        assert cli.main(words(command, base, data, folder, *again, "--seed", "2")) == 4
    assert tree(folder) == before, "nothing of a run that has not taken a step is worth more"


def test_packing_that_mixes_samples_deletes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    assert cli.main(words("train", base, data, tmp_path)) == 0
    before = tree(tmp_path)
    with mock.patch("rankwise.train.launch.unpacked_difference", return_value=1.0):
        assert cli.main(words("train", base, data, tmp_path, "--overwrite_output_dir", "--packing")) == 6
    assert tree(tmp_path) == before


def test_a_run_that_has_begun_replaces_the_earlier_one(base: Path, data: Path, tmp_path: Path) -> None:
    assert cli.main(words("train", base, data, tmp_path)) == 0
    with failing_at(2):
        assert cli.main(words("train", base, data, tmp_path, "--overwrite_output_dir", "--seed", "7")) == 4
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert json.loads((tmp_path / "resolved_config.json").read_text())["seed"] == 7
    assert not (tmp_path / PLACE).exists()


def test_what_a_killed_process_left_aside_comes_back(base: Path, data: Path, tmp_path: Path) -> None:
    assert cli.main(words("train", base, data, tmp_path)) == 0
    before = tree(tmp_path)
    earlier_run(TrainConfig(output_dir=str(tmp_path))).take()  # and then the power goes
    assert not checkpoints(tmp_path)
    assert cli.main(words("train", base, data, tmp_path)) == 2, "the earlier run is in the way, as it was before"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--report_to", "tensorboard"]])
def test_a_folder_of_another_program_survives_a_run_in_it(
    more: list[str], base: Path, data: Path, tmp_path: Path
) -> None:
    """Also a run that replaces the one before it there."""
    if more:
        pytest.importorskip("tensorboard")
    for name in ("runs/mine", "tensorboard/mine", "checkpoint-best", "checkpoint-1-old", "plots.old"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "events.out.tfevents.1").write_text("all there is")
    before = tree(tmp_path)
    for again in ([], ["--overwrite"]):
        assert cli.main(words("train", base, data, tmp_path, *more, *again)) == 0
        assert before.items() <= tree(tmp_path).items()
    assert len(list((tmp_path / "tensorboard").iterdir())) == (3 if more else 1), "a tracker keeps both runs"


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "training_log.csv", "phases.csv"])
def test_what_no_run_has_left_is_refused_and_stays(
    name: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("another program's")
    for more in ([], ["--overwrite"]):
        assert cli.main(words("train", base, data, tmp_path, *more)) == 2
        assert f"{name.partition('/')[0]} would be replaced" in capsys.readouterr().err
        assert tree(tmp_path) == {name: b"another program's"}


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("features") / "cache").path


def factors(cache: Path, place: Path, *more: str) -> int:
    own = f"features train --arch MLP --features {cache} --rank 4 --epochs 1 --device cpu"
    folders = f"--results_dir {place / 'results'} --log_dir {place / 'log'}"
    with mock.patch.object(train, "plotted", return_value=False):
        return cli.main([*own.split(), *folders.split(), *more])


def test_a_network_is_not_deleted_by_a_run_that_does_not_begin(cache: Path, tmp_path: Path) -> None:
    assert factors(cache, tmp_path) == 0
    folder = tmp_path / "results" / "MLP"
    before = tree(folder)
    assert {"best_model.safetensors", "history.json", "test_results.json"} <= before.keys()
    (tmp_path / "file").write_text("no folder")
    nan = tiny_matrices(40)
    nan[7, 0, 0] = float("nan")
    broken = tiny_cache(tmp_path / "broken", nan).path
    for more in (
        ["--log_dir", str(tmp_path / "file")],
        ["--log_dir", str(tmp_path / "file" / "below")],
        ["--lambda_B", "-1"],
        ["--rank", "4000"],
        ["--seed", "-1"],
        ["--use_rank_allocator"],
    ):
        assert factors(cache, tmp_path, "--overwrite", *more) == 2
    assert factors(broken, tmp_path, "--overwrite") == 3
    assert factors(tmp_path / "nothing", tmp_path, "--overwrite") == 3
    with failing_at(1):
        assert factors(cache, tmp_path, "--overwrite") == 4
    assert tree(folder) == before
    assert factors(cache, tmp_path, "--overwrite", "--lr", "1e-2") == 0
    assert tree(folder)["best_model.safetensors"] != before["best_model.safetensors"]
    assert not (folder / PLACE).exists()


def capture(folder: Path, *more: str) -> int:
    own = f"features capture --synthetic 6 --tokens 4 --channels 24 --shard_size 2 -o {folder}"
    return cli.main([*own.split(), *more])


@pytest.mark.parametrize(("fails_at", "stays"), [(0, True), (1, False)])
def test_a_capture_stays_until_the_first_shard_of_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, stays: bool
) -> None:
    assert capture(tmp_path) == 0
    before = tree(tmp_path)
    right = SyntheticShards.made

    def made(self: SyntheticShards, shard: int, step: Any) -> Any:
        if shard == fails_at:
            raise DataError("as if the model could not be loaded")
        return right(self, shard, step)

    monkeypatch.setattr(SyntheticShards, "made", made)
    assert capture(tmp_path, "--overwrite", "--seed", "5") == 3
    assert (tree(tmp_path) == before) == stays
    assert not (tmp_path / PLACE).exists()
    monkeypatch.undo()
    assert capture(tmp_path, "--seed", "42" if stays else "5") == 0, "what is there is whole, or is gone on with"


# --- stages of a recipe ----------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(base: Path, data: Path, tmp_path: Path) -> Callable[..., int]:
    """`rankwise run` of a recipe that trains and evaluates, with flags; its exit code."""
    common = f"task: e2e_nlg, data_path: {data}"
    saving = "max_steps: 2, save_strategy: steps, save_steps: 1, per_device_train_batch_size: 4, use_cpu: true"
    rows = [
        f"{{command: train, model_name: {base}, {common}, {saving}, no_plots: true, output_dir: '${{run}}/train'}}",
        f"{{command: evaluate, model_name: '${{run}}/train', {common}, split: train, num_samples: 2,"
        " max_new_tokens: 2, output_dir: '${run}/after'}",
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text("stages:\n" + "".join(f"  - {row}\n" for row in rows))
    return lambda *flags: cli.main(["run", str(file), "-o", str(tmp_path / "out"), *flags])


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "resolved_config.json").read_text())
    return found


def test_what_changed_starts_over_where_this_recipe_has_begun(recipe: Callable[..., int], tmp_path: Path) -> None:
    """Also after starts that came to nothing, whose folder still holds the run that they were to replace."""
    out = tmp_path / "out"
    assert recipe() == 0
    before = tree(out / "train")
    seven, eight = (["--set", f"train.seed={seed}"] for seed in (7, 8))
    for _ in range(2):
        with failing_at(1):
            assert recipe(*seven) == 4
        assert tree(out / "train") == before
    with failing_at(2):
        assert recipe(*seven) == 4
    assert [folder.name for folder in checkpoints(out / "train")] == ["checkpoint-1"]
    assert recipe(*seven) == 0
    assert settings(out / "train")["seed"] == 7
    assert settings(out / "train")["resume_from_checkpoint"] == "true", "of the same run, the second step alone is left"
    earlier_run(TrainConfig(output_dir=str(out / "train"))).take()  # and then the power goes
    assert recipe(*eight) == 0
    assert settings(out / "train")["seed"] == 8 and not (out / "train" / PLACE).exists()


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_what_the_recipe_has_not_made_is_refused_and_stays(
    stage: str,
    recipe: Callable[..., int],
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether the stage has run before elsewhere or not, and whatever is changed after it was refused."""
    own = tmp_path / "own"
    if stage == "train":
        assert cli.main(words("train", base, data, own)) == 0
    else:
        line = f"evaluate {base} --task e2e_nlg --data_path {data} --split train --num_samples 2 --max_new_tokens 2"
        assert cli.main([*line.split(), "-o", str(own)]) == 0
    before = tree(own)
    there = ["--set", f"{stage}.output_dir={own}"]
    remedy = {"train": "start over with --overwrite", "evaluate": "choose another output folder"}[stage]

    def refused(*flags: str) -> None:
        assert recipe("--only", stage, *there, *flags) == 2
        assert f"stage {stage} " in (said := capsys.readouterr().err) and remedy in said
        assert tree(own) == before

    if stage == "train":
        refused()
        refused("--set", "train.seed=7")
    assert recipe() == 0
    refused()
    refused("--set", f"{stage}.seed=7")
    refused("--force")
    assert recipe() == 0


def test_arms_that_changed_start_over(recipe: Callable[..., int], tmp_path: Path) -> None:
    file, out = tmp_path / "arms.yaml", tmp_path / "out" / "train"
    arms = ["--only", "train", "--set", f"train.arms={file}", "--set", "train.lora_dropout=0"]
    arms += ["--set", "train.save_strategy=no"]
    for rank in (2, 3):
        file.write_text(f"- {{name: a, rank: {rank}}}\n")
        assert recipe(*arms) == 0
        assert json.loads((out / "a" / "adapter_config.json").read_text())["r"] == rank


def test_answers_stay_until_the_evaluation_that_replaces_them_can_begin(base: Path, tmp_path: Path) -> None:
    answers = tmp_path / "predictions.jsonl"
    answers.write_text("{}\n")
    data = ScoredData(task="e2e_nlg", data_path=str(tmp_path))
    right = EvaluateConfig(model_name=str(base), data=data, output_dir=str(tmp_path))
    for wrong in ({"num_samples": 0}, {"model_name": str(tmp_path / "nothing")}, {"num_fewshot": 2}):
        with pytest.raises((UsageError, DataError)):
            evaluate.going_on(EvaluateConfig(**{**vars(right), **wrong}), unchanged=False)
        assert answers.is_file()
    evaluate.going_on(right, unchanged=True)
    assert answers.is_file()
    evaluate.going_on(right, unchanged=False)
    assert not answers.exists()


# --- merge -----------------------------------------------------------------------------------------------------------


def test_a_merge_that_fails_leaves_the_earlier_one(base: Path, data: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert cli.main(words("train", base, data, adapter)) == 0
    assert cli.main(["merge", str(adapter), "-o", str(merged)]) == 0
    before = tree(merged)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, file)
    assert cli.main(["merge", str(adapter), "-o", str(merged)]) in (3, 6)
    assert tree(merged) == before


def test_entries_aside_are_renamed_and_never_copied(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_text("old")
    inode = os.stat(tmp_path / "checkpoint-1" / "weights").st_ino
    aside = Aside(tmp_path, ("checkpoint-*",))
    assert [entry.name for entry in aside.take()] == ["checkpoint-1"] and not list(tmp_path.glob("checkpoint-*"))
    (tmp_path / "checkpoint-1").mkdir()
    aside.put_back()
    assert os.stat(tmp_path / "checkpoint-1" / "weights").st_ino == inode
    assert not aside.place.exists()
    aside.put_back()
    aside.drop()
    assert (tmp_path / "checkpoint-1").is_dir()
