"""`train --allocator adalora`: from its options to ranks and steps, and what it does not go with.

--lora_r 16, keep 0.5 ─▶ start: 32 everywhere ─▶ training masks ─▶ mean 16 (`allocated.py` saves them)
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from transformers import TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.core.rank_budget import RankBudget
from rankwise.errors import UsageError
from rankwise.files.processes import announce
from rankwise.models.adalora import Allocation
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import LoraSection
from rankwise.page.text import plural
from rankwise.stages.scheduling import schedule_of
from rankwise.train.estimate import run_length


def check_allocation(config: TrainConfig) -> None:
    """UsageError for all that does not go with AdaLoRA."""
    if config.allocation.allocator == "none":
        return
    for option, reason in conflicts(config).items():
        raise UsageError(f"--allocator adalora does not go with {option}: {reason}")


def conflicts(config: TrainConfig) -> dict[str, str]:
    """Option in use → why AdaLoRA does not go with it."""
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
    return {option: reason for option, (used, reason) in wrong.items() if used}


def start_rank(config: TrainConfig) -> int:
    """Rank of every site at the beginning: --lora_r ÷ keep_ratio, at least one more than is left."""
    return max(config.lora.lora_r + 1, round(config.lora.lora_r / config.allocation.allocator_keep_ratio))


def starting(config: TrainConfig) -> LoraSection:
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
    budget = RankBudget(
        rank=first * sites,
        keep_ratio=last / first,
        init_warmup=chosen(section.allocator_init_warmup, steps // 10),
        final_warmup=chosen(section.allocator_final_warmup, 3 * steps // 10),
        mask_interval=chosen(section.allocator_mask_interval, max(1, steps // 100)),
        total_steps=steps,
    )
    announce(in_words(first, last, sites, budget))
    return Allocation(first, last, budget, section.allocator_orth)


def chosen(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def in_words(first: int, last: int, sites: int, budget: RankBudget) -> str:
    return (
        f"allocator: rank {first} at each of {plural(sites, 'site')} ({budget.rank:,} in all) for "
        f"{plural(budget.init_warmup, 'step')}, then down to {last} on average ({budget.final:,}) until step "
        f"{budget.end:,}, masked every {plural(budget.mask_interval, 'step')}; the last "
        f"{plural(budget.final_warmup, 'step')} of {budget.total_steps:,} with the final ranks"
    )


def allocation_facts(allocation: Allocation | None) -> dict[str, Any]:
    """What makes an allocated run this run; the length of the schedule is part of it, so it cannot be raised later."""
    if allocation is None:
        return {}
    return {"allocator": {"method": "adalora", **asdict(allocation)}}
