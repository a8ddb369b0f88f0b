"""AdaLoRA's rank allocation while a network of factors trains: scores at every step, masks as the budget falls.

    backward ── clip ──▶ on_pre_optimizer_step: importance from values and gradients; masked ones get no gradient
             ── step ──▶ on_step_end: every mask_interval steps the channels with the lowest scores are masked

A masked channel stays masked: its value is zero, and so is all that the optimizer remembers of its triplet, so that
nothing moves it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.core.rank_budget import Importance, RankBudget, kept, triplet_scores
from rankwise.errors import DataError
from rankwise.features.nets.row_column import AdaptiveLowRankProjAdaLoRA
from rankwise.files.atomic import atomic_write, read_object, write_json
from rankwise.train.gradient_table import StepTable

TABLE, STATE, SCORES = "effective_rank.csv", "rank_allocation.json", "rank_allocation.safetensors"
SIDES = ("sensitivity", "uncertainty")
COLUMNS = ("step", "effective_rank", "budget")
MEMORY = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of AdamW, in the parameter's shape


class ChannelAllocation(TrainerCallback):
    """Masks the rank channels of a network as its budget falls; `effective_rank.csv` gets a row per step.

    A run that goes on keeps the schedule it began with: the budget is the one of its first number of steps, and after
    those the ranks stay.

    Whenever channels have gone since the last evaluation, errors before and after are of different ranks: the best one,
    the patience and the plateau of the learning rate then start anew. Therefore this comes before early stopping.
    """

    def __init__(self, net: AdaptiveLowRankProjAdaLoRA, budget: RankBudget, folder: Path) -> None:
        self.net, self.budget = net, budget
        self.table = StepTable(folder / TABLE, COLUMNS)
        self.importance = Importance()
        self.mask = torch.ones(budget.rank, dtype=torch.bool)
        self.effective = self.evaluated = budget.rank

    # --- at the beginning ------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Path) -> None:
        """Take up scores and mask of a checkpoint. DataError where they are not there or damaged."""
        self.evaluated = read_object(checkpoint / STATE)["evaluated"]
        try:
            tensors = load_file(checkpoint / SCORES)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{checkpoint / SCORES}: cannot be read ({error}); the ranks' scores are in it") from error
        self.mask = tensors.pop("mask")
        sensitivity, uncertainty = (
            {name.removeprefix(f"{side}."): value for name, value in tensors.items() if name.startswith(side)}
            for side in SIDES
        )
        self.importance = replace(self.importance, sensitivity=sensitivity, uncertainty=uncertainty)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """The network's own mask, where it has one already, goes on."""
        device = next(self.net.parameters()).device
        if self.net.rank_mask is not None:
            self.mask = self.mask.to(device) & self.net.rank_mask
        self.mask = self.mask.to(device)
        self.importance = self.importance.to(device)
        self.apply(optimizer)
        if state.is_world_process_zero:
            self.table.cut(state.global_step)

    # --- at every step -----------------------------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The gradients are those that the step will use: of all processes together, unscaled and clipped."""
        parameters = self.net.rank_parameters()
        self.importance = self.importance.updated(
            {name: value.detach() for name, value in parameters.items()},
            {name: gradient(value) for name, value in parameters.items()},
        )
        if self.effective < self.budget.rank:
            for value in parameters.values():
                if value.grad is not None:
                    clear(value.grad, self.mask)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        step = state.global_step
        allowed = self.budget.at(step)
        if self.budget.masks_at(step):
            self.mask = kept(self.scores(), allowed, among=self.mask)
            self.apply(optimizer)
        if state.is_world_process_zero:
            self.table.append({"step": step, "effective_rank": self.effective, "budget": allowed})

    def scores(self) -> Tensor:
        """One per rank channel (r,)."""
        return triplet_scores(*(self.importance.score(name) for name in self.net.rank_parameters()))

    def apply(self, optimizer: Any) -> None:
        """Mask the network's channels, and forget what the optimizer remembers of the masked ones."""
        self.effective = int(self.mask.sum())
        if self.effective == self.budget.rank:
            return
        self.net.mask_ranks(self.mask)
        for value in self.net.rank_parameters().values():
            memory: Mapping[str, Any] = optimizer.state.get(value, {})
            for name in MEMORY:
                if name in memory:
                    clear(memory[name], self.mask)

    # --- at evaluations and checkpoints ------------------------------------------------------------------------------

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, lr_scheduler: Any = None, **_: Any
    ) -> None:
        if self.effective < self.evaluated:
            state.best_metric = None
            if isinstance(lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                lr_scheduler.best, lr_scheduler.num_bad_epochs = math.inf, 0
        self.evaluated = self.effective

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / STATE, {"budget": asdict(self.budget), "evaluated": self.evaluated})
        tensors = {"mask": self.mask.cpu()}
        for side in SIDES:
            tensors |= {f"{side}.{name}": value.cpu() for name, value in getattr(self.importance, side).items()}
        with atomic_write(folder / SCORES) as temporary:
            save_file(tensors, str(temporary))


def saved_budget(checkpoint: Path) -> RankBudget:
    """The schedule that a checkpoint's run began with."""
    return RankBudget(**read_object(checkpoint / STATE)["budget"])


def gradient(parameter: nn.Parameter) -> Tensor:
    """Zero where the loss does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def clear(values: Tensor, mask: Tensor) -> None:
    """Zero the rows (r, …) of masked channels in place."""
    values.masked_fill_(~mask.reshape(-1, *[1] * (values.ndim - 1)), 0)
