"""Energy that an adapter keeps of its source, and what it leaves out: `fidelity.json` of `extract` and `compress`.

left_out(source, carried)     # [LeftOut("model.norm.weight", "changed", energy …), LeftOut("lm_head.weight", "new" …)]
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.core.factors import share_kept
from rankwise.core.measure import energy_between, energy_of
from rankwise.core.site import Site
from rankwise.errors import DataError, VerificationError
from rankwise.files.adapter import LoraAdapter
from rankwise.files.document import Document
from rankwise.page.blocks import Block, Finding, Folded, Table
from rankwise.page.text import amount, has_numbers, is_number, number, plural
from rankwise.ranks.deltas import (
    CheckpointPair,
    DeltaSource,
    SavedDeltas,
    WeightPair,
    matrices_of,
    shape_of,
    weight_name,
)

DOCUMENT = Document("fidelity.json", "rankwise-fidelity/1", "a record of the energy kept")
MEASURED = 1e-5  # of the energy: a delta against its factors, multiplied in float32
EXACT = 1e-9  # factors against factors in float64; what is written in float32 loses 1e-14


@dataclass(frozen=True)
class SiteFidelity:
    """One site: `energy_total` is ‖Δ‖²_F of what was to be kept, `energy_kept` the share of it that is.

    `rank` 0 means that the site is not in the adapter; `rank_before` is None where the source is no adapter. `experts`:
    the share of each expert's energy that is kept.
    """

    site: Site
    rank: int
    energy_total: float
    energy_kept: float
    rank_before: int | None = None
    note: str = ""
    experts: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        before = {} if self.rank_before is None else {"rank_before": self.rank_before}
        return {
            "path": self.site.path,
            **before,
            "rank": self.rank,
            "energy_kept": self.energy_kept,
            "parameters": self.site.parameters(self.rank),
            "energy_total": self.energy_total,
            "shape": list(self.site.shape),
            "note": self.note,
            **({"energy_kept_of_experts": list(self.experts)} if self.experts else {}),
        }


@dataclass(frozen=True)
class Fidelity:
    """The whole table. Sites whose delta is zero have nothing to keep and count for nothing.

    `left_out`: tensors that are no sites and that the adapter does not carry; `whole`: names of those that it carries.
    """

    rows: tuple[SiteFidelity, ...]
    left_out: tuple[OmittedTensor, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[SiteFidelity, ...]:
        return tuple(row for row in self.rows if row.rank > 0)

    @property
    def energy_kept(self) -> float:
        """Σ of the kept energies ÷ Σ of the energies."""
        total = sum(row.energy_total for row in self.rows)
        return sum(row.energy_kept * row.energy_total for row in self.rows) / total if total else 0.0

    def beside(self, rest: Sequence[OmittedTensor], whole: Sequence[str]) -> Fidelity:
        """Add the tensors outside the sites: `rest` differs, and the adapter carries the tensors of these names."""
        return replace(self, left_out=tuple(row for row in rest if row.name not in whole), whole=tuple(whole))

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        dropped = sum(not row.rank and row.energy_total > 0 for row in self.rows)
        outside = {"sites": dropped, "tensors": len(self.left_out), "share_of_change": self.energy_outside}
        named = {"largest": [row.name for row in by_energy(self.left_out)[:20]]} if self.left_out else {}
        return {"energy_kept": self.energy_kept, "left_out": outside | named, "carried_whole": len(self.whole)}

    @property
    def energy_outside(self) -> float:
        """Share of all change that lies in tensors which are left out."""
        outside = sum(row.energy for row in self.left_out)
        total = outside + sum(row.energy_total for row in self.rows)
        return outside / total if total else 0.0

    @property
    def parameters(self) -> int:
        return sum(row.site.parameters(row.rank) for row in self.rows)

    @property
    def parameters_before(self) -> int:
        return sum(row.site.parameters(row.rank_before or 0) for row in self.rows)

    def write(self, folder: Path) -> Path:
        content = {
            "energy_kept": self.energy_kept,
            "energy_left_out": self.energy_outside,
            "parameters": self.parameters,
            "parameters_before": self.parameters_before or None,
            "sites": [row.as_dict() for row in self.rows],
            "left_out": [row.as_dict() for row in self.left_out],
            "whole": list(self.whole),
        }
        return DOCUMENT.write(folder, content)

    def summary(self) -> str:
        """24 sites · rank 3 to 9 · 590K parameters · energy kept 95.4 % (lowest: 95.0 % at model.layers.0…)"""
        kept = self.kept
        lowest = min((row for row in kept if row.energy_total > 0), key=lambda row: row.energy_kept)
        before = f"{amount(self.parameters_before)} → " if self.parameters_before else ""
        return (
            f"{plural(len(kept), 'site')} · rank {spread(row.rank for row in kept)} · "
            f"{before}{amount(self.parameters)} parameters · energy kept {self.energy_kept:.1%} "
            f"(lowest: {lowest.energy_kept:.1%} at {lowest.site.path})"
            + (f", {self.energy_kept * (1 - self.energy_outside):.1%} of all change" if self.energy_outside else "")
            + (f" · {plural(len(self.whole), 'tensor')} carried whole" if self.whole else "")
        )

    def notes(self) -> list[str]:
        """The remarks on sites, the same ones together, and what is left out besides."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note:
                found.setdefault(row.note, []).append(row.site.path)
        remarks = [f"{plural(len(paths), 'site')} ({paths[0]} …): {note}" for note, paths in found.items()]
        return remarks + sentences(self.left_out, self.energy_outside)


