"""PEFT's rank allocator inside the Trainer: called when it must be, recorded, and part of every checkpoint.

    backward ─▶ clipping ─▶ optimizer step ─▶ on_optimizer_step: scores, masks ─▶ gradients dropped ─▶ on_save: state

PEFT keeps what it has kept (`rank_pattern`) in its config, and saves an adapter with such a config without the masked
channels: a checkpoint like that could not be resumed, since masked channels may come back until the budget is final.
So the pattern lives here, and PEFT's config holds it only during PEFT's own call.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import DataError, VerificationError
from rankwise.models.adapt import ADAPTER, Allocation, adalora_layers, regularize, site_of
from rankwise.train.gradient_table import StepTable

ALLOCATED_TABLE, ALLOCATOR_STATE = "allocated_ranks.csv", "allocator.safetensors"
COLUMNS = ("step", "budget", "total_rank")
SENSITIVITY, UNCERTAINTY, KEPT = "sensitivity/", "uncertainty/", "kept/"


class RankAllocation(TrainerCallback):
    """Lets PEFT score and mask rank channels after every optimizer step.

    `kept` holds the mask of every site, as last set. `allocated_ranks.csv` in output_dir gets a row at the start and
    per mask: budget, ranks kept in all, ranks of each site. Between masks all channels train, until the budget is
    final; the last row is what comes out.
    """

    def __init__(self, allocation: Allocation, output_dir: Path) -> None:
        self.allocation = allocation
        self.kept: dict[str, Tensor] = {}
        self.table = StepTable(output_dir / ALLOCATED_TABLE, COLUMNS)
        self._restored: Mapping[str, Tensor] = {}
        self._model: Any = None

    # --- at the beginning -----------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        planned = self.allocation.budget.total_steps
        if state.max_steps != planned:
            raise VerificationError(
                f"training has {state.max_steps} optimizer steps and the rank allocator planned for {planned}; give "
                "the number with --max_steps"
            )
        self._model = model
        layers = adalora_layers(model)
        self.kept = {path: torch.ones(layer.r[ADAPTER], dtype=torch.bool) for path, layer in layers.items()}
        self.take_up(model)
        self.table = StepTable(self.table.path, (*COLUMNS, *layers))
        if state.is_world_process_zero:
            self.table.cut(state.global_step)
            if state.global_step == 0:
                self.record(0)

    def regularised(self, share: float) -> AbstractContextManager[None]:
        """Around a forward pass whose loss counts for this share of an optimizer step's."""
        return regularize(self._model, self.allocation.orthogonality * share)

    # --- after a step of the optimizer, while gradients are there ----------------------------------------------------

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        step, budget = state.global_step + 1, self.allocation.budget
        skipped = getattr(optimizer, "step_was_skipped", False)
        if skipped and step != budget.end:
            return  # the loss scaler found gradients that are not finite: they say nothing of importance
        if step < budget.end:
            fill_missing(self._model)
        pattern = self.allocated(step)
        if pattern is not None:
            self.kept = {site_of(name): torch.tensor(mask, dtype=torch.bool) for name, mask in pattern.items()}
            if state.is_world_process_zero:
                self.record(step)

    def allocated(self, step: int) -> Mapping[str, list[bool]] | None:
        """PEFT's own call, with its pattern in its config; the new pattern where this step sets one."""
        config = self._model.peft_config[ADAPTER]
        config.rank_pattern = None
        if step > self.allocation.budget.end:
            config.rank_pattern = {f"{path}.lora_E.{ADAPTER}": mask.tolist() for path, mask in self.kept.items()}
        self._model.base_model.update_and_allocate(step)
        pattern, config.rank_pattern = config.rank_pattern, None
        return pattern if step <= self.allocation.budget.end else None

    def record(self, step: int) -> None:
        ranks = {path: int(mask.sum()) for path, mask in self.kept.items()}
        budget = self.allocation.budget.at(step)
        self.table.append({"step": step, "budget": budget, "total_rank": sum(ranks.values()), **ranks})

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What the scores have smoothed so far, and the masks, go into the checkpoint, before it is sealed."""
        if state.is_world_process_zero:
            scores = self._model.base_model.rankallocator
            tensors = {SENSITIVITY + name: value for name, value in scores.exp_avg_ipt.items()}
            tensors |= {UNCERTAINTY + name: value for name, value in scores.exp_avg_unc.items()}
            tensors |= {KEPT + path: mask for path, mask in self.kept.items()}
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / ALLOCATOR_STATE
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)

    def restore(self, checkpoint: Path) -> None:
        """Read the state that a checkpoint holds. DataError where it is gone."""
        file = checkpoint / ALLOCATOR_STATE
        if not file.is_file():
            raise DataError(f"{file} is missing: without it the rank allocator cannot go on as it would have")
        self._restored = load_file(file)

    def take_up(self, model: Any) -> None:
        """Give the allocator its restored state. PEFT overwrites `ipt` before it reads it; only its names count."""
        scores, parameters = model.base_model.rankallocator, dict(model.base_model.model.named_parameters())
        for key, value in self._restored.items():
            prefix, _, name = key.partition("/")
            if f"{prefix}/" == KEPT:
                self.kept[name] = value
                continue
            average = scores.exp_avg_ipt if f"{prefix}/" == SENSITIVITY else scores.exp_avg_unc
            average[name] = value.to(parameters[name].device)
            scores.ipt[name] = torch.zeros_like(average[name])


def fill_missing(model: nn.Module) -> None:
    """A site that this step's rows did not reach (a vision tower, without images) has no influence: gradient zero."""
    for layer in adalora_layers(model).values():
        for part in (layer.lora_A, layer.lora_E, layer.lora_B):
            if part[ADAPTER].grad is None:
                part[ADAPTER].grad = torch.zeros_like(part[ADAPTER])
