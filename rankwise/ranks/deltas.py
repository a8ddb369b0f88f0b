"""Deltas from the disk, one site at a time: of two checkpoints, of a saved probe, or of a foreign pair.

source = CheckpointPair(base, tuned, sites, places)
for site, delta in source.deltas(list_of_sites): ...
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.core.measure import Delta, energy_of, from_difference, subtract
from rankwise.core.site import Site, from_row
from rankwise.errors import DataError
from rankwise.files.atomic import atomic_folder, write_json
from rankwise.files.checkpoint import SAVED_DELTAS, Checkpoint, Weight, open_checkpoint, weights_of
from rankwise.files.document import Document
from rankwise.models.expert_files import ExpertFiles
from rankwise.models.sites import WeightTable
from rankwise.page.progress import progress

DELTAS = Document(SAVED_DELTAS, "rankwise-deltas/1", "saved deltas", "rankwise finetune")
WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class DeltaSource(Protocol):
    """Sites, and the delta of each on demand; of a layer's experts one at a time."""

    @property
    def sites(self) -> dict[str, Site]: ...

    @property
    def description(self) -> str: ...

    def read(self, site: Site) -> Delta: ...

    def expert(self, site: Site, expert: int) -> Delta: ...

    def prefetch(self, site: Site, expert: int = 0) -> None: ...


def deltas(source: DeltaSource, sites: Sequence[Site]) -> Iterator[tuple[Site, Delta]]:
    """Site after site, the next one's bytes requested from the disk while this one is worked on."""
    for index, site in enumerate(sites):
        if index + 1 < len(sites):
            source.prefetch(sites[index + 1])
        yield site, source.read(site)


def read_expert(source: DeltaSource, site: Site, expert: int, device: str = "cpu") -> Delta:
    """The delta of one expert on the device, the next one's bytes requested from the disk. DataError, naming parameter
    and expert, for entries that are not finite."""
    if expert + 1 < site.experts:
        source.prefetch(site, expert + 1)
    delta = source.expert(site, expert)
    check_finite(site, delta, f"{site.weight}, expert {expert}")
    return on_device(delta, device)


def dense(source: DeltaSource, site: Site) -> Delta:
    """The whole delta, of a layer's experts (E, m, n): for whoever moves the model by it. stored_as: None where the
    experts that moved were stored in several formats."""
    if not site.experts:
        return source.read(site)
    whole, parts = torch.empty(site.experts, *site.shape), list[Delta]()
    for expert in range(site.experts):
        part = read_expert(source, site, expert)
        whole[expert] = part.matrix
        parts.append(replace(part, matrix=whole[expert]))
    formats = {one.stored_as for one in parts if one.energy}
    return Delta(
        matrix=whole,
        energy=sum(one.energy for one in parts),
        base_energy=sum(one.base_energy for one in parts),
        unchanged=sum(one.unchanged for one in parts) / site.experts,
        rounding_energy=sum(one.rounding_energy for one in parts),
        stored_as=formats.pop() if len(formats) == 1 else None,
        base_rounding=sum(one.base_rounding for one in parts),
    )


def logical(tensor: Tensor, site: Site) -> Tensor:
    """The stored tensor as (out, in): Conv1D transposed, a convolution flattened."""
    if site.transposed:
        return tensor.T
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 2 else tensor


@dataclass(frozen=True)
class WeightPair:
    """Where a tensor lies in the base and in the tuned checkpoint, and a layer's experts; None: it is not there."""

    base: Weight | ExpertFiles | None
    tuned: Weight | ExpertFiles | None


