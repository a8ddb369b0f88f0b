"""Gradient norms as the documented scripts measure them: a callback that names the folder, and a Trainer.

gradients = GradientNormCallback(config=GradientAnalysisConfig(), output_dir="results/experiment")
trainer = GradientMeasuringTrainer(model=model, args=arguments, train_dataset=rows, gradient_callback=gradients,
                                   callbacks=[gradients, dynamic_lora])
trainer.train()
GradientNormLog.load("results/experiment").groups["attention_norm"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.errors import DataError, UsageError
from rankwise.scripts.experiment import GradientAnalysisConfig
from rankwise.scripts.phases import DynamicLoRACallback
from rankwise.train import gradient_plots, gradient_summary, loss_plots
from rankwise.train.gradient_summary import GradientTables, read_tables, series
from rankwise.train.gradient_table import GROUPS, TRAINING_LOG, StepTable, summary
from rankwise.train.gradients import GradientNorms
from rankwise.train.phases import PhaseKeeper
from rankwise.train.trainer import RankwiseTrainer


@dataclass(frozen=True)
class GradientNormLog:
    """The measured norms as columns beside `steps`; NaN where a group or layer did not train.

    groups: attention_norm, mlp_norm, embed_norm, lm_head_norm, total_norm … layers: layer_0_attention,
    layer_0_mlp … summary: group → mean, std, max, min, peak_step.
    """

    steps: list[int]
    groups: dict[str, list[float]]
    layers: dict[str, list[float]]
    summary: dict[str, dict[str, float | int]]

    @classmethod
    def load(cls, folder: str | Path) -> GradientNormLog:
        """Read the tables of a run folder; DataError where it has none."""
        tables = read_tables(Path(folder))
        if tables is None:
            raise DataError(f"{folder}: no {GROUPS}: no gradient norms were measured")
        groups, layers = series(tables.groups), series(tables.layers)
        return cls(groups.steps, groups.columns, layers.columns, summary(tables.groups))


class GradientNormCallback(TrainerCallback):
    """Where and how often a GradientMeasuringTrainer writes norms: two tables and a summary, and the long table.

    Alone it measures nothing, because a callback sees gradients after they are clipped: in another Trainer it is an
    error when training begins.
    """

    def __init__(self, config: GradientAnalysisConfig | None = None, output_dir: str | Path = ".") -> None:
        self.config = config or GradientAnalysisConfig()
        self.output_dir = Path(output_dir)

    def norms(self, phases: PhaseKeeper | None) -> GradientNorms | None:
        """The gradient-norm recorder; None where the config turns it off."""
        if self.config.every == 0:
            return None
        self.output_dir.mkdir(parents=True, exist_ok=True)
        named = None if phases is None else lambda step: phases.schedule.name(step - 1)
        return GradientNorms(self.output_dir, self.config.every, named)

    @property
    def log(self) -> GradientNormLog:
        """The measurements so far."""
        return GradientNormLog.load(self.output_dir)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        raise UsageError(
            "GradientNormCallback measures nothing in this Trainer; use GradientMeasuringTrainer(gradient_callback=…)"
        )


class GradientMeasuringTrainer(RankwiseTrainer):
    """RankwiseTrainer, built as the documented scripts build theirs.

    Args:
        gradient_callback: says where norms go; it may also be among the callbacks.
        callbacks: a DynamicLoRACallback among them sets the phases.
        The rest are the Trainer's own. Rows of `load_and_preprocess_dataset` get their collator where none is given.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        gradient_callback: GradientNormCallback | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        data_collator: Any = None,
        train_dataset: Any = None,
        **rest: Any,
    ) -> None:
        measuring = [one for one in (gradient_callback, *callbacks) if isinstance(one, GradientNormCallback)]
        dynamic = [one for one in callbacks if isinstance(one, DynamicLoRACallback)]
        if len(dynamic) > 1 or len({id(one) for one in measuring}) > 1:
            raise UsageError("one DynamicLoRACallback and one GradientNormCallback at most")
        phases = dynamic[0].keeper(model, Path(args.output_dir)) if dynamic else None
        if data_collator is None and isinstance(train_dataset, RenderedDataset):
            data_collator = Collator.of(train_dataset.renderer.tokenizer)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            phases=phases,
            gradients=measuring[0].norms(phases) if measuring else None,
            callbacks=[one for one in callbacks if one not in (*measuring, *dynamic)],
            **rest,
        )


PLOTS = "plots"


def plot_gradient_norms(experiment_dir: str | Path, output_path: str | Path | None = None) -> Path:
    """Norms of attention, MLP, embeddings and head over the steps."""
    path = target(experiment_dir, output_path, "gradient_norms")
    tables = measured(experiment_dir)
    return gradient_plots.plot_gradient_norms(tables.groups, path, tables.boundaries())


def plot_layer_heatmap(experiment_dir: str | Path, output_path: str | Path | None = None) -> Path:
    """Steps × layers, attention and MLP."""
    path, tables = target(experiment_dir, output_path, "layer_heatmap"), measured(experiment_dir)
    return gradient_plots.plot_layer_heatmap(tables.layers, path, tables.boundaries())


def plot_layer_comparison(experiment_dir: str | Path, output_path: str | Path | None = None) -> Path:
    """Mean norm of every layer, attention beside MLP."""
    path = target(experiment_dir, output_path, "layer_comparison")
    return gradient_plots.plot_layer_comparison(measured(experiment_dir).layers, path)


def plot_gradient_evolution(experiment_dir: str | Path, output_path: str | Path | None = None) -> Path:
    """Norm over the layers at a few moments of training."""
    path = target(experiment_dir, output_path, "gradient_evolution")
    return gradient_plots.plot_gradient_evolution(measured(experiment_dir).layers, path)


def plot_training_loss(experiment_dir: str | Path, output_path: str | Path | None = None) -> Path:
    """Training and validation loss, minima marked; phases too where gradient norms were measured."""
    rows = list(StepTable(Path(experiment_dir) / TRAINING_LOG, ()).read())
    tables = read_tables(Path(experiment_dir))
    path = target(experiment_dir, output_path, "training_loss")
    return loss_plots.plot_loss(rows, path, tables.boundaries() if tables else ())


def generate_summary_report(experiment_dir: str | Path) -> list[Path]:
    """gradient_summary.txt and gradient_summary.json: the norms in words and in numbers."""
    return gradient_summary.generate_summary_report(Path(experiment_dir))


def target(folder: str | Path, output_path: str | Path | None, name: str) -> Path:
    return Path(output_path) if output_path else Path(folder) / PLOTS / f"{name}.png"


def measured(folder: str | Path) -> GradientTables:
    """The tables of gradient norms of a run; DataError where nothing was measured."""
    found = read_tables(Path(folder))
    if found is None:
        raise DataError(f"{folder}: no {GROUPS}; train with gradient norms switched on to have it")
    return found
