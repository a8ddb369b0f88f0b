"""rankwise features compare: trained networks against the SVD three ways and a shared PCA, at equal rank.

rankwise features compare --arch ResMLP,AdaLoRA --results_dir results [--ood another_cache]
results/<arch>, their cache's test images ──▶ errors, time, ranks ──▶ comparison.json, .md, plots; one file each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.data.features.cache import FeatureCache, open_cache
from rankwise.data.features.split import SPLIT, FeatureSplit, read_split
from rankwise.errors import DataError, UsageError, need
from rankwise.files.run_folder import RunFolder
from rankwise.nets.factorize.files import SETTINGS
from rankwise.options.features import FactorCompareConfig, canonical
from rankwise.score import bootstrap
from rankwise.show.factor_blocks import terminal
from rankwise.show.factor_files import FILE, OF_ONE, PLOT_FOLDER, write_comparison
from rankwise.stages.engines import pick_device
from rankwise.stages.features.comparing import Compared, Source, compared
from rankwise.stages.features.trained import Network, networks

CONFIG, STAGE = "resolved_config.compare.json", "features compare"


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
    sources = [Source("test images", cache, split.test)]
    if config.ood:
        sources.append(other_source(config.ood, cache))
    for note in dict.fromkeys(note for source in sources for note in source.cache.notes()):
        print(note)
    comparison = Compared(
        networks={each.folder.name: each.net for each in found},
        rank=common_rank(config.rank, found),
        training=Source("training images", cache, split.train),
        sources=sources,
        ranks=config.sweep,
        batch_size=config.batch_size,
        repeats=config.repeats,
        device=pick_device(config.device),
        seed=config.seed,
    )
    folder = RunFolder(Path(config.results_dir).expanduser())
    with folder.lock(), folder.recording(STAGE, inputs(config, found, cache)) as record:
        content = compared(comparison)
        folder.save_config(config, CONFIG)
        record.outputs |= write_comparison(folder.path, content, plots=not config.no_plots)
    print(terminal(content))
    print(f"\n{', '.join(sorted({Path(path).name for path in record.outputs.values()}))} in {folder.path}")
    return content


def check(config: FactorCompareConfig) -> None:
    """What nothing works without, before anything is measured."""
    bootstrap.check_installed()
    if not config.no_plots:
        need("matplotlib", extra="plots")


def trained_on(found: Sequence[Network], config: FactorCompareConfig) -> tuple[FeatureCache, FeatureSplit]:
    """The cache that all networks were trained on, and its split. DataError where there is not one of each."""
    first = found[0]
    cache = open_cache(config.features) if config.features else first.cache
    if cache is None:
        raise DataError(f"{first.folder}: its feature cache cannot be read, give it as --features: {first.lost}")
    splits = [read_split(each.folder / SPLIT, cache) for each in found]
    for each, split in zip(found, splits, strict=True):
        if split != splits[0]:
            raise DataError(
                f"{first.folder} and {each.folder} divide {cache.path} differently: what one was tested on, the other "
                "may have seen; compare them apart (--arch), or train both with one --seed"
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


def other_source(path: str, cache: FeatureCache) -> Source:
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
    return Source("other images", other, places)


def inputs(config: FactorCompareConfig, found: Sequence[Network], cache: FeatureCache) -> dict[str, Path | str]:
    weights: dict[str, Path | str] = {each.folder.name: each.folder / SETTINGS for each in found}
    return weights | {"features": cache.path} | ({"ood": config.ood} if config.ood else {})


def describe(config: FactorCompareConfig) -> list[str]:
    check(config)
    names = ", ".join(map(canonical, config.arch)) or f"every network in {config.results_dir}"
    where = f"the test images of {config.features or 'the cache they were trained on'}"
    lines = [f"compare {names} with the SVD three ways and a shared PCA on {where}"]
    lines += [f"and on all images of {config.ood} that are not in that cache"] if config.ood else []
    plots = "" if config.no_plots else f", plots in {PLOT_FOLDER}/"
    return [*lines, f"write {FILE} and .md{plots}, and {OF_ONE} of each network, in {config.results_dir}"]
