"""Image features that a vision-language model's language model receives: read them, or replace them.

    pixel_values ──▶ vision tower ──▶ projector ──▶ features (T, D) per matrix ──▶ merged with the text
                                                     │  image_features reads them here
                                                     └─ approximated(model, f): the model goes on with f(features)

All families of transformers pass through `get_image_features` of the inner model, in forward and in generate alike.
A matrix is an image, or, where the tower takes tiles (SmolVLM, Idefics3), a tile.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import DataError, UsageError
from rankwise.files.checkpoint import open_checkpoint, resolve
from rankwise.models.load import load_model, take_any_pixels, weightless_model
from rankwise.models.sites import tower_of, tower_prefixes, weight_table

Approximate = Callable[[Tensor], Tensor]


def image_features(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The matrices (T, D) of the images in these inputs, in order, in the model's precision.

    inputs: what a processor makes, or a batch for the model; what the vision side does not take is left aside. Only the
    vision tower and the projector run. UsageError for a model without images.
    """
    inner = seeing_part(model)
    names = inspect.signature(inner.get_image_features).parameters
    wanted = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return matrices(inner.get_image_features(**wanted, return_dict=True))


@contextmanager
def approximate_features(model: nn.Module, approximate: Approximate) -> Iterator[None]:
    """Inside the block the model's own forward and generate see `approximate(features)` in place of the features.

    approximate: (N, T, D) → (N, T, D), on the features' own scale; it gets the matrices of equal T together. What it
    returns is cast to the features' type. Videos are left alone.
    """
    inner = seeing_part(model)
    given = vars(inner).get("get_image_features")
    original = inner.get_image_features

    @functools.wraps(original)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **{**kwargs, "return_dict": True})
        outputs.pooler_output = replace_features(outputs, approximate)
        return outputs

    inner.get_image_features = get_image_features
    try:
        yield
    finally:
        if given is None:
            del inner.get_image_features
        else:
            inner.get_image_features = given


def seeing_part(model: nn.Module) -> Any:
    """The innermost model with image features, below any wrapper (PEFT, a head, DDP)."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and hasattr(type(module), "get_image_features")
    ]
    if not found:
        raise UsageError(f"{type(model).__name__} has no image features: it is not a vision-language model")
    return found[-1]


def matrices(outputs: Any) -> list[Tensor]:
    """The features of `get_image_features` as one (T, D) per image or tile."""
    tokens = tile_tokens(outputs)
    return [matrix for part in parts(outputs) for matrix in part.reshape(-1, tokens or part.shape[-2], part.shape[-1])]


def parts(outputs: Any) -> list[Tensor]:
    """One tensor (tokens, D), or (tiles, T, D), per image or row of the batch, however the family holds them."""
    features = outputs.pooler_output
    return [features] if isinstance(features, Tensor) and features.dim() == 2 else list(features)


def tile_tokens(outputs: Any) -> int | None:
    """T where the tower has seen more pictures than there are parts, so that a part holds the tokens of several tiles;
    None where every part is one image."""
    seen, given = outputs.last_hidden_state, parts(outputs)
    if not isinstance(seen, Tensor) or seen.dim() != 3 or len(seen) <= len(given):
        return None
    tokens = sum(part.shape[:-1].numel() for part in given)
    return tokens // len(seen) if tokens % len(seen) == 0 else None


def replace_features(outputs: Any, approximate: Approximate) -> Any:
    """`pooler_output` with every matrix approximated, in the form in which the family holds it."""
    given = parts(outputs)
    flat = torch.cat(
        [matrix.reshape(-1, matrix.shape[-1]) for matrix in approximate_each(matrices(outputs), approximate)]
    )
    pieces = flat.split([part.shape[:-1].numel() for part in given])
    shaped = [rows.view_as(part) for rows, part in zip(pieces, given, strict=True)]
    features = outputs.pooler_output
    if isinstance(features, Tensor):
        return shaped[0] if features.dim() == 2 else torch.stack(shaped)
    return type(features)(shaped) if type(features) in (list, tuple) else tuple(shaped)


def approximate_each(features: Sequence[Tensor], approximate: Approximate) -> list[Tensor]:
    """Every matrix's approximation, in order; matrices with the same number of tokens go through together."""
    result: dict[int, Tensor] = {}
    for tokens in dict.fromkeys(len(matrix) for matrix in features):
        places = [place for place, matrix in enumerate(features) if len(matrix) == tokens]
        together = torch.stack([features[place] for place in places])
        approximation = approximate(together)
        if approximation.shape != together.shape:
            raise ValueError(f"an approximation of {tuple(together.shape)} came out as {tuple(approximation.shape)}")
        result.update(zip(places, approximation.to(together), strict=True))
    return [result[place] for place in range(len(features))]


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
    """Replace a parameter or buffer of a module below the model."""
    inner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(inner), leaf, value)
