"""Whose is each trainable parameter: which site (the wrapping of PEFT taken off), and which part of it.

    base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight   →   model.layers.3.mlp.up_proj, part A
    base_model.model.lm_head.modules_to_save.default.weight             →   lm_head, part rest

Layers and PEFT's own wrappers are asked what they hold; a path is parsed by `core.site` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.keys import PEFT_PREFIX
from rankwise.core.site import describe
from rankwise.nets.sites import tower_of, tower_prefixes

A, B, REST = "a", "b", "rest"


@dataclass(frozen=True)
class Place:
    """A module with something to train: a site, an embedding, a norm. `kind` and `layer` as in `core.site`."""

    path: str
    tower: str
    kind: str
    layer: int | None


@dataclass(frozen=True, eq=False)
class Trained:
    """One trainable parameter: number of its place, and its part there (A or B of a LoRA pair, or the rest)."""

    place: int
    part: str
    parameter: nn.Parameter


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors of a place: A (r, n), B (m, r), and the factor of B·A."""

    place: int
    a: nn.Parameter
    b: nn.Parameter
    scale: float


@dataclass(frozen=True)
class TrainedModel:
    """All that trains, in module order."""

    places: tuple[Place, ...] = ()
    parameters: tuple[Trained, ...] = ()
    pairs: tuple[Pair, ...] = ()


def trained_model(model: nn.Module) -> TrainedModel:
    """What trains in a model (wrapped for several processes or not, with adapters or without).

    The adapters of LoRA layers count even where they are frozen at the moment, because a phase may thaw them.
    """
    model = extract_model_from_parallel(model)
    towers = prefixes(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    pairs = {name: pair for name, layer in layers.items() if (pair := factors(layer))}
    parts = {id(pair[i]): part for pair in pairs.values() for i, part in ((0, A), (1, B))}
    paths: dict[str, int] = {}
    found = []
    for owner, parameter in owners(model):
        if parameter.requires_grad or id(parameter) in parts:
            number = paths.setdefault(owner, len(paths))
            found.append(Trained(number, parts.get(id(parameter), REST), parameter))
    return TrainedModel(
        places=tuple(place(path, tower_of(path, towers)) for path in paths),
        parameters=tuple(found),
        pairs=tuple(Pair(paths[bare(name)], *pair) for name, pair in pairs.items() if bare(name) in paths),
    )


def prefixes(model: Any) -> dict[str, str]:
    """Module prefix → tower, of the base model where this one has adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tower_prefixes(base) if isinstance(base, PreTrainedModel) else {}


def parameter_towers(model: nn.Module) -> dict[int, str]:
    """id of a parameter → tower, for all parameters of a model as in `trained_model`."""
    model = extract_model_from_parallel(model)
    towers = prefixes(model)
    return {id(parameter): tower_of(path, towers) for path, parameter in owners(model)}


def place(path: str, tower: str) -> Place:
    site = describe(path, (1, 1), tower)  # norms and biases have no shape of a matrix; where they lie is all we ask
    return Place(path, tower, site.kind, site.layer)


def bare(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX)


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(path of the module in the base model, parameter) of every parameter, shared ones once."""
    seen: set[int] = set()
    holder, wrapper = "", None  # the last wrapper met; what lies inside it comes right after it
    for name, module in model.named_modules():
        if wrapper is None or not name.startswith(holder + "."):
            holder, wrapper = name, module if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) else None
        path = bare(name if wrapper is None else within(holder, name, wrapper))
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, parameter


def within(holder: str, name: str, wrapper: nn.Module) -> str:
    """The base model's path of a module inside a wrapper: the wrapper's own, but for what `modules_to_save` copies."""
    inner = name.removeprefix(holder).removeprefix(".").split(".")
    copied = inner[2:] if isinstance(wrapper, ModulesToSaveWrapper) and inner[0] == "modules_to_save" else []
    return ".".join([holder, *copied])


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float] | None:
    """(A, B, scale) of a layer's active adapter; None where it has none, or where B·A is not its delta
    (AdaLoRA puts a diagonal between them, and fused experts share one A)."""
    adapter = next(iter(layer.active_adapters), None)
    for first, second in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
        if adapter in first:
            a, b = (getattr(container[adapter], "weight", container[adapter]) for container in (first, second))
            plain = "lora_E" not in layer.adapter_layer_names and layer.r[adapter] == a.shape[0]
            return (a, b, float(layer.scaling[adapter])) if plain else None
    return None


def matrices(pair: Pair) -> tuple[Tensor, Tensor]:
    """(A, B) as matrices (r, n) and (m, r); those of a convolution are flattened."""
    return pair.a.detach().flatten(1), pair.b.detach().flatten(1)
