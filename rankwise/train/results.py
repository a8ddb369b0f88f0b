"""Outputs of a training run: the adapter as plain PEFT, its manifest entry, a summary, plots, the final lines.

An adapter of AdaLoRA is written as plain LoRA, each site with its own rank, and proven against the trained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from rankwise.core.plan import RankPlan
from rankwise.data.split import SPLIT
from rankwise.errors import VerificationError
from rankwise.evaluate.likelihood import BESIDE
from rankwise.files.adapter import LoraAdapter, LoraPair, write_adapter
from rankwise.files.adapter_config import EXPERTS, lora_config
from rankwise.files.atomic import read_if_there, write_json
from rankwise.files.checkpoint import open_checkpoint, resolve
from rankwise.files.lineage import row_options
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.files.run_folder import SITES, Record
from rankwise.models.adapt import allocated_plan, plain_pairs
from rankwise.models.adapters import (
    full_weights,
    load_adapter,
    require_converted,
    save_adapter,
    write_sites,
)
from rankwise.models.load import meta_model
from rankwise.options.commands import TrainConfig
from rankwise.options.field import flatten
from rankwise.options.sections import SCORED_TASKS
from rankwise.page.text import amount, command_line, duration, percent, plural
from rankwise.train.adalora import ALLOCATED_TABLE, RankAllocation
from rankwise.train.expert_norms import check_saved
from rankwise.train.expert_record import read_experts
from rankwise.train.gradient_plots import plot_gradients
from rankwise.train.gradient_table import GRADIENT_SUMMARY, PHASES_TABLE, TRAINING_LOG
from rankwise.train.gradients import GRADIENT_FILES
from rankwise.train.job import Job
from rankwise.train.phases import phase_of
from rankwise.train.trainer import ACCURACY, RankwiseTrainer

RESULTS_SUMMARY = "results_summary.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", SITES.name)
# What logits may differ by: a share of the adapter's effect, and one of the logits (in float32; with fewer bits).
SHARE, EXACT, ROUNDED = 1e-3, 1e-4, 5e-2
PROOF_ROWS = 4


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


def whole_state(trainer: RankwiseTrainer) -> Mapping[str, Tensor] | None:
    """The state dict gathered from all processes where parameters are sharded; every process must ask for it."""
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


def plain_model(trainer: RankwiseTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def write_adapter_files(
    trainer: RankwiseTrainer,
    folder: Path,
    name: str,
    plan: RankPlan,
    left_out: list[str],
    initial: Mapping[str, LoraPair] | None = None,
    full: Mapping[str, str] | None = None,
) -> None:
    """The adapter in this folder, and sites.json beside it. full: path → tower of the modules trained in full."""
    state, learnt = whole_state(trainer), trainer.experts.learnt(kept_step(trainer.state))
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(plain_model(trainer), folder, name, initial, state)
        write_sites(folder, plan, left_out, full)
        check_saved(folder, learnt)
        if initial:
            require_converted(plain_model(trainer), folder, open_checkpoint(resolve(name)), meta_model(name))


def kept_step(state: TrainerState) -> int:
    """The step that the weights are of: the last one, or that of the best checkpoint."""
    best: int | None = state.best_global_step if state.best_model_checkpoint else None
    return best or int(state.global_step)


def save_allocated(
    trainer: RankwiseTrainer,
    keeper: RankAllocation,
    job: Job,
    config: TrainConfig,
    start: RankPlan,
    left_out: list[str],
    full: Mapping[str, str],
) -> Outcome:
    """Write the adapter as plain LoRA, each site with its rank, and the ranks as a plan; then prove the adapter.

    The adapter is read back onto the very base it was trained on, in place of what trained: the trainer's model is used
    up. Called in the first process alone. VerificationError where its logits are not those of the trained model.
    """
    folder = adapter_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # the proof without autocast
    plan = allocated_plan(start, keeper.kept)
    settings = lora_config(job.name, dropout=config.lora.dropout, modules_to_save=list(full) or None)
    pairs = plain_pairs(model, keeper.kept, start.alpha_over_rank)
    write_adapter(folder, LoraAdapter(settings, pairs, full_weights(model)))
    write_sites(folder, plan, left_out, full)
    ranks = write_plan(Path(config.output_dir) / PLAN_FILE.name, plan)
    count = sum(parameter.numel() for parameter in full_weights(model).values()) + plan.parameters
    prove(model, folder, job)
    told, files = describe_ranks(start, plan, config.lora.lora_r), (ranks, Path(config.output_dir) / ALLOCATED_TABLE)
    facts = {
        "allocator": "adalora",
        "total_rank_before": sum(start.ranks.values()),
        "total_rank_after": sum(plan.ranks.values()),
        "parameters_while_training": start.parameters + sum(start.ranks.values()),
    }
    return Outcome(len(plan.ranks), count, told, facts, files)


def prove(model: Any, folder: Path, job: Job) -> None:
    """VerificationError unless the saved adapter on the model's own base gives the model's logits, on training rows.

    Up to a thousandth of what the adapter changes, and what sums in another order differ by.
    """
    batch = job.collator([job.rows[index] for index in range(min(PROOF_ROWS, len(job.rows)))])
    inputs = {name: value.to(model.device) for name, value in batch.items() if name not in BESIDE}
    plain = all(value.dtype == torch.float32 for value in model.get_base_model().parameters())
    noise = EXACT if plain and torch.get_float32_matmul_precision() == "highest" else ROUNDED
    trained = logits(model, inputs)
    with model.disable_adapter():
        effect = float((trained - logits(model, inputs)).abs().max())
    saved = logits(load_adapter(model.unload(), folder), inputs)
    difference = float((saved - trained).abs().max())
    if not difference <= SHARE * effect + noise * float(trained.abs().max()):
        raise VerificationError(
            f"the adapter in {folder} is not what was trained: its logits differ by up to {difference:.2g}, where "
            f"training changed them by {effect:.2g}; the last checkpoint holds the trained weights"
        )


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model.eval()(**inputs).logits
    return found.float()


def describe_ranks(start: RankPlan, plan: RankPlan, uniform: int) -> str:
    """`ranks: 448 → 224 over 14 sites, 3 to 29 each; 9,830 parameters (rank 16 everywhere: 9,720)`"""
    before, ranks, none = sum(start.ranks.values()), list(plan.ranks.values()), len(plan.sites) - len(plan.ranks)
    alike = sum(row.site.parameters(uniform) for row in plan.sites)
    lost = f"; {plural(none, 'site')} came out without any" if none else ""
    return (
        f"ranks: {before:,} → {sum(ranks):,} over {plural(len(plan.sites), 'site')}, {min(ranks)} to {max(ranks)} each"
        f"{lost}; {amount(plan.parameters)} parameters (rank {uniform} everywhere: {amount(alike)})"
    )


def finish(
    config: TrainConfig, trainer: RankwiseTrainer, outcome: Outcome, full: int, record: Record, seconds: float
) -> None:
    """Enter the run in its manifest; print the results and the next command.

    full: parameters of the whole model, which full fine-tuning would train.
    """
    folder, state, trainable = Path(config.output_dir), trainer.state, outcome.parameters
    adapter = {name: adapter_folder(config) / name for name in (*ADAPTER_FILES, EXPERTS.name)}
    adapter = {name: file for name, file in adapter.items() if name in ADAPTER_FILES or file.is_file()}
    record.outputs |= adapter | {name: folder / name for name in (SPLIT.name, TRAINING_LOG)}
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
    write_results_summary(config, state, folder)
    print(
        f"train: {state.global_step:,} steps in {duration(seconds)}, {describe_losses(state.log_history)}; "
        f"{amount(trainable)} trainable parameters, {percent(trainable / full)} of full fine-tuning ({amount(full)})"
    )
    if outcome.said:
        print(outcome.said)
    experts = read_experts(folder)
    for line in (*experts.sentences(), *filter(None, [experts.warning()])):
        print(line)
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
    """`accuracy by generation 0.9130`: the metric that chose the checkpoint."""
    name = str(trainer.args.metric_for_best_model).removeprefix("eval_")
    method = f" by {config.selection.select_by}" if name == "accuracy" else ""
    return f"{name}{method} {trainer.state.best_metric:.4f}"


def tables_and_plots(config: TrainConfig) -> list[Path]:
    """What was recorded of gradients and phases, its summary, and its pictures where they are wanted."""
    folder = Path(config.output_dir)
    tables = [folder / name for name in (*GRADIENT_FILES, PHASES_TABLE) if (folder / name).is_file()]
    if config.phases.log_frequency == 0:
        return tables
    return tables + plot_gradients(folder, plots=not config.phases.no_plots)


def write_results_summary(config: TrainConfig, state: TrainerState, folder: Path) -> None:
    """`results_summary.json`: config, train_loss and gradient_stats in one file, for tables over many runs."""
    stats = folder / GRADIENT_SUMMARY
    losses = [row["train_loss"] for row in state.log_history if "train_loss" in row]
    row: dict[str, Any] = {"config": flatten(config), "train_loss": losses[-1] if losses else None}
    row["gradient_stats"] = read_if_there(stats)
    write_json(folder / RESULTS_SUMMARY, row)


def describe_losses(history: Sequence[Mapping[str, Any]]) -> str:
    """`loss 2.31 → 0.52, validation 0.61, accuracy 0.93`, from the Trainer's log."""
    training = [row["loss"] for row in history if "loss" in row]
    training = training or [row["train_loss"] for row in history if "train_loss" in row]
    validation = [row["eval_loss"] for row in history if "eval_loss" in row]
    accuracy = [row[ACCURACY] for row in history if ACCURACY in row]
    first_and_last = [f"{value:.3f}" for value in dict.fromkeys((training[0], training[-1]))]
    last = {"validation": validation[-1:], "accuracy": accuracy[-1:]}
    return f"loss {' → '.join(first_and_last)}" + "".join(f", {name} {row:.3f}" for name in last for row in last[name])