def spread(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]}" if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def require_kept(site: str, kept: float, claimed: float, tolerance: float = MEASURED) -> None:
    """VerificationError where factors keep less energy than their spectrum states."""
    if not abs(kept - claimed) <= tolerance:
        raise VerificationError(
            f"{site}: its factors keep {kept:.6%} of the energy, and by their singular values it would be "
            f"{claimed:.6%}: they are not the leading directions of what they were made from; nothing was written"
        )


def require_all_kept(before: LoraAdapter, after: LoraAdapter, fidelity: Fidelity) -> None:
    """`require_kept` of every site of an adapter made from another one; and no site is missing."""
    for row in fidelity.rows:
        path = row.site.path
        if row.energy_total and row.energy_kept:
            olds, news = before.pairs[path].matrices(), after.pairs[path].matrices() if path in after.pairs else ()
            sums = torch.zeros(3, dtype=torch.float64)
            for expert, (old, new) in enumerate(zip(olds, news, strict=False)):
                one, other = old.factors(), new.factors()
                found = torch.tensor([one.inner(other), other.inner(other), one.inner(one)], dtype=torch.float64)
                if row.experts and found[2]:
                    kept = share_kept(*found.tolist())
                    require_kept(f"{path}, expert {expert}", kept, row.experts[expert], EXACT)
                sums += found
            require_kept(path, share_kept(*sums.tolist()) if sums[2] else 0.0, row.energy_kept, EXACT)


CHANGED, RESIZED, NEW = "changed", "resized", "only in the tuned model"


@dataclass(frozen=True)
class OmittedTensor:
    """A tensor that the adapter does not carry. `energy`: ‖Δ‖²_F of what both have of it, 0 where the base has none."""

    name: str
    why: str
    energy: float
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None

    def as_dict(self) -> dict[str, Any]:
        shapes = {"shape": list(self.shape), "base_shape": self.base_shape and list(self.base_shape)}
        return {"name": self.name, "why": self.why, "energy_total": self.energy, **shapes}


def left_out(source: DeltaSource, carried: Collection[str]) -> list[OmittedTensor]:
    """Every tensor but the `carried` ones that differs. One is in memory at a time."""
    if isinstance(source, CheckpointPair):
        found = (compare_tensor(source, name, place) for name, place in source.places.items() if name not in carried)
        return [row for row in found if row]
    if isinstance(source, SavedDeltas):
        names = [name for name in source.checkpoint if name not in carried]
        energies = {name: energy_of(matrix(source.checkpoint.tensor(name))) for name in names}
        shapes = {name: source.checkpoint.shape(name) for name in names}
        return [
            OmittedTensor(name, CHANGED, energies[name], shapes[name], shapes[name]) for name in names if energies[name]
        ]
    return []


def require_change(source: DeltaSource, energies: Mapping[str, float]) -> None:
    """DataError where no site of the source has changed (path → ‖Δ‖²_F), with what else differs and what to check."""
    if any(energies.values()):
        return
    sites = plural(len(energies), "site")
    if not isinstance(source, CheckpointPair | SavedDeltas):
        raise DataError(f"{source.description}: B·A is zero at all of its {sites}: was the adapter saved untrained?")
    rest = left_out(source, {source.sites[path].weight for path in energies} | set(energies))
    changed = [row for row in rest if row.energy or row.why == RESIZED]
    outside = f"outside them {plural(len(changed), 'tensor')} changed ({names(changed)}), which get no rank from this"
    raise DataError(
        f"{source.description}: none of the {sites} has changed; {outside if changed else 'nor has any other tensor'}. "
        "Check that these are the base and the model trained from it, that the rate was above 0, and that these "
        "matrices were trained (--towers, --include and --exclude choose which are looked at)"
    )


