"""A probe: whatever shows how the weights moved (checkpoint pair, saved deltas, adapter), opened and measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.core.measure import Delta, from_difference
from rankwise.core.site import Site, describe, nearest
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraAdapter, read_adapter
from rankwise.files.checkpoint import resolve
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites
from rankwise.ranks.deltas import DELTAS_FILE, DeltaSource, SavedDeltas, open_deltas
from rankwise.ranks.pair import SiteFilter, open_pair
from rankwise.ranks.spectra import Measured, MeasureSettings, Question, Unsettled, measure_adapter, measure_sites


@dataclass(frozen=True)
class AdapterDeltas:
    """An adapter as a source of dense deltas, for whoever needs them; its spectra come from the factors."""

    adapter: LoraAdapter
    sites: dict[str, Site]
    description: str

    def read(self, site: Site) -> Delta:
        return from_difference(self.adapter.pairs[site.path].factors().product())

    def prefetch(self, site: Site) -> None:
        """Nothing to prefetch: the factors are in memory."""


@dataclass(frozen=True)
class Probe:
    """An opened source with its spectra. `notes`: what was left out or assumed, printed and never silent."""

    name: str
    source: DeltaSource
    measured: dict[Site, Measured]
    model_name: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def spectra(self) -> dict[Site, Spectrum]:
        return {site: row.spectrum for site, row in self.measured.items()}


def open_source(
    *,
    base: str | None,
    tuned: str | None,
    deltas: str | None,
    adapter: str | None,
    filter_: SiteFilter,
    notes: list[str],
    model_name: str | None = None,
    scale: float | None = None,
) -> DeltaSource:
    """The deltas of exactly one of: a checkpoint pair, a finetune run, an adapter."""
    if deltas:
        saved = open_deltas(Path(deltas))
        return replace(saved, sites=filter_.apply(saved.sites))
    if adapter:
        return adapter_source(adapter, model_name, filter_, notes, scale)
    assert base is not None
    assert tuned is not None
    return open_pair(base, tuned, filter_, notes)


def adapter_source(
    path: str, model_name: str | None, filter_: SiteFilter, notes: list[str], scale: float | None = None
) -> AdapterDeltas:
    adapter = read_adapter(Path(path), scale)
    model = meta_model(model_name) if model_name else None
    known = model_sites(model) if model else {}
    if model:
        check_base(adapter, known, [name for name, _ in model.named_modules()], f"{path} and {model_name}")
    whole = adapter.config.get("modules_to_save")
    if whole:
        notes.append(
            f"{path} also carries modules trained in full ({whole[0]} …): they have no factors, and no spectrum"
        )
    sites = {
        name: known.get(name) or describe(name, pair.shape, transposed=pair.fan_in_fan_out)
        for name, pair in adapter.pairs.items()
    }
    if not model_name:
        notes.append("no --model_name: sites are the adapter's keys, their tower is unknown, `train` refuses the plan")
    return AdapterDeltas(adapter, filter_.apply(sites), str(path))


def check_base(adapter: LoraAdapter, known: Mapping[str, Site], modules: Collection[str], where: str) -> None:
    """DataError where the adapter was made for another model: a site that the model lacks, or of another shape."""
    absent = [path for path in adapter.pairs if path not in modules]
    if absent:
        near = ", ".join(nearest(absent[0], modules)) or "none that look alike"
        raise DataError(
            f"{where}: {len(absent)} of the adapter's {len(adapter.pairs)} sites are not in the model ({absent[0]} …; "
            f"nearest: {near})"
        )
    for path in adapter.pairs:
        if path in known and adapter.pairs[path].shape != known[path].shape:
            raise DataError(f"{where} differ: {path} is {adapter.pairs[path].shape} and {known[path].shape}")


def measure_source(
    source: DeltaSource, settings: MeasureSettings, question: Question, unsettled: Unsettled
) -> dict[Site, Measured]:
    if isinstance(source, AdapterDeltas):
        return measure_adapter(source.adapter, source.sites)
    return measure_sites(source, settings, question, unsettled)


def other_probe(path: str, base: str | None, filter_: SiteFilter, notes: list[str]) -> DeltaSource:
    """A further probe of the same sites: saved deltas, an adapter, or another tuned checkpoint of the same base."""
    folder = resolve(path)
    if (folder / DELTAS_FILE).is_file() or (folder / "deltas" / DELTAS_FILE).is_file():
        return open_source(base=None, tuned=None, deltas=str(folder), adapter=None, filter_=filter_, notes=notes)
    if (folder / "adapter_config.json").is_file():
        return adapter_source(str(folder), None, filter_, notes)
    if base is None:
        raise UsageError(f"--probe2 {path}: a tuned checkpoint is compared with its base: give it as BASE or --base")
    return open_pair(base, path, filter_, notes)


def source_metadata(source: DeltaSource) -> Mapping[str, Any]:
    return source.metadata if isinstance(source, SavedDeltas) else {}
