"""The deltas of a fine-tune, written shard by shard: tuned parameters in memory, base weights read from their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from rankwise.core.measure import energy_of
from rankwise.core.site import Site
from rankwise.files.atomic import atomic_folder, write_json
from rankwise.files.checkpoint import Checkpoint
from rankwise.models.sites import WeightTable
from rankwise.store.deltas import DELTAS_FILE

FORMAT = "rankwise-deltas/1"
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class BaseWeights:
    """What the parameters were: by their place in the base's files, or as a copy where no view of a file gives them."""

    checkpoint: Checkpoint
    table: WeightTable
    copies: Mapping[str, Tensor]

    @classmethod
    def before_training(
        cls, checkpoint: Checkpoint, table: WeightTable, parameters: Mapping[str, Tensor]
    ) -> BaseWeights:
        """Call this with the untrained parameters: those that the table lacks are copied now."""
        copies = {name: value.detach().cpu().clone() for name, value in parameters.items() if name not in table.weights}
        return cls(checkpoint, table, copies)

    def read(self, name: str) -> Tensor:
        copy = self.copies.get(name)
        return (self.table.weights[name].read(self.checkpoint) if copy is None else copy).float()


def shards(tensors: Mapping[str, Tensor], limit: int = SHARD_BYTES) -> Iterator[list[str]]:
    """Names in order, grouped so that a group's float32 tensors stay within `limit` bytes (one tensor at least)."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + 4 * tensor.numel() > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += 4 * tensor.numel()
    if group:
        yield group


def write_deltas(
    folder: Path,
    tuned: Mapping[str, Tensor],
    base: BaseWeights,
    sites: Mapping[str, Site],
    facts: Mapping[str, Any],
    limit: int = SHARD_BYTES,
) -> Path:
    """tuned − base of every trained parameter, float32, under the parameter's name; whole or not at all.

    One shard is in memory at a time. `deltas.json` holds the sites, the energy of each one's base weight, and `facts`.
    """
    groups = list(shards(tuned, limit))
    energies: dict[str, float] = {}
    places: dict[str, str] = {}
    with atomic_folder(folder) as temporary:
        for index, names in enumerate(tqdm(groups, desc="deltas", unit="shard", disable=None, leave=False), 1):
            file = f"deltas-{index:05d}-of-{len(groups):05d}.safetensors"
            differences = {}
            for name in names:
                before = base.read(name)
                differences[name] = (tuned[name].detach().to("cpu", torch.float32) - before).contiguous()
                path = name.removesuffix(".weight")
                if path in sites:
                    energies[path] = energy_of(before)
            save_file(differences, temporary / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        size = 4 * sum(tensor.numel() for tensor in tuned.values())
        index_content = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(temporary / "deltas.safetensors.index.json", index_content)
        rows = [sites[path].as_dict() for path in energies]
        write_json(temporary / DELTAS_FILE, {"format": FORMAT, **facts, "sites": rows, "base_energy": energies})
    return folder
