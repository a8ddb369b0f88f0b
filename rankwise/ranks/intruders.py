"""Intruder dimensions: leading left singular vectors of W + Δ without a counterpart among those of W, counted by site;
and an adapter with them scaled (Shuttleworth et al. 2024, arXiv 2410.21228; PEFT: `reduce_intruder_dimension`).

    found = compare(weight, factors)              # of one matrix: the TOP leading triplets of W + Δ, with their cosines
    pair, kept = scale_intruders(pair, found, 0.5)      # their part of W + Δ halved, by factors of the pair's own rank

W's vectors: all eigenvectors of the Gram matrix of its short side, float64. Those of W + Δ: subspace iteration from
W's leading vectors and the adapter's factor, proved by a Cholesky decomposition to be the leading ones; where that
fails, or the matrix is small, all eigenvectors here too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.core.factors import Factors, balanced
from rankwise.core.site import Site
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraPair
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint, resolve
from rankwise.files.document import Document
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites, weight_table
from rankwise.page.blocks import Block, Finding, Table, Words
from rankwise.page.progress import progress
from rankwise.page.text import duration, has_numbers, plural
from rankwise.ranks.deltas import WEIGHT_TYPES, logical

TOP, COSINE = 10, 0.5  # PEFT's defaults: leading vectors per matrix, and the |cosine| below which one is an intruder
RESOLVED = 1e-12  # of the largest eigenvalue: below, a Gram matrix in float64 tells no direction
CONVERGED, ITERATIONS = 1e-12, 40
SHARE = 1 / 8  # of the short side: a wider block costs as much as all eigenvectors do
TIMED = (384, 768)  # shape of the matrix whose comparison is timed for the estimate
GRAM = 0.2  # time of a Gram matrix's entry products against an eigendecomposition's, per n³
DOCUMENT = Document(
    "intruders.json", "rankwise-intruders/1", "a count of intruder dimensions", "rankwise ranks", ("sites",)
)


@dataclass(frozen=True)
class LeadingTriplets:
    """The k ≤ TOP leading singular triplets of W + Δ: left (m, k), values (k,), right (k, n), float64, and of each left
    vector the largest |cosine| with a left singular vector of W."""

    left: Tensor
    values: Tensor
    right: Tensor
    cosines: Tensor

    @property
    def intruders(self) -> list[int]:
        return [at for at, cosine in enumerate(self.cosines.tolist()) if cosine < COSINE]


def compare(weight: Tensor, factors: Factors) -> LeadingTriplets:
    """W (m, n) and Δ as factors, on one device."""
    base = weight.double()
    changed = base + factors.left.double() @ factors.right.double()
    tall = base.shape[0] > base.shape[1]
    wide, wide_changed, factor = (base.T, changed.T, factors.right.T) if tall else (base, changed, factors.left)
    energies, vectors = torch.linalg.eigh(wide @ wide.T)
    told = energies > RESOLVED * energies[-1].clamp(min=torch.finfo(torch.float64).tiny)
    energies, vectors = energies[told], vectors[:, told]
    start = torch.cat([vectors[:, -2 * TOP :], factor.double()], 1)
    squares, found = leading(wide_changed @ wide_changed.T, start, TOP)
    values = squares.clamp(min=0).sqrt()
    told = squares > RESOLVED * squares[0]
    values, found = values[told], found[:, told]
    left, right = (changed @ found / values, found.T) if tall else (found, (changed.T @ found / values).T)
    own = base @ vectors / energies.sqrt() if tall else vectors
    cosines = (own.T @ left).abs().amax(0) if own.shape[1] else torch.zeros_like(values)
    return LeadingTriplets(left, values, right, cosines)


def leading(gram: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues (k,), descending, and eigenvectors (s, k) of a symmetric matrix (s, s) ≥ 0.

    start: (s, c), columns near them; only the time depends on it.
    """
    if start.shape[1] <= SHARE * len(gram) and (found := certified(gram, start, count)) is not None:
        return found
    values, vectors = torch.linalg.eigh(gram)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def certified(gram: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """`leading` by subspace iteration. None where it doesn't converge, or a larger eigenvalue is left: the smallest one
    found less what is left of the matrix is not positive definite then."""
    image = start
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(image).Q
        image = gram @ basis
        values, turn = torch.linalg.eigh(basis.T @ image)
        values, turn = values[-count:].flip(0), turn[:, -count:].flip(1)
        vectors = basis @ turn
        if float((image @ turn - vectors * values).norm(dim=0).max()) <= CONVERGED * float(values[0]):
            below = (vectors * values) @ vectors.T - gram
            below.diagonal().add_(values[-1] * (1 - 1e-9))
            return None if int(torch.linalg.cholesky_ex(below).info) else (values, vectors)
    return None


def scale_intruders(pair: LoraPair, found: LeadingTriplets, scale: float) -> tuple[LoraPair, float]:
    """The pair with which every intruder σuvᵀ of W + Δ is scale·σuvᵀ, to the best of the pair's own rank, and the share
    of the wanted Δ's energy that this rank holds. Without an intruder the pair itself."""
    at = found.intruders
    if not at or scale == 1:
        return pair, 1.0
    own = pair.factors()
    added = (scale - 1) * found.left[:, at] * found.values[at]
    whole = Factors(torch.cat([own.left.double(), added], 1), torch.cat([own.right.double(), found.right[at]]))
    u, values, vt = whole.svd()
    rank, squares = pair.rank, values.square()
    smaller = balanced(u[:, :rank], values[:rank], vt[:rank]).padded(rank)
    lora_a, lora_b = smaller.lora(pair.scale)
    return replace(pair, lora_A=lora_a, lora_B=lora_b), float(squares[:rank].sum() / squares.sum())


# --- over an adapter -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseMatrices:
    """The base's linear weights, read one at a time, as (out, in)."""

    name: str
    checkpoint: Checkpoint
    weights: Mapping[str, Weight]
    sites: Mapping[str, Site]

    @classmethod
    def open(cls, base: str) -> BaseMatrices:
        model, checkpoint = meta_model(base), open_checkpoint(resolve(base))
        return cls(base, checkpoint, weight_table(model, list(checkpoint)).weights, model_sites(model))

    def comparable(self, paths: Iterable[str]) -> list[Site]:
        """Those of the paths that are one linear matrix each: no experts, routers, embeddings, heads."""
        found = [self.sites[path] for path in paths if path in self.sites]
        return [site for site in found if not site.experts and site.weight in self.weights]

    def require_comparable(self, paths: Collection[str]) -> None:
        """UsageError where no path is one linear matrix."""
        if not self.comparable(paths):
            raise UsageError(
                f"--intruders needs sites that are one linear matrix each, and {self.name} has none for "
                f"{next(iter(paths))} … (experts, embeddings and heads are none); leave it out"
            )

    def read(self, site: Site) -> Tensor:
        """DataError for weights that are not stored as plain numbers, or not finite."""
        tensor = self.weights[site.weight].read(self.checkpoint)
        if tensor.dtype not in WEIGHT_TYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(f"{self.name}: {site.weight} is stored as {kind}: give the base that is not quantized")
        if not tensor.isfinite().all():
            raise DataError(f"{self.name}: {site.weight} has entries that are NaN or infinite: fetch or save it again")
        return logical(tensor, site)


@dataclass(frozen=True)
class SiteIntruders:
    """Of one site: σ and cosine of each leading singular vector of W + Δ, and which are intruders. energy_kept: share
    of the scaled Δ that the rank holds, None where nothing was scaled."""

    site: Site
    values: tuple[float, ...]
    cosines: tuple[float, ...]
    intruders: tuple[int, ...]
    energy_kept: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.site.path,
            "projection": self.site.projection,
            "shape": list(self.site.shape),
            "intruders": list(self.intruders),
            "cosines": list(self.cosines),
            "singular_values": list(self.values),
            "energy_kept": self.energy_kept,
        }


