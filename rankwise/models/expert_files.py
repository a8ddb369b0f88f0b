"""A layer's experts in a checkpoint's files, one at a time: read from them, and a change of one written into them.

Files hold experts one by one (`experts.3.w1.weight` …) or in one tensor, plain or MXFP4. transformers makes the
parameter (E, a, b) of them by a converter's operations (`transformers.core_model_loading`), which here work on one
expert alone, forwards and backwards: never is a whole parameter in memory. An operation that is not known to do the
same to every expert is refused by name.

    place = weight_table(model, checkpoint.keys()).experts["model.layers.0.mlp.experts.gate_up_proj"]
    place.expert(checkpoint, 3)                   # (a, b), as the parameter stores it: its two files joined
    place.in_files(checkpoint, 3, change)         # key → the change of that file's tensor (of a fused one: of its [3])
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    SplitModulelist,
    Transpose,
    WeightConverter,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rankwise.errors import DataError
from rankwise.files.checkpoint import Checkpoint

ALL = -1  # in place of an expert's number: one tensor holds all of them
BLOCKS, SCALES = "_blocks", "_scales"  # of MXFP4: two 4-bit values a byte, and a power of two for 32 of them
SHOWN = 3


class Mxfp4Values(ConversionOps):
    """Blocks and scales of MXFP4 → bfloat16 (E, in, out), as transformers dequantizes them. There is no way back."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        blocks, scales = (input_dict[pattern][0] for pattern in source_patterns)
        return {target_patterns[0]: convert_moe_packed_tensors(blocks, scales)}


def known(operation: ConversionOps) -> bool:
    """Whether an operation does to every expert, along the first axis, what it does to each alone."""
    if isinstance(operation, MergeModulelist | SplitModulelist):
        return bool(operation.dim == 0)
    if isinstance(operation, Concatenate | Chunk):
        return operation.dim not in (0, -3) and operation.num_shards_attribute is None
    if isinstance(operation, Interleave):
        return operation.dim not in (0, -3)
    if isinstance(operation, Transpose):
        return not {operation.dim0, operation.dim1} & {0, -3}
    return isinstance(operation, Mxfp4Values)


