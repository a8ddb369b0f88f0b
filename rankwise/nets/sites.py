"""The sites of a model, and where each one's weight lies in a checkpoint.

A site is named by its module path in the loaded model. Files use other names (Qwen2.5-VL saves `model.layers.0…`
for the module `model.language_model.layers.0…`), so the table from path to key comes from transformers' own
conversion map: a plan made from raw keys would match nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from rankwise.core.site import Site, describe
from rankwise.files.checkpoint import Weight
from rankwise.nets.precision import warn_if_slow

DEPTH_MODULES = frozenset(["depth_model", "depth_preproc"])


@dataclass(frozen=True)
class WeightTable:
    """Module parameter → place in the files, and the parameters whose files transformers rewrites on loading
    (fused experts and the like), which no view of one file can give."""

    weights: dict[str, Weight]
    rewritten: tuple[str, ...]


def model_sites(model: PreTrainedModel) -> dict[str, Site]:
    """Path → site of every linear weight that LoRA can target, in module order; the output head is not one."""
    towers = tower_prefixes(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    sites = {}
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape is None or module is head:
            continue
        site = describe(path, shape, tower_of(path, towers), transposed=isinstance(module, Conv1D))
        if site.kind != "head":
            sites[path] = site
    return sites


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module of any of the kinds PEFT adapts; None for everything else."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # inside nn.MultiheadAttention, which reads the weight past any adapter
    if isinstance(module, nn.Linear) and type(module).__name__.endswith("Router"):
        return None  # Llama 4, Phi-MoE: it returns scores of experts beside logits, which no adapter can be added to
    if isinstance(module, nn.Linear):  # bitsandbytes' quantized ones are too
        return module.out_features, module.in_features
    return None


def tower_prefixes(model: PreTrainedModel) -> dict[str, str]:
    """Module prefix → tower, by which part of the config each sub-model was built from. Empty: one tower, language.

    A model class that declares `towers` (prefix → tower) knows better.
    """
    declared = getattr(model, "towers", None)
    if isinstance(declared, Mapping):
        return dict(declared)
    parts = {
        type(part): "language" if name == "text_config" else "vision"
        for name in model.config.sub_configs
        if (name == "text_config" or "vision" in name)
        and (part := getattr(model.config, name, None)) is not None
        and part is not model.config
    }
    if "vision" not in parts.values():
        return {}
    return {
        path: parts[type(module.config)]
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) in parts
    }


def tower_of(path: str, towers: Mapping[str, str]) -> str:
    """The tower of a module path: that of the longest prefix. What stands between the towers, a vision tower's own
    merger included, projects; what a depth encoder has added to the model is the depth tower."""
    parts = path.split(".")
    if not DEPTH_MODULES.isdisjoint(parts):
        return "depth"
    if not towers:
        return "language"
    owners = [prefix for prefix in towers if path == prefix or path.startswith(prefix + ".")]
    owner = max(owners, key=len, default=None)
    if owner is None:
        return "language" if path == "lm_head" else "projector"
    inside = path.removeprefix(owner).split(".")
    return "projector" if towers[owner] == "vision" and any("merger" in part for part in inside) else towers[owner]


def fused_experts(model: PreTrainedModel) -> list[str]:
    """Parameters with three dimensions (fused experts): listed, and left out of the analysis."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def weight_table(model: PreTrainedModel, keys: list[str]) -> WeightTable:
    """Where each parameter of the (meta) model lies among a checkpoint's keys, by transformers' own rules."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    state = dict(model.state_dict(keep_vars=True))
    weights: dict[str, Weight] = {}
    rewritten: list[str] = []
    for key in sorted(keys, key=dot_natural_key):
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if source is None:
            weights[name] = Weight(key)
            continue
        converter = next(item for item in converters if source in item.source_patterns)
        parts = chunks(converter, name)
        if parts is None:
            rewritten.append(name)
        for index, part in enumerate(parts or []):
            weights[part] = Weight(key, part=(index, len(parts or [])))
    return WeightTable(weights, tuple(dict.fromkeys(rewritten)))


def chunks(converter: WeightConverter, first: str) -> list[str] | None:
    """The targets of a converter that only splits one tensor into equal row blocks; None for any other."""
    operations = converter.operations
    if len(operations) != 1 or type(operations[0]) is not Chunk or operations[0].dim != 0:
        return None
    lead = converter.target_patterns[0]
    return [first.replace(lead, target) for target in converter.target_patterns]


def torch_dtype(name: str, trained: bool, device: torch.device) -> torch.dtype:
    """`auto`: float32 for trained weights; frozen ones bf16 on a GPU and float32 on a CPU. A type that is slow on a CPU
    is warned about."""
    if name == "auto":
        return torch.float32 if trained or device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    if device.type == "cpu":
        warn_if_slow(dtype, "--dtype float32")
    return dtype
