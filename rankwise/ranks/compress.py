"""rankwise compress: adapter → smaller adapter. Exact: QR of both factors and an r×r SVD, never the dense matrix.

rankwise compress saved_models/high_rank --energy 0.95 -o smaller/
rankwise compress saved_models/high_rank --intruders 0.5 -o milder/     # same ranks, intruder dimensions halved

Experts of one parameter get one rank, each the best factors of its own: rank r keeps Σ_e Σ_{i≤r} σ²_{e,i}.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.allocate import Rule, by_budget, parse_budget, spectral_gains
from rankwise.core.factors import Factors, balanced
from rankwise.core.site import Site
from rankwise.core.site import describe as describe_site
from rankwise.core.spectrum import Spectrum, all_values, together
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import (
    LoraAdapter,
    LoraPair,
    adapter_files,
    carry,
    known_places,
    read_adapter,
    write_adapter,
)
from rankwise.files.adapter_config import lora_config
from rankwise.files.atomic import about_to_write, read_object
from rankwise.files.lineage import trained_rows
from rankwise.files.plan import read_plan
from rankwise.files.run_folder import RunFolder
from rankwise.merge.beside import own_files
from rankwise.merge.plan import build_skeleton
from rankwise.models.adapters import publish
from rankwise.models.depth.encoder import read_depth, write_depth
from rankwise.models.load import another_base, described_folder, meta_model
from rankwise.models.per_expert import in_todays_layout, refuse_single_experts
from rankwise.models.sites import fused_experts, model_sites
from rankwise.options.commands import CompressConfig
from rankwise.page.text import command_line, percent
from rankwise.ranks.fidelity import EXACT, Fidelity, SiteFidelity, require_all_kept
from rankwise.ranks.intruders import DOCUMENT as INTRUDERS
from rankwise.ranks.intruders import BaseMatrices, IntruderTable, examine, time_note

SCALE = 2.0  # alpha = 2r at every site, so that one rank and one alpha describe a uniform adapter


@dataclass(frozen=True)
class Ordered:
    """A site's product as factors in the order of its singular values: the first k columns are its best rank k. Of
    experts the factors and the spectrum of each, and the one of all (`core.spectrum.together`)."""

    factors: tuple[Factors, ...]
    spectra: tuple[Spectrum, ...]
    spectrum: Spectrum

    @classmethod
    def of(cls, pair: LoraPair) -> Ordered:
        found = [one.factors().svd() for one in pair.matrices()]
        spectra = tuple(all_values(values, pair.shape, "factors") for _, values, _ in found)
        return cls(tuple(balanced(*each) for each in found), spectra, together(spectra))

    def first(self, rank: int) -> list[Factors]:
        """Of every matrix."""
        return [Factors(each.left[:, :rank], each.right[:rank]) for each in self.factors]

    def kept(self, rank: int) -> tuple[float, ...]:
        """Share of every expert's energy; empty for one matrix, 1 for an expert that does not change."""
        return tuple(each.energy(rank).low for each in self.spectra) if len(self.spectra) > 1 else ()


def run(config: CompressConfig) -> Fidelity:
    check(config)
    adapter, model = read_with_base(config)
    folder, source = RunFolder(config.output_dir), adapter_files(Path(str(config.adapter)))[0].parent
    base = base_matrices(config, adapter) if config.intruders is not None else None
    inputs = {"adapter": str(config.adapter), "plan": config.plan} | ({"base": base.name} if base else {})
    with folder.lock(), folder.recording("compress", inputs) as record:
        if base:
            about_to_write()
            intruders, pairs = examine(base, adapter.pairs, config.intruders)
            adapter = replace(adapter, pairs=pairs)
        smaller, fidelity = compress_adapter(adapter, config)
        about_to_write()
        with tempfile.TemporaryDirectory(dir=folder.path, prefix=".adapter-") as temporary:
            written = write_adapter(temporary, smaller)
            require_all_kept(adapter, read_adapter(written), fidelity)
            if model is not None and fused_experts(model):
                build_skeleton(model, written, f"{config.adapter} compressed, loaded by PEFT")
            record.outputs |= {file.name: folder / file.name for file in publish(written, folder.path)}
        record.outputs |= carry(source, folder.path)
        record.outputs |= {file.name: Path(shutil.copyfile(file, folder / file.name)) for file in own_files(source)}
        if depth := read_depth(source):
            record.outputs["depth"] = write_depth(folder.path, depth)
        record.outputs["fidelity"] = fidelity.write(folder.path)
        (folder / INTRUDERS.name).unlink(missing_ok=True)  # an earlier run's
        if base:
            record.outputs["intruders"] = intruders.write(folder.path)
        record.facts |= fidelity.beside((), list(smaller.extra)).facts()
        folder.save_config(config)
    report(config, fidelity, smaller, intruders if base else None)
    return fidelity


