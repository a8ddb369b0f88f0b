"""Open a source of weight changes (a checkpoint pair, saved deltas, an adapter) and measure its spectra.

source = open_source(config.sites, notes, base="base/", tuned="tuned/")     # DeltaSource: sites, and a delta of each

Sites of a pair go by the loaded model's paths, or by key where no config.json says more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rankwise.core.measure import Delta, from_difference
from rankwise.core.site import Site, describe, nearest
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraAdapter, known_places, read_adapter
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint, resolve
from rankwise.models.expert_files import ExpertFiles
from rankwise.models.load import another_base, embedding_paths, meta_model
from rankwise.models.per_expert import in_todays_layout, refuse_single_experts
from rankwise.models.sites import flat_experts, model_sites, weight_table
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SitesSection
from rankwise.ranks.deltas import (
    DELTAS,
    WEIGHT_TYPES,
    CheckpointPair,
    DeltaSource,
    SavedDeltas,
    WeightPair,
    open_deltas,
    shape_of,
)
from rankwise.ranks.foreign import foreign_sites, match_keys, rename_keys
from rankwise.ranks.measured import Measured
from rankwise.ranks.spectra import Question, Unsettled, measure_adapter, measure_sites

NOWHERE = WeightPair(None, None)


def filter_sites(sites: Mapping[str, Site], asked: SitesSection) -> dict[str, Site]:
    """The sites that --towers, --include and --exclude leave, in order. UsageError for a bad regex or for none left."""
    include, exclude = compile_regex(asked.include, "--include"), compile_regex(asked.exclude, "--exclude")
    kept = {
        path: site
        for path, site in sites.items()
        if site.tower in (*asked.towers, "unknown")
        and (include is None or include.search(path))
        and not (exclude and exclude.search(path))
    }
    if not kept:
        towers = sorted({site.tower for site in sites.values()})
        raise UsageError(
            f"none of {len(sites)} sites selected (towers here: {', '.join(towers) or 'none'}); look at --towers "
            f"{','.join(asked.towers)}, --include {asked.include} and --exclude {asked.exclude}"
        )
    return kept


def compile_regex(regex: str | None, flag: str) -> re.Pattern[str] | None:
    try:
        return re.compile(regex) if regex else None
    except re.error as error:
        raise UsageError(f"{flag} {regex!r} is not a regular expression: {error}") from error


def open_pair(base: str, tuned: str, asked: SitesSection, notes: list[str]) -> CheckpointPair:
    """The pair as a source of deltas. What is left out is counted in `notes`.

    Raises DataError listing the keys and shapes that do not match (unless `allow_unmatched`), and for a checkpoint that
    holds LoRA factors beside the base's own weights.
    """
    before, after = open_checkpoint(resolve(base)), open_checkpoint(resolve(tuned))
    for checkpoint in (before, after):
        factor = next((name for name in checkpoint if ".lora_" in name), None)
        if factor:
            raise DataError(f"{checkpoint.path}: holds an adapter that is not merged ({factor}): merge it first")
    described = next((one for one in (before, after) if one.config is not None), None)
    if described is None:
        return foreign_pair(before, after, asked, notes)
    return model_pair(before, after, meta_model(str(folder_of(described))), asked, notes)


def folder_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def model_pair(
    before: Checkpoint, after: Checkpoint, model: PreTrainedModel, asked: SitesSection, notes: list[str]
) -> CheckpointPair:
    sites = filter_sites(model_sites(model), asked)
    if flat := flat_experts(model):
        notes.append(f"{len(flat)} parameters hold experts below one another in one matrix: not analysed ({flat[0]} …)")
    places = places_of(model, before, after, asked.rename)
    reasons = {path: mismatch(places.get(site.weight, NOWHERE), before, after) for path, site in sites.items()}
    lines = [f"{path} {reason}" for path, reason in reasons.items() if reason]
    refuse_unmatched(lines, before.path, after.path, asked.allow_unmatched, notes)
    matching = {path: site for path, site in sites.items() if not reasons[path]}
    if not matching:
        raise DataError(f"{before.path} and {after.path} have no site in common ({lines[0]} …)")
    return CheckpointPair(before, after, matching, places, f"{before.path} → {after.path}")


def places_of(
    model: PreTrainedModel, before: Checkpoint, after: Checkpoint, rules: Sequence[str]
) -> dict[str, WeightPair]:
    """Where every tensor lies in both, by the model's names; those that the model does not know by their keys.

    A key is brought to the model's name as it is, else as `--rename` changes it; and two keys that `--rename` gives one
    name are one tensor, whatever the model calls it.
    """
    names = [rename_keys(checkpoint.keys(), rules) for checkpoint in (before, after)]
    left, right = (model_weights(model, each) for each in names)
    brought = {key: name for name, key in names[0].items()}
    for name, weight in left.items():
        if name in right:
            continue
        if isinstance(weight, Weight) and brought[weight.key] in names[1]:
            right[name] = replace(weight, key=names[1][brought[weight.key]])
        elif isinstance(weight, ExpertFiles) and all(brought[key] in names[1] for key in weight.keys):
            right[name] = weight.renamed({key: names[1][brought[key]] for key in weight.keys})
    for table, each in ((left, names[0]), (right, names[1])):
        used = {key for place in table.values() for key in keys_of(place)}
        table |= {name if name not in table else key: Weight(key) for name, key in each.items() if key not in used}
    for one, other in tied_ends(model):
        for table, opposite in ((left, right), (right, left)):
            if one in opposite and one not in table and other in table:
                table[one] = table[other]
    return {name: WeightPair(left.get(name), right.get(name)) for name in {**left, **right}}


def model_weights(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Weight | ExpertFiles]:
    """Parameter → place, of a checkpoint's tensors (name after `--rename` → key) that the model knows."""
    known, experts = model.state_dict(), {site.weight for site in model_sites(model).values() if site.experts}
    found: dict[str, Weight | ExpertFiles] = {}
    for each in ({key: key for key in names.values()}, names):
        table = weight_table(model, list(each))
        plain = {n: replace(w, key=each[w.key]) for n, w in table.weights.items() if n in known and n not in experts}
        stacks = {n: files.renamed(each) for n, files in table.experts.items() if n in experts}
        found = plain | stacks | found
    return found


