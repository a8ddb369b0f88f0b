"""A model that runs with one layer's weights in memory at a time: how a merge is verified where no whole model fits.

    structure, every weight NaN ── hooks ──▶ a layer's weights come from the files before it, and go after it

model = layered_model("org/base")                   # float32, as load_model gives it
adapted = layered_adapted("org/base", adapter)      # PEFT's layers with the adapter's own tensors, which stay

A layer here is any module with weights of its own, so the peak is the largest matrix (mostly the embeddings), and every
pass reads the files once. NaN, because a model that reads a weight past its layer must not pass for right; accelerate's
offloading hooks leave meta tensors there, with which torch computes garbage without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import UsageError
from rankwise.nets.adapt import ADAPTER, PREFIX
from rankwise.nets.adapters import attached
from rankwise.nets.load import weightless_model
from rankwise.nets.sites import weight_table
from rankwise.ship.merging.skeleton import adapter_state, filled, quiet_ties
from rankwise.store.checkpoint import Checkpoint, open_checkpoint, resolve
from rankwise.store.deltas import Weight

WRAPPERS = ("base_layer", "original_module")
INSTEAD = "merge on a machine with more memory, or with --no_verify"
NOWHERE = torch.tensor(torch.nan)


class FileWeights:
    """A model's parameters by name, read from its files in float32 whenever they are asked for."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.places = checkpoint, places(model, checkpoint)
        lacking = [name for name, _ in model.named_parameters() if name not in self.places]
        if lacking:
            raise UsageError(
                f"{checkpoint.path}: {type(model).__name__} cannot be compared layer by layer: its files hold "
                f"{lacking[0]} in another form; {INSTEAD}"
            )

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].read(self.checkpoint).float()


def places(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Weight]:
    """Where the files hold each parameter; what is tied has its partner's place."""
    found = dict(weight_table(model, checkpoint.keys()).weights)
    for name, other in model.all_tied_weights_keys.items():
        for one, partner in ((name, other), (other, name)):
            if one not in found and partner in found:
                found[one] = found[partner]
    return found


class Coming:
    """The hooks of one module: `inner name → name in the files` of the weights that come before it and go after it."""

    def __init__(self, names: Mapping[str, str], weights: FileWeights) -> None:
        self.names, self.weights = names, weights

    def come(self, module: nn.Module, _: Any) -> None:
        for inner, name in self.names.items():
            put(module, inner, self.weights[name])

    def go(self, module: nn.Module, *_: Any) -> None:
        for inner in self.names:
            put(module, inner, NOWHERE.expand(module.get_parameter(inner).shape))


def put(module: nn.Module, inner: str, weight: Tensor) -> None:
    path, _, leaf = inner.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))


def layered_model(name: str) -> PreTrainedModel:
    """The model of a folder or hub id. UsageError where its files hold weights in another form than its modules."""
    model, weights = structure(name)
    stream(model, weights)
    return model.eval()


def layered_adapted(name: str, adapter: Path) -> PeftModel:
    """Base + adapter by PEFT; the adapter's tensors are in memory, the base's come and go."""
    model, weights = structure(name)
    with quiet_ties():
        empty = attached(model, adapter, f"adapter {adapter} on {name}", False)
        adapted = filled(empty, adapter_state(adapter))
    stream(adapted, weights)
    return adapted.eval()


def structure(name: str) -> tuple[PreTrainedModel, FileWeights]:
    """The model with NaN for weights, and where they are."""
    model = weightless_model(name)
    weights = FileWeights(model, open_checkpoint(resolve(name)))
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        put(model, path, NOWHERE.expand(parameter.shape))
    for path, buffer in model.named_buffers():
        if path in weights.places:
            buffer.copy_(weights[path])
    return model, weights


def stream(model: nn.Module, weights: FileWeights) -> None:
    """Hang the hooks. What an adapter has brought with it (factors, biases, modules trained in full) stays."""
    done: list[str] = []
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{other}.") for other in done):
            continue
        whole = reads_past_its_layers(module)
        inner = [name for name, value in module.named_parameters(recurse=whole) if is_nowhere(value)]
        if inner:
            hooks = Coming({name: base_name(f"{path}.{name}") for name in inner}, weights)
            module.register_forward_pre_hook(hooks.come)
            module.register_forward_hook(hooks.go)
        done += [path] if whole else []


def reads_past_its_layers(module: nn.Module) -> bool:
    """Whether a module uses weights of the modules in it without calling these: it gets all of them at once."""
    return isinstance(module, nn.MultiheadAttention) or (
        isinstance(module, LoraLayer) and bool(module.use_dora.get(ADAPTER))
    )


def is_nowhere(value: Tensor) -> bool:
    return value.untyped_storage().data_ptr() == NOWHERE.untyped_storage().data_ptr()


def base_name(path: str) -> str:
    """Name in the base model of one of PEFT's modules' parameters."""
    return ".".join(part for part in path.removeprefix(PREFIX).split(".") if part not in WRAPPERS)


def require_all_came(logits: Tensor, model: Any) -> None:
    """UsageError where a weight was read past its layer, so that NaN came out."""
    if not bool(torch.isfinite(logits).all()):
        raise UsageError(
            f"{type(model).__name__} cannot be compared layer by layer: a weight is read past its layer (or the logits "
            f"are not finite anyway); {INSTEAD}"
        )