def check(config: CompressConfig) -> None:
    """Refuse invalid combinations of options before anything is read."""
    if not config.adapter:
        raise UsageError("compress needs an adapter: rankwise compress ADAPTER --energy 0.95 -o smaller/")
    given_sizes = [config.energy is not None, bool(config.budget), bool(config.plan)]
    if sum(given_sizes) > 1:
        raise UsageError("--energy, --budget and --plan are alternatives: give one of them")
    if not any(given_sizes) and not config.uniform and config.intruders is None:
        raise UsageError(
            "compress needs a size: --energy 0.95, --budget N|uniform:R|P% or --plan FILE (or --uniform alone: same "
            "product; or --intruders alone: same ranks)"
        )
    if config.metric == "sigma" and (not config.budget or config.uniform or config.normalise != "none"):
        raise UsageError("--metric sigma divides a --budget by one threshold, without --uniform and --normalise")
    given = Path(config.adapter)  # in a recipe an earlier stage may still have to make it
    if given.exists() and Path(config.output_dir).resolve() == adapter_files(given)[0].parent.resolve():
        raise UsageError(f"--output_dir {config.output_dir} is where the adapter is: choose another folder")


def read_with_base(config: CompressConfig) -> tuple[LoraAdapter, PreTrainedModel | None]:
    """The adapter, in the form that its base asks for, and the base's structure. Where the base is not on this machine:
    None, and the adapter in the form of its own config."""
    path, config_file = str(config.adapter), adapter_files(Path(str(config.adapter)))[1]
    content = read_object(config_file) if config_file else {}
    folder = described_folder(config.base_model or content.get("base_model_name_or_path"))
    if folder is None:
        if config.base_model:
            raise DataError(f"--base_model {config.base_model}: no folder with a config.json")
        adapter = read_adapter(path, config.scale)
        refuse_single_experts(adapter.pairs, path)
        return adapter, None
    model = meta_model(str(folder))
    path = str(in_todays_layout(model, path))
    sites = model_sites(model, routers=True)
    adapter = read_adapter(path, config.scale, known_places(sites, path) if config_file else None)
    return replace(adapter, pairs={path: in_form(pair, path, sites) for path, pair in adapter.pairs.items()}), model


def in_form(pair: LoraPair, path: str, sites: Mapping[str, Site]) -> LoraPair:
    """The pair as PEFT's config has to name it in this model. DataError where the model has other experts there."""
    site = sites.get(path)
    if site:
        told, has = ((one.experts, *one.shape) for one in (pair, site))
        if told != has and (pair.experts or site.experts):
            raise DataError(f"{path}: (experts, out, in) is {told} in the adapter and {has} in the base; another base?")
        return replace(pair, peft=site.peft)
    if all(site.peft == "pattern" for site in sites.values()):
        return replace(pair, peft="pattern")
    return pair if pair.peft == "parameter" else replace(pair, peft="path")


def compress_adapter(adapter: LoraAdapter, config: CompressConfig) -> tuple[LoraAdapter, Fidelity]:
    """The smaller adapter, in float32 whatever the original's dtype: rounding it again would not be exact."""
    sites = {
        path: describe_site(
            path,
            pair.shape,
            transposed=pair.fan_in_fan_out,
            experts=pair.experts,
            peft=pair.peft,
            swapped=pair.swapped,
            order=pair.order,
        )
        for path, pair in adapter.pairs.items()
    }
    ordered = {site: Ordered.of(adapter.pairs[path]) for path, site in sites.items()}
    if all(one.spectrum.is_zero for one in ordered.values()):
        raise DataError(
            f"{config.adapter}: every B·A is zero, so the adapter has no effect; was it saved before training?"
        )
    ranks = choose_ranks(config, {site: one.spectrum for site, one in ordered.items()})
    width = max(ranks.values()) if config.uniform else None
    pairs = {
        site.path: shrink(adapter.pairs[site.path], site, ordered[site], rank, width)
        for site, rank in ranks.items()
        if rank or width
    }
    table = tuple(fidelity_of(adapter, site, ordered[site], rank, width) for site, rank in ranks.items())
    return replace(adapter, config=settings(adapter), pairs=pairs), Fidelity(table)


def choose_ranks(config: CompressConfig, spectra: Mapping[Site, Spectrum]) -> dict[Site, int]:
    """Ranks by energy, by budget, or (--uniform alone) as they are. A site whose product is zero gets rank 0."""
    if config.energy is not None:
        return {site: spectrum.rank_for(config.energy, least=0) for site, spectrum in spectra.items()}
    if config.plan:
        return planned_ranks(config.plan, spectra)
    if not config.budget:
        return {site: 0 if spectrum.is_zero else len(spectrum) for site, spectrum in spectra.items()}
    budget = parse_budget(config.budget, spectra)
    if config.uniform:  # one rank for all spends the budget without padding
        rank = budget // sum(site.parameters(1) for site in spectra)
        ranks = {site: 0 if spectrum.is_zero else min(rank, len(spectrum)) for site, spectrum in spectra.items()}
    else:
        rule = Rule(min_rank=0, max_rank=max(len(spectrum) for spectrum in spectra.values()))
        sigma = config.metric == "sigma"
        ranks = by_budget(sigma_gains(spectra) if sigma else spectral_gains(spectra, config.normalise), budget, rule)
    if not any(ranks.values()):
        raise UsageError(f"--budget {config.budget} ({budget:,} parameters) is below rank 1 of any site")
    return ranks