def shape_of(place: Weight | ExpertFiles, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Of a layer's experts the parameter's, of a block of a tensor the block's."""
    if isinstance(place, ExpertFiles):
        return place.shape
    shape = checkpoint.shape(place.key)
    index, count = place.part
    return shape if count == 1 else (place.sizes[index] if place.sizes else shape[0] // count, *shape[1:])


def matrices_of(place: Weight | ExpertFiles, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """The tensor, or a layer's experts one at a time."""
    if isinstance(place, ExpertFiles):
        return (place.expert(checkpoint, expert) for expert in range(place.experts))
    return iter([place.read(checkpoint)])


@dataclass(frozen=True)
class CheckpointPair:
    """Two checkpoints with the place of every tensor, by its name in the model, and the sites among them."""

    base: Checkpoint
    tuned: Checkpoint
    sites: dict[str, Site]
    places: Mapping[str, WeightPair]
    description: str = ""

    @property
    def config(self) -> dict[str, Any] | None:
        """config.json of the base, else of the tuned checkpoint."""
        return self.base.config or self.tuned.config

    def weights(self, site: Site) -> tuple[Weight, Weight]:
        """The places of a site's weight, which lies in both."""
        place = self.places[weight_name(site.path, self.places)]
        assert isinstance(place.base, Weight)
        assert isinstance(place.tuned, Weight)
        return place.base, place.tuned

    def experts(self, site: Site) -> tuple[ExpertFiles, ExpertFiles]:
        """The files of a site's experts, which lie in both."""
        place = self.places[site.weight]
        assert isinstance(place.base, ExpertFiles)
        assert isinstance(place.tuned, ExpertFiles)
        return place.base, place.tuned

    def read(self, site: Site) -> Delta:
        base, tuned = self.weights(site)
        return subtract(logical(base.read(self.base), site), logical(tuned.read(self.tuned), site))

    def expert(self, site: Site, expert: int) -> Delta:
        base, tuned = self.experts(site)
        delta = subtract(base.expert(self.base, expert), tuned.expert(self.tuned, expert))
        return replace(delta, matrix=logical(delta.matrix, site))

    def prefetch(self, site: Site, expert: int = 0) -> None:
        if site.experts:
            for files, checkpoint in zip(self.experts(site), (self.base, self.tuned), strict=True):
                files.prefetch(checkpoint, expert)
        else:
            for weight, checkpoint in zip(self.weights(site), (self.base, self.tuned), strict=True):
                checkpoint.prefetch(weight.key)


def weight_name(path: str, names: Container[str]) -> str:
    """A module's weight; some checkpoints name it without `.weight`."""
    return f"{path}.weight" if f"{path}.weight" in names else path


@dataclass(frozen=True)
class SavedDeltas:
    """The float32 deltas of a `rankwise finetune` run: `deltas/` with one tensor per parameter, by its name."""

    checkpoint: Checkpoint
    sites: dict[str, Site]
    metadata: Mapping[str, Any]
    description: str = ""

    def read(self, site: Site) -> Delta:
        assert not site.experts, "experts are read one at a time"
        matrix = logical(self.checkpoint.tensor(site.weight), site)
        return from_difference(matrix, float(self.metadata.get("base_energy", {}).get(site.path, 0.0)))

    def expert(self, site: Site, expert: int) -> Delta:
        energies = self.metadata.get("base_energy", {}).get(site.path) or [0.0] * site.experts
        return from_difference(logical(self.checkpoint.tensor(site.weight)[expert], site), float(energies[expert]))

    def prefetch(self, site: Site, expert: int = 0) -> None:
        if not site.experts:
            self.checkpoint.prefetch(site.weight)


def open_deltas(path: Path) -> SavedDeltas:
    """Deltas from a finetune run folder, or from the `deltas/` folder in it."""
    folder = path / "deltas" if (path / "deltas").is_dir() else path
    if not (folder / DELTAS.name).is_file():
        raise DataError(
            f"{path}: no deltas/{DELTAS.name} here; `rankwise finetune` writes it (two checkpoints go in as BASE TUNED)"
        )
    metadata = DELTAS.read(folder)
    checkpoint = open_checkpoint(weights_of(folder))
    try:
        rows = [from_row(row) for row in metadata["sites"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / DELTAS.name}: not what `rankwise finetune` writes: {error!r}") from error
    for row in rows:
        shape, stored = checkpoint.shape(row.weight), row.shape[::-1] if row.transposed else row.shape
        if shape != ((row.experts, *stored) if row.experts else stored):
            told = f"{row.experts} × {row.shape}" if row.experts else f"{row.shape}"
            raise DataError(f"{folder}: {row.path} is {shape} in the weights and {told} in {DELTAS.name}")
    return SavedDeltas(checkpoint, {row.path: row for row in rows}, metadata, str(path))


def on_device(delta: Delta, device: str) -> Delta:
    return delta if device == "cpu" else replace(delta, matrix=delta.matrix.to(device))


def check_finite(site: Site, delta: Delta, name: str = "") -> None:
    """NaN and Inf name their tensor."""
    if not torch.isfinite(torch.tensor(delta.energy)):
        raise DataError(f"{name or site.weight}: the delta has NaN or infinite entries; the run it comes from diverged")


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
        there = {*table.weights, *table.experts}
        copies = {name: value.detach().cpu().clone() for name, value in parameters.items() if name not in there}
        return cls(checkpoint, table, copies)

    def read(self, name: str) -> Tensor:
        if name in self.copies:
            return self.copies[name].float()
        place = self.table.weights.get(name) or self.table.experts[name]
        return place.read(self.checkpoint).float()

    def experts(self, name: str) -> Iterator[Tensor]:
        """The matrices of a parameter with experts, one at a time."""
        files = self.table.experts[name]
        return (files.expert(self.checkpoint, expert).float() for expert in range(files.experts))


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

    One shard is in memory at a time. `deltas.json` holds the sites, the energy of each one's base weight (of experts a
    list), and `facts`.
    """
    groups = list(shards(tuned, limit))
    named = {site.weight: site for site in sites.values()}
    energies: dict[str, Any] = {}
    places: dict[str, str] = {}
    with atomic_folder(folder) as temporary:
        for index, names in enumerate(progress(groups, desc="deltas", unit="shard"), 1):
            file = f"deltas-{index:05d}-of-{len(groups):05d}.safetensors"
            differences = {}
            for name in names:
                after, site = tuned[name].detach().to("cpu", torch.float32, copy=True).contiguous(), named.get(name)
                if site and site.experts:
                    energies[site.path] = []
                    for matrix, before in zip(after, base.experts(name), strict=True):
                        matrix.sub_(before)
                        energies[site.path].append(energy_of(before))
                else:
                    before = base.read(name)
                    after.sub_(before)
                    if site:
                        energies[site.path] = energy_of(before)
                differences[name] = after
            save_file(differences, temporary / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        size = 4 * sum(tensor.numel() for tensor in tuned.values())
        index_content = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(temporary / "deltas.safetensors.index.json", index_content)
        rows = [sites[path].as_dict() for path in energies]
        DELTAS.write(temporary, {**facts, "sites": rows, "base_energy": energies})
    return folder
