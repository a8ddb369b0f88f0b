"""A family's architecture small enough to run in seconds on a CPU: few layers, random weights, everything else its own.

small = cut_down(config)         # two layers a tower; narrower where the widths would not fit
model = random_model(small)      # float32, no weight at zero, no head

What a model asks of its inputs (which tokens are an image's, how many, in which masks) does not depend on its size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import UsageError
from rankwise.models.load import new_model

LAYERS = 2
PARAMETERS = 480_000_000  # 1.9 GB in float32
HEADS = 4
DEPTHS = ("num_hidden_layers", "depth", "n_layers", "num_layers", "encoder_layers", "num_global_layers")
PLACES = re.compile(r"(layers|indexes|indices|idxs|layer_config)$")  # layers by their number
KINDS = 4  # layers that differ in more ways are of one kind
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
GROUPS = {"n_group": 1, "topk_group": 1}
UNFIT = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ImportError, StrictDataclassError)
Content = dict[str, Any]


class Untried(UsageError):
    """No cut-down copy of a model can be made, or it does not run."""


def cut_down(config: Any) -> Any:
    """The config with few layers, and with a narrower language tower where that alone is too big.

    Untried, with the reason, where the family's models cannot be made so.
    """
    content = {name: value for name, value in config.to_dict().items() if name not in ("quantization_config", "dtype")}
    for part, _ in list(_parts(content)):
        part.update({name: _number_keys(value) for name, value in part.items()})
        _cut_layers(part)
    _clamp_read_layers(content)
    small = _make_config(config, content)
    if _parameters(small) > PARAMETERS:
        _narrow(content)
        small = _make_config(config, content)
    if (size := _parameters(small)) > PARAMETERS:
        raise Untried(f"with {LAYERS} layers it still has {size / 1e9:.1f} billion parameters")
    return small


def random_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """The model in evaluation mode, float32 on the CPU, without its head: its logits are the last hidden states.

    Weights that new models have at zero (gates of what an image adds) are random too: a wrong image must show.
    """
    model = _without_head(config, init_empty_weights(include_buffers=False))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        inner, _, leaf = name.rpartition(".")
        value = nn.Parameter(_weights(parameter.shape, leaf, generator), requires_grad=False)
        setattr(model.get_submodule(inner), leaf, value)
    return model.float().eval()


def headless(model: PreTrainedModel) -> PreTrainedModel:
    """The model with nothing between its last hidden states and its logits: a vocabulary wide takes memory and time."""
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(nn.Identity())
    return model


def _weights(shape: torch.Size, leaf: str, generator: torch.Generator) -> Tensor:
    """Uniform, such that what goes through a matrix keeps its size; norms and gates around 1, biases around 0."""
    made = torch.empty(shape)
    if len(shape) > 1:
        return made.uniform_(-1, 1, generator=generator).mul_(math.sqrt(3 / math.prod(shape[1:])))
    return made.uniform_(-0.1, 0.1, generator=generator) + (leaf != "bias")


def _make_config(config: Any, content: Content) -> Any:
    try:
        return type(config).from_dict(content)
    except UNFIT as error:
        raise Untried(f"its config takes no smaller sizes ({type(error).__name__}: {error})") from error


def _parameters(config: Any) -> int:
    """Of a model without its head."""
    return int(_without_head(config, torch.device("meta")).num_parameters())


def _without_head(config: Any, inside: AbstractContextManager[object]) -> PreTrainedModel:
    """A new model, made inside this context."""
    try:
        with inside:
            model = new_model(config)
    except UNFIT as error:
        raise Untried(f"its model cannot be made at this size ({type(error).__name__}: {error})") from error
    return headless(model)


def _parts(content: Content, seeing: bool = False) -> Iterator[tuple[Content, bool]]:
    """The config and its parts, with whether they belong to a tower that sees or hears."""
    yield content, seeing
    for name, part in content.items():
        if isinstance(part, dict):
            yield from _parts(part, seeing or "vision" in str(name) or "audio" in str(name))


def _cut_layers(tower: Content) -> None:
    """Cut a tower to one layer of each kind."""
    for name in DEPTHS:
        depth = tower.get(name)
        if isinstance(depth, int) and depth > LAYERS:
            kept = _choose_layers(tower, depth)
            for key, value in tower.items():
                if _names_layers(key, value, depth):
                    moved = {kept.index(place): place for place in value if place in kept}
                    tower[key] = (
                        {new: value[old] for new, old in moved.items()} if isinstance(value, dict) else [*moved]
                    )
                elif _is_per_layer(value, depth):
                    tower[key] = [value[place] for place in kept]
            tower[name] = len(kept)


def _choose_layers(tower: Content, depth: int) -> list[int]:
    """Layers that stay: of each list the first and one that is not in it; of one whose length decides widths (Mllama's
    `intermediate_layers_indices`) all."""
    kept: set[int] = set()
    for key, value in tower.items():
        if _names_layers(key, value, depth):
            kept |= set(list(value)[: None if "intermediate" in key else 1])
            kept |= {next((place for place in range(depth) if place not in value), 0)}
        elif _is_per_layer(value, depth) and len(kinds := dict.fromkeys(map(str, value))) <= KINDS:
            kept |= {list(map(str, value)).index(kind) for kind in kinds}
    rest = (place for place in range(depth) if place not in kept)
    return sorted([*kept, *(next(rest) for _ in range(LAYERS - len(kept)))])


def _is_per_layer(value: Any, depth: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == depth


def _number_keys(value: Any) -> Any:
    """A table of layers ("05": …) by their numbers."""
    numbered = isinstance(value, dict) and value and all(str(key).isdigit() for key in value)
    return {int(key): entry for key, entry in value.items()} if numbered else value


def _names_layers(key: str, value: Any, depth: int) -> bool:
    """Whether this is a list of layers by number, which rise."""
    numbers = isinstance(value, list | tuple | dict) and value and all(type(place) is int for place in value)
    if not numbers or not PLACES.search(key):
        return False
    return list(value) == sorted(set(value)) and min(value) >= 0 and max(value) < depth


def _clamp_read_layers(content: Content) -> None:
    """Layers that the projector reads, within those that are left."""
    vision, read = content.get("vision_config"), content.get("vision_feature_layer")
    depth = next((vision[name] for name in DEPTHS if name in vision), None) if isinstance(vision, dict) else None
    if depth is None or read is None:
        return
    within = [max(-depth, min(layer, depth)) for layer in (read if isinstance(read, Sequence) else [read])]
    content["vision_feature_layer"] = within if isinstance(read, Sequence) else within[0]


def _narrow(content: Content) -> None:
    """Fewer heads of the same size in the language tower, fewer experts, and what is as wide as it made as narrow."""
    text = content["text_config"] if isinstance(content.get("text_config"), dict) else content
    wide, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if not isinstance(wide, int) or not isinstance(heads, int):
        raise Untried("its language tower has no heads and hidden size to make narrower")
    groups = HEADS if text.get("num_key_value_heads") in (None, heads) else 1
    narrow = HEADS * (text.get("head_dim") or wide // heads)
    if narrow >= wide:
        raise Untried("its language tower has few and wide heads")
    for part, seeing in list(_parts(content)):
        inner = ("hidden_size", "intermediate_size") if seeing and "embed_dim" not in part else ("intermediate_size",)
        part.update({name: narrow for name, value in part.items() if value == wide and name not in inner})
    text.update(num_attention_heads=HEADS, num_key_value_heads=groups)
    sizes = {name: 2 * narrow for name in text if name.startswith(("intermediate_size", "moe_intermediate_size"))}
    for name, most in {**sizes, **EXPERTS, **GROUPS}.items():
        if isinstance(text.get(name), int):
            text[name] = min(text[name], most)
