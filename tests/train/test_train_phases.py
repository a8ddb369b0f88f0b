"""`rankwise train` in phases: what it writes and says, what it refuses, and how it goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_finetune import restaurants
from test_train_stage import words
from tiny import tiny_llama

from rankwise import cli

Train = Callable[..., int]
THREE = (
    "--dynamic_lora",
    "--phase_strategy",
    "both-mlp-attn",
    "--phase1_end",
    "2",
    "--phase2_end",
    "4",
    "--max_steps",
    "6",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restaurants(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(base: Path, data: Path, tmp_path: Path) -> Train:
    """With plots, which other tests of the command leave out."""
    plain = [word for word in words(base, data, tmp_path) if word != "--no_plots"]
    return lambda *more: cli.main([*plain, *more])


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_phased_run_leaves_its_tables_its_plots_and_a_summary(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*THREE, "--adapter_folder", "final_model") == 0
    said = capsys.readouterr().out
    assert [said.count(f"phase from step {step}: {name}") for step, name in ((1, "both"), (3, "mlp"), (5, "attention"))]
    assert [(row["step"], row["phase"]) for row in table(tmp_path / "phases.csv")] == [
        ("1", "both"),
        ("3", "mlp"),
        ("5", "attention"),
    ]
    groups = table(tmp_path / "gradient_analysis.group_norms.csv")
    assert [int(row["step"]) for row in groups] == list(range(1, 7))
    assert [bool(row["attention_norm"]) for row in groups] == [True, True, False, False, True, True]
    assert [bool(row["mlp_norm"]) for row in groups] == [True, True, True, True, False, False]
    summary = json.loads((tmp_path / "results_summary.json").read_text())
    assert summary["config"]["phase_strategy"] == "both-mlp-attn"
    assert summary["train_loss"] > 0
    assert {"attention", "mlp"} <= {name.removesuffix("_norm") for name in summary["gradient_stats"]}
    assert (tmp_path / "final_model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert len(list((tmp_path / "plots").glob("*.png"))) >= 4
    written = json.loads((tmp_path / "manifest.json").read_text())["stages"]["train"]["outputs"]
    assert {"phases.csv", "gradient_norms.csv", "adapter_model.safetensors"} <= set(written)


def test_no_table_and_no_plots_where_none_is_wanted(train: Train, tmp_path: Path) -> None:
    assert train("--max_steps", "2", "--log_frequency", "0") == 0
    assert not list(tmp_path.glob("gradient*"))
    assert not (tmp_path / "plots").exists()


def test_the_best_checkpoint_is_named_with_its_phase(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2")
    assert train(*THREE, *every, "--load_best_model_at_end", "--no_plots") == 0
    best = json.loads((tmp_path / "manifest.json").read_text())["stages"]["train"]["best_checkpoint"]
    losses = {row["step"]: float(row["eval_loss"]) for row in table(tmp_path / "training_log.csv") if row["eval_loss"]}
    step = min(losses, key=losses.__getitem__)
    assert best == f"checkpoint-{step} (phase {dict(zip('246', ('both', 'mlp', 'attention'), strict=True))[step]})"
    assert best in capsys.readouterr().out
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("given", "words_of_it"),
    [
        (("--schedule", "mpl"), ("mpl", "did you mean mlp")),
        (("--schedule", "vision"), ("trains nothing",)),
        (("--schedule", "layers 7"), ("trains nothing", "layers 0 to 1")),
        (("--schedule", "mlp", "--target", "attention_only"), ("trains nothing", "attention")),
        (("--phase_strategy", "both-"), ("shell", "quotes")),
        (("--phase_strategy", "both-mlp"), ("both-mlp-attn",)),
        (("--schedule", "mlp", "--dynamic_lora"), ("give one",)),
        (("--log_frequency", "-1"), ("log_frequency",)),
    ],
)
def test_wrong_phases_are_refused_before_the_model_loads(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    words_of_it: tuple[str, ...],
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rankwise.models.load.load_model", no_model)
    assert train(*given) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words_of_it), said


def test_another_schedule_is_another_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    saving = ("--save_strategy", "steps", "--save_steps", "3", "--no_plots")
    assert train("--schedule", "both:2 > mlp", "--max_steps", "3", *saving) == 0
    resume = ("--max_steps", "6", *saving, "--resume_from_checkpoint", "true")
    assert train("--schedule", "both:3 > mlp", *resume) == 2
    assert "schedule" in capsys.readouterr().err
    assert train("--schedule", "both:2 > mlp", "--phase_state", "reset", *resume) == 2
    assert train("--schedule", "both:2 > mlp", *resume) == 0


def test_packed_rows_train(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--packing", "--max_steps", "2", "--no_plots", "--per_device_train_batch_size", "1") == 0
    assert "packing: " in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").is_file()
