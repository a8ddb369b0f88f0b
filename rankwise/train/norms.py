"""Norms on the device: of every parameter's gradient, and of every LoRA delta. Nothing here waits for the device.

    gradients ──▶ one kernel for all that are alike ──▶ (P,) norms          A, B ──▶ r × r Gram matrices ──▶ (S,) ‖BA‖

Sharded ones (FSDP2's DTensor) give the norms of the whole, in every process; then each call is a collective one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankwise.train.trained import Pair, matrices

ABSENT = -1.0  # in place of the norm of a gradient that is not there: a norm is never negative, and may be NaN


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """‖∇‖₂ of each parameter, (P,) float32; ABSENT where there is no gradient.

    Half-precision gradients are summed in float32. Shards of one gradient (DTensor) are summed over their processes.
    """
    device = next((one.grad.device for one in parameters if one.grad is not None), torch.device("cpu"))
    norms = [torch.full((), ABSENT, device=device)] * len(parameters)
    for (kind, _), numbers in alike(parameters).items():
        gradients = [local(parameters[i].grad) for i in numbers]
        found = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        if kind is not None:
            found = across_shards(torch.stack(found), *kind).unbind()
        for i, norm in zip(numbers, found, strict=True):
            norms[i] = norm.to(device, non_blocking=True)
    return torch.stack(norms) if norms else torch.zeros(0)


def alike(parameters: Sequence[nn.Parameter]) -> dict[tuple[Any, Any], list[int]]:
    """Numbers of the parameters with a gradient, in groups that one kernel can take: equally sharded, alike in
    device and dtype."""
    groups: dict[tuple[Any, Any], list[int]] = {}
    for i, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is not None:
            sharding = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
            groups.setdefault((sharding, (gradient.device, gradient.dtype)), []).append(i)
    return groups


def local(gradient: Tensor) -> Tensor:
    """This process's part of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def across_shards(norms: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Norms of whole gradients from those of the shards: squares are summed along the mesh's sharded dimensions."""
    squares = norms.square()
    for dimension, placement in enumerate(placements):
        assert not placement.is_partial(), "FSDP2 leaves reduced gradients"
        if not placement.is_replicate():
            torch.distributed.all_reduce(squares, group=mesh.get_group(dimension))
    return squares.sqrt()


@torch.no_grad()
def delta_norms(pairs: Sequence[Pair]) -> Tensor:
    """‖scale·B·A‖_F of each pair, (S,) float32, without forming B·A: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, matrices of r × r.

    Exactly 0 where A or B is; else to about 1e-7·‖A‖²‖B‖² in the square.
    """
    if not pairs:
        return torch.zeros(0)
    sides = whole([matrix.float() for pair in pairs for matrix in matrices(pair)])
    factors = list(zip(sides[::2], sides[1::2], strict=True))
    groups: dict[Any, list[int]] = {}
    for i, (a, b) in enumerate(factors):
        groups.setdefault((a.device, a.shape, b.shape), []).append(i)
    device = factors[0][0].device
    squares = [torch.zeros((), device=device)] * len(pairs)
    for (place, *_), numbers in groups.items():
        products = one_by_one if place.type == "cpu" else stacked
        for i, square in zip(numbers, products([factors[i] for i in numbers]), strict=True):
            squares[i] = square.to(device, non_blocking=True)
    scales = torch.tensor([abs(pair.scale) for pair in pairs]).to(device, non_blocking=True)
    return scales * torch.stack(squares).clamp(min=0).sqrt()


def one_by_one(factors: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """‖BA‖² of each (A, B)."""
    return [torch.sum((b.T @ b) * (a @ a.T)) for a, b in factors]


def stacked(factors: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """The same of pairs alike in shape; it spares a GPU hundreds of launches, where a CPU would only copy."""
    a, b = (torch.stack(side) for side in zip(*factors, strict=True))
    return torch.sum((b.mT @ b) * (a @ a.mT), dim=(1, 2)).unbind()


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, those in shards put together: one collective call for all that are sharded alike."""
    found = list(tensors)
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            groups.setdefault((tensor.device_mesh, tensor.placements), []).append(i)
    for (mesh, placements), numbers in groups.items():
        for i, tensor in zip(numbers, gathered([tensors[i] for i in numbers], mesh, placements), strict=True):
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
    parts = [
        part.view(shard.shape) for part, shard in zip(flat.split([s.numel() for s in shards]), shards, strict=True)
    ]
    for part, shard in zip(parts, shards, strict=True):
        rows = shard.to_local()
        first = mesh.get_local_rank(dimension) * -(-shard.shape[0] // mesh.size(dimension))
        part[first : first + len(rows)] = rows
    torch.distributed.all_reduce(flat, group=mesh.get_group(dimension))
    return parts
