"""The spectra of all sites: streamed, shared among processes, corrected for rounding, with findings.

measured = measure_sites(source, RanksConfig(), question)
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from rankwise.core.measure import UNDECIDED, Delta, measure, null_edge
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.files.adapter import LoraAdapter
from rankwise.files.processes import gathered, own_share
from rankwise.options.commands import RanksConfig
from rankwise.page.progress import progress
from rankwise.ranks.deltas import DeltaSource, check_finite, deltas, on_device
from rankwise.ranks.expert_spectra import measure_experts
from rankwise.ranks.measured import Measured, histories, of_experts

Question = Callable[[Site, Spectrum], object]  # raises Undecided
Unsettled = Callable[[Mapping[Site, Spectrum]], Collection[Site]]


def site_generator(site: Site, seed: int, device: str = "cpu") -> torch.Generator:
    """Randomness keyed by the site: the same sketch whichever process draws it, in whatever order."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(site.path.encode()))


def sketch_count(sites: Collection[Site]) -> int:
    """Sketches that a run makes at most: one of a matrix, two of an expert, whose closer bounds may take another."""
    return max(1, sum(2 * site.experts or 1 for site in sites))


def measure_sites(
    source: DeltaSource, config: RanksConfig, question: Question, unsettled: Unsettled = lambda _: ()
) -> dict[Site, Measured]:
    """Every site's spectrum, in the source's order; `question` is what each must be able to answer.

    `unsettled`: from all spectra, the sites whose bounds are too wide for what is to be decided from all together; they
    are measured exactly, until there are none. Processes started by torchrun share the sites, largest first, and all of
    them get all results. Raises DataError for entries that are not finite.
    """
    sites = list(source.sites.values())
    found = measure_share(source, sites, config, question, sketch_count(sites))
    exactly = replace(config, spectrum=replace(config.spectrum, exact=True))
    while wide := wide_sites(found, sites, unsettled):
        exact = measure_share(source, wide, exactly, question)
        found |= {path: mark_undecided(row) for path, row in exact.items()}
    return {site: found[site.path] for site in sites}


def measure_share(
    source: DeltaSource, sites: Sequence[Site], config: RanksConfig, question: Question, matrices: int = 1
) -> dict[str, Measured]:
    """Path → what was measured, of these sites, by all processes together. matrices: sketches of the whole run."""
    mine = own_share(sites, [float(site.size * min(site.shape)) for site in sites])
    bar = progress(total=len(mine), desc="spectra", unit="site", leave=True)
    found: dict[str, Measured] = {}
    for site, delta in deltas(source, [site for site in mine if not site.experts]):
        found[site.path] = measure_site(site, delta, config, question, matrices)
        del delta  # or the next one would be read while this one is still held
        bar.update()
    for site in (site for site in mine if site.experts):
        generator = site_generator(site, config.seed, config.device)
        found[site.path] = measure_experts(source, site, config, question, generator, matrices)
        bar.update()
    bar.close()
    return gathered(found)


def wide_sites(found: Mapping[str, Measured], sites: Sequence[Site], unsettled: Unsettled) -> list[Site]:
    """Sites that either history leaves unsettled."""
    tuned = unsettled({site: found[site.path].spectrum for site in sites})
    both = unsettled({site: found[site.path].if_base_rounded for site in sites})
    return [site for site in sites if site in tuned or site in both]


def mark_undecided(row: Measured) -> Measured:
    """An exact result that a sketch had left open, marked as such."""

    def marked(found: Spectrum) -> Spectrum:
        return replace(found, method=found.method.replace("exact", UNDECIDED, 1))

    return replace(row, spectrum=marked(row.spectrum), spectrum_both=row.spectrum_both and marked(row.spectrum_both))


def measure_site(site: Site, delta: Delta, config: RanksConfig, question: Question, matrices: int = 1) -> Measured:
    """One site's spectra, which answer `question` under both histories of its rounding."""
    started = time.perf_counter()
    check_finite(site, delta)
    delta = on_device(delta, config.device)
    generator = site_generator(site, config.seed, config.device)
    section = config.spectrum
    exact = section.exact or section.noise_floor != "none"

    def asked(found: Spectrum) -> None:
        for spectrum in filter(None, histories(found, delta, section)):
            question(site, spectrum)

    found = measure(delta, section.max_rank, asked, exact=exact, generator=generator, matrices=matrices)
    edge = null_edge(delta, generator) if delta.energy else 0.0
    return Measured.of(found, delta, section, edge, time.perf_counter() - started)


def measure_adapter(adapter: LoraAdapter, sites: Mapping[str, Site]) -> dict[Site, Measured]:
    """Exact spectra of scale·B·A from its factors: two thin QRs and an r×r SVD each, never the dense matrix."""
    measured = {}
    for path, site in sites.items():
        pair = adapter.pairs[path]
        if site.experts:
            rows = [Measured.of_pair(pair.expert(expert)) for expert in range(site.experts)]
            measured[site] = of_experts(rows, math.nan, sum(row.seconds for row in rows))
        else:
            measured[site] = Measured.of_pair(pair)
    return measured
