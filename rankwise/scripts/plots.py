"""The documented plots, each from the folder of a run: they read its tables and write one picture.

plot_gradient_norms("results/experiment")        # → results/experiment/plots/gradient_norms.png
"""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import DataError
from rankwise.train import gradient_plots, gradient_summary, loss_plots
from rankwise.train.gradient_summary import GradientTables, read_tables
from rankwise.train.gradient_table import GROUPS, TRAINING_LOG, StepTable

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
