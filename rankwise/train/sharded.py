"""Tensors of which each process holds a part (FSDP2's DTensor), put together or summed: what is measured is the whole.

Every call is a collective one where tensors are in shards; of plain tensors it is none.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def numbers_by(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Key → positions at which it stands: what one kernel, or one collective call, can take together."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


def sharding(tensor: Tensor | None) -> tuple[Any, Any] | None:
    """Mesh and placements of a tensor in shards; None of a whole one."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def across_shards(norms: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Norms of whole gradients from those of the shards: squares are summed along the mesh's sharded dimensions."""
    squares = norms.square()
    for dimension, placement in enumerate(placements):
        assert not placement.is_partial(), "FSDP2 leaves reduced gradients"
        if not placement.is_replicate():
            torch.distributed.all_reduce(squares, group=mesh.get_group(dimension))
    return squares.sqrt()


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, those in shards put together: one collective call for all that are sharded alike."""
    found = list(tensors)
    for shards, numbers in numbers_by(map(sharding, tensors)).items():
        if shards is not None:
            for i, tensor in zip(numbers, gathered([tensors[i] for i in numbers], *shards), strict=True):
                found[i] = tensor
    return found


def gathered(shards: Sequence[Any], mesh: Any, placements: Sequence[Any]) -> list[Tensor]:
    """Whole tensors of which each process has some rows, as FSDP2 deals them (torch.chunk): every process lays its
    rows into zeros, and the sum over the processes is the whole."""
    dimensions = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(dimensions) != 1 or not placements[dimensions[0]].is_shard(0):
        return [shard.full_tensor() for shard in shards]
    (dimension,) = dimensions
    flat = torch.zeros(sum(shard.numel() for shard in shards), device=shards[0].to_local().device)
    pieces = zip(flat.split([shard.numel() for shard in shards]), shards, strict=True)
    parts = [part.view(shard.shape) for part, shard in pieces]
    for part, shard in zip(parts, shards, strict=True):
        rows = shard.to_local()
        first = mesh.get_local_rank(dimension) * -(-shard.shape[0] // mesh.size(dimension))
        part[first : first + len(rows)] = rows
    torch.distributed.all_reduce(flat, group=mesh.get_group(dimension))
    return parts
