"""The proof of an extraction: base + adapter, as PEFT loads it, is the tuned model but for what is said to be left out.

    expected   the tuned model's own weights; factored sites as base + B·A, tensors that are left out as in the base
    proof = prove(both_models(source, base), adapter, expected, sees=False)
    proof.require()                                     # exit 6 where the logits differ

Whatever neither the adapter nor the list of what it leaves out knows of (a module that PEFT does not find, an embedding
taken for a matrix, another config) is a difference. One layer is in memory at a time, as in `merge/logits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.factors import share_kept
from rankwise.core.measure import same_as_stored
from rankwise.errors import VerificationError
from rankwise.files.checkpoint import Checkpoint, open_checkpoint
from rankwise.merge.logits import (
    Batch,
    image_batch,
    layered_adapted,
    logits,
    require_finite,
    stream_weights,
    text_batch,
)
from rankwise.merge.verify import NO_EFFECT, TOLERANCE, read_changes, relative
from rankwise.models.load import embedding_paths, meta_model, weightless_model
from rankwise.models.vocabulary import resize, row_count
from rankwise.ranks.deltas import CheckpointPair, DeltaSource, SavedDeltas, WeightPair, read_expert
from rankwise.ranks.fidelity import Fidelity, require_kept
from rankwise.ranks.probe import folder_of, model_weights

LOST = 0.1  # of the adapter's effect: a difference of rounding is far below it, an adapter half loaded far above


@dataclass(frozen=True)
class Proof:
    """Relative rms differences of logits. `error`: base + adapter to what it is said to be; `effect`: that to the base;
    `distance`: base + adapter to the tuned model, as a share of the base's distance to it."""

    error: float
    effect: float
    distance: float

    def require(self) -> None:
        if not self.error <= max(NO_EFFECT, min(TOLERANCE[torch.float32], LOST * self.effect)):
            raise VerificationError(
                "base + adapter, loaded by PEFT, differs from the tuned model in more than what is left out: logits by "
                f"{self.error:.2g} (relative rms), and the adapter's effect is {self.effect:.2g}. Something differs "
                "that is neither in the adapter nor among what it leaves out: compare the two config.json. Nothing was "
                "written (--no_verify skips this)"
            )


def prove(both: Both, adapter: Path, expected: Makers, sees: bool) -> Proof:
    """Compare on random tokens, and on pictures where `sees`. expected: the weights that base + adapter should have.

    UsageError for a model that cannot be run layer by layer.
    """
    base = MadeWeights(both.base)
    plain = stream_weights(weightless_model(both.folder), base)
    batches = [text_batch(plain)]
    if sees:
        batches.append(image_batch(plain, both.folder))
    before = logits(plain, batches)
    require_finite(before, plain)
    adapted = layered_adapted(both.folder, adapter, base)
    added = range(row_count(plain), row_count(adapted.get_base_model()))
    if added:
        batches.append(text_batch(adapted.get_base_model(), added))
    after = logits(adapted, batches)
    wanted, whole = (made_logits(both.tuned_folder, makers, batches) for makers in (expected, both.tuned))
    places, columns = len(before), min(each.shape[1] for each in (before, after, wanted, whole))
    old, change = before[:, :columns], relative(whole[:places, :columns] - before[:, :columns], before[:, :columns])
    both_have = min(after.shape[1], wanted.shape[1])
    return Proof(
        error=relative(after[:, :both_have] - wanted[:, :both_have], wanted[:, :both_have]),
        effect=relative(wanted[:places, :columns] - old, old),
        distance=relative(after[:places, :columns] - whole[:places, :columns], old) / change if change else 0.0,
    )


def require_experts(source: DeltaSource, adapter: Path, model: PreTrainedModel, fidelity: Fidelity) -> None:
    """VerificationError, naming it, where an expert's pair in an adapter's file is not made from its own delta, by the
    energy that it keeps: an expert that no token is routed to shows in no logit. Read past `core.experts`."""
    changes = dict(read_changes(adapter, model))
    for row in (row for row in fidelity.kept if row.experts):
        site = row.site
        module = model.get_submodule(site.path.rpartition(".")[0])
        for expert, claimed in enumerate(row.experts):
            name, delta = f"{site.path}, expert {expert}", read_expert(source, site, expert)
            stored = changes[site.path].of_expert(expert, site.experts, module)
            made = (stored.T if site.transposed else stored).double()
            energy, after = delta.energy, float(made.square().sum())
            if not energy and after:
                raise VerificationError(f"{name} has a pair, and has not changed; nothing was written")
            if energy:
                inner = float((delta.matrix.cpu().double() * made).sum())
                require_kept(name, share_kept(inner, after, energy), claimed)


def made_logits(structure: str, makers: Makers, batches: list[Batch]) -> Tensor:
    """Logits of these weights in this structure, whose embeddings get as many rows as they have."""
    model, weights = weightless_model(structure), MadeWeights(makers)
    rows = len(weights[f"{embedding_paths(model)[0]}.weight"])
    if rows != row_count(model):
        resize(model, rows)
    return logits(stream_weights(model, weights), batches)


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


def tuned_of(pair: CheckpointPair, place: WeightPair) -> Tensor:
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