def unpaired(source: DeltaSource) -> list[OmittedTensor]:
    """The tensors of a pair that have no delta, because the base has none or one of another shape. Reads no tensor."""
    if not isinstance(source, CheckpointPair):
        return []
    found = []
    sites = {weight_name(site.path, source.places) for site in source.sites.values()}
    for name, place in source.places.items():
        if place.tuned is None or name in sites:
            continue
        before = shape_of(place.base, source.base) if place.base else None
        after = shape_of(place.tuned, source.tuned)
        if before != after:
            found.append(OmittedTensor(name, RESIZED if before else NEW, 0.0, after, before))
    return found


def compare_tensor(pair: CheckpointPair, name: str, place: WeightPair) -> OmittedTensor | None:
    """One tensor of both; None where they do not differ, or the tuned model has none (the base's stays then)."""
    if place.tuned is None:
        return None
    shape = shape_of(place.tuned, pair.tuned)
    if place.base is None:
        return OmittedTensor(name, NEW, 0.0, shape, None)
    old = shape_of(place.base, pair.base)
    why = CHANGED if old == shape else RESIZED
    matrices = zip(matrices_of(place.base, pair.base), matrices_of(place.tuned, pair.tuned), strict=False)
    energy = sum(common_energy(before, after) for before, after in matrices)
    return OmittedTensor(name, why, energy, shape, old) if energy or why == RESIZED else None


def common_energy(before: Tensor, after: Tensor) -> float:
    """‖after − before‖²_F over the rows and columns that both have; 0 for shapes with nothing in common."""
    if before.dim() != after.dim():
        return 0.0
    common = tuple(slice(min(sizes)) for sizes in zip(before.shape, after.shape, strict=True))
    return energy_between(matrix(before[common]), matrix(after[common]))


def matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def sentences(rows: Sequence[OmittedTensor], share: float) -> list[str]:
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


def names(rows: Sequence[OmittedTensor]) -> str:
    return ", ".join(row.name for row in by_energy(rows)[:3]) + (" …" if len(rows) > 3 else "")


def by_energy(rows: Sequence[OmittedTensor]) -> list[OmittedTensor]:
    """The most changed first."""
    return sorted(rows, key=lambda row: -row.energy)


# --- in the report ---------------------------------------------------------------------------------------------------

WORST = 14  # sites


def fidelity_blocks(content: Mapping[str, Any]) -> list[Block]:
    """Of `fidelity.json`: what is kept in total, and the sites that lose most."""
    totals = [(spaced(name), share_or_number(name, value)) for name, value in content.items() if is_number(value)]
    sites = content["sites"]
    columns = ["rank_before"] * any("rank_before" in row for row in sites) + ["rank", "parameters", "energy_kept"]
    worst = sorted(sites, key=lambda row: float(row["energy_kept"]))[:WORST]
    rows = [[row["path"], *(share_or_number(name, row.get(name)) for name in columns)] for row in worst]
    note = f"The {len(rows)} of {plural(len(sites), 'site')} that lose most." if len(rows) > 1 else ""
    table = Table(("site", *map(spaced, columns)), rows, note=note)
    return [Table((), totals), Folded("Sites", [table])]


def read_fidelity(path: Path) -> Mapping[str, Any]:
    content = DOCUMENT.read(path)
    rows = content.get("sites")
    numbers = ("rank", "energy_kept", "parameters")
    if not isinstance(rows, list) or not all(has_numbers(row, numbers, "path") for row in rows):
        raise DataError(f"{path}: expected `sites`, a list of objects with path, {', '.join(numbers)}")
    return content


FIDELITY = Finding(DOCUMENT.name, ("extract", "compress", "merge"), read_fidelity, fidelity_blocks)


def spaced(name: str) -> str:
    return name.replace("_", " ")


def share_or_number(name: str, value: Any) -> str:
    if not is_number(value):
        return ""
    return f"{100 * value:.2f} %" if name == "energy_kept" else number(value)
