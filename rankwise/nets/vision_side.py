"""The part of a vision-language model that sees, without the rest: what capturing features needs.

    load_vision_side("Qwen/Qwen2.5-VL-3B-Instruct", dtype, device)   # tower and projector: 0.67 of 3.75 billion weights

The language tower stays on the meta device: the model's modules are all there, and only `image_features` can run.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from rankwise.errors import DataError
from rankwise.files.checkpoint import open_checkpoint, resolve
from rankwise.nets.image_features import seeing_part
from rankwise.nets.load import load_model, take_any_pixels, weightless_model
from rankwise.nets.sites import tower_of, tower_prefixes, weight_table


def load_vision_side(
    name: str, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """The model in evaluation mode with the weights of everything but its language tower, on the device.

    A model whose files hold these in another form than its modules is loaded whole. UsageError for a model without
    images; DataError where the files lack weights.
    """
    folder = resolve(name, revision)
    model = weightless_model(str(folder))
    seeing_part(model)
    checkpoint = open_checkpoint(folder)
    table = weight_table(model, checkpoint.keys())
    wanted = seeing_names(model)
    if set(wanted) & set(table.rewritten):
        return load_model(name, dtype, revision=revision).to(device).eval()
    lacking = [path for path in wanted if path not in table.weights]
    if lacking:
        raise DataError(f"{folder}: the files lack {len(lacking)} weights of the vision side: {', '.join(lacking[:5])}")
    for path in wanted:
        weight = table.weights[path].read(checkpoint)
        put(model, path, nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False))
    for path, buffer in list(model.named_buffers()):
        stored = table.weights.get(path)
        put(model, path, (stored.read(checkpoint) if stored else buffer).to(device, copy=True))
    return take_any_pixels(model).eval()


def seeing_names(model: PreTrainedModel) -> list[str]:
    """Parameters outside the language tower."""
    prefixes = tower_prefixes(model)
    return [path for path, _ in model.named_parameters() if tower_of(path.rpartition(".")[0], prefixes) != "language"]


def put(model: nn.Module, path: str, value: torch.Tensor) -> None:
    """A parameter or buffer of a module below the model, replaced."""
    inner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(inner), leaf, value)
