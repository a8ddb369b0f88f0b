"""rankwise features compare: trained networks against the SVD three ways and a shared PCA, on test and other images.

rankwise features compare --results_dir results --ood feature_cache_other
training matrices ── shared_basis ──▶ PCA ─┐
networks ──────────────────────────────────┴─ measure, timings, sweep on every source ──▶ comparison.json, .md, plots/
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import DataError, UsageError, need
from rankwise.evaluate import bootstrap
from rankwise.evaluate.generate import pick_device
from rankwise.features.approximation import normalised, shared_basis
from rankwise.features.cache import FeatureCache, open_cache
from rankwise.features.dataset import FeatureSplit, cached, read_split
from rankwise.features.measures import (
    GRAM,
    PCA,
    ROUNDING,
    SVD,
    Batches,
    Closeness,
    Method,
    array,
    baselines,
    break_even_rank,
    counted,
    estimated,
    excess_error,
    measure,
    network,
    optimum,
    paired,
    stored_numbers,
    summary,
    sweep,
    timings,
)
from rankwise.features.nets.base import Factorizer
from rankwise.features.page import COMPARISON, OF_ONE, Comparison, comparison_blocks, label
from rankwise.features.trained import SETTINGS, Network, networks
from rankwise.files.atomic import about_to_write, write_json, write_text
from rankwise.files.run_folder import RunFolder
from rankwise.options.features import FactorCompareConfig, canonical
from rankwise.page.blocks import Page, Section, drawn, into, lines, pictures
from rankwise.page.template import markdown

DRAWN = ("relative_error", "excess_error", "cosine")
CONFIG, STAGE = "resolved_config.compare.json", "features compare"
PAGE, PLOT_FOLDER = "comparison.md", "plots"


def run(config: FactorCompareConfig) -> Mapping[str, Any]:
    """Measure, write and print; returns the content of comparison.json."""
    check(config)
    found = networks(config.results_dir, config.arch)
    if not found:
        raise UsageError(
            f"{config.results_dir}: no trained network (<arch>/{SETTINGS}) there; train one with `rankwise features "
            "train`, or give its folder as --results_dir"
        )
    cache, split = trained_on(found, config)
    sources = [CacheSubset("test images", cache, split.test)]
    if config.ood:
        sources.append(other_source(config.ood, cache))
    for note in dict.fromkeys(note for source in sources for note in source.cache.notes()):
        print(note)
    comparison = Compared(
        config=config,
        networks={each.folder.name: each.net for each in found},
        rank=common_rank(config.rank, found),
        training=CacheSubset("training images", cache, split.train),
        sources=sources,
    )
    folder = RunFolder(config.results_dir)
    with folder.lock(), folder.recording(STAGE, inputs(config, found, cache)) as record:
        about_to_write()
        content = compared(comparison)
        folder.save_config(config, CONFIG)
        record.outputs |= write_comparison(folder.path, content, plots=not config.no_plots)
    print("\n".join(lines(comparison_blocks(content))))
    print(f"\n{', '.join(sorted({Path(path).name for path in record.outputs.values()}))} in {folder.path}")
    return content


def describe(config: FactorCompareConfig) -> list[str]:
    names = ", ".join(map(canonical, config.arch)) or f"every network in {config.results_dir}"
    where = f"the test images of {config.features or 'the cache they were trained on'}"
    lines = [f"compare {names} with the SVD three ways and a shared PCA on {where}"]
    lines += [f"and on all images of {config.ood} that are not in that cache"] if config.ood else []
    return [*lines, f"write {COMPARISON.name}, and {OF_ONE} of each network, in {config.results_dir}"]


def check(config: FactorCompareConfig) -> None:
    """Check the required inputs before anything is measured."""
    bootstrap.check_installed()
    if not config.no_plots:
        need("matplotlib", extra="plots")


def trained_on(found: Sequence[Network], config: FactorCompareConfig) -> tuple[FeatureCache, FeatureSplit]:
    """The cache that all networks were trained on, and its split. DataError where there is not one of each."""
    first = found[0]
    cache = first.cache_or(config.features)
    splits = [read_split(each.folder, cache) for each in found]
    for each, split in zip(found, splits, strict=True):
        if split != splits[0]:
            raise DataError(
                f"{first.folder} and {each.folder} split {cache.path} differently: test images of one may be training "
                "images of the other; compare them separately (--arch), or train both with one --seed"
            )
    return cache, splits[0]


def common_rank(asked: int | None, found: Sequence[Network]) -> int:
    """The rank of the comparison. UsageError where networks have none in common, or fewer channels than asked."""
    ranks = {each.folder.name: each.rank for each in found}
    told = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
    least = min(ranks.values())
    if asked is None and len(set(ranks.values())) > 1:
        raise UsageError(
            f"the networks have different ranks ({told}): give --rank {least} (larger networks then give their leading "
            "channels), or compare them apart with --arch"
        )
    if asked is not None and asked > least:
        raise UsageError(f"--rank {asked}: a network has no more channels than it was trained with ({told})")
    return asked or least


def other_source(path: str, cache: FeatureCache) -> CacheSubset:
    """All matrices of another cache. DataError where they are of another shape or model, or the same pictures."""
    other = open_cache(path)
    for what in ("tokens", "channels"):
        if getattr(other, what) != getattr(cache, what):
            raise DataError(
                f"--ood {path}: matrices of {other.tokens} tokens × {other.channels} channels; the networks take "
                f"{cache.tokens} × {cache.channels}. Capture them with the same model and --image_size"
            )
    if (other.model and other.model.fingerprint) != (cache.model and cache.model.fingerprint):
        names = [one.model.name if one.model else one.source for one in (other, cache)]
        raise DataError(f"--ood {path}: features of {names[0]}; the networks were trained on those of {names[1]}")
    seen = set(cache.groups)
    places = tuple(place for place, group in enumerate(other.groups) if group not in seen)
    if not places:
        raise DataError(f"--ood {path}: every picture in it is in {cache.path} too; give other pictures")
    return CacheSubset("other images", other, places)


def inputs(config: FactorCompareConfig, found: Sequence[Network], cache: FeatureCache) -> dict[str, Path | str | None]:
    weights = {each.folder.name: each.folder / SETTINGS for each in found}
    return {**weights, "features": cache.path, "ood": config.ood}


@dataclass(frozen=True)
class CacheSubset:
    """Some matrices of a cache, under the name they are shown by."""

    name: str
    cache: FeatureCache
    places: tuple[int, ...]

    def groups(self) -> list[str]:
        return [self.cache.groups[place] for place in self.places]


@dataclass(frozen=True)
class Compared:
    """What is compared, on what, and how. sources: the test images first."""

    config: FactorCompareConfig
    networks: Mapping[str, Factorizer]
    rank: int
    training: CacheSubset
    sources: Sequence[CacheSubset]

    @cached_property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.training.cache.tokens, self.training.cache.channels

    def swept_ranks(self) -> list[int]:
        """Those asked for that such a matrix has, and the comparison's own."""
        return sorted({rank for rank in self.config.sweep if rank <= min(self.shape)} | {self.rank})

    def batches(self, source: CacheSubset) -> Batches:
        """Normalised (B, T, D) on the device."""
        return partial(cached, source.cache, source.places, self.device)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.config.seed)


