"""The spectra of all sites: streamed, shared among processes, corrected for rounding, with findings.

measured = measure_sites(source, RanksConfig(), question)
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from tqdm import tqdm

from rankwise.core.measure import UNDECIDED, Delta, marchenko_pastur_edge, measure, null_edge
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError
from rankwise.files.adapter import LoraAdapter
from rankwise.files.processes import gathered, own_share
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SpectrumSection
from rankwise.ranks.deltas import DeltaSource, check_finite, deltas

NEGLIGIBLE = 0.01  # a share of rounding noise; sites with more that cannot be corrected are reported
IDLE_NOISE = 0.001  # under a budget, which would spend on noise what nothing else wants
TOO_NOISY = 0.5  # above this share of noise, or of unchanged entries, a correction would be a guess
ALLOWED = "(--allow_noise)"
FLOAT32_DELTAS = "save float32 deltas (`rankwise finetune` does, `rankwise ranks --deltas` reads them)"
Question = Callable[[Site, Spectrum], object]  # raises Undecided
Unsettled = Callable[[Mapping[Site, Spectrum]], Collection[Site]]


@dataclass(frozen=True)
class Measured:
    """Spectrum and statistics of one site's delta. `null_edge`: largest singular value without structure.

    `spectrum` and `noise_share` are those of weights that were rounded after training, `spectrum_both` and
    `noise_share_both` those of a base that was rounded as well; None where that makes no difference.
    """

    spectrum: Spectrum
    spectrum_both: Spectrum | None
    energy: float
    relative_change: float
    unchanged: float
    noise_share: float
    noise_share_both: float
    corrected: bool
    stored_as: str | None
    null_edge: float
    seconds: float

    @property
    def above_null(self) -> bool:
        """Whether the delta has at least one direction that permuted entries would not produce."""
        return len(self.spectrum) > 0 and float(self.spectrum.values[0]) > self.null_edge

    @property
    def if_base_rounded(self) -> Spectrum:
        return self.spectrum_both or self.spectrum

    def facts(self) -> dict[str, Any]:
        """The plain numbers, for JSON."""
        names = [field.name for field in fields(self) if not field.name.startswith("spectrum")]
        return {name: getattr(self, name) for name in names}


def site_generator(site: Site, seed: int, device: str = "cpu") -> torch.Generator:
    """Randomness keyed by the site: the same sketch whichever process draws it, in whatever order."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(site.path.encode()))


def measure_sites(
    source: DeltaSource, config: RanksConfig, question: Question, unsettled: Unsettled = lambda _: ()
) -> dict[Site, Measured]:
    """Every site's spectrum, in the source's order; `question` is what each must be able to answer.

    `unsettled`: from all spectra, the sites whose bounds are too wide for what is to be decided from all together; they
    are measured exactly, until there are none. Processes started by torchrun share the sites, largest first, and all of
    them get all results. Raises DataError for entries that are not finite.
    """
    sites = list(source.sites.values())
    found = measure_share(source, sites, config, question)
    exactly = replace(config, spectrum=replace(config.spectrum, exact=True))
    while wide := wide_sites(found, sites, unsettled):
        exact = measure_share(source, wide, exactly, question)
        found |= {path: mark_undecided(row) for path, row in exact.items()}
    return {site: found[site.path] for site in sites}


def measure_share(
    source: DeltaSource, sites: Sequence[Site], config: RanksConfig, question: Question
) -> dict[str, Measured]:
    """Path → what was measured, of these sites, by all processes together."""
    mine = own_share(sites, [float(site.size * min(site.shape)) for site in sites])
    bar = tqdm(total=len(mine), desc="spectra", unit="site", disable=not sys.stderr.isatty())
    found: dict[str, Measured] = {}
    for site, delta in deltas(source, mine):
        found[site.path] = measure_site(site, delta, config, question)
        del delta  # or the next one would be read while this one is still held
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


def measure_site(site: Site, delta: Delta, config: RanksConfig, question: Question) -> Measured:
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

    found = measure(delta, section.max_rank, asked, exact=exact, generator=generator)
    spectrum, spectrum_both = histories(found, delta, section)
    return Measured(
        spectrum=spectrum,
        spectrum_both=spectrum_both,
        energy=delta.energy,
        relative_change=delta.relative_change,
        unchanged=delta.unchanged,
        noise_share=delta.noise_share,
        noise_share_both=delta.noise_share_both,
        corrected=correctable(delta, negligible(section)),
        stored_as=delta.stored_as if delta.energy else None,
        null_edge=null_edge(delta, generator) if delta.energy else 0.0,
        seconds=time.perf_counter() - started,
    )


def on_device(delta: Delta, device: str) -> Delta:
    return delta if device == "cpu" else replace(delta, matrix=delta.matrix.to(device))


def negligible(section: SpectrumSection) -> float:
    """Share of rounding noise below which nothing is corrected: a tenth of what the threshold leaves out."""
    return IDLE_NOISE if section.budget else (1 - section.svd_threshold) / 10


