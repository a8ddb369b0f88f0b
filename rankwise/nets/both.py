"""All weights of a base and of what it was tuned to, by the model's names, read when they are asked for.

both = both_models(source, base)          # of a checkpoint pair, or of saved deltas and the base they are for
both.tuned["model.norm.weight"]           # float tensor as stored
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.measure import same_as_stored
from rankwise.files.checkpoint import Checkpoint, open_checkpoint
from rankwise.models.load import meta_model
from rankwise.nets.pair import folder_of, model_weights
from rankwise.store.deltas import CheckpointPair, DeltaSource, Place, SavedDeltas

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
