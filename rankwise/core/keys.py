"""From a tensor's key in a file to its name in the model: the wrappers of training frameworks are taken off.

module._orig_mod.model.layers.0.mlp.up_proj.weight               →  model.layers.0.mlp.up_proj.weight
base_model.model.model.embed_tokens.modules_to_save.weight       →  model.embed_tokens.weight  (`parameter_name`)

The one reader of such keys: checkpoints and adapters are opened through it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rankwise.errors import DataError

PEFT_PREFIX = "base_model.model."
DISTRIBUTED = "module."  # DistributedDataParallel, DataParallel, DeepSpeed: around the whole model
# torch.compile, FSDP (and its older name), activation checkpointing: around any module
WRAPPERS = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"])
# In a running model PEFT's parts bear their adapter's name, in a saved adapter they do not.
ADAPTER_NAME = re.compile(r"\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$)([^.]+)")
NAMED_PARTS = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.([^.]+)(?=\.|$)")
# What PEFT puts between a module and its weights.
HOLDERS = frozenset(["base_layer", "modules_to_save", "original_module", "token_adapter"])


def unwrapped(keys: Iterable[str], where: object) -> dict[str, str]:
    """Name → key of the tensors of one file or model. `module.` is taken off where every key begins with it.

    Raises DataError, naming `where`, for two keys of one name, and for several adapters in one file.
    """
    keys = list(keys)
    names = [".".join(part for part in key.split(".") if part not in WRAPPERS) for key in keys]
    before = None
    while names != before:
        before = names
        names = [name.removeprefix(PEFT_PREFIX) for name in names]
        if all(name.startswith(DISTRIBUTED) for name in names):
            names = [name.removeprefix(DISTRIBUTED) for name in names]
    found: dict[str, str] = {}
    for name, key in zip(without_adapter_name(names, where), keys, strict=True):
        if name in found:
            raise DataError(f"{where}: {found[name]} and {key} are one tensor, {name}, without their wrappers")
        found[name] = key
    return found


def without_adapter_name(names: list[str], where: object) -> list[str]:
    """`lora_A.default.weight` → `lora_A.weight`, for whatever name the adapter had."""
    adapters = sorted({match[1] for name in names for match in ADAPTER_NAME.finditer(name)})
    if len(adapters) > 1 or (adapters and any(re.search(r"\.lora_[AB]\.weight$", name) for name in names)):
        shown = ", ".join(adapters)
        raise DataError(f"{where}: several adapters in one file ({shown}): save the one that is meant by itself")
    if not adapters:
        return names
    return [NAMED_PARTS.sub(lambda m: f".{m[1]}" if m[2] == adapters[0] else m[0], name) for name in names]


def parameter_name(name: str) -> str:
    """Name in the base model of a tensor that an adapter carries whole: PEFT's prefix and holders taken out."""
    return ".".join(part for part in name.removeprefix(PEFT_PREFIX).split(".") if part not in HOLDERS)