def correctable(delta: Delta, least: float) -> bool:
    """Whether rounding is large enough to matter and small enough to be white noise of known energy."""
    return least < delta.noise_share <= TOO_NOISY and delta.unchanged <= TOO_NOISY


def histories(spectrum: Spectrum, delta: Delta, section: SpectrumSection) -> tuple[Spectrum, Spectrum | None]:
    """The spectrum if only the tuned weights were rounded, and if the base was rounded as well (None: the same).

    The second is ruled out where few entries are unchanged and yet the delta has less energy than
    two roundings make. Where the first cannot be corrected, the second lacks all that rounding can have made.
    """
    least = negligible(section)
    noise, alone = delta.rounding_energy + delta.base_rounding, correctable(delta, least)
    first = spectrum.without_noise(delta.rounding_energy) if alone else spectrum
    ruled_out = alone and noise >= delta.energy
    matters = delta.noise_share_both > least and not ruled_out
    second = spectrum.without_noise(min(noise, delta.energy)) if matters else None
    if section.noise_floor == "none" or spectrum.is_zero:
        return first, second
    return first.cut(section.noise_floor), second and second.cut(section.noise_floor)


def noise_share(measured: Mapping[Site, Measured]) -> float:
    """Share of all the deltas' energy that rounding of the tuned weights is expected to have put there."""
    return weighted(measured, lambda row: row.noise_share)


def noise_share_both(measured: Mapping[Site, Measured]) -> float:
    """The same if the base is a rounded copy as well."""
    return weighted(measured, lambda row: row.noise_share_both)


def weighted(measured: Mapping[Site, Measured], share: Callable[[Measured], float]) -> float:
    total = sum(row.energy for row in measured.values())
    return sum(row.energy * share(row) for row in measured.values()) / total if total else 0.0


def unchanged_share(measured: Mapping[Site, Measured]) -> float:
    """Share of entries that are equal in both checkpoints, over the sites that changed at all."""
    rows = [(site.size, row.unchanged) for site, row in measured.items() if row.energy > 0]
    return sum(size * share for size, share in rows) / sum(size for size, _ in rows) if rows else 0.0


def finding(measured: Mapping[Site, Measured]) -> str:
    """The effect of rounding on these deltas, in numbers."""
    noise, both, unchanged = noise_share(measured), noise_share_both(measured), unchanged_share(measured)
    more = f" ({both:.0%} if the base is a rounded copy as well)" if both > noise else ""
    return (
        f"{'/'.join(dtypes(measured))} weights: {noise:.0%} of the delta's energy is rounding{more}, "
        f"{unchanged:.0%} of entries unchanged"
    )


def refuse_noise(measured: Mapping[Site, Measured], allowed: bool, warnings: list[str]) -> None:
    """Refuse to plan from rounding noise; warn where the spectra were corrected for it."""
    rounded = {site: row for site, row in measured.items() if row.noise_share > 0}
    if not rounded:
        return
    noise, unchanged = noise_share(rounded), unchanged_share(rounded)
    if noise > TOO_NOISY or unchanged > TOO_NOISY:
        if not allowed:
            raise DataError(
                f"{finding(rounded)}. No ranks can be read from this: {FLOAT32_DELTAS}, train longer or with a larger "
                "rate, or pass --allow_noise to get ranks of the noise"
            )
        warnings.append(f"{finding(rounded)}: THESE RANKS DESCRIBE NOISE {ALLOWED}")
    elif any(row.corrected for row in rounded.values()):
        warnings.append(f"{finding(rounded)}; spectra corrected for it (optimal shrinkage): ranks are estimates")
    lost = [site.path for site, row in rounded.items() if row.noise_share > NEGLIGIBLE and not row.corrected]
    if lost and noise <= TOO_NOISY and unchanged <= TOO_NOISY:
        warnings.append(f"{len(lost)} sites are mostly rounding and could not be corrected ({lost[0]} …)")


def dtypes(measured: Mapping[Site, Measured]) -> tuple[str, ...]:
    """Formats that the tuned values went through; sites that have not changed tell nothing."""
    return tuple(sorted({row.stored_as for row in measured.values() if row.stored_as}))


def measure_adapter(adapter: LoraAdapter, sites: Mapping[str, Site]) -> dict[Site, Measured]:
    """Exact spectra of scale·B·A from its factors: two thin QRs and an r×r SVD each, never the dense matrix."""
    measured = {}
    for path, site in sites.items():
        started = time.perf_counter()
        spectrum = adapter.pairs[path].factors().spectrum()
        dtype = str(adapter.pairs[path].lora_A.dtype).removeprefix("torch.")
        total, edge = spectrum.energy_total, marchenko_pastur_edge(spectrum.energy_total, site.shape)
        found = Measured(spectrum, None, total, float("nan"), 0.0, 0.0, 0.0, False, dtype, edge, 0.0)  # nothing rounded
        measured[site] = replace(found, seconds=time.perf_counter() - started)
    return measured