def sigma_gains(spectra: Mapping[Site, Spectrum]) -> dict[Site, Tensor]:
    """Gains whose order per parameter is that of σ alone, of experts their root mean square: the budget then keeps what
    is above one threshold for all sites, to the last step that fits."""
    return {site: spectrum.values / site.matrices**0.5 * site.parameters(1) for site, spectrum in spectra.items()}


def base_matrices(config: CompressConfig, adapter: LoraAdapter) -> BaseMatrices:
    """The weights that --intruders compares with; says how long that takes. DataError where the base is not here."""
    named = config.base_model or adapter.base_model
    folder = described_folder(named)
    if folder is None:
        raise DataError(
            f"--intruders compares with the base's weights, and the base ({named or 'the adapter names none'}) is not "
            "on this machine: give its folder with --base_model"
        )
    base = BaseMatrices.open(str(folder))
    base.require_comparable(adapter.pairs)
    print(time_note(base, adapter.pairs))
    return base


def planned_ranks(file: str, spectra: Mapping[Site, Spectrum]) -> dict[Site, int]:
    """Ranks of a plan, at most the adapter's own; sites that the plan leaves out get none."""
    plan = read_plan(Path(file), {site.path: site for site in spectra})
    plan.require_ranks(file)
    return {
        site: 0 if spectrum.is_zero else min(plan.ranks.get(site.path, 0), len(spectrum))
        for site, spectrum in spectra.items()
    }


def shrink(pair: LoraPair, site: Site, ordered: Ordered, rank: int, width: int | None) -> LoraPair:
    """The pair of this rank, zero-padded to `width` where one rank is wanted everywhere (the same product)."""
    found = [LoraPair.of(factors.padded(width or rank), SCALE) for factors in ordered.first(rank)]
    if site.experts:
        return LoraPair.of_experts(found, site)
    return replace(pair, lora_A=found[0].lora_A, lora_B=found[0].lora_B, scale=SCALE)


def fidelity_of(adapter: LoraAdapter, site: Site, ordered: Ordered, rank: int, width: int | None) -> SiteFidelity:
    spectrum = ordered.spectrum
    kept = spectrum.energy(rank).low
    note = "" if rank else "its product is zero" if spectrum.is_zero else "the budget or plan gives it no rank"
    if note:
        note += ": all zeros" if width else ": left out"
    return SiteFidelity(
        site,
        width or rank,
        spectrum.energy_total,
        kept,
        rank_before=adapter.pairs[site.path].rank,
        note=note,
        experts=ordered.kept(rank),
    )


def settings(adapter: LoraAdapter) -> dict[str, Any]:
    """The adapter's own config; one without (loralib) gets PEFT's, its other tensors as modules to save."""
    if adapter.config:
        return dict(adapter.config) | {"use_rslora": False}
    modules = sorted({name.rpartition(".")[0] for name in adapter.extra})
    return lora_config(None, task_type=None, modules_to_save=modules or None)


def report(
    config: CompressConfig, fidelity: Fidelity, smaller: LoraAdapter, intruders: IntruderTable | None = None
) -> None:
    recorded, plan = smaller.base_model, read_plan(Path(config.plan)) if config.plan else None
    notes = another_base("the adapter", recorded, config.base_model)
    notes += another_base(str(config.plan), plan.model_name, config.base_model or recorded) if plan else []
    for note in [*notes, *fidelity.notes(), *(intruders.notes() if intruders else [])]:
        print(f"note: {note}")
    if intruders:
        lost = 1 - intruders.energy_kept
        held = f"; the ranks hold all but {percent(lost)} of the scaled change (worst site)" if lost > EXACT else ""
        print(f"intruders × {intruders.scale:g}: {intruders.sentence()}{held}")
    if smaller.extra:
        print(f"note: {len(smaller.extra)} further tensors kept as they are ({', '.join(list(smaller.extra)[:3])} …)")
    form = " · one rank, no patterns" if config.uniform else ""
    print(f"compressed {config.adapter}: {fidelity.summary()}{form}")
    print(f"adapter (float32) and fidelity.json in {config.output_dir}")
    print(f"next: {next_command(config, smaller)}")


def next_command(config: CompressConfig, smaller: LoraAdapter) -> str:
    """`rankwise evaluate`, where the training run records its data; else `rankwise merge`."""
    rows = trained_rows(Path(config.output_dir))
    if rows and smaller.base_model:
        return command_line("evaluate", config.output_dir, **rows)
    return command_line("merge", config.output_dir, base_model=None if smaller.base_model else "BASE")


def describe(config: CompressConfig) -> list[str]:
    how = f"{config.energy} of its energy at every site" if config.energy is not None else f"the budget {config.budget}"
    if config.plan:
        how = f"the ranks of {config.plan}"
    elif config.energy is None and not config.budget:
        how = "the same product, zero-padded to one rank" if config.uniform else "its own ranks"
    scaled = f"scale the intruder dimensions of base + adapter by {config.intruders}"
    return [
        *([scaled] if config.intruders is not None else []),
        f"compress the adapter to {how}, exactly, from its factors",
    ]
