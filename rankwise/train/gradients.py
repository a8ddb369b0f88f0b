"""Gradient norms of every site, measured at the accumulation boundary before clipping, written row by row.

    backward ──▶ values(): norms on the device ──▶ one copy to the host with loss and guard ──▶ record(): three tables

`values` queues a few kernels and never waits; the Trainer fetches its result together with the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import UsageError
from rankwise.store.files import write_json
from rankwise.train.gradient_table import (
    COLUMNS,
    GRADIENT_SUMMARY,
    GROUP_COLUMNS,
    GROUPS,
    LAYERS,
    NORMS,
    PER_LAYER,
    SiteNorm,
    cells,
    group_row,
    kept,
    layer_columns,
    layer_row,
    root_sum,
    rounded,
    summary,
)
from rankwise.train.norms import ABSENT, delta_norms, gradient_norms
from rankwise.train.tables import StepTable
from rankwise.train.trained import A, B, TrainedModel, trained_model

GRADIENT_FILES = (NORMS, GROUPS, LAYERS, GRADIENT_SUMMARY)


class GradientNorms(TrainerCallback):
    """Measures the norms of a training run and keeps its tables.

    Args:
        output_dir: the run folder.
        every: measure at each optimizer step whose number (from 1) this divides, and write all of it. None: measure at
            every step, and write site by site what `gradient_table.kept` names (24 kB a step with 210 sites).
        phase_at: name of the phase of an optimizer step (from 1, as in the tables).

    A step that the loss scaler skips, its gradients not being finite, keeps its rows, with blank norms.
    """

    def __init__(
        self, output_dir: Path, every: int | None = None, phase_at: Callable[[int], str] | None = None
    ) -> None:
        if every is not None and every < 1:
            raise UsageError(f"--log_frequency {every}: gradient norms are measured every so many steps, 1 or more")
        self.every = every
        self.phase_at = phase_at or (lambda _: "")
        self.output_dir = output_dir
        self.model = TrainedModel()
        self.norms = StepTable(output_dir / NORMS, COLUMNS)
        self.groups = StepTable(output_dir / GROUPS, GROUP_COLUMNS)
        self.layers = StepTable(output_dir / LAYERS, ("step",))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Find what trains, and cut the tables back to where training goes on."""
        self.model = trained_model(model)
        self.layers = StepTable(self.layers.path, layer_columns(self.model.places))
        if state.is_world_process_zero:
            for table in (self.norms, self.groups, self.layers):
                table.cut(state.global_step)

    def wanted(self, step: int) -> bool:
        """Whether the norms of this optimizer step (from 1) are measured."""
        return self.every is None or step % self.every == 0

    def values(self) -> Tensor:
        """Norms of all trainable parameters' gradients (ABSENT where there is none), then ‖B·A‖ of all LoRA sites.

        A float32 tensor of one dimension on the gradients' device. With FSDP2 it is a collective call, and every
        process gets the norms of the whole gradient.
        """
        gradients = gradient_norms([one.parameter for one in self.model.parameters])
        return torch.cat([gradients, delta_norms(self.model.pairs).to(gradients.device, non_blocking=True)])

    def record(self, step: int, norms: Sequence[float], loss_scale: float, max_grad_norm: float | None) -> None:
        """Append the measurement of a step to the three tables.

        Args:
            norms: the numbers of `values`.
            loss_scale: of the gradient scaler, 1 without one: gradients are written without it.
            max_grad_norm: what the Trainer clips to (None, 0: it does not).
        """
        rows = site_norms(self.model, norms, loss_scale, step, self.phase_at(step))
        if rows:
            if self.every is not None or kept(step):
                self.norms.extend(cells(row) for row in rows)
            self.groups.append(group_row(rows, max_grad_norm))
            self.layers.append(layer_row(rows))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_json(self.output_dir / GRADIENT_SUMMARY, summary(self.groups.read()))

    on_train_end = on_save


def site_norms(model: TrainedModel, norms: Sequence[float], loss_scale: float, step: int, phase: str) -> list[SiteNorm]:
    """The rows of one step, from the numbers of `GradientNorms.values`; places without a gradient have none."""
    gradients, deltas = norms[: len(model.parameters)], norms[len(model.parameters) :]
    parts: dict[int, dict[str, list[float]]] = {}
    counts: dict[int, int] = {}
    for one, norm in zip(model.parameters, gradients, strict=True):
        if norm != ABSENT:
            parts.setdefault(one.place, {}).setdefault(one.part, []).append(norm / loss_scale)
            counts[one.place] = counts.get(one.place, 0) + one.parameter.numel()
    delta = {pair.place: rounded(norm) for pair, norm in zip(model.pairs, deltas, strict=True)}
    finite = all(math.isfinite(norm) for norm in gradients)
    rows = []
    for number, place in enumerate(model.places):
        if number in parts:
            measured = measured_parts(parts[number], counts[number]) if finite else {"norm": None}
            at = (place.path, place.tower, place.kind, place.layer)
            rows.append(SiteNorm(step, *at, **measured, delta_norm=delta.get(number), phase=phase))
    return rows


def measured_parts(parts: Mapping[str, Sequence[float]], count: int) -> dict[str, float | None]:
    norm = root_sum(value for values in parts.values() for value in values)
    return {
        "norm": rounded(norm),
        "norm_a": rounded(root_sum(parts[A])) if A in parts else None,
        "norm_b": rounded(root_sum(parts[B])) if B in parts else None,
        "norm_per_sqrt_parameter": rounded(norm / math.sqrt(count)),
    }


def measure_gradient_norms(model: nn.Module, loss_scale: float = 1.0) -> dict[str, Any]:
    """Norms of the gradients that a model has at the moment; to be called after any backward.

    Returns:
        attention_norm, mlp_norm, embed_norm, lm_head_norm, total_norm (None for a group without gradients) and
        layer_data: layer → {"attention": norm, "mlp": norm} of the language model.
    """
    trained = trained_model(model)
    gradients = gradient_norms([one.parameter for one in trained.parameters]).tolist()
    deltas = [0.0] * len(trained.pairs)
    rows = site_norms(trained, [*gradients, *deltas], loss_scale, step=0, phase="")
    groups, layers = (group_row(rows, None), layer_row(rows)) if rows else ({}, {})
    found: dict[str, Any] = {name: groups.get(name) for name in GROUP_COLUMNS if name.endswith("_norm")}
    del found["clipped_total_norm"]
    return found | {"layer_data": by_layer(layers)}


def by_layer(row: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """A row of the layer table as layer → kind → norm; towers beside the language model are left out."""
    found: dict[int, dict[str, float]] = {}
    for column, norm in row.items():
        first, *rest = column.split("_")
        if first == "layer" and rest[-1] in PER_LAYER:
            found.setdefault(int(rest[0]), {})[rest[-1]] = norm
    return found
