"""What an adapter of some sites leaves out of a pair: every other tensor that training changed, and what it made new.

left_out(source, plan)     # [LeftOut("model.norm.weight", "changed", energy …), LeftOut("lm_head.weight", "new" …)]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.core.measure import energy_between, energy_of
from rankwise.errors import VerificationError
from rankwise.merge.by_layer import layered_adapted, require_all_came, streamed
from rankwise.merge.verify import NO_EFFECT, TOLERANCE, Batch, image_batch, logits, relative, text_batch
from rankwise.models.load import weightless_model
from rankwise.models.vocabulary import embedding_paths, resize, row_count
from rankwise.ranks.deltas import CheckpointPair, DeltaSource, Place, SavedDeltas, weight_name
from rankwise.ranks.pair import Both, MadeWeights, Makers

CHANGED, RESIZED, NEW = "changed", "resized", "only in the tuned model"


@dataclass(frozen=True)
class LeftOut:
    """A tensor that the adapter does not carry. `energy`: ‖Δ‖²_F of what both have of it, 0 where the base has none."""

    name: str
    why: str
    energy: float
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None

    def as_dict(self) -> dict[str, Any]:
        shapes = {"shape": list(self.shape), "base_shape": self.base_shape and list(self.base_shape)}
        return {"name": self.name, "why": self.why, "energy_total": self.energy, **shapes}


def left_out(source: DeltaSource, carried: Collection[str]) -> list[LeftOut]:
    """Every tensor but the `carried` ones that differs. One is in memory at a time."""
    if isinstance(source, CheckpointPair):
        found = (compared(source, name, place) for name, place in source.places.items() if name not in carried)
        return [row for row in found if row]
    if isinstance(source, SavedDeltas):
        names = [name for name in source.checkpoint if name not in carried]
        energies = {name: energy_of(matrix(source.checkpoint.tensor(name))) for name in names}
        shapes = {name: source.checkpoint.shape(name) for name in names}
        return [LeftOut(name, CHANGED, energies[name], shapes[name], shapes[name]) for name in names if energies[name]]
    return []


def unpaired(source: DeltaSource) -> list[LeftOut]:
    """The tensors of a pair that have no delta, because the base has none or one of another shape. Reads no tensor."""
    if not isinstance(source, CheckpointPair):
        return []
    found = []
    sites = {weight_name(site.path, source.places) for site in source.sites.values()}
    for name, place in source.places.items():
        if place.tuned is None or name in sites:
            continue
        before = source.base.shape(place.base.key) if place.base else None
        after = source.tuned.shape(place.tuned.key)
        if before != after:
            found.append(LeftOut(name, RESIZED if before else NEW, 0.0, after, before))
    return found


def compared(pair: CheckpointPair, name: str, place: Place) -> LeftOut | None:
    """One tensor of both; None where they do not differ, or the tuned model has none (the base's stays then)."""
    if place.tuned is None:
        return None
    after = place.tuned.read(pair.tuned)
    if place.base is None:
        return LeftOut(name, NEW, 0.0, tuple(after.shape), None)
    before = place.base.read(pair.base)
    why = CHANGED if before.shape == after.shape else RESIZED
    energy = common_energy(before, after)
    return LeftOut(name, why, energy, tuple(after.shape), tuple(before.shape)) if energy or why == RESIZED else None


def common_energy(before: Tensor, after: Tensor) -> float:
    """‖after − before‖²_F over the rows and columns that both have; 0 for shapes with nothing in common."""
    if before.dim() != after.dim():
        return 0.0
    common = tuple(slice(min(sizes)) for sizes in zip(before.shape, after.shape, strict=True))
    return energy_between(matrix(before[common]), matrix(after[common]))


def matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def sentences(rows: Sequence[LeftOut], share: float) -> list[str]:
    """What is left out, by kind, three names each. share: of all change, in what both models have."""
    lines = []
    changed = [row for row in rows if row.energy]
    if changed:
        lines.append(
            f"{len(changed)} tensors outside these sites changed as well ({share:.1%} of all change), and the adapter "
            f"does not carry them ({names(changed)}): base + adapter is not the tuned model"
        )
    for row in rows:
        if row.why == RESIZED:
            lines.append(f"{row.name} is {row.base_shape} in the base and {row.shape} in the tuned model")
    new = [row for row in rows if row.why == NEW]
    if new:
        lines.append(
            f"{len(new)} tensors are only in the tuned model ({names(new)}), and the adapter has nothing of them"
        )
    return lines


def names(rows: Sequence[LeftOut]) -> str:
    return ", ".join(row.name for row in by_energy(rows)[:3]) + (" …" if len(rows) > 3 else "")


def by_energy(rows: Sequence[LeftOut]) -> list[LeftOut]:
    """The most changed first."""
    return sorted(rows, key=lambda row: -row.energy)


LOST = 0.1  # of the adapter's effect: a difference of rounding is far below it, an adapter half loaded far above


@dataclass(frozen=True)
class Proof:
    """Relative rms differences of logits. `error`: base + adapter to what it is said to be; `effect`: that to the base;
    `distance`: base + adapter to the tuned model, as a share of the base's distance to it."""

    error: float
    effect: float
    distance: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def require(self) -> None:
        if not self.error <= max(NO_EFFECT, min(TOLERANCE[torch.float32], LOST * self.effect)):
            raise VerificationError(
                "base + adapter, loaded by PEFT, is not the tuned model but for what is left out: its logits differ by "
                f"{self.error:.2g} (relative rms), and the adapter's effect is {self.effect:.2g}. Something differs "
                "that is neither in the adapter nor among what it leaves out: compare the two config.json. Nothing was "
                "written (--no_verify skips this)"
            )


def prove(both: Both, adapter: Path, expected: Makers, sees: bool) -> Proof:
    """Compare on random tokens, and on pictures where `sees`. expected: the weights that base + adapter should have.

    UsageError for a model that cannot be run layer by layer.
    """
    base = MadeWeights(both.base)
    plain = streamed(weightless_model(both.folder), base)
    batches = [text_batch(plain)]
    if sees:
        batches.append(image_batch(plain, both.folder))
    before = logits(plain, batches)
    require_all_came(before, plain)
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


def made_logits(structure: str, makers: Makers, batches: list[Batch]) -> Tensor:
    """Logits of these weights in this structure, whose embeddings get as many rows as they have."""
    model, weights = weightless_model(structure), MadeWeights(makers)
    rows = len(weights[f"{embedding_paths(model)[0]}.weight"])
    if rows != row_count(model):
        resize(model, rows)
    return logits(streamed(model, weights), batches)
