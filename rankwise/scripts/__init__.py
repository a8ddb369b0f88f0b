"""The documented Python names of the training scripts that Rankwise grew from, over Rankwise's own types.

    from rankwise.scripts import ExperimentConfig, PRESETS, run_experiment

    config = PRESETS["e2e_attention"]()
    config.lora.r = 8
    run_experiment(config)                     # what `rankwise train` does with the same options

Nothing else imports this package: code that starts today uses the commands, or the names in `rankwise` itself.
"""

from __future__ import annotations

from rankwise.models.adapt import print_trainable_parameters
from rankwise.scripts.evaluation import (
    ModelEvaluator,
    evaluate_e2e,
    evaluate_multi_nli,
    evaluate_samsum,
    evaluate_wikisql,
    get_data_collator,
    load_and_preprocess_dataset,
    setup_model_with_lora,
)
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
from rankwise.scripts.features import (
    ANDROID_IMAGE_MARKER,
    ANDROID_IMAGE_SIZE,
    ANDROID_MAX_TOKENS,
    AdaptiveLowRankProjAdaLoRA,
    LowRankProjMLP,
    LowRankProjSymmetric,
    SVDLinear,
    build_model,
    resize_for_android,
)
from rankwise.scripts.gradients import (
    GradientMeasuringTrainer,
    GradientNormCallback,
    GradientNormLog,
    generate_summary_report,
    plot_gradient_evolution,
    plot_gradient_norms,
    plot_layer_comparison,
    plot_layer_heatmap,
    plot_training_loss,
)
from rankwise.scripts.phases import DynamicLoRACallback, create_layerwise_lora_config, create_phased_lora_config
from rankwise.scripts.running import PRESETS, experiment_command, run_experiment
from rankwise.train.gradients import measure_gradient_norms

__all__ = [
    "ANDROID_IMAGE_MARKER",
    "ANDROID_IMAGE_SIZE",
    "ANDROID_MAX_TOKENS",
    "ATTENTION_ONLY",
    "BOTH",
    "MLP_ONLY",
    "PRESETS",
    "AdaptiveLowRankProjAdaLoRA",
    "DataConfig",
    "DatasetType",
    "DynamicLoRACallback",
    "DynamicLoRAConfig",
    "ExperimentConfig",
    "GradientAnalysisConfig",
    "GradientMeasuringTrainer",
    "GradientNormCallback",
    "GradientNormLog",
    "LoRAConfig",
    "LowRankProjMLP",
    "LowRankProjSymmetric",
    "ModelConfig",
    "ModelEvaluator",
    "SVDLinear",
    "TrainingConfig",
    "build_model",
    "create_layerwise_lora_config",
    "create_phased_lora_config",
    "evaluate_e2e",
    "evaluate_multi_nli",
    "evaluate_samsum",
    "evaluate_wikisql",
    "experiment_command",
    "generate_summary_report",
    "get_data_collator",
    "load_and_preprocess_dataset",
    "measure_gradient_norms",
    "plot_gradient_evolution",
    "plot_gradient_norms",
    "plot_layer_comparison",
    "plot_layer_heatmap",
    "plot_training_loss",
    "print_trainable_parameters",
    "resize_for_android",
    "run_experiment",
    "setup_model_with_lora",
]
