"""What a run says and refuses where it adapts parameters by their name: a layer's experts, above all.

    refuse_asked(config)                        of the options alone, before anything is read
    config = settle_dropout(config, plan)       the plan is known: dropout 0, or UsageError that names the option
    report_unquantized(config, model, dtype)    a 4-bit base keeps its experts in 16 bits

PEFT adds s·B·A to such a parameter in each forward pass (`lora.ParamWrapper`); there is no input of a layer to drop,
and nothing to decompose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.errors import UsageError
from rankwise.files.processes import announce
from rankwise.models.load import quantized_linears
from rankwise.models.sites import fused_experts
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import DROPOUT
from rankwise.page.text import amount, percent
from rankwise.train.arguments import quantization
from rankwise.train.estimate.cost import QUANTIZED
from rankwise.train.estimate.gpus import FLOAT32

STARTS = ("default", "gaussian")
MOST_IN_16_BITS = 0.5  # of a quantized base's weights, without --yes
Test = Callable[[Any], bool]

# Option → when it is refused, and why.
REFUSED: Mapping[str, tuple[Test, str]] = {
    "lora_dropout": (bool, "there is no dropout on a parameter: leave it out, or 0 for the whole run"),
    "use_dora": (bool, "a parameter is not decomposed"),
    "lora_bias": (lambda bias: bias != "none", "a pair on a parameter has no bias"),
    "init_lora_weights": (lambda start: start not in STARTS, f"pairs on a parameter start as {' or '.join(STARTS)}"),
    "allocator": (lambda name: name != "none", "AdaLoRA adapts linear layers alone; give a rank plan"),
}


def by_parameter(plan: RankPlan) -> list[Site]:
    """The adapted sites that PEFT names by their parameter: experts, and in such a model linear layers named alike."""
    return [site for site in plan.adapted.values() if site.peft == "parameter"]


def refuse_asked(config: TrainConfig) -> None:
    """UsageError for what does not go with `--target experts`, whatever the model."""
    if config.lora.target == "experts":
        refuse(config, "--target experts")


def settle_dropout(config: TrainConfig, plan: RankPlan) -> TrainConfig:
    """The config with its dropout: none in the whole run where PEFT has none for a planned site.

    UsageError naming the option that does not go with such a site.
    """
    found, lora = by_parameter(plan), config.lora
    if not found:
        return replace(config, lora=replace(lora, lora_dropout=lora.dropout))
    refuse(config, f"{found[0].path}, a parameter that PEFT adapts by its name,")
    linear = [site for site in found if not site.experts]
    if linear and quantization(lora):
        raise UsageError(
            f"a base in {quantization(lora)} does not go with {linear[0].path}: in a model with fused experts PEFT "
            "adapts it by its parameter, which holds packed bits there; leave it out (--target experts, or "
            "--target_modules with other names)"
        )
    if lora.lora_dropout is None:
        announce(f"dropout 0 in this run (not {DROPOUT}): PEFT has none for experts")
    return replace(config, lora=replace(lora, lora_dropout=0.0))


def refuse(config: TrainConfig, beside: str) -> None:
    """UsageError naming the first option that does not go with `beside`."""
    told = {**vars(config.lora), **vars(config.allocation)}
    for name, (refused, why) in REFUSED.items():
        if told[name] is not None and refused(told[name]):
            raise UsageError(f"{beside} does not go with --{name} {told[name]}: {why}")


def report_unquantized(config: TrainConfig, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Say how much of a base that is to be quantized stays in 16 bits: bitsandbytes quantizes linear layers alone.

    UsageError where that is most of it, without --yes. model: may be on the meta device; dtype: of what stays.
    """
    kind, experts = quantization(config.lora), set(fused_experts(model))
    if kind is None or not experts:
        return
    small, total, least, stays = quantized_linears(model), 0, 0.0, 0
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            count, whole = parameter.numel(), f"{path}.{name}" in experts
            each = QUANTIZED[kind] if path in small and name == "weight" else dtype.itemsize if whole else FLOAT32
            total, least, stays = total + count, least + each * count, stays + count * whole
    said = (
        f"{percent(stays / total)} of the base's {amount(total)} parameters, its fused experts, stay in "
        f"{str(dtype).removeprefix('torch.')}: at least {least / 1e9:.3g} GB of weights in each process"
    )
    if stays > MOST_IN_16_BITS * total and not config.yes:
        raise UsageError(f"a base in {kind}: {said}. Load it as it is, or accept that with --yes")
    announce(f"note: a base in {kind}: {said}")
