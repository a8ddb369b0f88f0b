"""Where the files of a checkpoint hold each parameter of experts, by transformers' own conversion map.

    found = expert_weights(model, checkpoint.keys())
    found.weights["model.layers.0.mlp.experts.gate_up_proj"].expert(checkpoint, 3)

On loading, transformers stacks files of single experts and joins gate and up; the map says how. Its operations are read
backwards here, as views of an expert's matrix (`files/expert_weight.py`), for each expert alone: a whole parameter may
be gigabytes. An operation that is not known here is told by name, and whoever needs that parameter refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from rankwise.files.expert_weight import PACKED, Cut, ExpertWeight, Piece, Turned, Woven
from rankwise.models.sites import fused_experts

Views = list[Cut | Turned | Woven]


@dataclass(frozen=True)
class ExpertTable:
    """Parameter → where its experts lie, and → the operation of transformers' map that is not known here."""

    weights: dict[str, ExpertWeight]
    unknown: dict[str, str]


def expert_weights(model: PreTrainedModel, keys: Sequence[str]) -> ExpertTable:
    """Of every parameter of experts of the (meta) model that the keys hold."""
    names = dict.fromkeys(fused_experts(model))
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    pieces: dict[str, list[Piece]] = {}
    unknown: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        converter = next((item for item in converters if source in item.source_patterns), None) if source else None
        targets = [name] if converter is None else target_names(converter, name)
        if names.keys().isdisjoint(targets):
            continue
        if converter is None:
            pieces.setdefault(name, []).append(Piece(key))
            continue
        operation = unknown_operation(converter)
        if operation:
            unknown |= dict.fromkeys(targets, operation)
            continue
        number = expert_number(str(source), apply_renamings(key, renamings)) if is_stacked(converter) else None
        target, piece = piece_of(converter, str(source), key, number, targets, state)
        pieces.setdefault(target, []).append(piece)
    packed = {name for name in names if all(f"{name}{end}" in keys for end in PACKED)} - pieces.keys()
    pieces |= {name: [Piece(f"{name}{end}") for end in PACKED] for name in packed}
    weights = {
        name: ExpertWeight(name, shape_of(state[name]), tuple(found), name in packed)
        for name, found in pieces.items()
        if name not in unknown
    }
    return ExpertTable(weights, unknown)


def shape_of(parameter: Tensor) -> tuple[int, int, int]:
    experts, rows, columns = parameter.shape
    return experts, rows, columns


def target_names(converter: WeightConverter, first: str) -> list[str]:
    """Names of all parameters that a converter makes, from that of the first."""
    lead = converter.target_patterns[0].replace("\\", "")
    return [first.replace(lead, target.replace("\\", "")) for target in converter.target_patterns]


def unknown_operation(converter: WeightConverter) -> str | None:
    """The first operation that cannot be read backwards one expert at a time, by name."""
    for place, operation in enumerate(converter.operations):
        if not is_known(operation, place, len(converter.operations)):
            return f"{operation!r} of {len(converter.operations)}" if len(converter.operations) > 1 else repr(operation)
    return None


def is_known(operation: ConversionOps, place: int, count: int) -> bool:
    if type(operation) is MergeModulelist:
        return place == 0 and operation.dim == 0
    if type(operation) is ErnieFuseAndSplitTextVisionExperts:
        return count == 1 and operation.stack_dim == 0 and operation.concat_dim in (1, 2)
    if type(operation) is Concatenate:
        return operation.dim in (1, 2) and operation.num_shards_attribute is None
    if type(operation) is Interleave:
        return operation.dim in (1, 2) and place == 0
    return type(operation) is Transpose and {operation.dim0, operation.dim1} == {1, 2}


def piece_of(
    converter: WeightConverter,
    source: str,
    key: str,
    number: int | None,
    targets: Sequence[str],
    state: Mapping[str, Tensor],
) -> tuple[str, Piece]:
    """The parameter that a file's tensor belongs to, and as which piece. number: of the expert, by the file's name."""
    sources = converter.source_patterns
    part, parts = sources.index(source), len(sources)
    views: Views = []
    for operation in reversed(converter.operations):
        if isinstance(operation, Concatenate) and parts > 1:
            views.append(Cut(operation.dim - 1, part, parts))
        elif isinstance(operation, ErnieFuseAndSplitTextVisionExperts) and parts > 1:
            views.append(Cut(operation.concat_dim - 1, part, parts))
        elif isinstance(operation, Transpose):
            views.append(Turned(operation.check_dims))
        elif isinstance(operation, Interleave):
            views.append(Woven(operation.dim - 1, operation.inverse))
    target = targets[0]
    if number is not None and len(targets) > 1:
        share = state[target].shape[0]
        target, number = targets[min(number // share, len(targets) - 1)], number % share
    return target, Piece(key, number, tuple(views))


def is_stacked(converter: WeightConverter) -> bool:
    """Whether the files hold the experts one by one."""
    return isinstance(converter.operations[0], MergeModulelist | ErnieFuseAndSplitTextVisionExperts)


def expert_number(source: str, key: str) -> int:
    """The number in the place of a pattern's star."""
    match = re.search(source.replace("*.", r"(\d+)\."), key)
    assert match is not None, f"{key} has no number where {source} has its star"
    return int(match[1])
