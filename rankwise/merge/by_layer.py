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
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import parameter_name
from rankwise.errors import UsageError
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint, resolve
from rankwise.merge.plan import fitted_state, quiet_ties
from rankwise.models.adapt import ADAPTER
from rankwise.models.adapters import attached, fill
from rankwise.models.load import weightless_model
from rankwise.models.sites import weight_table
from rankwise.models.vocabulary import resize, row_count, row_names, with_rows

INSTEAD = "merge on a machine with more memory, or with --no_verify"
NOWHERE = torch.tensor(torch.nan)


class Weights(Protocol):
    """Parameters and buffers by name, float32, made or read whenever they are asked for."""

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> Tensor: ...


class FileWeights:
    """A model's parameters by name, read from its files in float32 whenever they are asked for.

    rows: of embeddings and head, where they are to have another number than the files; new ones are zero.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, rows: int | None = None) -> None:
        self.checkpoint, self.places, self.rows = checkpoint, places(model, checkpoint), rows
        self.rowed = row_names(model)
        lacking = [name for name, _ in model.named_parameters() if name not in self.places]
        if lacking:
            raise UsageError(
                f"{checkpoint.path}: {type(model).__name__} cannot be compared layer by layer: its files hold "
                f"{lacking[0]} in another form; {INSTEAD}"
            )

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        weight = self.places[name].read(self.checkpoint).float()
        return with_rows(weight, self.rows) if self.rows and name in self.rowed else weight


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

    def __init__(self, names: Mapping[str, str], weights: Weights) -> None:
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


def layered_model(name: str, rows: int | None = None) -> PreTrainedModel:
    """The model of a folder or hub id. UsageError where its files hold weights in another form than its modules.

    rows: of its embeddings, where it is to have another number than its files; new ones are zero.
    """
    model = weightless_model(name)
    if rows:
        resize(model, rows)
    return streamed(model, FileWeights(model, open_checkpoint(resolve(name)), rows))


def streamed(model: PreTrainedModel, weights: Weights) -> PreTrainedModel:
    """A model without weights, to which they come from anywhere. UsageError where some come from nowhere."""
    lacking = [name for name, _ in model.named_parameters() if name not in weights]
    if lacking:
        raise UsageError(f"{type(model).__name__} cannot be run layer by layer: {lacking[0]} is in no file as such")
    stream(model, emptied(model, weights))
    return model.eval()


def layered_adapted(name: str, adapter: Path, weights: Weights | None = None) -> PeftModel:
    """Base + adapter by PEFT; the adapter's tensors are in memory, the base's come and go (from its files, where
    `weights` gives no other source)."""
    model, where = weightless_model(name), f"adapter {adapter} on {name}"
    state = {key: tensor.float() for key, tensor in fitted_state(model, adapter, where).items()}
    weights = emptied(model, weights or FileWeights(model, open_checkpoint(resolve(name)), row_count(model)))
    with quiet_ties():
        adapted = attached(model, adapter, where, False)
    fill(adapted, state, where, assign=True)
    stream(adapted, weights)
    return adapted.eval()


def emptied(model: PreTrainedModel, weights: Weights) -> Weights:
    """Make every weight of the model NaN, to come from `weights`; buffers come from there at once."""
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        put(model, path, NOWHERE.expand(parameter.shape))
    for path, buffer in model.named_buffers():
        if path in weights:
            buffer.copy_(weights[path])
    return weights


def stream(model: nn.Module, weights: Weights) -> None:
    """Hang the hooks. What an adapter has brought with it (factors, biases, modules trained in full) stays."""
    done: list[str] = []
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{other}.") for other in done):
            continue
        whole = reads_past_its_layers(module)
        inner = [name for name, value in module.named_parameters(recurse=whole) if is_nowhere(value)]
        if inner:
            hooks = Coming({name: parameter_name(f"{path}.{name}") for name in inner}, weights)
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


def require_all_came(logits: Tensor, model: Any) -> None:
    """UsageError where a weight was read past its layer, so that NaN came out."""
    if not bool(torch.isfinite(logits).all()):
        raise UsageError(
            f"{type(model).__name__} cannot be compared layer by layer: a weight is read past its layer (or the logits "
            f"are not finite anyway); {INSTEAD}"
        )