@dataclass(frozen=True)
class ExpertFiles:
    """The files of the experts in one parameter.

    `shape` is the parameter's, (E, a, b). `sources`: a converter's pattern → expert → key of its tensor, ALL → key of
    the one tensor for all. `targets`: what the converter makes of them, of which `target` is this parameter.
    """

    parameter: str
    shape: tuple[int, int, int]
    sources: Mapping[str, Mapping[int, str]]
    operations: tuple[ConversionOps, ...] = ()
    target: str = ""
    targets: tuple[str, ...] = ()

    @property
    def experts(self) -> int:
        return self.shape[0]

    @property
    def fused(self) -> bool:
        """Whether one tensor holds all experts."""
        return all(ALL in keys for keys in self.sources.values())

    @property
    def quantized(self) -> bool:
        return any(isinstance(operation, Mxfp4Values) for operation in self.operations)

    @cached_property
    def keys(self) -> dict[str, int]:
        """Key → the expert whose tensor it is, or ALL."""
        return {key: expert for keys in self.sources.values() for expert, key in keys.items()}

    def renamed(self, keys: Mapping[str, str]) -> ExpertFiles:
        """The same with these keys in place of its own."""
        sources = {name: {expert: keys[key] for expert, key in each.items()} for name, each in self.sources.items()}
        return replace(self, sources=sources)

    def keys_of(self, expert: int) -> dict[str, str]:
        """Pattern → the key that holds this expert. DataError where there is none."""
        absent = [pattern for pattern, keys in self.sources.items() if not {expert, ALL} & set(keys)]
        if absent:
            raise DataError(f"{self.parameter}: expert {expert} has no {absent[0]}")
        return {pattern: keys.get(expert, keys.get(ALL, "")) for pattern, keys in self.sources.items()}

    def dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        """Type of what `expert` gives."""
        return torch.bfloat16 if self.quantized else checkpoint.dtype(next(iter(self.keys)))

    def expert(self, checkpoint: Checkpoint, expert: int) -> Tensor:
        """The matrix (a, b) of one expert as the parameter stores it; a view of the file, where there is nothing to do.

        DataError, naming parameter and expert, for what is missing, and for an operation that is not known.
        """
        self.require_known(checkpoint)
        parts = {
            pattern: slice_of(checkpoint.tensor(key), expert, self) for pattern, key in self.keys_of(expert).items()
        }
        return self.converted(parts)

    def converted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensors of one expert by pattern, as `slice_of` gives them → its matrix."""
        if not self.operations:
            return next(iter(parts.values()))[0]
        made: dict[str, Any] = {pattern: [part] for pattern, part in parts.items()}
        for operation in self.steps({pattern: tuple(part.shape) for pattern, part in parts.items()}):
            made = operation.convert(made, source_patterns=list(self.sources), target_patterns=list(self.targets))
        found = made[self.target] if self.target in made else next(iter(made.values()))
        matrix: Tensor = (found[0] if isinstance(found, list) else found)[0]
        return matrix

    def in_files(self, checkpoint: Checkpoint, expert: int, change: Tensor) -> dict[str, Tensor]:
        """Key → change of its tensor that a change (a, b) of this expert's matrix is; of a tensor with all experts, the
        change of its part for this one. DataError where files cannot take it: MXFP4, an operation that is not known.
        """
        self.require_known(checkpoint)
        keys = self.keys_of(expert)
        if self.quantized:
            raise DataError(f"{checkpoint.path}: {self.parameter} is MXFP4 in its files, which rounds a change away")
        if not self.operations:
            return {next(iter(keys.values())): change}
        made: dict[str, Any] = {name: torch.zeros_like(change)[None] for name in self.targets}
        made[self.target] = change[None]
        shapes = {pattern: stored_shape(checkpoint.shape(key), self) for pattern, key in keys.items()}
        for operation in reversed(self.steps(shapes)):
            made = operation.reverse_op.convert(
                made, source_patterns=list(self.targets), target_patterns=list(self.sources)
            )
        names = {pattern.replace("*", "0"): key for pattern, key in keys.items()}
        return {names[name]: part[0] if self.fused else part for name, part in made.items()}

    def steps(self, shapes: Mapping[str, tuple[int, ...]]) -> list[ConversionOps]:
        """The operations, without transposes that only files of the other orientation need."""
        turned = any(shape[-2:] != self.shape[1:] for shape in shapes.values())
        return [each for each in self.operations if turned or not (isinstance(each, Transpose) and each.check_dims)]

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The whole parameter, as the model has it: for whoever runs the layer."""
        if self.fused and not self.operations:
            return checkpoint.tensor(next(iter(self.keys)))
        whole = torch.empty(self.shape, dtype=self.dtype(checkpoint))
        for expert in range(self.experts):
            whole[expert] = self.expert(checkpoint, expert)
        return whole

    def prefetch(self, checkpoint: Checkpoint, expert: int) -> None:
        """Ask for the bytes of this expert's own files; of a tensor with all experts the kernel reads on by itself."""
        for keys in self.sources.values():
            if expert in keys:
                checkpoint.prefetch(keys[expert])

    def require_known(self, checkpoint: Checkpoint) -> None:
        """DataError, naming it, for an operation that is not known to work expert by expert."""
        unknown = [type(each).__name__ for each in self.operations if not known(each)]
        if unknown:
            raise DataError(
                f"{checkpoint.path}: transformers makes {self.parameter} of its files by {unknown[0]}, which is not "
                "known here to do the same to every expert: save the loaded model with save_original_format=False"
            )

    def problem(self, checkpoint: Checkpoint) -> str | None:
        """Why the files do not give this parameter, by expert; None where they do. Reads no tensor."""
        self.require_known(checkpoint)
        for pattern, keys in self.sources.items():
            count = checkpoint.shape(keys[ALL])[0] if ALL in keys else max(keys) + 1
            missing = [] if ALL in keys else [expert for expert in range(count) if expert not in keys]
            if count != self.experts:
                return f"has {count} experts ({pattern}) where the model has {self.experts}"
            if missing:
                shown = ", ".join(map(str, missing[:SHOWN])) + (" …" if len(missing) > SHOWN else "")
                return f"has no {pattern} of expert {shown}"
        seen: set[tuple[Any, ...]] = set()
        for expert in range(1 if self.fused else self.experts):
            stored = tuple(
                (pattern, stored_shape(checkpoint.shape(key), self)) for pattern, key in self.keys_of(expert).items()
            )
            shape = self.shape[1:] if stored in seen or self.quantized else self.made_shape(dict(stored))
            seen.add(stored)
            if shape != self.shape[1:]:
                who = "every expert" if self.fused else f"expert {expert}"
                return f"is {shape or dict(stored)} for {who} where the model has {self.shape[1:]}"
        return None

    def made_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """What the operations make of tensors of these shapes; None where they cannot."""
        try:
            return tuple(
                self.converted({name: torch.empty(each, device="meta") for name, each in shapes.items()}).shape
            )
        except (RuntimeError, ValueError, IndexError):
            return None


