"""TrainingArguments as flags: all of them, the older names, our defaults, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from rankwise import cli
from rankwise.errors import UsageError
from rankwise.models import load
from rankwise.models.load import torch_dtype
from rankwise.train.arguments import NO_LONGER, TRANSLATED, autocast, build_arguments, frozen_dtype


def given(*words: str, command: str = "train") -> dict[str, Any]:
    return cli.resolve(command, words)[0].training


def built(tmp_path: Path, *words: str) -> TrainingArguments:
    return build_arguments(tmp_path, 42, given(*words))


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_every_training_argument_is_a_flag_once(command: str) -> None:
    options = cli.command_options(cli.COMMANDS[command])
    names = [name for option in options for name in (option.name, *option.aliases)]
    assert len(names) == len(set(names))
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= set(names)
    assert {*TRANSLATED, *NO_LONGER} <= set(names)


def test_older_names_mean_what_they_meant(tmp_path: Path) -> None:
    words = (
        "--evaluation_strategy steps --eval-steps 5 --batch-size 3 --gradient-accumulation 4 --num-epochs 2 --lr 1e-3"
    )
    arguments = built(tmp_path, *words.split(), "--no_cuda", "--warmup_ratio", "0.1", "--group_by_length")
    assert arguments.eval_strategy == "steps"
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 4)
    assert (arguments.num_train_epochs, arguments.learning_rate) == (2.0, 1e-3)
    assert arguments.use_cpu
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.train_sampling_strategy == "group_by_length"


def test_names_without_effect_are_accepted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(tmp_path, "--logging_dir", "x", "--save_safetensors", "True", "--do_train")
    printed = capsys.readouterr().out
    assert printed.count("no effect") == 3
    assert "--logging_dir" in printed and "--do_train" in printed


def test_two_names_for_one_thing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="set the same option"):
        built(tmp_path, "--warmup_ratio", "0.1", "--warmup_steps", "5")
    with pytest.raises(UsageError, match=r"--warmup_ratio is 10\.0; give a number of at least 0 and below 1"):
        built(tmp_path, "--warmup_ratio", "10")


def test_our_defaults(tmp_path: Path) -> None:
    arguments = built(tmp_path)
    assert arguments.learning_rate == 2e-4
    assert arguments.report_to == []
    assert not arguments.logging_nan_inf_filter
    assert not arguments.disable_tqdm
    assert built(tmp_path, "--report_to", "none").report_to == []


def test_yaml_numbers_and_none_reach_training_arguments(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 2e-5\nreport_to: none\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    arguments = built(tmp_path, str(recipe))
    assert (arguments.learning_rate, arguments.report_to) == (2e-5, [])
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}


def test_gradient_checkpointing_is_non_reentrant(tmp_path: Path) -> None:
    arguments = built(tmp_path, "--gradient-checkpointing")
    assert arguments.gradient_checkpointing
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_what_training_arguments_refuses_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="load_best_model_at_end"):
        built(tmp_path, "--load_best_model_at_end", "--eval_strategy", "no")
    with pytest.raises(UsageError, match="cosine"):
        built(tmp_path, "--lr_scheduler_type", "cosin")
    with pytest.raises(UsageError, match=r"did you mean.*learning_rate"):
        built(tmp_path, "--learning_rat", "1")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without a GPU")
def test_half_precision_on_a_cpu_is_a_warning_and_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = built(tmp_path, "--fp16")
    assert "float32" in capsys.readouterr().out
    assert not arguments.fp16
    assert arguments.use_cpu
    assert frozen_dtype("auto", arguments) == frozen_dtype("float16", arguments) == torch.float32
    assert frozen_dtype("bfloat16", arguments) == torch.bfloat16


@pytest.fixture
def slow_halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU on which 16 bits take 35 times as long."""
    monkeypatch.setattr(load, "seconds_of", lambda dtype: 0.001 if dtype == torch.float32 else 0.035)
    yield from forgotten()


def forgotten() -> Iterator[None]:
    for measured in (load.slowdown, load.warn_if_slow):
        measured.cache_clear()
    yield
    for measured in (load.slowdown, load.warn_if_slow):
        measured.cache_clear()


@pytest.mark.parametrize(
    ("words", "instead"),
    [(["--bf16"], "--bf16 false computes in float32"), (["--dtype", "bfloat16"], "--dtype float32 computes"), ([], "")],
)
def test_emulated_bf16_is_said_before_training(
    words: list[str], instead: str, slow_halves: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train",
        "--model_name",
        str(tmp_path),
        "--lora_r",
        "2",
        "--task",
        "e2e_nlg",
        "--data_path",
        str(tmp_path),
    ]
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    assert cli.main([*command, "--use_cpu", "-o", str(tmp_path / "run"), *words]) != 0, "there is no model"
    said = capsys.readouterr().out
    assert ("35 times as long" in said) is bool(instead)
    assert instead in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_emulated_halves_are_said_where_a_model_is_loaded(
    dtype: str, slow_halves: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert torch_dtype(dtype, trained=False, device=torch.device("cpu")) == getattr(torch, dtype)
    assert capsys.readouterr().out.count(f"this CPU has no {dtype} units") == 1
    assert torch_dtype("auto", trained=False, device=torch.device("cpu")) == torch.float32
    assert not capsys.readouterr().out


def test_what_is_measured_is_a_product_in_that_type() -> None:
    assert 0.2 < load.seconds_of(torch.float32) / load.seconds_of(torch.float32) < 5
    assert 0 < load.seconds_of(torch.float16) < 0.5


def test_precision_is_decided_by_flags_then_dtype() -> None:
    assert autocast("auto", {"fp16": True}, on_cpu=False)[0] == {"fp16": True, "bf16": False}
    assert autocast("float32", {}, on_cpu=False)[0] == {"fp16": False, "bf16": False}
    assert autocast("bfloat16", {}, on_cpu=False)[0]["bf16"]
    assert autocast("bfloat16", {}, on_cpu=True)[0]["bf16"]


def test_one_process_with_several_gpus_is_told_to_use_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 4"):
        built(tmp_path)


def test_a_tracker_that_is_not_installed_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"rankwise\[track\]"):
        built(tmp_path, "--use_wandb")


@pytest.mark.parametrize("words", [("--hub_model_id", "org/name"), ("--hub_private_repo",), ("--push_to_hub",)])
def test_nothing_is_uploaded_and_nothing_is_said_about_where(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"{words[0]}: training uploads nothing"):
        built(tmp_path, *words)
