"""`train --allocator adalora`: from its options to ranks and steps, and what it does not go with.

--lora_r 16, keep 0.5 ─▶ start: 32 everywhere ─▶ training masks ─▶ mean 16 (`allocated.py` saves them)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.core.rank_budget import RankBudget
from rankwise.errors import UsageError, VerificationError
from rankwise.evaluate.likelihood import BESIDE
from rankwise.files.adapter import LoraAdapter, lora_config, write_adapter
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.files.processes import announce
from rankwise.models.adapt import Allocation, allocated_plan, plain_pairs
from rankwise.models.adapters import full_weights, load_adapter, write_sites
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import LoraSection
from rankwise.page.text import amount, plural
from rankwise.train.allocation import ALLOCATED_TABLE, RankAllocation
from rankwise.train.estimate.cost import run_length
from rankwise.train.job import Job
from rankwise.train.outcome import Outcome, adapter_folder
from rankwise.train.phases import schedule_of
from rankwise.train.trainer import RankwiseTrainer


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


# What logits may differ by: a share of the adapter's effect, and one of the logits (in float32; with fewer bits).
SHARE, EXACT, ROUNDED = 1e-3, 1e-4, 5e-2
PROOF_ROWS = 4


def save_allocated(
    trainer: RankwiseTrainer,
    keeper: RankAllocation,
    job: Job,
    config: TrainConfig,
    start: RankPlan,
    left_out: list[str],
    full: Mapping[str, str],
) -> Outcome:
    """Write the adapter as plain LoRA, each site with its rank, and the ranks as a plan; then prove the adapter.

    The adapter is read back onto the very base it was trained on, in place of what trained: the trainer's model is used
    up. Called in the first process alone. VerificationError where its logits are not those of the trained model.
    """
    folder = adapter_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # the proof without autocast
    plan = allocated_plan(start, keeper.kept)
    settings = lora_config(job.name, dropout=config.lora.lora_dropout, modules_to_save=list(full) or None)
    pairs = plain_pairs(model, keeper.kept, start.alpha_over_rank)
    write_adapter(folder, LoraAdapter(settings, pairs, full_weights(model)))
    write_sites(folder, plan, left_out, full)
    ranks = write_plan(Path(config.output_dir) / PLAN_FILE.name, plan)
    count = sum(parameter.numel() for parameter in full_weights(model).values()) + plan.parameters
    prove(model, folder, job)
    table = Path(config.output_dir) / ALLOCATED_TABLE
    return Outcome(
        len(plan.ranks), count, described(start, plan, config.lora.lora_r), facts(start, plan), (ranks, table)
    )


def prove(model: Any, folder: Path, job: Job) -> None:
    """VerificationError unless the saved adapter on the model's own base gives the model's logits, on training rows.

    Up to a thousandth of what the adapter changes, and what sums in another order differ by.
    """
    batch = job.collator([job.rows[index] for index in range(min(PROOF_ROWS, len(job.rows)))])
    inputs = {name: value.to(model.device) for name, value in batch.items() if name not in BESIDE}
    noise = EXACT if computes_exactly(model.get_base_model()) else ROUNDED
    trained = logits(model, inputs)
    with model.disable_adapter():
        effect = float((trained - logits(model, inputs)).abs().max())
    saved = logits(load_adapter(model.unload(), folder), inputs)
    difference = float((saved - trained).abs().max())
    if not difference <= SHARE * effect + noise * float(trained.abs().max()):
        raise VerificationError(
            f"the adapter in {folder} is not what was trained: its logits differ by up to {difference:.2g}, where "
            f"training changed them by {effect:.2g}; the last checkpoint holds the trained form"
        )


def computes_exactly(base: Any) -> bool:
    """Whether logits come out in float32 throughout."""
    plain = all(value.dtype == torch.float32 for value in base.parameters())
    return plain and torch.get_float32_matmul_precision() == "highest"


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model.eval()(**inputs).logits
    return found.float()


def described(start: RankPlan, plan: RankPlan, uniform: int) -> str:
    """`ranks: 448 → 224 over 14 sites, 3 to 29 each; 9,830 parameters (rank 16 everywhere: 9,720)`"""
    before, ranks, none = sum(start.ranks.values()), list(plan.ranks.values()), len(plan.sites) - len(plan.ranks)
    alike = sum(row.site.parameters(uniform) for row in plan.sites)
    lost = f"; {plural(none, 'site')} came out without any" if none else ""
    return (
        f"ranks: {before:,} → {sum(ranks):,} over {plural(len(plan.sites), 'site')}, {min(ranks)} to {max(ranks)} each"
        f"{lost}; {amount(plan.parameters)} parameters (rank {uniform} everywhere: {amount(alike)})"
    )


def facts(start: RankPlan, plan: RankPlan) -> dict[str, Any]:
    return {
        "allocator": "adalora",
        "total_rank_before": sum(start.ranks.values()),
        "total_rank_after": sum(plan.ranks.values()),
        "parameters_while_training": start.parameters + sum(start.ranks.values()),
    }
