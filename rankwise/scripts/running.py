"""From an experiment to `rankwise train` and back: its options, its command line, its run, and the presets.

    PRESETS["samsum_phased"]() ──▶ ExperimentConfig ──▶ experiment_command: rankwise train --model_name …
                                                    └─▶ run_experiment: the same run, in this process

A preset is read from the recipe of its name, so that the two cannot differ.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rankwise.core.phase import Phases
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import TARGETS
from rankwise.pipeline.recipe import PACKAGED, load_recipe
from rankwise.pipeline.table import configured
from rankwise.scripts.evaluation import ModelEvaluator
from rankwise.scripts.experiment import (
    ATTENTION_ONLY,
    BOTH,
    MLP_ONLY,
    DataConfig,
    DatasetType,
    DynamicLoRAConfig,
    ExperimentConfig,
    GradientAnalysisConfig,
    LoRAConfig,
    ModelConfig,
    TrainingConfig,
)
from rankwise.scripts.phases import phase_modules, schedule_of
from rankwise.train import command as train
from rankwise.train import phases

MODULES = dict(zip(TARGETS, (ATTENTION_ONLY, MLP_ONLY, BOTH), strict=False))
FINAL_MODEL = "final_model"
RESULTS = "results"


def experiment_options(config: ExperimentConfig) -> dict[str, Any]:
    """Options of `rankwise train` for this experiment."""
    training = config.training
    named = {
        "model_name": config.model.model_name,
        "dtype": config.model.dtype,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "task": str(config.data.dataset_type),
        "data_path": config.data.path,
        "max_seq_length": config.data.max_length,
        "val_fraction": config.data.val_fraction,
        "max_samples": config.data.max_samples,
        "lora_r": config.lora.r,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        **target_options(config.lora.target_modules),
        **phase_options(config),
        "learning_rate": training.lr,
        "max_steps": training.max_steps,
        "batch_size": training.batch_size,
        "gradient_accumulation": training.gradient_accumulation,
        "warmup_steps": training.warmup_steps,
        "lr_scheduler_type": training.lr_scheduler_type,
        "weight_decay": training.weight_decay,
        **validation_options(config),
        "seed": training.seed,
        "output_dir": config.output_dir,
        "adapter_folder": FINAL_MODEL,
    }
    return {name: value for name, value in named.items() if value is not None}


def target_options(modules: list[str]) -> dict[str, Any]:
    """The documented lists by their names, so that fused projections count too; any other list by its own."""
    part = next((name for name, listed in MODULES.items() if sorted(listed) == sorted(modules)), None)
    return {"target_modules": list(modules)} if part is None else {"target": part}


def phase_options(config: ExperimentConfig) -> dict[str, Any]:
    form, gradients = schedule_of(config.dynamic_lora), config.gradient_analysis
    return {
        "schedule": None if form is None else str(form),
        "log_frequency": gradients.every,
        "no_plots": not gradients.save_plots,
    }


def validation_options(config: ExperimentConfig) -> dict[str, Any]:
    """Validated and saved every so many steps, the best kept; only saved where no rows are held out."""
    steps, validated = config.training.eval_steps, config.data.val_fraction > 0
    saving = {"save_strategy": "steps", "save_steps": steps, "save_total_limit": 2}
    if not validated:
        return {"eval_strategy": "no", **saving}
    return {"eval_strategy": "steps", "eval_steps": steps, **saving, "load_best_model_at_end": True}


def experiment_command(config: ExperimentConfig) -> list[str]:
    """The experiment as the words of a command line."""
    words = ["rankwise", "train"]
    for name, value in experiment_options(config).items():
        words += [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]
    return words


def run_experiment(config: ExperimentConfig) -> Path:
    """Train, and with `config.evaluate` score the adapter. Returns the run folder.

    It holds the resolved config, results_summary.json, final_model/, the tables and plots, and after an evaluation
    evaluation_results.json.
    """
    folder = train.run(train_config(config))
    if config.evaluate:
        tested = ModelEvaluator(folder / FINAL_MODEL, config.model.model_name, config.training.batch_size)
        tested.evaluate(
            config.data.dataset_type, config.num_eval_samples, data_path=config.data.path, output_dir=folder
        )
    return folder


def train_config(config: ExperimentConfig) -> TrainConfig:
    """The config of `rankwise train`, checked as from a file."""
    built: TrainConfig = configured("train", experiment_options(config), "ExperimentConfig")
    return built


def preset(name: str) -> ExperimentConfig:
    """The experiment of a recipe that comes with the package, writing to results/<name>."""
    recipe = load_recipe(PACKAGED / f"{name}.yaml", Path(RESULTS) / name)
    stage = next(stage for stage in recipe.stages if stage.command == "train")
    return experiment_of(configured("train", stage.options, str(recipe.path)))


def experiment_of(config: TrainConfig) -> ExperimentConfig:
    """The experiment whose options give this config, of a recipe that asks for no more than an experiment can say."""
    given = config.training
    frequency = 1 if config.phases.log_frequency is None else config.phases.log_frequency
    return ExperimentConfig(
        model=ModelConfig(
            str(config.model.model_name), config.model.dtype, bool(given.get("activation_checkpointing", False))
        ),
        lora=LoRAConfig(
            config.lora.lora_r,
            float(config.lora.lora_alpha or 2 * config.lora.lora_r),
            config.lora.dropout,
            list(MODULES.get(config.lora.target or "both", config.lora.target_modules)),
        ),
        training=TrainingConfig(
            lr=given["learning_rate"],
            max_steps=given["max_steps"],
            batch_size=given["per_device_train_batch_size"],
            gradient_accumulation=given.get("gradient_accumulation_steps", 1),
            warmup_steps=int(given["warmup_steps"]),
            lr_scheduler_type=given["lr_scheduler_type"],
            weight_decay=given["weight_decay"],
            eval_steps=int(given["eval_steps"]),
            seed=config.seed,
        ),
        data=DataConfig(
            DatasetType(str(config.data.task)),
            config.data.data_path,
            config.data.max_seq_length,
            config.val_fraction,
            config.max_samples,
        ),
        dynamic_lora=dynamic_lora_of(config),
        gradient_analysis=GradientAnalysisConfig(frequency > 0, frequency, not config.phases.no_plots),
        output_dir=config.output_dir,
    )


def dynamic_lora_of(config: TrainConfig) -> DynamicLoRAConfig:
    """The phases of a config as steps and kinds of modules."""
    form = phases.schedule_of(config.phases)
    if form is None:
        return DynamicLoRAConfig()
    assert isinstance(form, Phases) and len(form.phases) == 3, "presets have three phases of kinds"
    first, second, third = map(phase_modules, form.phases)
    ends = [phase.steps or 0 for phase in form.phases[:2]]
    middle = sum(ends)
    return DynamicLoRAConfig(True, (0, ends[0]), (ends[0], middle), (middle, None), first, second, third)


NAMES = ("e2e_attention", "e2e_mlp", "samsum_attention", "samsum_mlp", "samsum_phased")
PRESETS = {name: partial(preset, name) for name in NAMES}