def compared(asked: Compared) -> dict[str, Any]:
    """The content of comparison.json."""
    for net in asked.networks.values():
        net.to(asked.device).eval()
    ranks = asked.swept_ranks()
    basis = shared_basis(asked.batches(asked.training)(), max(ranks)).to(asked.device)
    methods = baselines(asked.rank, basis, asked.generator())
    methods += [network(net, name, asked.rank) for name, net in asked.networks.items()]
    first, best = asked.sources[0], {source.name: optimum(asked.batches(source)) for source in asked.sources}
    (tokens, channels), cache = asked.shape, asked.training.cache
    factors, whole = stored_numbers(tokens, channels, asked.rank)
    errors = sweep(ranks, asked.batches(first), best[first.name], basis, asked.networks, asked.generator())
    return {
        "rank": asked.rank,
        "tokens": tokens,
        "channels": channels,
        "networks": list(asked.networks),
        "network_ranks": {name: net.settings.rank for name, net in asked.networks.items()},
        "features": str(cache.path),
        "model": cache.model.name if cache.model else None,
        "training_matrices": len(asked.training.places),
        "sources": [source_record(source, methods, best[source.name], asked) for source in asked.sources],
        **cost_record(methods, asked),
        "sweep": {"ranks": ranks, "relative_error": errors},
        "storage": {"factors": factors, "matrix": whole, "break_even_rank": break_even_rank(tokens, channels)},
    }


def source_record(source: CacheSubset, methods: Sequence[Method], best: Tensor, asked: Compared) -> dict[str, Any]:
    """Means with intervals of every method on one source, paired differences, and the single matrices."""
    groups = source.groups()
    found = measure(methods, asked.batches(source), best)
    rows = [row_record(one, methods, best, groups, asked.config.seed) for one in found]
    products = {one.method: one for one in found if not one.refined}
    return {
        "name": source.name,
        "source": source.cache.source,
        "features": str(source.cache.path),
        "matrices": len(source.places),
        "images": len(set(groups)),
        "rows": rows,
        "paired": [
            paired(products[name], products[other], groups, "relative_error", asked.config.seed)
            for name in asked.networks
            for other in (SVD, PCA)
        ],
        "ids": [source.cache.ids[place] for place in source.places],
        "values": {label(row): shown_values(one) for row, one in zip(rows, found, strict=True)},
    }


