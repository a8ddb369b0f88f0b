"""What AdaLoRA leaves: the adapter as plain LoRA with the rank that each site kept, proven, and the ranks as a plan.

trained B·Λ·A, masks ─▶ plain pairs on the disk ─▶ read back onto the same base ─▶ the same logits
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.core.plan import RankPlan
from rankwise.errors import VerificationError
from rankwise.files.adapter import LoraAdapter, lora_config, write_adapter
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.models.adalora import allocated_plan, plain_pairs
from rankwise.models.adapters import full_weights, load_adapter, write_sites
from rankwise.options.commands import TrainConfig
from rankwise.page.text import amount, plural
from rankwise.score.likelihood import BESIDE
from rankwise.stages.outcome import Outcome, adapter_folder
from rankwise.stages.training import Job
from rankwise.train.allocation import ALLOCATED_TABLE, RankAllocation
from rankwise.train.trainer import RankwiseTrainer

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