@dataclass(frozen=True)
class IntruderTable:
    """All compared sites, the paths that were not compared, and what the intruders were scaled by (None: not)."""

    rows: tuple[SiteIntruders, ...]
    skipped: tuple[str, ...] = ()
    scale: float | None = None

    @property
    def count(self) -> int:
        return sum(len(row.intruders) for row in self.rows)

    @property
    def energy_kept(self) -> float:
        """The lowest of the sites."""
        return min((row.energy_kept for row in self.rows if row.energy_kept is not None), default=1.0)

    def content(self) -> dict[str, Any]:
        return {
            "top": TOP,
            "cosine": COSINE,
            "intruders": self.count,
            "scaled_by": self.scale,
            "sites": [row.as_dict() for row in self.rows],
            "not_compared": list(self.skipped),
        }

    def write(self, folder: Path) -> Path:
        return DOCUMENT.write(folder, self.content())

    def sentence(self) -> str:
        return summary_of(self.content())

    def notes(self) -> list[str]:
        if not self.skipped:
            return []
        told = f"{plural(len(self.skipped), 'site')} ({self.skipped[0]} …) not compared with the base"
        return [f"{told}: experts, embeddings and heads have no intruder count"]


def summary_of(content: Mapping[str, Any]) -> str:
    """12 of 2,100 leading singular vectors of W + Δ have no counterpart in W, at 8 of 210 sites (most: q_proj, 5)"""
    rows = content["sites"]
    compared = sum(len(row["cosines"]) for row in rows)
    where = [row for row in rows if row["intruders"]]
    told = f"{content['intruders']:,} of {compared:,} leading singular vectors of W + Δ have no counterpart in W"
    if not where:
        return told
    by_type = Counter({row["projection"]: 0 for row in where})
    for row in where:
        by_type[row["projection"]] += len(row["intruders"])
    name, most = by_type.most_common(1)[0]
    return f"{told}, at {len(where)} of {plural(len(rows), 'site')} (most: {name}, {most})"


