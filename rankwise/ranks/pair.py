"""Two checkpoints as a source of deltas: sites by the loaded model's paths, or by key where no config says more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.measure import same_as_stored
from rankwise.core.site import TOWERS, Site
from rankwise.errors import DataError, UsageError
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint, resolve
from rankwise.models.load import meta_model
from rankwise.models.sites import fused_experts, model_sites, weight_table
from rankwise.models.vocabulary import embedding_paths
from rankwise.ranks.deltas import (
    WEIGHT_TYPES,
    CheckpointPair,
    DeltaSource,
    Place,
    SavedDeltas,
    foreign_sites,
    match_keys,
    renamed,
)

NOWHERE = Place(None, None)


@dataclass(frozen=True)
class SiteFilter:
    """Which sites are analysed, and how keys are brought together."""

    include: str | None = None
    exclude: str | None = None
    towers: tuple[str, ...] = ("language",)
    rename: tuple[str, ...] = ()
    allow_unmatched: bool = False
    flatten_conv: bool = False

    def apply(self, sites: Mapping[str, Site]) -> dict[str, Site]:
        """The sites that pass, in order. Raises UsageError for a bad regex or where nothing is left."""
        for tower in self.towers:
            if tower not in TOWERS:
                raise UsageError(f"--towers: {tower!r} is not one of {', '.join(TOWERS)}")
        include, exclude = compiled(self.include, "--include"), compiled(self.exclude, "--exclude")
        kept = {
            path: site
            for path, site in sites.items()
            if site.tower in (*self.towers, "unknown")
            and (include is None or include.search(path))
            and not (exclude and exclude.search(path))
        }
        if not kept:
            towers = sorted({site.tower for site in sites.values()})
            raise UsageError(
                f"no site is left of {len(sites)} (towers here: {', '.join(towers) or 'none'}); look at --towers "
                f"{','.join(self.towers)}, --include {self.include} and --exclude {self.exclude}"
            )
        return kept


def compiled(regex: str | None, flag: str) -> re.Pattern[str] | None:
    try:
        return re.compile(regex) if regex else None
    except re.error as error:
        raise UsageError(f"{flag} {regex!r} is not a regular expression: {error}") from error


def open_pair(base: str, tuned: str, filter_: SiteFilter, notes: list[str]) -> CheckpointPair:
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
        return foreign_pair(before, after, filter_, notes)
    return model_pair(before, after, meta_model(str(folder_of(described))), filter_, notes)


def folder_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def model_pair(
    before: Checkpoint, after: Checkpoint, model: PreTrainedModel, filter_: SiteFilter, notes: list[str]
) -> CheckpointPair:
    sites = filter_.apply(model_sites(model))
    places = places_of(model, before, after, filter_.rename)
    experts = fused_experts(model)
    if experts:
        notes.append(f"{len(experts)} fused expert tensors are not analysed ({experts[0]} …)")
    reasons = {path: mismatch(places.get(f"{path}.weight", NOWHERE), before, after) for path in sites}
    lines = [f"{path} {reason}" for path, reason in reasons.items() if reason]
    refuse_unmatched(lines, before.path, after.path, filter_.allow_unmatched, notes)
    matching = {path: site for path, site in sites.items() if not reasons[path]}
    if not matching:
        raise DataError(f"{before.path} and {after.path} have no site in common ({lines[0]} …)")
    return CheckpointPair(before, after, matching, places, f"{before.path} → {after.path}")


def places_of(model: PreTrainedModel, before: Checkpoint, after: Checkpoint, rules: Sequence[str]) -> dict[str, Place]:
    """Where every tensor lies in both, by the model's names; those that the model does not know by their keys.

    A key is brought to the model's name as it is, else as `--rename` changes it; and two keys that `--rename` gives one
    name are one tensor, whatever the model calls it.
    """
    names = [renamed(checkpoint.keys(), rules) for checkpoint in (before, after)]
    left, right = (model_weights(model, each) for each in names)
    brought = {key: name for name, key in names[0].items()}
    for name, weight in left.items():
        if name not in right and brought[weight.key] in names[1]:
            right[name] = Weight(names[1][brought[weight.key]], weight.part)
    for table, each in ((left, names[0]), (right, names[1])):
        used = {weight.key for weight in table.values()}
        table |= {name if name not in table else key: Weight(key) for name, key in each.items() if key not in used}
    for one, other in tied_ends(model):
        for table, opposite in ((left, right), (right, left)):
            if one in opposite and one not in table and other in table:
                table[one] = table[other]
    return {name: Place(left.get(name), right.get(name)) for name in {**left, **right}}


def model_weights(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Weight]:
    """Parameter → place, of a checkpoint's tensors (name after `--rename` → key) that the model knows."""
    known = model.state_dict()
    found: dict[str, Weight] = {}
    for each in ({key: key for key in names.values()}, names):
        table = weight_table(model, list(each)).weights
        found = {n: Weight(each[w.key], w.part) for n, w in table.items() if n in known} | found
    return found


