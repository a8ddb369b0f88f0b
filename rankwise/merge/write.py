"""A planned merge, written: tensor by tensor in the base's own layout, and the files beside the weights.

    with atomic_folder("merged_model") as folder:
        write_merged(plan, folder, "5GB")

    base's weight ── + rows ── PEFT merges in float32 ── rounded once, and counted ──▶ shard ◀── header made beforehand

safetensors' own writer wants a whole file's tensors at once, which for 5 GB files is 5 GB of merged weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import split_state_dict_into_shards_factory
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankwise.core.site import is_expert
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import free_space, write_json
from rankwise.files.checkpoint import DTYPES, LENGTH_BYTES
from rankwise.merge.beside import Copied, copy_beside
from rankwise.merge.plan import Entry, MergePlan
from rankwise.models.adapt import ADAPTER
from rankwise.models.depth.encoder import write_depth
from rankwise.models.expert_files import ALL, ExpertFiles
from rankwise.models.vocabulary import with_rows
from rankwise.page.progress import progress

MUCH = 0.05  # of the adapter's change: above it the other precision is worth a word
BESIDE = torch.float16
PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        change = squared_norm(merged - stored)
        self.change += change
        for kind in dict.fromkeys((dtype, BESIDE)):
            lost = squared_norm(merged - merged.to(kind))
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
        shares = {dtype_name(dtype): self.share(dtype) for dtype in self.lost if self.share(dtype) != float("inf")}
        worst = {"worst": {"weight": self.worst[0], "share": self.worst[1]}} if self.worst else {}
        return {"share_of_change_lost": shares, **worst}

    def sentence(self) -> str | None:
        """What rounding took, and which precision takes less; None where nothing was rounded."""
        if not self.change:
            return None
        share, other = self.share(self.dtype), self.share(BESIDE)
        text = f"rounding to {dtype_name(self.dtype)} changes the weights by {share:.1%} of what the adapter changes"
        if self.dtype == BESIDE or share <= MUCH:
            return text
        if other < share:
            return f"{text}; float16 would by {other:.1%}: --dtype float16 is the better one for export"
        return f"{text}; --dtype float32 keeps all of it"


def squared_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Written:
    """What a merge has written: all files, the weights first; where those that were taken over came from; what rounding
    cost."""

    files: tuple[Path, ...]
    copied: Mapping[str, Copied]
    rounding: Rounding

    def as_facts(self) -> dict[str, Any]:
        """For the manifest: where the files that were taken over came from, and what rounding cost."""
        rounding = self.rounding.as_dict()
        copied = {name: copied.as_dict() for name, copied in self.copied.items()}
        return {"copied": copied} | ({"rounding": rounding} if rounding else {})


def require_space(plan: MergePlan, folder: Path) -> None:
    """DataError where the disk below `folder` has no room for the merged weights."""
    free = free_space(folder)
    if plan.bytes > free:
        raise DataError(
            f"{folder}: the merged weights take {plan.bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            "free some space, or choose another --output_dir"
        )


def shard_bytes(text: str, flag: str = "--max_shard_size") -> int:
    """ "5GB" → bytes. UsageError, naming the flag, for what is no size."""
    try:
        size = int(convert_file_size_to_int(text))
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(f"{flag} takes a number with KB, MB or GB, such as 5GB; got {text!r}")
    return size


def write_merged(plan: MergePlan, folder: Path, max_shard_size: str) -> Written:
    """Weights, config and the files beside them."""
    entries = {entry.key: entry for entry in plan.entries}
    following = {one.key: other.source for one, other in pairwise(plan.entries)}
    bar = progress(total=len(entries), desc="merge", unit="tensor", leave=True)
    rounding = Rounding()

    def tensor(key: str) -> Tensor:
        if key in following:
            plan.base.prefetch(following[key])
        bar.update()
        return make_tensor(plan, entries[key], rounding)

    files = write_shards(folder, plan.entries, tensor, max_shard_size)
    bar.close()
    own = [write_json(folder / "config.json", plan.config)]
    own += [write_depth(folder, plan.depth)] if plan.depth else []
    copied = copy_beside(plan.base.path, plan.adapter, folder, plan.special)
    return Written((*files, *own, *(folder / name for name in copied)), copied, rounding)


def make_tensor(plan: MergePlan, entry: Entry, rounding: Rounding | None = None) -> Tensor:
    """The merged tensor as it is written; `rounding` counts what that costs. DataError where it has entries that
    are not finite."""
    if entry.experts:
        return make_experts(plan, entry, entry.experts, rounding)
    stored = plan.base.tensor(entry.source)
    refuse_not_finite(entry.source, stored, parameter=bool(entry.names) or is_expert(entry.source))
    if not plan.touched & set(entry.names):
        return stored.to(entry.dtype)
    written = []
    blocks = stored.split(entry.sizes) if entry.sizes else stored.chunk(len(entry.names))
    for name, block in zip(entry.names, blocks, strict=True):
        merged = change_weight(plan, name, block)
        if rounding is not None and name in plan.touched:
            rounding.add(name, with_rows(block, len(merged)), merged, entry.dtype)
        written.append(merged.to(entry.dtype))
        del merged
    whole = torch.cat(written) if len(written) > 1 else written[0]
    if not bool(torch.isfinite(whole).all()):
        raise DataError(f"{entry.key}: merged weights are not finite in {entry.dtype}; try --dtype float32")
    return whole


def refuse_not_finite(key: str, stored: Tensor, *, parameter: bool) -> None:
    """DataError, naming the expert of a stack, where the base's tensor has NaN; of a parameter, infinite entries too,
    which some buffers (masks) have."""
    if not stored.is_floating_point() or stored.dtype.itemsize == 1 or bool(stored.sum(dtype=torch.float64).isfinite()):
        return
    parts = list(enumerate(stored)) if stored.dim() == 3 and is_expert(key) else [(None, stored)]
    for number, part in parts:
        bad = ~torch.isfinite(part) if parameter else torch.isnan(part)
        if bool(bad.any()):
            where = key if number is None else f"{key}, expert {number}"
            raise DataError(
                f"{where}: {int(bad.sum())} entries are NaN or infinite in the base: fetch or save it again"
            )


def make_experts(plan: MergePlan, entry: Entry, files: ExpertFiles, rounding: Rounding | None = None) -> Tensor:
    """One tensor of the files that holds experts, or a part of one: expert by expert, each merged alone in float32."""
    name, stored = files.parameter, plan.base.tensor(entry.source)
    whole, change = plan.change.whole.get(name), plan.change.experts.get(name)
    one = files.keys[entry.source]
    written = torch.empty(entry.shape, dtype=entry.dtype)
    for expert in range(files.experts) if one == ALL else [one]:

        def in_file(matrix: Tensor, expert: int = expert) -> Tensor:
            """The part of an expert's matrix that this tensor has."""
            return matrix if files.quantized else files.in_files(plan.base, expert, matrix)[entry.source]

        if whole is not None:
            before = in_file(whole[expert])
        elif files.quantized:
            before = files.expert(plan.base, expert).float()
        else:
            before = (stored[expert] if one == ALL else stored).float()
        merged = before if change is None else before + in_file(change.expert(expert).change())
        if change is not None and rounding is not None:
            rounding.add(f"{name}, expert {expert}", before, merged, entry.dtype)
        place = written[expert] if one == ALL else written
        place.copy_(merged)
        if not bool(torch.isfinite(place).all()):
            if not bool(torch.isfinite(before).all()):
                raise DataError(f"{name}, expert {expert}: NaN or infinite in the base")
            raise DataError(f"{name}, expert {expert}: not finite once merged in {entry.dtype}; try --dtype float32")
    return written


def change_weight(plan: MergePlan, name: str, weight: Tensor) -> Tensor:
    weight = plan.change.whole.get(name, weight)
    if name in plan.resized:
        weight = with_rows(weight, plan.rows[1])
    if name in plan.change.tokens:
        indices, values = plan.change.tokens[name]
        weight = weight.float().index_copy(0, indices, values)
    layer = plan.change.layers.get(name)
    return weight if layer is None else merge_layer(layer, weight)


def merge_layer(layer: LoraLayer, weight: Tensor) -> Tensor:
    """PEFT's merge of one layer, in float32 on a copy of the weight."""
    base = layer.get_base_layer()  # of a matrix that PEFT adapts by its parameter too
    empty = base.weight
    base.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    layer.merge(adapter_names=[ADAPTER])
    merged: Tensor = base.weight.data
    base.weight = empty
    layer.merged_adapters.clear()
    return merged


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