def examine(
    base: BaseMatrices, pairs: Mapping[str, LoraPair], scale: float | None = None, device: str = "cpu"
) -> tuple[IntruderTable, dict[str, LoraPair]]:
    """Compare every pair that the base has one matrix for; the pairs, intruders scaled where `scale` is given."""
    rows, result = [], dict(pairs)
    sites = base.comparable(pairs)
    for site in progress(sites, desc="intruders", unit="site", leave=True):
        pair = pairs[site.path]
        weight = base.read(site)
        if weight.shape != pair.shape:
            raise DataError(f"{site.path} is {pair.shape} in the adapter and {tuple(weight.shape)} in {base.name}")
        own = pair.factors()
        found = compare(weight.to(device), Factors(own.left.to(device), own.right.to(device)))
        found = LeadingTriplets(*(each.cpu() for each in (found.left, found.values, found.right, found.cosines)))
        kept = None
        if scale is not None:
            result[site.path], kept = scale_intruders(pair, found, scale)
        values, cosines, at = (tuple(each) for each in (found.values.tolist(), found.cosines.tolist(), found.intruders))
        rows.append(SiteIntruders(site, values, cosines, at, kept))
    known = {site.path for site in sites}
    return IntruderTable(tuple(rows), tuple(path for path in pairs if path not in known), scale), result


def time_note(base: BaseMatrices, pairs: Mapping[str, LoraPair], device: str = "cpu") -> str:
    """What a comparison takes, by a timed one of a small matrix: said before it starts."""
    sites = base.comparable(pairs)
    if not sites:
        return "intruders: none to count; experts, embeddings and heads have no intruder count"
    weight, left, right = (torch.randn(*size, device=device) for size in (TIMED, (TIMED[0], 8), (8, TIMED[1])))
    compare(weight[:8, :8], Factors(left[:8], right[:, :8]))
    started = time.perf_counter()
    float(compare(weight, Factors(left, right)).values[0])
    unit = (time.perf_counter() - started) / work(TIMED, 8)
    seconds = unit * sum(work(site.shape, pairs[site.path].rank) for site in sites)
    largest = max((site.shape for site in sites), key=lambda shape: (min(shape), max(shape)))
    return (
        f"intruders: singular vectors of {len(sites):,} matrices of the base (largest {largest[0]:,} × "
        f"{largest[1]:,}), about {duration(seconds)} on {device}"
    )


def work(shape: tuple[int, int], rank: int) -> float:
    """Of `compare`, in cubes: W's eigenvectors, those of W + Δ where the block is wide, and two Gram matrices."""
    short, long = sorted(shape)
    whole = 2 if 2 * TOP + rank > SHARE * short else 1 + SHARE
    return short**3 * whole + 2 * GRAM * long * short**2


# --- in the report ---------------------------------------------------------------------------------------------------

WORST = 14  # sites


def intruder_blocks(content: Mapping[str, Any]) -> list[Block]:
    scaled = content.get("scaled_by")
    said = f"{summary_of(content)} (top {content['top']} per matrix, |cosine| below {content['cosine']})."
    said += f" Scaled by {scaled:g}." if scaled is not None else ""
    rows = [row for row in content["sites"] if row["intruders"]]
    rows = sorted(rows, key=lambda row: -len(row["intruders"]))[:WORST]
    cells = [
        (row["path"], f"{len(row['intruders'])}", f"{1 + min(row['intruders'])}", f"{min(row['cosines']):.2f}")
        for row in rows
    ]
    table = Table(("site", "intruders", "first at", "lowest cosine"), cells, note="Sites with most intruders.")
    return [Words(said), *([table] if cells else [])]


def read_intruders(path: Path) -> Mapping[str, Any]:
    content = DOCUMENT.read(path)
    rows = content["sites"]
    lists = ("intruders", "cosines", "singular_values")
    if (
        not has_numbers(content, ("top", "cosine", "intruders"))
        or not isinstance(rows, list)
        or not all(isinstance(row, dict) and all(isinstance(row.get(name), list) for name in lists) for row in rows)
    ):
        raise DataError(f"{path}: expected `sites`, a list of objects with lists of {', '.join(lists)}")
    return content


INTRUDERS = Finding(DOCUMENT.name, ("ranks", "compress"), read_intruders, intruder_blocks)
