"""AdaLoRA (Zhang et al. 2023) as PEFT has it: adapters B·Λ·A, of whose rank channels training keeps the best.

    model = adapt_allocated(base, start, LoraSettings(), allocation)     every site at the starting rank
    … train.allocation masks channels while it trains …
    pairs = plain_pairs(model, kept)                                     Λ within B, masked channels gone: plain LoRA

Λ is `lora_E`: one number per rank channel, 0 at the start. All channels of all sites compete with each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.rank_budget import RankBudget
from rankwise.errors import VerificationError
from rankwise.files.adapter import LoraPair
from rankwise.models.adapt import ADAPTER, LoraSettings, check_built, lora_config, lora_layers, wrapped

SUFFIX = f".lora_E.{ADAPTER}"  # PEFT's rank pattern names a site by its Λ
SHARED_FIELDS = ("lora_alpha", "target_modules", "fan_in_fan_out", "lora_dropout", "modules_to_save", "task_type")


@dataclass(frozen=True)
class Allocation:
    """From which rank to which, and when.

    start, target: rank of every site at the beginning, and the mean over the sites at the end. budget: of all sites
    together, after each optimizer step. orthogonality: weight of PEFT's term that keeps A and B near orthonormal.
    """

    start: int
    target: int
    budget: RankBudget
    orthogonality: float = 0.5


def adalora_config(plan: RankPlan, settings: LoraSettings, allocation: Allocation) -> AdaLoraConfig:
    """PEFT's config. Its alpha belongs to the starting rank, so that the scale of B·Λ·A is the plan's."""
    lora, budget = lora_config(plan, settings), allocation.budget
    return AdaLoraConfig(
        **{name: getattr(lora, name) for name in SHARED_FIELDS},
        init_r=allocation.start,
        target_r=allocation.target,
        tinit=budget.init_warmup,
        tfinal=budget.final_warmup,
        deltaT=budget.mask_interval,
        total_step=budget.total_steps,
        orth_reg_weight=0.0,  # `regularised` sets it for a training step; a validation loss is the task's alone
    )


def adapt_allocated(model: Any, plan: RankPlan, settings: LoraSettings, allocation: Allocation) -> PeftModel:
    """The model with B·Λ·A at the plan's sites, all of them at the starting rank, which is the plan's.

    Random initial values come from torch's global generator. VerificationError where PEFT built other shapes.
    """
    adapted = wrapped(model, adalora_config(plan, settings, allocation), settings.full)
    check_built(adapted, plan)
    return adapted


def adalora_layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    """Path (in the base model) → layer."""
    return {path: layer for path, layer in lora_layers(model).items() if isinstance(layer, AdaLoraLayer)}


@contextmanager
def regularised(model: PeftModel, weight: float) -> Iterator[None]:
    """Within it, the model's own loss holds the orthogonality term with this weight; outside with none."""
    config = model.peft_config[ADAPTER]
    config.orth_reg_weight = weight
    try:
        yield
    finally:
        config.orth_reg_weight = 0.0


def site_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj.lora_E.default` → the site's path."""
    return name.removesuffix(SUFFIX)


def plain_pairs(model: PeftModel, kept: Mapping[str, Tensor], scale: float) -> dict[str, LoraPair]:
    """Path → pair whose scale·B·A is the trained site's delta: Λ within B, channels that are not kept left out.

    kept: path → mask (r,) of the channels that act. Sites that keep none have no pair. PEFT divides by the starting
    rank + 1e-5; that goes into B as well. VerificationError where a channel outside the mask still acts.
    """
    pairs = {}
    for path, layer in adalora_layers(model).items():
        mask = kept[path].cpu()
        a, e, b = (part[ADAPTER].detach().float().cpu() for part in (layer.lora_A, layer.lora_E, layer.lora_B))
        if bool(e[~mask].any()):
            raise VerificationError(f"{path}: a masked rank channel still acts, so leaving it out would lose it")
        if bool(mask.any()):
            own = float(layer.scaling[ADAPTER]) / (float(layer.ranknum[ADAPTER]) + 1e-5)
            transposed = getattr(layer, "fan_in_fan_out", False)  # layers on quantized bases do not have it
            pairs[path] = LoraPair(a[mask], b[:, mask] * (e[mask, 0] * (own / scale)), scale, bool(transposed))
    return pairs


def allocated_plan(start: RankPlan, kept: Mapping[str, Tensor]) -> RankPlan:
    """The ranks that came out, sites without one included, at the scale of the plan that training started from."""
    rows = tuple(PlannedSite(row.site, int(kept[row.site.path].sum()), method="adalora") for row in start.sites)
    return replace(start, sites=rows, description="ranks that AdaLoRA allocated while it trained")