def keys_of(place: Weight | ExpertFiles) -> Collection[str]:
    return place.keys if isinstance(place, ExpertFiles) else [place.key]


def tied_ends(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The head's weight with the input embeddings', and the reverse: where one is in no file, it is the other."""
    names = [f"{path}.weight" for path in embedding_paths(model)]
    return [(names[0], names[1]), (names[1], names[0])] if len(names) == 2 else []


def mismatch(place: WeightPair, before: Checkpoint, after: Checkpoint) -> str | None:
    """Why a site's two weights cannot be subtracted; None where they can."""
    sides = {"base": (place.base, before), "tuned checkpoint": (place.tuned, after)}
    absent = [where for where, (weight, _) in sides.items() if weight is None]
    if absent:
        return f"is missing in the {' and the '.join(absent)}"
    for where, (weight, checkpoint) in sides.items():
        if isinstance(weight, ExpertFiles) and (problem := weight.problem(checkpoint)):
            return f"{problem}, in the {where} ({checkpoint.path})"
    found = [(weight, checkpoint) for weight, checkpoint in sides.values() if weight is not None]
    one, other = (shape_of(weight, checkpoint) for weight, checkpoint in found)
    if one != other:
        return f"is {one} in the base and {other} in the tuned checkpoint"
    types = [checkpoint.dtype(key) for weight, checkpoint in found for key in stored_keys(weight)]
    odd = [str(dtype).removeprefix("torch.") for dtype in types if dtype not in WEIGHT_TYPES]
    return f"is stored as {odd[0]}, which is not a plain weight: dequantize it first" if odd else None


def stored_keys(place: Weight | ExpertFiles) -> Collection[str]:
    """The keys whose type is that of the weights: MXFP4's codes are no such."""
    return [] if isinstance(place, ExpertFiles) and place.quantized else keys_of(place)


def foreign_pair(before: Checkpoint, after: Checkpoint, asked: SitesSection, notes: list[str]) -> CheckpointPair:
    matching = match_keys(before, after, asked.rename, asked.flatten_conv)
    lines = [f"{name} is only in the base" for name in matching.only_base]
    lines += [f"{name} is only in the tuned checkpoint" for name in matching.only_tuned]
    lines += [f"{name} is of another shape" for name in matching.other_shape]
    if not matching.shared:
        raise DataError(
            f"{before.path} and {after.path} have no matrix in common ({matching.explain() or 'no matrices'}); "
            "see --rename REGEX=TEXT and --flatten_conv"
        )
    refuse_unmatched(lines, before.path, after.path, asked.allow_unmatched, notes)
    if matching.skipped:
        notes.append(f"{len(matching.skipped)} tensors of the base are not matrices and were skipped")
    notes.append("no config.json: sites are named by their keys, their tower is unknown, and `train` refuses the plan")
    found = foreign_sites(before, matching)
    ends = [name for name in matching.shared if name.removesuffix(".weight") not in found]
    if ends:
        notes.append(f"no config.json: by their names {', '.join(ends[:3])} are embeddings or heads, and no sites")
    sides = [rename_keys(checkpoint.keys(), asked.rename) for checkpoint in (before, after)]
    left, right = ({name: Weight(key) for name, key in side.items()} for side in sides)
    places = {name: WeightPair(left.get(name), right.get(name)) for name in {**left, **right}}
    return CheckpointPair(before, after, filter_sites(found, asked), places, f"{before.path} → {after.path}")


def refuse_unmatched(lines: Sequence[str], base: Path, tuned: Path, allowed: bool, notes: list[str]) -> None:
    if not lines:
        return
    if not allowed:
        shown = "\n  ".join(lines[:20]) + (f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise DataError(
            f"{base} and {tuned} do not match:\n  {shown}\n--rename REGEX=TEXT brings names together; "
            "--allow_unmatched analyses the rest"
        )
    notes.append(f"{len(lines)} tensors do not match and were left out ({lines[0]} …)")


@dataclass(frozen=True)
class AdapterDeltas:
    """An adapter as a source of dense deltas, for whoever needs them; its spectra come from the factors."""

    adapter: LoraAdapter
    sites: dict[str, Site]
    description: str

    def read(self, site: Site) -> Delta:
        return from_difference(self.adapter.pairs[site.path].factors().product())

    def expert(self, site: Site, expert: int) -> Delta:
        return from_difference(self.adapter.pairs[site.path].expert(expert).factors().product())

    def prefetch(self, site: Site, expert: int = 0) -> None:
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
    asked: SitesSection,
    notes: list[str],
    *,
    base: str | None = None,
    tuned: str | None = None,
    deltas: str | None = None,
    adapter: str | None = None,
    model_name: str | None = None,
) -> DeltaSource:
    """The deltas of exactly one of: a checkpoint pair, a finetune run, an adapter."""
    if deltas:
        saved = open_deltas(Path(deltas))
        return replace(saved, sites=filter_sites(saved.sites, asked))
    if adapter:
        return open_adapter(adapter, model_name, asked, notes)
    assert base is not None
    assert tuned is not None
    return open_pair(base, tuned, asked, notes)


def open_adapter(path: str, model_name: str | None, asked: SitesSection, notes: list[str]) -> AdapterDeltas:
    model = meta_model(model_name) if model_name else None
    known = model_sites(model, routers=True) if model else {}
    read = in_todays_layout(model, path) if model else Path(path)
    adapter = read_adapter(read, places=known_places(known, read))
    if model is None:
        refuse_single_experts(adapter.pairs, path)
    if model:
        check_base(adapter, known, {*known, *dict(model.named_modules())}, f"{path} and {model_name}")
        notes += another_base("the adapter", adapter.base_model, model_name)
    whole = adapter.config.get("modules_to_save")
    if whole:
        notes.append(f"{path} also carries modules trained in full ({whole[0]} …): no factors, no spectrum")
    sites = {
        name: known.get(name) or describe(name, pair.shape, transposed=pair.fan_in_fan_out, experts=pair.experts)
        for name, pair in adapter.pairs.items()
    }
    if not model_name:
        notes.append("no --model_name: sites are the adapter's keys, their tower is unknown, `train` refuses the plan")
    return AdapterDeltas(adapter, filter_sites(sites, asked), str(path))


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
        pair, site = adapter.pairs[path], known.get(path)
        if site and pair.experts != site.experts:
            raise DataError(f"{where} differ: {path} has {pair.experts or 'no'} experts and {site.experts or 'none'}")
        if site and pair.shape != site.shape:
            raise DataError(f"{where} differ: {path} is {pair.shape} and {site.shape}")


def measure_source(
    source: DeltaSource, config: RanksConfig, question: Question, unsettled: Unsettled
) -> dict[Site, Measured]:
    if isinstance(source, AdapterDeltas):
        return measure_adapter(source.adapter, source.sites)
    return measure_sites(source, config, question, unsettled)


def other_probe(path: str, base: str | None, asked: SitesSection, notes: list[str]) -> DeltaSource:
    """A further probe of the same sites: saved deltas, an adapter, or another tuned checkpoint of the same base."""
    folder = resolve(path)
    if (folder / DELTAS.name).is_file() or (folder / "deltas" / DELTAS.name).is_file():
        return open_source(asked, notes, deltas=str(folder))
    if (folder / "adapter_config.json").is_file():
        return open_adapter(str(folder), None, asked, notes)
    if base is None:
        raise UsageError(f"--probe2 {path}: a tuned checkpoint is compared with its base: give it as BASE or --base")
    return open_pair(base, path, asked, notes)


def source_metadata(source: DeltaSource) -> Mapping[str, Any]:
    return source.metadata if isinstance(source, SavedDeltas) else {}
