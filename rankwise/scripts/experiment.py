"""Configs of the documented scripts' experiments: mutable dataclasses with their defaults.

    config = ExperimentConfig()
    config.data.dataset_type = DatasetType.WIKISQL
    config.lora.r = 4

`running.py` turns it into the options of `rankwise train`. The defaults are those of the preset recipes (a test
compares them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

ATTENTION_ONLY = ["q_proj", "v_proj"]
MLP_ONLY = ["gate_proj", "up_proj", "down_proj"]
BOTH = ["q_proj", "k_proj", "o_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]

Steps = tuple[int, int | None]


class DatasetType(StrEnum):
    """The text tasks; the values are the names of `--task`."""

    E2E_NLG = "e2e_nlg"
    SAMSUM = "samsum"
    WIKISQL = "wikisql"
    MULTI_NLI = "multi_nli"


def usual_path(task: str) -> str:
    """Where a task's official files are looked for unless a path is given: data/<task>, as in the preset recipes.

    The dot says that it is a folder: `data/samsum` alone, where it does not exist, would be asked of the hub.
    """
    return f"./data/{task}"


@dataclass
class ModelConfig:
    """The base model: folder or hub id."""

    model_name: str = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    dtype: str = "auto"
    gradient_checkpointing: bool = True


@dataclass
class LoRAConfig:
    """LoRA settings: projection names, and the rank and scale of all of them."""

    r: int = 4
    alpha: float = 32
    dropout: float = 0.1
    target_modules: list[str] = field(default_factory=lambda: list(BOTH))


@dataclass
class TrainingConfig:
    """Training length and learning rate. Every `eval_steps` the model is validated and saved; the best one is kept."""

    lr: float = 2e-4
    max_steps: int = 1000
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup_steps: int = 10
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.01
    eval_steps: int = 100
    seed: int = 42


@dataclass
class DataConfig:
    """Which rows. data_path: official files [data/<task>]; max_length: tokens of a row [as the model was trained, else
    2,048]; val_fraction: share of the groups held out."""

    dataset_type: DatasetType = DatasetType.E2E_NLG
    data_path: str | None = None
    max_length: int | None = None
    val_fraction: float = 0.05
    max_samples: int | None = None

    @property
    def path(self) -> str:
        return self.data_path or usual_path(self.dataset_type)


@dataclass
class DynamicLoRAConfig:
    """Phases, as (first step, step after the last) and what trains in them; None is to the end.

    With phase1_layers and phase2_layers (first and last layer, counted from 0) there are two phases of layers, and
    phase 2 must run to the end: `phase2_steps = (300, None)`.
    """

    enabled: bool = False
    phase1_steps: Steps = (0, 300)
    phase2_steps: Steps = (300, 600)
    phase3_steps: Steps | None = (600, None)
    phase1_modules: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    phase2_modules: list[str] = field(default_factory=lambda: ["mlp"])
    phase3_modules: list[str] = field(default_factory=lambda: ["attention"])
    phase1_layers: tuple[int, int] | None = None
    phase2_layers: tuple[int, int] | None = None


@dataclass
class GradientAnalysisConfig:
    """Gradient norms every `log_frequency` optimizer steps, and their pictures after training."""

    enabled: bool = True
    log_frequency: int = 1
    save_plots: bool = True

    @property
    def every(self) -> int | None:
        """As `GradientNorms` and `--log_frequency` take it: at every step the long table, which the scripts do not
        have, is thinned (None); 0 where nothing is measured."""
        return 0 if not self.enabled else None if self.log_frequency == 1 else self.log_frequency


@dataclass
class ExperimentConfig:
    """One experiment. evaluate: score the trained adapter on `num_eval_samples` items [all] of the dev split."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dynamic_lora: DynamicLoRAConfig = field(default_factory=DynamicLoRAConfig)
    gradient_analysis: GradientAnalysisConfig = field(default_factory=GradientAnalysisConfig)
    output_dir: str = "results/experiment"
    evaluate: bool = False
    num_eval_samples: int | None = None
