"""LoRA on single experts, `…experts.3.gate_proj`, as transformers 4 had them: the same adapter on today's parameters.

transformers 5 joins an expert's gate and up matrices, and all experts, in one parameter. Of two pairs of ranks r and q
it makes one of rank r + q, exactly: A = [A₁; A₂], and B block-diagonal. An expert or a half that the adapter leaves out
is zero; smaller ranks are padded with zeros, other scales are within B.

    folder = in_todays_layout(model, folder)        # the folder itself, where its keys are the model's

PEFT 0.21 converts some on load, too: without dropout, with one rank and scale alpha / r, all experts, both halves, and
no dense or shared MLP of the same names. Else it refuses, or builds another adapter: hence ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, Transpose

from rankwise.core.experts import single_experts
from rankwise.core.site import Site
from rankwise.errors import DataError
from rankwise.files.adapter import (
    CONFIG_NAME,
    LoraAdapter,
    LoraPair,
    adapter_files,
    read_adapter,
    write_adapter,
)
from rankwise.files.adapter_config import EXPERTS
from rankwise.files.checkpoint import ADAPTER_NAMES, open_checkpoint
from rankwise.files.processes import announce
from rankwise.models.expert_files import ExpertFiles
from rankwise.models.sites import model_sites, weight_table

OWN = (*ADAPTER_NAMES, CONFIG_NAME, EXPERTS.name, "sites.json")  # of the adapter as it was; the rest goes with it


def in_todays_layout(model: PreTrainedModel, path: Path | str) -> Path:
    """The adapter's folder as it is where its keys are modules of the model (which may be on the meta device); else a
    temporary one of the same adapter, in PEFT's layout for the model's parameters, kept until the process ends.

    DataError, naming it, for a pair that has no place in the model.
    """
    weights, config_file = adapter_files(Path(path))
    modules = {name for name, _ in model.named_modules()}
    if config_file is None or not [name for name in single_experts(open_checkpoint(weights)) if name not in modules]:
        return Path(path)
    adapter = joined_adapter(model, read_adapter(weights), str(weights.parent))
    shapes = tuple((path, pair.lora_A.shape, pair.lora_B.shape) for path, pair in adapter.pairs.items())
    folder = temporary(weights.resolve(), weights.stat().st_mtime_ns, type(model), shapes)
    if not (folder / CONFIG_NAME).is_file():
        for file in weights.parent.iterdir():
            if file.is_file() and file.name not in OWN:
                (folder / file.name).symlink_to(file.resolve())
        write_adapter(folder, adapter)
        largest = max(pair.rank for pair in adapter.pairs.values() if pair.experts)
        announce(
            f"note: {weights.parent} adapts experts one by one, as transformers 4 had them: read as pairs of today's "
            f"parameters, of rank {largest} at most"
        )
    return folder


@cache
def kept(_: object) -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="rankwise-adapter-")


def temporary(*key: object) -> Path:
    """A folder that is there until the process ends; the same one for the same key."""
    return Path(kept(key).name)


def joined_adapter(model: PreTrainedModel, adapter: LoraAdapter, where: str) -> LoraAdapter:
    """The adapter with its pairs at the model's own matrices and parameters."""
    keys = {f"{name}.weight": name for name in adapter.pairs}
    table, sites = weight_table(model, list(keys)), model_sites(model, routers=True)
    modules = {name for name, _ in model.named_modules()}
    found: dict[str, LoraPair] = {}
    for name, weight in table.weights.items():
        path = name.removesuffix(".weight")
        if path in modules and weight.part == (0, 1):
            pair = adapter.pairs[keys.pop(weight.key)]
            found[path] = replace(pair, peft=sites[path].peft if path in sites else "path")
    for name, files in table.experts.items():
        if name in sites:
            own = {key: adapter.pairs[keys.pop(key)] for key in files.keys}
            found[name] = joined(files, own, sites[name], where)
    if keys:
        lost = next(iter(keys.values()))
        raise DataError(f"{where}: {len(keys)} pairs have no place in the model ({lost} …); another base?")
    return replace(adapter, pairs=found)


def joined(files: ExpertFiles, pairs: Mapping[str, LoraPair], site: Site, where: str) -> LoraPair:
    """One pair (E, r, n), (E, m, r) of the parameter. pairs: by the keys of `files`."""
    unknown = [type(step).__name__ for step in files.operations if not stacks_rows(step)]
    if unknown or site.transposed:
        raise DataError(
            f"{where}: transformers makes {site.path} of single experts by {(unknown or ['Transpose'])[0]}, which is "
            "not known to join their adapters: merge it with the transformers 4 that trained it, and take the merged "
            "model"
        )
    rows = row_counts(files, pairs, site, where)
    parts = {
        expert: [(pattern, pairs[own[expert]]) for pattern, own in files.sources.items() if expert in own]
        for expert in range(site.experts)
    }
    first = next(iter(pairs.values()))
    rank = max(sum(pair.rank for _, pair in each) for each in parts.values())
    starts = dict(zip(rows, torch.tensor([0, *rows.values()]).cumsum(0).tolist(), strict=False))
    a = first.lora_A.new_zeros(site.experts, rank, site.shape[1])
    b = first.lora_B.new_zeros(site.experts, site.shape[0], rank)
    for expert, each in parts.items():
        at = 0
        for pattern, pair in each:
            channels, block = slice(at, at + pair.rank), slice(starts[pattern], starts[pattern] + rows[pattern])
            a[expert, channels], at = pair.lora_A, at + pair.rank
            b[expert, block, channels] = (
                pair.lora_B if pair.scale == first.scale else pair.lora_B * (pair.scale / first.scale)
            )
    return LoraPair(a, b, first.scale, peft="parameter", swapped=site.swapped, order=site.order)


def stacks_rows(step: ConversionOps) -> bool:
    """Whether it stacks experts, or joins an expert's matrices row after row."""
    if isinstance(step, Transpose):
        return bool(step.check_dims)
    return (isinstance(step, MergeModulelist) and step.dim == 0) or (isinstance(step, Concatenate) and step.dim == 1)


def row_counts(files: ExpertFiles, pairs: Mapping[str, LoraPair], site: Site, where: str) -> dict[str, int]:
    """Pattern → rows of its matrix, in the order of the joined one. DataError for pairs that do not fit the model."""
    m, n = site.shape
    known = {pattern: sorted({pairs[key].shape for key in own.values()}) for pattern, own in files.sources.items()}
    told = [shapes[0][0] for shapes in known.values() if shapes]
    rows = {
        pattern: shapes[0][0] if shapes else (m - sum(told)) // max(1, len(known) - len(told))
        for pattern, shapes in known.items()
    }
    odd = [shape for shapes in known.values() for shape in shapes if len(shapes) > 1 or shape[1] != n]
    beyond = [expert for own in files.sources.values() for expert in own if expert >= site.experts]
    if odd or beyond or sum(rows.values()) != m:
        seen = odd or [shape for shapes in known.values() for shape in shapes]
        told_of = f"expert {beyond[0]}" if beyond else f"(out, in) {seen[0]}"
        raise DataError(
            f"{where}: a pair of single experts is of {told_of}, and {site.path} has {site.experts} experts of "
            f"{site.shape}: another base?"
        )
    return rows


def refuse_single_experts(names: Iterable[str], where: str) -> None:
    """DataError where a base is needed to know how the model has these experts."""
    found = single_experts(names)
    if found:
        raise DataError(
            f"{where}: it adapts experts one by one ({found[0]} …), as transformers 4 had them; how today's model has "
            "them only the base tells: name it (`--base_model`; of `ranks`, `--model_name`)"
        )
