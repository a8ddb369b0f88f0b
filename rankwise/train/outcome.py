"""What a training run leaves besides its adapter: the manifest's entry, a summary, plots, and its last words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerState

from rankwise.files.atomic import read_object, write_json
from rankwise.files.lineage import row_options
from rankwise.files.run_folder import Record
from rankwise.models.adapters import SITES_FILE
from rankwise.options.commands import TrainConfig
from rankwise.options.field import flatten
from rankwise.options.sections import SCORED_TASKS
from rankwise.page.text import amount, command_line, duration, percent
from rankwise.train.gradient_plots import plot_gradients
from rankwise.train.gradient_table import GRADIENT_SUMMARY, TRAINING_LOG
from rankwise.train.gradients import GRADIENT_FILES
from rankwise.train.job import describe_losses
from rankwise.train.phases import PHASES_TABLE, phase_of
from rankwise.train.trainer import RankwiseTrainer

SPLIT_FILE, RESULTS_SUMMARY = "split.json", "results_summary.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", SITES_FILE)


def adapter_folder(config: TrainConfig) -> Path:
    """The root of the run folder, unless a recipe documents another place."""
    return Path(config.output_dir) / config.adapter_folder


@dataclass(frozen=True)
class Outcome:
    """An adapter as it was saved: its sites and parameters; a line about it, facts and files where there are some."""

    sites: int
    parameters: int
    said: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def finish(
    config: TrainConfig, trainer: RankwiseTrainer, outcome: Outcome, full: int, record: Record, seconds: float
) -> None:
    """Enter the run in its manifest, and say in a few lines what came out and what comes next.

    full: parameters of the whole model, which full fine-tuning would train.
    """
    folder, state, trainable = Path(config.output_dir), trainer.state, outcome.parameters
    adapter = {name: adapter_folder(config) / name for name in ADAPTER_FILES}
    record.outputs |= adapter | {name: folder / name for name in (SPLIT_FILE, TRAINING_LOG)}
    record.outputs |= {path.name: path for path in (*tables_and_plots(config), *outcome.files)}
    record.facts |= {
        "trainable_parameters": trainable,
        "total_parameters": full,
        "adapted_sites": outcome.sites,
        "steps": state.global_step,
        "training_seconds": round(seconds, 2),
        **({"best_checkpoint": best_checkpoint(state)} if state.best_model_checkpoint else {}),
        **outcome.facts,
    }
    write_results_summary(config, state)
    print(
        f"train: {state.global_step:,} steps in {duration(seconds)}, {describe_losses(state.log_history)}; "
        f"{amount(trainable)} trainable parameters, {percent(trainable / full)} of full fine-tuning ({amount(full)})"
    )
    if outcome.said:
        print(outcome.said)
    if state.best_model_checkpoint:
        print(f"kept the best checkpoint: {best_checkpoint(state)}, {best_metric(trainer, config)}")
    print(f"adapter in {adapter_folder(config)}, losses in {folder / TRAINING_LOG}")
    print(f"next: {next_command(config)}")


def next_command(config: TrainConfig) -> str:
    """Its scores, on the validation rows where they are a file of their own; for a task without scores, the merge."""
    if config.data.task not in SCORED_TASKS:
        return command_line("merge", config.output_dir)
    held_out = config.val_path if config.val_path and config.data.task != "labels" else config.data.data_path
    asked = row_options(vars(config.data)) | {"data_path": held_out}
    if config.selection.select == "accuracy" and config.selection.select_by == "generation":
        asked["classify"] = "generation"  # scored as it was selected
    return command_line("evaluate", config.output_dir, **asked)


def best_checkpoint(state: TrainerState) -> str:
    """Its step, and the phase that it was saved in."""
    folder = Path(state.best_model_checkpoint)
    phase = phase_of(folder)
    return folder.name + (f" (phase {phase})" if phase else "")


def best_metric(trainer: RankwiseTrainer, config: TrainConfig) -> str:
    """`accuracy by generation 0.9130`: what it was chosen by."""
    name = str(trainer.args.metric_for_best_model).removeprefix("eval_")
    method = f" by {config.selection.select_by}" if name == "accuracy" else ""
    return f"{name}{method} {trainer.state.best_metric:.4f}"


def tables_and_plots(config: TrainConfig) -> list[Path]:
    """What was recorded of gradients and phases, its summary, and its pictures where they are wanted."""
    folder = Path(config.output_dir)
    tables = [folder / name for name in (*GRADIENT_FILES, PHASES_TABLE) if (folder / name).is_file()]
    if config.phases.log_frequency == 0:
        return tables
    return tables + plot_gradients(folder, pictures=not config.phases.no_plots)


def write_results_summary(config: TrainConfig, state: TrainerState) -> None:
    """`results_summary.json`: config, train_loss and gradient_stats in one file, for tables over many runs."""
    folder = Path(config.output_dir)
    stats = folder / GRADIENT_SUMMARY
    losses = [row["train_loss"] for row in state.log_history if "train_loss" in row]
    write_json(
        folder / RESULTS_SUMMARY,
        {
            "config": flatten(config),
            "train_loss": losses[-1] if losses else None,
            "gradient_stats": read_object(stats) if stats.is_file() else {},
        },
    )
