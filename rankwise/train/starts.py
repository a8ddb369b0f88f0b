"""Initial values of A and B that come from somewhere: a preliminary run's delta, or the inputs of each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.factors import truncate
from rankwise.core.plan import RankPlan
from rankwise.errors import DataError, UsageError
from rankwise.models.adapt import ADAPTER, lora_config, lora_layers
from rankwise.models.targets import scales
from rankwise.ranks.deltas import DeltaSource, deltas


def write_pair(layer: LoraLayer, lora_a: Tensor, lora_b: Tensor | None = None) -> None:
    """Copy values into a layer's A, and into its B where some are given."""
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.copy_(lora_a)
        if lora_b is not None:
            layer.lora_B[ADAPTER].weight.copy_(lora_b)


def warm_start(model: PeftModel, plan: RankPlan, source: DeltaSource, generator: torch.Generator) -> None:
    """Start from a preliminary run: A and B of each site become the leading singular vectors of its delta.

    base + adapter is then base + truncated delta. DataError where the run has no delta of a planned site.
    """
    settings = model.peft_config[ADAPTER]
    if settings.use_dora or settings.init_lora_weights is not True:
        raise UsageError("--warm_start delta goes with the default initialisation, without --use_dora")
    missing = [path for path in plan.ranks if path not in source.sites]
    if missing:
        raise DataError(
            f"the preliminary run has no delta of {len(missing)} planned sites ({missing[0]} …); the plan and --deltas "
            "must be of one model"
        )
    layers, scale = lora_layers(model), scales(plan)
    for site, delta in deltas(source, [row.site for row in plan.sites if row.rank]):
        factors = truncate(delta.matrix, plan.ranks[site.path], generator)
        write_pair(layers[site.path], *factors.lora(scale[site.path]))


def input_directions(
    model: PreTrainedModel, plan: RankPlan, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Path → leading directions (r, n) of the site's inputs on these batches: EVA (Paischer et al. 2024).

    PEFT's own incremental SVD, on the model before it is adapted, at the plan's largest rank. UsageError where the
    batches hold fewer tokens than that.
    """
    planned = lora_config(plan)
    config = LoraConfig(
        r=planned.r, target_modules=planned.target_modules, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    tokens = min(int(batch["attention_mask"].sum()) for batch in batches)
    if tokens < config.r:
        raise UsageError(
            f"--init_lora_weights eva needs batches of at least {config.r} tokens, the smallest has {tokens}; raise "
            "--per_device_train_batch_size"
        )
    was_training = model.training
    model.eval()
    moved = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
    found = get_eva_state_dict(model, moved, config, show_progress_bar=False)
    model.train(was_training)
    return {path: found[path][:rank] for path, rank in plan.ranks.items()}


def eva_start(model: PeftModel, directions: Mapping[str, Tensor]) -> None:
    """A becomes the leading directions of each site's inputs; B stays zero."""
    for path, layer in lora_layers(model).items():
        write_pair(layer, directions[path])
