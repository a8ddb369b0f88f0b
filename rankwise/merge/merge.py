"""Adapter into base: every name and shape checked first, then written tensor by tensor in the base's own layout.

    plan = plan_merge("org/base", Path("saved_models/adapter"))      # nothing is written yet
    with atomic_folder("merged_model") as folder:
        write_merged(plan, folder, "5GB")

PEFT's own layers merge (so DoRA is right as well), on a skeleton of the model whose base weights take no memory:
a layer gets its weight, merges, hands it over, and is empty again. Merged in float32, rounded once on writing.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.adapter import CONFIG_NAME
from rankwise.files.atomic import read_object, write_json
from rankwise.files.checkpoint import DTYPES, LENGTH_BYTES, Checkpoint, Weight, open_checkpoint, resolve
from rankwise.merge.plan import Skeleton, filled_skeleton, merge_layer, mergeable
from rankwise.merge.tokens import Copied, copy_beside, special_tokens, with_special
from rankwise.models.depth.encoder import ENCODER, attach_depth
from rankwise.models.depth.settings import DepthSettings, read_depth, write_depth
from rankwise.models.load import meta_model
from rankwise.models.sites import tower_of, tower_prefixes, weight_table
from rankwise.models.vocabulary import row_count, with_rows

MUCH = 0.05  # of the adapter's change: above it the other precision is worth a word
BESIDE = torch.float16


@dataclass
class Rounding:
    """Sums over the weights that the adapter changes, as they are written one after the other.

    `change`: Σ‖Δ‖²_F; `lost`: Σ‖round(W + Δ) − (W + Δ)‖²_F for each precision looked at. `worst`: the weight that loses
    the largest share of its own change, with that share.
    """

    dtype: torch.dtype = torch.float32
    change: float = 0.0
    lost: dict[torch.dtype, float] = field(default_factory=dict)
    worst: tuple[str, float] | None = None

    def add(self, key: str, stored: Tensor, merged: Tensor, dtype: torch.dtype) -> None:
        """Count one weight: as the base stores it, merged in float32, and the precision it is written in."""
        if dtype == torch.float32:
            return
        self.dtype = dtype
        change = squared(merged - stored)
        self.change += change
        for kind in dict.fromkeys((dtype, BESIDE)):
            lost = squared(merged - merged.to(kind))
            self.lost[kind] = self.lost.get(kind, 0.0) + lost
            if kind == dtype and change and (self.worst is None or (lost / change) ** 0.5 > self.worst[1]):
                self.worst = key, (lost / change) ** 0.5

    def share(self, dtype: torch.dtype) -> float:
        """‖round(W + Δ) − (W + Δ)‖_F / ‖Δ‖_F over all of them; 0 where they are written as they were merged."""
        return (self.lost[dtype] / self.change) ** 0.5 if self.change and dtype in self.lost else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the manifest; empty where nothing was rounded."""
        if not self.change:
            return {}
        shares = {name_of(dtype): self.share(dtype) for dtype in self.lost if self.share(dtype) != float("inf")}
        worst = {"worst": {"weight": self.worst[0], "share": self.worst[1]}} if self.worst else {}
        return {"share_of_change_lost": shares, **worst}

    def sentence(self) -> str | None:
        """What rounding took, and which precision takes less; None where nothing was rounded."""
        if not self.change:
            return None
        share, other = self.share(self.dtype), self.share(BESIDE)
        text = f"rounding to {name_of(self.dtype)} changes the weights by {share:.1%} of what the adapter changes"
        if self.dtype == BESIDE or share <= MUCH:
            return text
        if other < share:
            return f"{text}; float16 would by {other:.1%}: --dtype float16 is the better one for export"
        return f"{text}; --dtype float32 keeps all of it"


def squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is still to be made."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def shard_bytes(text: str, flag: str = "--max_shard_size") -> int:
    """ "5GB" → bytes. UsageError, naming the flag, for what is no size."""
    try:
        size = int(convert_file_size_to_int(text))
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(f"{flag} takes a number with KB, MB or GB, such as 5GB; got {text!r}")
    return size


def write_shards(
    folder: Path, entries: Sequence[Entry], tensor: Callable[[str], Tensor], max_shard_size: str
) -> list[Path]:
    """Write every entry's tensor to `folder`, in one file or several with their index. Returns the files."""
    by_key = {entry.key: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_key,
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern=PATTERN,
        max_shard_size=shard_bytes(max_shard_size),
    )
    for name, keys in split.filename_to_tensors.items():
        write_file(folder / name, [by_key[key] for key in keys], tensor)
    files = [folder / name for name in split.filename_to_tensors]
    if split.is_sharded:
        files.append(write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}))
    return files


def write_file(path: Path, entries: Sequence[Entry], tensor: Callable[[str], Tensor]) -> None:
    """One safetensors file: length, header, then the tensors' bytes; wide types first, so that all are aligned."""
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        end = offset + entry.bytes
        header[entry.key] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            made = tensor(entry.key).contiguous()
            assert (tuple(made.shape), made.dtype) == (entry.shape, entry.dtype), entry.key
            file.write(made.reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Source:
    """Where a merged tensor comes from: a key of the base, and the module parameters that are its equal row blocks."""

    key: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """A merge that will work: what is written, from what, and what changes it on the way.

    `change`: what the adapter makes of which parameter. `untied`: parameters that shared another one's storage and no
    longer do. `rows`: of the embeddings, before and after. `special`: special tokens that the adapter's own tokenizer
    has in place of the base's. `sees`: something of a vision tower or projector changes,
    which only images show. `depth`: how the merged model takes depth, with the trained gate's value.
    """

    base: Checkpoint
    adapter: Path
    entries: tuple[Entry, ...]
    sources: Mapping[str, Source]
    change: Skeleton
    config: Mapping[str, Any]
    untied: tuple[str, ...]
    rows: tuple[int, int]
    special: Mapping[str, int]
    sees: bool = False
    depth: DepthSettings | None = None

    @cached_property
    def touched(self) -> frozenset[str]:
        return self.change.touched | self.resized

    @cached_property
    def resized(self) -> frozenset[str]:
        """Parameters with a row per token, where the adapter has another number of them."""
        return self.change.rowed if self.rows[0] != self.rows[1] else frozenset()

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What the changed tensors are written as, the coarsest first."""
        changed = {entry.dtype for entry in self.entries if self.touched & set(self.sources[entry.key].names)}
        return sorted(changed, key=lambda dtype: -torch.finfo(dtype).eps)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def tensor(self, entry: Entry, rounding: Rounding | None = None) -> Tensor:
        """The merged tensor as it is written; `rounding` counts what that costs. DataError where it has entries that
        are not finite."""
        source = self.sources[entry.key]
        stored = self.base.tensor(source.key)
        if not self.touched & set(source.names):
            return stored.to(entry.dtype)
        written = []
        for name, block in zip(source.names, stored.chunk(len(source.names)), strict=True):
            merged = self.merged(name, block)
            if rounding is not None and name in self.touched:
                rounding.add(name, with_rows(block, len(merged)), merged, entry.dtype)
            written.append(merged.to(entry.dtype))
            del merged
        whole = torch.cat(written) if len(written) > 1 else written[0]
        if not bool(torch.isfinite(whole).all()):
            raise DataError(f"{entry.key}: merged weights are not finite in {entry.dtype}; try --dtype float32")
        return whole

    def merged(self, name: str, weight: Tensor) -> Tensor:
        weight = self.change.whole.get(name, weight)
        if name in self.resized:
            weight = with_rows(weight, self.rows[1])
        if name in self.change.tokens:
            indices, values = self.change.tokens[name]
            weight = weight.float().index_copy(0, indices, values)
        layer = self.change.layers.get(name)
        return weight if layer is None else merge_layer(layer, weight)


def plan_merge(base: str, adapter: Path, dtype: str = "auto") -> MergePlan:
    """Check that the adapter fits the base, name by name and shape by shape.

    DataError, naming both, where it does not, for adapters that cannot be merged, and for quantized bases;
    VerificationError where the adapter has no effect, or needs embeddings untied that the architecture ties.
    """
    folder = mergeable(adapter)
    checkpoint, model = open_checkpoint(resolve(base)), meta_model(base)
    refuse_quantized(base, checkpoint.config or {})
    where = f"adapter {folder} (made for {read_object(folder / CONFIG_NAME).get('base_model_name_or_path')}) on {base}"
    table = weight_table(model, checkpoint.keys())
    depth = read_depth(folder) or read_depth(checkpoint.path)
    if depth:
        attach_depth(model, depth)
    before, tied, towers = row_count(model), dict(model.all_tied_weights_keys), tower_prefixes(model)
    change = filled_skeleton(model, folder, where)
    rows = before, row_count(model)
    depth = with_gate_value(depth, model, change.whole)
    refuse_no_effect(change, where)
    alike = {one: other for one, other in tied.items() if change.alike(one, other)}
    touched = change.touched | (change.rowed if rows[0] != rows[1] else set())
    apart = {one: other for one, other in tied.items() if one not in alike and touched & {one, other}}
    partner = {one: other for pair in apart.items() for one, other in (pair, pair[::-1])}
    held = {*table.weights, *partner, *alike}
    lacking = [name for name in touched if name not in held]
    if lacking:
        raise DataError(f"{where}: the files hold {lacking[0]} in another form (fused?): it cannot be merged")
    special = special_tokens(checkpoint.path, folder, rows[1])
    config = with_special(merged_config(checkpoint.config or {}, dtype, bool(partner)), special)
    if rows[0] != rows[1]:
        config = with_vocabulary(config, model.config, rows[1])
    if partner:
        check_untied(model, config, partner)
    sources = all_sources(checkpoint, table.weights, partner)
    entries = tuple(
        Entry(key, merged_shape(checkpoint, source, change, rows), written_as(checkpoint.dtype(source.key), dtype))
        for key, source in sources.items()
    )
    sees = any(tower_of(name.rpartition(".")[0], towers) in ("vision", "projector") for name in touched)
    return MergePlan(checkpoint, folder, entries, sources, change, config, tuple(partner), rows, special, sees, depth)


def merged_shape(checkpoint: Checkpoint, source: Source, change: Skeleton, rows: tuple[int, int]) -> tuple[int, ...]:
    shape = checkpoint.shape(source.key)
    return (rows[1], *shape[1:]) if rows[0] != rows[1] and change.rowed & set(source.names) else shape


def with_gate_value(
    depth: DepthSettings | None, model: PreTrainedModel, replaced: dict[str, Tensor]
) -> DepthSettings | None:
    """The settings with the adapter's own gate, taken out of what it carries whole: checkpoints hold none."""
    gate = replaced.pop(f"{model.base_model_prefix}.{ENCODER}.gate", None)
    return depth if depth is None or gate is None else replace(depth, gate_value=float(gate))


def refuse_quantized(base: str, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise DataError(
            f"{base}: its files are quantized ({kind}), and merging into rounded weights would round the adapter away; "
            "give the full-precision model it was made from with --base_model"
        )


def refuse_no_effect(change: Skeleton, where: str) -> None:
    pairs = [[one for name, one in layer.named_parameters() if "lora_" in name] for layer in change.layers.values()]
    if not change.whole and not change.tokens and not any(all(bool(one.any()) for one in pair) for pair in pairs):
        raise VerificationError(f"{where}: every B·A is zero, so the adapter has no effect; was it saved untrained?")


def all_sources(base: Checkpoint, weights: Mapping[str, Weight], partner: Mapping[str, str]) -> dict[str, Source]:
    """Output key → source: the base's own keys, and a key of their own for parameters that no file holds yet."""
    names: dict[str, list[str]] = {}
    for name, _ in sorted(weights.items(), key=lambda item: item[1].part[0]):
        names.setdefault(weights[name].key, []).append(name)
    sources = {key: Source(key, tuple(names.get(key, ()))) for key in base}
    untied = {name: Source(weights[other].key, (name,)) for name, other in partner.items() if name not in weights}
    return sources | untied


def written_as(stored: torch.dtype, asked: str) -> torch.dtype:
    if asked == "auto" or not stored.is_floating_point:
        return stored
    dtype: torch.dtype = getattr(torch, asked)
    return dtype


def merged_config(config: Mapping[str, Any], dtype: str, untie: bool) -> dict[str, Any]:
    """config.json of the merged model: the base's, with what the merge has changed, in its sub-configs as well."""
    changed = {
        name: merged_config(value, dtype, untie) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in config.items()
    }
    if dtype != "auto":
        changed.pop("torch_dtype", None)
        changed["dtype"] = dtype
    if untie and ("architectures" in config or "tie_word_embeddings" in config):
        changed["tie_word_embeddings"] = False
    return changed


def with_vocabulary(config: Mapping[str, Any], settings: PreTrainedConfig, rows: int) -> dict[str, Any]:
    """config.json with this many tokens, in the part of it that describes the decoder."""
    text = settings.get_text_config()
    part = next((name for name in settings.sub_configs if getattr(settings, name, None) is text), None)
    return {**config, part: {**config.get(part, {}), "vocab_size": rows}} if part else {**config, "vocab_size": rows}


def check_untied(model: PreTrainedModel, config: Mapping[str, Any], partner: Mapping[str, str]) -> None:
    """The architecture really has two weights once its config says so."""
    with torch.device("meta"):
        fresh = type(model)(type(model.config).from_dict(dict(config)))
    stuck = [name for name in partner if name in fresh.all_tied_weights_keys]
    if stuck:
        raise VerificationError(
            f"the adapter changes {stuck[0]}, which {type(model).__name__} always ties to {partner[stuck[0]]}: "
            "such a model cannot hold the merged weights; leave that site out of the adapter"
        )


def require_space(plan: MergePlan, folder: Path) -> None:
    """DataError where the disk below `folder` has no room for the merged weights."""
    free = shutil.disk_usage(folder).free
    if plan.bytes > free:
        raise DataError(
            f"{folder}: the merged weights take {plan.bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            "free some space, or choose another --output_dir"
        )


@dataclass(frozen=True)
class Written:
    """What a merge has written: all files, the weights first; where those that were taken over came from; what rounding
    cost."""

    files: tuple[Path, ...]
    copied: Mapping[str, Copied]
    rounding: Rounding


def write_merged(plan: MergePlan, folder: Path, max_shard_size: str) -> Written:
    """Weights, config and the files beside them."""
    entries = {entry.key: entry for entry in plan.entries}
    following = dict(zip(list(entries)[:-1], list(entries)[1:], strict=True))
    bar = tqdm(total=len(entries), desc="merge", unit="tensor", disable=not sys.stderr.isatty())
    rounding = Rounding()

    def tensor(key: str) -> Tensor:
        if key in following:
            plan.base.prefetch(plan.sources[following[key]].key)
        bar.update()
        return plan.tensor(entries[key], rounding)

    files = write_shards(folder, plan.entries, tensor, max_shard_size)
    bar.close()
    own = [write_json(folder / "config.json", plan.config)]
    own += [write_depth(folder, plan.depth)] if plan.depth else []
    copied = copy_beside(plan.base.path, plan.adapter, folder, plan.special)
    return Written((*files, *own, *(folder / name for name in copied)), copied, rounding)