def row_record(
    found: Closeness, methods: Sequence[Method], best: Tensor, groups: Sequence[str], seed: int
) -> dict[str, Any]:
    """One method's row; where a mask lets fewer ranks act, also its excess over the optimum of that rank. Over an
    optimum that is exact there is no excess: None."""
    method = next(one for one in methods if one.name == found.method)
    acting = None if found.refined else method.effective_rank
    row = {
        "method": found.method,
        "refined": found.refined,
        "learned": method.learned,
        "rank": found.rank,
        "effective_rank": acting,
        **summary(found, groups, seed),
    }
    if "excess_error" in row and float(best[:, found.rank - 1].min()) <= ROUNDING:
        row["excess_error"] = None
    if acting and float(best[:, acting - 1].min()) > ROUNDING:
        excess = excess_error(found.values["relative_error"], best[:, acting - 1])
        (row["excess_at_effective_rank"],) = estimated(array(excess)[None], groups, seed)
    return row


def shown_values(found: Closeness) -> dict[str, list[float]]:
    return {name: found.values[name].tolist() for name in DRAWN if name in found.values}


def cost_record(methods: Sequence[Method], asked: Compared) -> dict[str, Any]:
    """Operations, time, parameters and stored numbers of every method, and how time was measured."""
    batch = timing_batch(asked)
    spent = timings(methods, batch, asked.config.repeats)
    cost = [
        {
            "method": method.name,
            "flops": method.flops,
            "seconds": spent[method.name].seconds,
            "slowest": spent[method.name].slowest,
            "parameters": method.parameters,
            "stored": method.stored(*asked.shape, asked.rank),
        }
        for method in counted(methods, batch[: min(len(batch), 4)])
    ]
    on_cpu = asked.device.type == "cpu"
    timing = {
        "device": "CPU" if on_cpu else torch.cuda.get_device_name(asked.device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "batch_size": asked.config.batch_size,
        "repeats": asked.config.repeats,
    }
    return {"cost": cost, "timing": timing}


def timing_batch(asked: Compared) -> Tensor:
    """`batch_size` test matrices, over again where there are fewer: time does not depend on what is in them."""
    source = asked.sources[0]
    places = itertools.islice(itertools.cycle(source.places), asked.config.batch_size)
    return torch.stack([normalised(source.cache[place]) for place in places]).to(asked.device)


def write_comparison(folder: Path, comparison: Comparison, *, plots: bool = True) -> dict[str, Path | str]:
    """Write them into the results folder; what was written, by name."""
    blocks = drawn(comparison_blocks(comparison), into(folder / PLOT_FOLDER) if plots else None)
    title = f"Factors of rank {comparison['rank']}: {', '.join(comparison['networks'])}"
    subtitle = f"{comparison['tokens']} tokens × {comparison['channels']} channels of {comparison['features']}"
    page = Page(title, subtitle, sections=[Section("Networks against the optimum", blocks)])
    written: dict[str, Path | str] = {
        name: write_json(folder / name / OF_ONE, of_one(comparison, name)) for name in comparison["networks"]
    }
    written |= pictures(blocks)
    written["page"] = write_text(folder / PAGE, markdown(page, folder))
    return written | {"comparison": COMPARISON.write(folder, comparison)}


def of_one(comparison: Comparison, name: str) -> dict[str, Any]:
    """One network compared with the SVD and the shared PCA: means, paired differences, every matrix, cost."""
    shared = ("rank", "tokens", "channels", "features", "model", "timing", "storage")
    sweep = comparison["sweep"]
    return {
        "arch": name,
        **{key: comparison[key] for key in shared},
        "network_rank": comparison["network_ranks"][name],
        "sources": [one_source(source, name) for source in comparison["sources"]],
        "cost": [row for row in comparison["cost"] if row["method"] in (SVD, GRAM, PCA, name)],
        "sweep": {"ranks": sweep["ranks"], **{key: sweep["relative_error"][key] for key in (SVD, PCA, name)}},
    }


def one_source(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    own, optimum = source["values"][name], source["values"][SVD]
    rows = {row["method"]: row for row in source["rows"] if not row["refined"]}
    refined = [row for row in source["rows"] if row["method"] == name and row["refined"]]
    matrices = zip(source["ids"], optimum["relative_error"], *own.values(), strict=True)
    names = ("id", "svd_relative_error", *own)
    return {
        **{key: source[key] for key in ("name", "source", "features", "matrices", "images")},
        "svd": rows[SVD],
        "pca": rows[PCA],
        "network": rows[name],
        "refined": refined[0] if refined else None,
        "paired": [pair for pair in source["paired"] if pair["network"] == name],
        "per_matrix": [dict(zip(names, row, strict=True)) for row in matrices],
    }
