"""Deltas from the disk, one site at a time: of two checkpoints, of a saved probe, or of a foreign pair.

source = CheckpointPair(base, tuned, sites, places)
for site, delta in source.deltas(list_of_sites): ...
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rankwise.core.measure import Delta, from_difference, subtract
from rankwise.core.site import Site, describe
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import read_object
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint

DELTAS_FILE = "deltas.json"
WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONV1D = frozenset(["c_attn", "c_proj", "c_fc", "q_attn"])  # modules of GPT-2 and its kin
NOT_ANALYSED = re.compile(r"(running_mean|running_var|num_batches_tracked)$")


class DeltaSource(Protocol):
    """Sites, and the delta of each on demand."""

    @property
    def sites(self) -> dict[str, Site]: ...

    @property
    def description(self) -> str: ...

    def read(self, site: Site) -> Delta: ...

    def prefetch(self, site: Site) -> None: ...


def deltas(source: DeltaSource, sites: Sequence[Site]) -> Iterator[tuple[Site, Delta]]:
    """Site after site, the next one's bytes requested from the disk while this one is worked on."""
    for index, site in enumerate(sites):
        if index + 1 < len(sites):
            source.prefetch(sites[index + 1])
        yield site, source.read(site)


def logical(tensor: Tensor, site: Site) -> Tensor:
    """The stored tensor as (out, in): Conv1D transposed, a convolution flattened."""
    if site.transposed:
        return tensor.T
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 2 else tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the base and in the tuned checkpoint; None: it is not there."""

    base: Weight | None
    tuned: Weight | None


@dataclass(frozen=True)
class CheckpointPair:
    """Two checkpoints with the place of every tensor, by its name in the model, and the sites among them."""

    base: Checkpoint
    tuned: Checkpoint
    sites: dict[str, Site]
    places: Mapping[str, Place]
    description: str = ""

    @property
    def config(self) -> dict[str, Any] | None:
        """config.json of the base, else of the tuned checkpoint."""
        return self.base.config or self.tuned.config

    def weights(self, site: Site) -> tuple[Weight, Weight]:
        """The places of a site's weight, which lies in both."""
        place = self.places[weight_name(site.path, self.places)]
        assert place.base is not None
        assert place.tuned is not None
        return place.base, place.tuned

    def read(self, site: Site) -> Delta:
        base, tuned = self.weights(site)
        return subtract(logical(base.read(self.base), site), logical(tuned.read(self.tuned), site))

    def prefetch(self, site: Site) -> None:
        base, tuned = self.weights(site)
        self.base.prefetch(base.key)
        self.tuned.prefetch(tuned.key)


def weight_name(path: str, names: Container[str]) -> str:
    """A module's weight; some checkpoints name it without `.weight`."""
    return f"{path}.weight" if f"{path}.weight" in names else path


@dataclass(frozen=True)
class SavedDeltas:
    """The float32 deltas of a `rankwise finetune` run: `deltas/` with one tensor `<path>.weight` per matrix."""

    checkpoint: Checkpoint
    sites: dict[str, Site]
    metadata: Mapping[str, Any]
    description: str = ""

    def read(self, site: Site) -> Delta:
        matrix = logical(self.checkpoint.tensor(f"{site.path}.weight"), site)
        return from_difference(matrix, float(self.metadata.get("base_energy", {}).get(site.path, 0.0)))

    def prefetch(self, site: Site) -> None:
        self.checkpoint.prefetch(f"{site.path}.weight")


