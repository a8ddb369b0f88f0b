"""`train --allocator adalora`: PEFT's rank allocator, from its options to masks in every checkpoint.

    --lora_r 16, keep 0.5 ─▶ rank 32 everywhere ─▶ masks while training ─▶ 16 on average (`results.py` saves them)
    backward ─▶ clipping ─▶ optimizer step ─▶ on_optimizer_step: scores, masks ─▶ gradients dropped ─▶ on_save: state

PEFT keeps what it has kept (`rank_pattern`) in its config, and saves an adapter with such a config without the masked
channels: a checkpoint like that could not be resumed, since masked channels may come back until the budget is final.
So the pattern lives here, and PEFT's config holds it only during PEFT's own call.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.core.rank_budget import RankBudget
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.processes import announce
from rankwise.models.adapt import ADAPTER, Allocation, adalora_layers, regularize, site_of
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import LoraSection
from rankwise.page.text import plural
from rankwise.train.estimate.cost import run_length
from rankwise.train.gradient_table import StepTable
from rankwise.train.phases import schedule_of


def check_allocation(config: TrainConfig) -> None:
    """UsageError for options that are incompatible with AdaLoRA."""
    if config.allocation.allocator == "none":
        return
    lora, selection, training = config.lora, config.selection, config.training
    start = "AdaLoRA has its own start: B·Λ·A with Λ = 0"
    final = "ranks are final only near the end, and an earlier checkpoint has others; leave it out"
    whole = "the allocator needs whole weights and gradients"
    wrong = {
        "--lora_config": (lora.lora_config, "a plan fixes the ranks; name its matrices with --target_modules"),
        "--use_dora": (lora.use_dora, "PEFT's AdaLoRA has no magnitudes"),
        "--use_rslora": (lora.use_rslora, "PEFT's AdaLoRA scales by its starting rank, whatever is left of it"),
        "--init_lora_weights": (lora.init_lora_weights != "default", start),
        "--warm_start": (lora.warm_start != "none", start),
        "--loraplus_lr_ratio": (lora.loraplus_lr_ratio is not None, "B does not start at zero here, as LoRA+ has it"),
        "--lora_bias": (lora.lora_bias != "none", "what comes out is plain LoRA, which has no biases"),
        "phases": (schedule_of(config.phases), "a frozen matrix has no gradient to score its channels by"),
        "--select": (selection.select, final),
        "--early_stopping": (selection.early_stopping, final),
        "--load_best_model_at_end": (training.get("load_best_model_at_end"), final),
        "--fsdp": (training.get("fsdp"), whole),
        "--deepspeed": (training.get("deepspeed"), whole),
        "--auto_find_batch_size": (training.get("auto_find_batch_size"), "the number of steps must be known before"),
        "--label_smoothing_factor": (
            training.get("label_smoothing_factor") and config.allocation.allocator_orth,
            "that loss is computed outside the model, without AdaLoRA's term; --allocator_orth 0 leaves the term out",
        ),
    }
    for option, (used, reason) in wrong.items():
        if used:
            raise UsageError(f"--allocator adalora does not go with {option}: {reason}")


def start_rank(config: TrainConfig) -> int:
    """Rank of every site at the beginning: --lora_r ÷ keep_ratio, at least one more than is left."""
    return max(config.lora.lora_r + 1, round(config.lora.lora_r / config.allocation.allocator_keep_ratio))


def starting_lora(config: TrainConfig) -> LoraSection:
    """The LoRA options as training starts: with an allocator at the starting rank, at the scale of --lora_r."""
    lora = config.lora
    if config.allocation.allocator == "none" or lora.lora_r < 1:
        return lora
    first = start_rank(config)
    alpha = None if lora.lora_alpha is None else lora.lora_alpha * first / lora.lora_r
    return replace(lora, lora_r=first, lora_alpha=alpha)


def allocation_of(config: TrainConfig, plan: RankPlan, rows: int, arguments: TrainingArguments) -> Allocation | None:
    """Ranks and steps, once the number of training rows is known; None without an allocator. Says what it will do.

    plan: the starting plan. UsageError where a matrix is too small for the starting rank, or the run for the warm-ups.
    """
    section = config.allocation
    if section.allocator == "none":
        return None
    first, last = start_rank(config), config.lora.lora_r
    small = [row.site for row in plan.sites if row.rank < first]
    if small:
        raise UsageError(
            f"--allocator adalora starts with rank {first} everywhere, and {small[0].path} {small[0].shape} has no "
            f"more than {small[0].full_rank}; lower --lora_r, raise --allocator_keep_ratio, or leave "
            f"{small[0].projection} out of --target_modules"
        )
    steps, sites = run_length(rows, arguments.per_device_train_batch_size, arguments).updates, len(plan.ranks)
    budget = budget_of(
        first,
        last,
        sites,
        steps,
        init_warmup=section.allocator_init_warmup,
        final_warmup=section.allocator_final_warmup,
        mask_interval=section.allocator_mask_interval,
    )
    announce(
        f"allocator: rank {first} at each of {plural(sites, 'site')} ({budget.rank:,} in all) for "
        f"{plural(budget.init_warmup, 'step')}, then down to {last} on average ({budget.final:,}) until step "
        f"{budget.end:,}, masked every {plural(budget.mask_interval, 'step')}; the last "
        f"{plural(budget.final_warmup, 'step')} of {budget.total_steps:,} with the final ranks"
    )
    return Allocation(first, last, budget, section.allocator_orth)


def budget_of(
    first: int,
    last: int,
    sites: int,
    steps: int,
    *,
    init_warmup: int | None = None,
    final_warmup: int | None = None,
    mask_interval: int | None = None,
) -> RankBudget:
    """From rank `first` at every site to `last` on average. Where nothing is given: a tenth of the steps at full rank,
    the last three tenths with the final ranks, a mask every hundredth."""
    return RankBudget(
        rank=first * sites,
        keep_ratio=last / first,
        init_warmup=default(init_warmup, steps // 10),
        final_warmup=default(final_warmup, 3 * steps // 10),
        mask_interval=default(mask_interval, max(1, steps // 100)),
        total_steps=steps,
    )


def default(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def allocation_facts(allocation: Allocation | None) -> dict[str, Any]:
    """What makes an allocated run this run; the length of the schedule is part of it, so it cannot be raised later."""
    if allocation is None:
        return {}
    return {"allocator": {"method": "adalora", **asdict(allocation)}}


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

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
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

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **_: Any) -> None:
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
        """Save the smoothed scores and the masks into the checkpoint before it is sealed."""
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