def tied_ends(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The head's weight with the input embeddings', and the reverse: where one is in no file, it is the other."""
    names = [f"{path}.weight" for path in embedding_paths(model)]
    return [(names[0], names[1]), (names[1], names[0])] if len(names) == 2 else []


def mismatch(place: Place, before: Checkpoint, after: Checkpoint) -> str | None:
    """Why a site's two weights cannot be subtracted; None where they can."""
    sides = {"base": (place.base, before), "tuned checkpoint": (place.tuned, after)}
    absent = [where for where, (weight, _) in sides.items() if weight is None]
    if absent:
        return f"is missing in the {' and the '.join(absent)}"
    found = [(weight, checkpoint) for weight, checkpoint in sides.values() if weight is not None]
    one, other = (checkpoint.shape(weight.key) for weight, checkpoint in found)
    if one != other:
        return f"is {one} in the base and {other} in the tuned checkpoint"
    types = [checkpoint.dtype(weight.key) for weight, checkpoint in found]
    odd = [str(dtype).removeprefix("torch.") for dtype in types if dtype not in WEIGHT_TYPES]
    return f"is stored as {odd[0]}, which is not a plain weight: dequantize it first" if odd else None


def foreign_pair(before: Checkpoint, after: Checkpoint, filter_: SiteFilter, notes: list[str]) -> CheckpointPair:
    matching = match_keys(before, after, filter_.rename, filter_.flatten_conv)
    lines = [f"{name} is only in the base" for name in matching.only_base]
    lines += [f"{name} is only in the tuned checkpoint" for name in matching.only_tuned]
    lines += [f"{name} is of another shape" for name in matching.other_shape]
    if not matching.shared:
        raise DataError(
            f"{before.path} and {after.path} have no matrix in common ({matching.explain() or 'no matrices'}); "
            "see --rename REGEX=TEXT and --flatten_conv"
        )
    refuse_unmatched(lines, before.path, after.path, filter_.allow_unmatched, notes)
    if matching.skipped:
        notes.append(f"{len(matching.skipped)} tensors of the base are not matrices and were skipped")
    notes.append("no config.json: sites are named by their keys, their tower is unknown, and `train` refuses the plan")
    found = foreign_sites(before, matching)
    ends = [name for name in matching.shared if name.removesuffix(".weight") not in found]
    if ends:
        notes.append(f"no config.json: by their names {', '.join(ends[:3])} are embeddings or heads, and no sites")
    left, right = renamed(before.keys(), filter_.rename), renamed(after.keys(), filter_.rename)
    places = {name: Place(weight_at(left, name), weight_at(right, name)) for name in {**left, **right}}
    return CheckpointPair(before, after, filter_.apply(found), places, f"{before.path} → {after.path}")


def weight_at(names: Mapping[str, str], name: str) -> Weight | None:
    return Weight(names[name]) if name in names else None


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


Maker = Callable[[], Tensor]
Makers = dict[str, Maker]


@dataclass(frozen=True)
class MadeWeights(Mapping[str, Tensor]):
    """Tensors by name that are read or made when they are asked for, in float32."""

    makers: Mapping[str, Maker]

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@dataclass(frozen=True)
class Both:
    """`model`: the structure of the base, without weights; `folder`, `tuned_folder`: where their configs are."""

    model: PreTrainedModel
    folder: str
    tuned_folder: str
    base: Makers
    tuned: Makers


def both_models(source: DeltaSource, base: str | None) -> Both | None:
    """None where there is no base with a config.json on this machine."""
    if isinstance(source, CheckpointPair):
        return None if source.base.config is None else of_pair(source)
    if isinstance(source, SavedDeltas) and base and (Path(base) / "config.json").is_file():
        return of_deltas(source, base)
    return None


def of_pair(pair: CheckpointPair) -> Both:
    folder = str(folder_of(pair.base))
    model = meta_model(folder)
    base = {name: partial(place.base.read, pair.base) for name, place in pair.places.items() if place.base}
    tuned = {name: partial(tuned_of, pair, place) for name, place in pair.places.items() if place.tuned}
    tuned_folder = folder if pair.tuned.config is None else str(folder_of(pair.tuned))
    return Both(model, folder, tuned_folder, with_tied(model, base), with_tied(model, base | tuned))


def of_deltas(source: SavedDeltas, base: str) -> Both:
    checkpoint, model = open_checkpoint(base), meta_model(base)
    places = model_weights(model, {name: name for name in checkpoint})
    before = with_tied(model, {name: partial(place.read, checkpoint) for name, place in places.items()})
    tuned = [name for name in source.checkpoint if name in before]
    moved = {name: partial(moved_by, before[name], source.checkpoint, name) for name in tuned}
    return Both(model, base, base, before, before | with_tied(model, moved))


def tuned_of(pair: CheckpointPair, place: Place) -> Tensor:
    """The tuned tensor; the base's, where it is nothing but the base's in another type."""
    assert place.tuned is not None
    after = place.tuned.read(pair.tuned)
    before = place.base.read(pair.base) if place.base else after
    unmoved = before.dtype != after.dtype and before.shape == after.shape and same_as_stored(before, after)
    return before if unmoved else after


def moved_by(before: Maker, deltas: Checkpoint, name: str) -> Tensor:
    return before().float() + deltas.tensor(name)


def with_tied(model: PreTrainedModel, makers: Mapping[str, Maker]) -> Makers:
    """Under both names, what the model ties."""
    pairs = [pair for one, other in model.all_tied_weights_keys.items() for pair in ((one, other), (other, one))]
    return {one: makers[other] for one, other in pairs if other in makers} | dict(makers)