def slice_of(tensor: Tensor, expert: int, files: ExpertFiles) -> Tensor:
    """An expert's own tensor as it is; of a tensor with all experts, its part, (1, …)."""
    return tensor[expert : expert + 1] if files.fused else tensor


def stored_shape(shape: tuple[int, ...], files: ExpertFiles) -> tuple[int, ...]:
    """The shape of `slice_of`."""
    return (1, *shape[1:]) if files.fused else shape


@dataclass(frozen=True)
class Converted:
    """A key that a converter takes: the pattern that it matches, its name after renaming, and the first parameter that
    is made of it."""

    key: str
    renamed: str
    pattern: str
    first: str
    converter: WeightConverter

    @property
    def expert(self) -> int:
        """The expert's number in the name; ALL where it has none."""
        regex = self.pattern.replace("*", r"(?P<expert>\d+)", 1)
        found = re.search(regex, self.renamed) if "*" in self.pattern else None
        return int(found["expert"]) if found else ALL


def converted_experts(found: Sequence[Converted], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[ExpertFiles]:
    """The parameters with experts, (E, a, b) in `shapes`, that converters make of these keys."""
    groups: dict[str, list[Converted]] = {}
    for row in found:
        groups.setdefault(row.first, []).append(row)
    for first, rows in groups.items():
        converter = rows[0].converter
        targets = tuple(converter.target_patterns)
        for place, target in enumerate(targets):
            shape = shapes.get(first.replace(targets[0], target), ())
            if len(shape) == 3:
                files = sources_of(rows, converter)
                name = first.replace(targets[0], target)
                yield of_target(name, (shape[0], shape[1], shape[2]), files, converter, place)


def sources_of(rows: Sequence[Converted], converter: WeightConverter) -> dict[str, dict[int, str]]:
    """Pattern → expert → key, in the converter's order."""
    found: dict[str, dict[int, str]] = {pattern: {} for pattern in converter.source_patterns}
    for row in rows:
        found[row.pattern][row.expert] = row.key
    return found


def of_target(
    name: str,
    shape: tuple[int, int, int],
    sources: Mapping[str, Mapping[int, str]],
    converter: WeightConverter,
    place: int,
) -> ExpertFiles:
    """One of a converter's parameters. Ernie's operation deals the experts out to several, part after part."""
    targets, operations = tuple(converter.target_patterns), tuple(converter.operations)
    ernie = next((each for each in operations if isinstance(each, ErnieFuseAndSplitTextVisionExperts)), None)
    if ernie is None or len(operations) > 1 or ernie.stack_dim != 0:
        return ExpertFiles(name, shape, sources, operations, targets[place], targets)
    share = math.ceil(max(map(len, sources.values())) / len(targets))
    own = {
        pattern: {expert - place * share: key for expert, key in keys.items() if expert // share == place}
        for pattern, keys in sources.items()
    }
    steps: tuple[ConversionOps, ...] = (MergeModulelist(0), Concatenate(ernie.concat_dim))[: len(sources)]
    return ExpertFiles(name, shape, own, steps, targets[place], (targets[place],))


def stored_experts(places: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[ExpertFiles]:
    """The parameters (E, a, b) that lie in one tensor each, as they are or in MXFP4. places: name → key."""
    for name, shape in shapes.items():
        if len(shape) != 3:
            continue
        whole = (shape[0], shape[1], shape[2])
        if name in places:
            yield ExpertFiles(name, whole, {name: {ALL: places[name]}})
        elif {name + BLOCKS, name + SCALES} <= set(places):
            sources = {each: {ALL: places[each]} for each in (name + BLOCKS, name + SCALES)}
            yield ExpertFiles(name, whole, sources, (Mxfp4Values(),), name, (name,))
