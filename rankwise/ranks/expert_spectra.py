"""Spectra of a layer's experts, streamed: a few matrices at a time, sketched together, never the whole parameter.

    measured = measure_experts(source, site, config, question)      # Measured of the parameter, with one per expert

The parameter's spectrum is σᵢ² = Σ_e σ²_{e,i}, so that rank r for each keeps Σ_e Σ_{i≤r} σ²_{e,i} of its energy.
‖Δ_e‖² is exact, and rounding is judged expert by expert. Where the sketches leave the question open, closer bounds of
all answer it, else exact spectra of the experts with the widest bounds, one after another until it is answered.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rankwise.core.measure import (
    UNDECIDED,
    Delta,
    Sketch,
    exact_spectrum,
    is_small,
    null_edge,
    sketches,
    zero_spectrum,
)
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum, Undecided
from rankwise.options.commands import RanksConfig
from rankwise.ranks.deltas import DeltaSource, read_expert
from rankwise.ranks.measured import Measured, of_experts

AT_ONCE = {"cpu": 2**25, "cuda": 2**31}  # bytes of float32 deltas: what a batch gains on a CPU, two matrices give
TRIMMED = 8  # batches between two returns of freed memory, which each cost as much as touching it again
Question = Callable[[Site, Spectrum], object]  # raises Undecided
Sketched = Callable[[Sketch], Spectrum]


@dataclass(frozen=True)
class ExpertDelta:
    """One expert's spectrum, and of its delta all but the matrix."""

    spectrum: Spectrum
    delta: Delta
    edge: float

    @property
    def gap(self) -> float:
        """How much energy the bounds of its spectrum leave open."""
        return float(self.spectrum.missed()[-1]) if len(self.spectrum) else 0.0


def measure_experts(
    source: DeltaSource,
    site: Site,
    config: RanksConfig,
    question: Question,
    generator: torch.Generator,
    matrices: int = 1,
) -> Measured:
    """The parameter's spectra, which answer `question` under both histories of its rounding, and its experts'.

    matrices: sketches of the whole run, as for `core.measure.measure`.

    DataError, naming parameter and expert, for entries that are not finite.
    """
    started = time.perf_counter()
    section = config.spectrum
    found: dict[int, ExpertDelta] = {}
    rows: dict[int, Measured] = {}

    def take(new: Mapping[int, ExpertDelta]) -> None:
        found.update(new)
        rows.update({e: Measured.of(one.spectrum, one.delta, section, one.edge, 0.0) for e, one in new.items()})

    def known(base_energy: float = math.nan) -> Measured:
        return of_experts([rows[expert] for expert in sorted(rows)], base_energy, time.perf_counter() - started)

    def answered() -> bool:
        so_far = known()
        try:
            for spectrum in filter(None, (so_far.spectrum, so_far.spectrum_both)):
                question(site, spectrum)
        except Undecided:
            return False
        return True

    def exact(expert: int, method: str) -> ExpertDelta:
        return exactly(read_expert(source, site, expert, config.device), generator, method)

    if section.exact or section.noise_floor != "none" or is_small(site.shape, section.max_rank):
        for expert in range(site.experts):
            take({expert: exact(expert, "exact")})
    else:
        bound: Sketched = Sketch.spectrum
        for number, batch in enumerate(batches(site, config.device)):
            bounded = sketch_batch(source, site, batch, config, generator, matrices)
            take(bounded(bound))
            if batch.start == 0 and not answered():  # the first experts tell how close the bounds have to be
                bound = Sketch.refined
                take(bounded(bound))
            if number % TRIMMED == 0:
                return_freed_memory()
        if bound is Sketch.spectrum and not answered():
            for batch in batches(site, config.device):
                take(sketch_batch(source, site, batch, config, generator, matrices)(Sketch.refined))
        for expert in sorted(found, key=lambda each: -found[each].gap):
            if answered():
                break
            take({expert: exact(expert, UNDECIDED)})
    return known(sum(row.delta.base_energy for row in found.values()))


def return_freed_memory() -> None:
    """Return freed memory to the system, where the allocator is glibc's: the little that is kept of each expert lies
    between the pages of freed matrices, and a heap that is only cut at its end grows by 0.6 MiB an expert."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def batches(site: Site, device: str) -> Iterator[range]:
    """The experts, as many at once as have AT_ONCE bytes."""
    size = max(1, AT_ONCE["cuda" if device.startswith("cuda") else "cpu"] // (4 * math.prod(site.shape)))
    for start in range(0, site.experts, size):
        yield range(start, min(start + size, site.experts))


def exactly(delta: Delta, generator: torch.Generator, method: str = "exact") -> ExpertDelta:
    if not delta.energy:
        return unmoved(delta, (delta.matrix.shape[0], delta.matrix.shape[1]))
    return ExpertDelta(exact_spectrum(delta.matrix, delta.energy, method), bare(delta), null_edge(delta, generator))


def unmoved(delta: Delta, shape: tuple[int, int]) -> ExpertDelta:
    return ExpertDelta(zero_spectrum(shape, min(shape)), bare(delta), 0.0)


def bare(delta: Delta) -> Delta:
    """Without the matrix, which is not kept."""
    return replace(delta, matrix=torch.empty(0))


def sketch_batch(
    source: DeltaSource,
    site: Site,
    batch: Sequence[int],
    config: RanksConfig,
    generator: torch.Generator,
    matrices: int,
) -> Callable[[Sketched], dict[int, ExpertDelta]]:
    """Read and sketch these experts together; what comes back gives their spectra with the bound that is asked for."""
    stack = torch.empty(len(batch), *site.shape, device=config.device)
    facts, edges = [], []
    for place, expert in enumerate(batch):
        delta = read_expert(source, site, expert, config.device)
        stack[place] = delta.matrix
        edges.append(null_edge(delta, generator) if delta.energy else 0.0)
        facts.append(bare(delta))
        del delta  # or the next one would be read while this one is still held
    found = sketches(stack, [each.energy for each in facts], config.spectrum.max_rank, generator, matrices)

    def bounded(bound: Sketched) -> dict[int, ExpertDelta]:
        rows = zip(batch, facts, edges, found, strict=True)
        return {
            expert: ExpertDelta(bound(each), delta, edge) if delta.energy else unmoved(delta, site.shape)
            for expert, delta, edge, each in rows
        }

    return bounded