def open_deltas(path: Path) -> SavedDeltas:
    """Deltas from a finetune run folder, or from the `deltas/` folder in it."""
    folder = path / "deltas" if (path / "deltas").is_dir() else path
    if not (folder / DELTAS_FILE).is_file():
        raise DataError(
            f"{path}: no deltas/{DELTAS_FILE} here; `rankwise finetune` writes it (two checkpoints go in as BASE TUNED)"
        )
    metadata = read_object(folder / DELTAS_FILE)
    checkpoint = open_checkpoint(folder)
    try:
        rows = [describe(row["path"], row["shape"], row["tower"], row["transposed"]) for row in metadata["sites"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / DELTAS_FILE}: not what `rankwise finetune` writes: {error!r}") from error
    for row in rows:
        shape = checkpoint.shape(f"{row.path}.weight")
        if shape != (row.shape[::-1] if row.transposed else row.shape):
            raise DataError(f"{folder}: {row.path} is {shape} in the weights and {row.shape} in {DELTAS_FILE}")
    return SavedDeltas(checkpoint, {row.path: row for row in rows}, metadata, str(path))


def renamed(keys: Iterable[str], rules: Sequence[str]) -> dict[str, str]:
    """New name → key, after the REGEX=TEXT rules in order. Two keys that get one name are an error."""
    compiled = []
    for rule in rules:
        regex, equals, text = rule.partition("=")
        if not equals:
            raise UsageError(f"--rename takes REGEX=TEXT; got {rule!r}")
        try:
            compiled.append((re.compile(regex), text))
        except re.error as error:
            raise UsageError(f"--rename {rule!r}: {error}") from error
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for regex_, text in compiled:
            name = regex_.sub(text, name)
        if name in names:
            raise DataError(f"--rename gives {key} and {names[name]} the same name {name}")
        names[name] = key
    return names


@dataclass(frozen=True)
class Matching:
    """What two foreign checkpoints have in common, and what not: everything is counted, nothing silent."""

    shared: dict[str, tuple[str, str]]
    only_base: tuple[str, ...]
    only_tuned: tuple[str, ...]
    other_shape: tuple[str, ...]
    skipped: tuple[str, ...]

    def explain(self) -> str:
        """The lists, three names each, for the error and for the printed count."""
        parts = [
            (self.only_base, "only in the base"),
            (self.only_tuned, "only in the tuned checkpoint"),
            (self.other_shape, "of different shapes"),
        ]
        return "; ".join(f"{len(names)} {what} ({', '.join(names[:3])} …)" for names, what in parts if names)


def match_keys(base: Checkpoint, tuned: Checkpoint, rules: Sequence[str], flatten_conv: bool) -> Matching:
    """Matrices that both have. 1-D, integer and running-statistics tensors are skipped, and so are convolutions
    unless they are to be flattened."""
    before, after = renamed(base.keys(), rules), renamed(tuned.keys(), rules)

    def analysed(checkpoint: Checkpoint, key: str) -> bool:
        dims = len(checkpoint.shape(key))
        fits = dims == 2 or (dims > 2 and flatten_conv)
        return fits and checkpoint.dtype(key) in WEIGHT_TYPES and not NOT_ANALYSED.search(key)

    left = {name for name, key in before.items() if analysed(base, key)}
    right = {name for name, key in after.items() if analysed(tuned, key)}
    both = [name for name in before if name in left & right]
    same = [name for name in both if base.shape(before[name]) == tuned.shape(after[name])]
    return Matching(
        shared={name: (before[name], after[name]) for name in same},
        only_base=tuple(sorted(left - right)),
        only_tuned=tuple(sorted(right - left)),
        other_shape=tuple(name for name in both if name not in set(same)),
        skipped=tuple(name for name in before if name not in left),
    )


def foreign_sites(base: Checkpoint, matching: Matching) -> dict[str, Site]:
    """Sites of a pair that has no config.json: the key is the path, the tower is unknown, and names alone tell what is
    no linear layer (embeddings), what no site (heads), and what is stored transposed (Conv1D)."""
    sites = {}
    for name, (key, _) in matching.shared.items():
        shape = base.shape(key)
        rest = 1
        for size in shape[1:]:
            rest *= size
        path = name.removesuffix(".weight")
        site = describe(path, (shape[0], rest))
        if site.kind not in ("embed", "head"):
            sites[path] = site
    conv1d = {site.projection for site in sites.values() if has_conv1d_shape(site)}
    return {
        path: replace(site, shape=site.shape[::-1], transposed=True) if conv1d and site.projection in CONV1D else site
        for path, site in sites.items()
    }


def has_conv1d_shape(site: Site) -> bool:
    """A fused q, k, v or an MLP's first layer that is wider than it is tall: GPT-2's Conv1D, not nanoGPT's Linear."""
    return site.projection in ("c_attn", "c_fc") and site.shape[0] < site.shape[1]


def check_finite(site: Site, delta: Delta) -> None:
    """NaN and Inf name their tensor."""
    if not torch.isfinite(torch.tensor(delta.energy)):
        raise DataError(f"{site.path}.weight: the delta has NaN or infinite entries; the run it comes from diverged")
