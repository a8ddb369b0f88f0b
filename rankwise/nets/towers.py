"""The towers of a model as wholes: their parameters, and the modules that carry a tower that is trained in full.

    tower_parameters(model, ["projector"])                  what `finetune --full projector` trains
    full_modules(model, ["projector"]).paths                ("model.connector",): PEFT keeps a trained copy of these

A tower inside another (the merger of Qwen's vision tower) counts as what `sites.tower_of` says it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from rankwise.core.site import Site, describe
from rankwise.errors import UsageError
from rankwise.nets.sites import linear_shape, tower_of, tower_prefixes

# PEFT calls what it wraps, and these have no forward; inside a sub-model transformers looks for modules by class.
NOT_WRAPPED = (PreTrainedModel, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class FullModules:
    """Modules that make up towers, as few as can be, each wholly of one of them; and parameters in none of them."""

    paths: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()


def tower_parameters(model: PreTrainedModel, towers: Collection[str]) -> dict[str, nn.Parameter]:
    """Every parameter of these towers (embeddings, norms and biases included), by name."""
    prefixes = tower_prefixes(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if tower_of(name.rpartition(".")[0], prefixes) in towers
    }


def towers_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The towers that a model has, in module order."""
    prefixes = tower_prefixes(model)
    return tuple(dict.fromkeys(tower_of(name.rpartition(".")[0], prefixes) for name, _ in model.named_parameters()))


def check_towers(model: PreTrainedModel, towers: Collection[str]) -> None:
    """UsageError for a tower that the model does not have."""
    there = towers_of(model)
    for tower in towers:
        if tower not in there:
            raise UsageError(f"{type(model).__name__} has no {tower} tower; it has: {', '.join(there)}")


def full_modules(model: PreTrainedModel, towers: Collection[str]) -> FullModules:
    """What PEFT's `modules_to_save` has to name for these towers to train in full."""
    names = {tower: tuple(tower_parameters(model, [tower])) for tower in towers}
    found = [path for wanted in names.values() for path in covering(model, "", frozenset(wanted))]
    inside = tuple(f"{path}." for path in found)
    loose = (name for wanted in names.values() for name in wanted if not name.startswith(inside))
    return FullModules(tuple(found), tuple(loose))


def covering(
    module: nn.Module, path: str, wanted: Collection[str], never: tuple[type[nn.Module], ...] = NOT_WRAPPED
) -> Iterator[str]:
    """Paths of the outermost modules that hold wanted parameters only, those of the types `never` left out."""
    names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
    if not any(name in wanted for name in names):
        return
    if all(name in wanted for name in names) and not isinstance(module, never):
        yield path
        return
    for name, child in module.named_children():
        yield from covering(child, f"{path}.{name}".lstrip("."), wanted, never)


def full_sites(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, Site]:
    """The modules with parameters of their own below these paths: what a schedule of phases can freeze and thaw.

    Their shape is that of a matrix only where they are one; a norm or a convolution counts as (1, 1).
    """
    prefixes = tower_prefixes(model)
    found = {}
    for path in paths:
        for name, module in model.get_submodule(path).named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                place = f"{path}.{name}".rstrip(".")
                found[place] = describe(place, linear_shape(module) or (1, 1), tower_of(place, prefixes))
    return found


def outside_language(model: PreTrainedModel) -> list[str]:
    """The outermost modules that hold nothing of the language tower: a quantized base keeps them as they are."""
    others = [tower for tower in towers_of(model) if tower != "language"]
    return list(covering(model, "", set(tower_parameters(model, others)), ()))
