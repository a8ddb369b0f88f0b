"""The spectra of all sites: streamed, shared among processes, corrected for rounding, with what was found on the way.

measured = measure_sites(source, MeasureSettings(up_to=128), question)
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from rankwise.core.measure import Delta, marchenko_pastur_edge, measure, null_edge
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError
from rankwise.store.adapter import LoraAdapter
from rankwise.store.deltas import DeltaSource, check_finite, deltas
from rankwise.store.processes import gathered, own_share

NEGLIGIBLE = 0.01  # a share of rounding noise below which nothing is corrected
TOO_NOISY = 0.5  # above this share of noise, or of unchanged entries, a correction would be a guess


@dataclass(frozen=True)
class MeasureSettings:
    """`up_to` singular values per site; `noise_floor` cuts the spectrum's own noise before the energy rule."""

    up_to: int = 128
    exact: bool = False
    noise_floor: str = "none"
    device: str = "cpu"
    seed: int = 42


@dataclass(frozen=True)
class Measured:
    """One site's spectrum and what its delta looked like. `null_edge`: largest singular value without structure."""

    spectrum: Spectrum
    energy: float
    relative_change: float
    unchanged: float
    noise_share: float
    corrected: bool
    stored_as: str
    null_edge: float
    seconds: float

    @property
    def above_null(self) -> bool:
        """Whether the delta has at least one direction that permuted entries would not produce."""
        return len(self.spectrum) > 0 and float(self.spectrum.values[0]) > self.null_edge

    def facts(self) -> dict[str, Any]:
        """The plain numbers, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "spectrum"}


def site_generator(site: Site, seed: int, device: str = "cpu") -> torch.Generator:
    """Randomness keyed by the site: the same sketch whichever process draws it, in whatever order."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(site.path.encode()))


def measure_sites(
    source: DeltaSource, settings: MeasureSettings, question: Callable[[Site, Spectrum], object]
) -> dict[Site, Measured]:
    """Every site's spectrum, in the source's order; `question` is what the spectra must be able to answer.

    Processes started by torchrun share the sites, largest first, and all of them get all results. Raises
    DataError for entries that are not finite.
    """
    sites = list(source.sites.values())
    mine = own_share(sites, [float(site.size * min(site.shape)) for site in sites])
    bar = tqdm(total=len(mine), desc="spectra", unit="site", disable=not sys.stderr.isatty())
    found: dict[str, Measured] = {}
    for site, delta in deltas(source, mine):
        found[site.path] = measure_site(site, delta, settings, question)
        del delta  # or the next one would be read while this one is still held
        bar.update()
    bar.close()
    everything = gathered(found)
    return {site: everything[site.path] for site in sites}


def measure_site(
    site: Site, delta: Delta, settings: MeasureSettings, question: Callable[[Site, Spectrum], object]
) -> Measured:
    started = time.perf_counter()
    check_finite(site, delta)
    delta = on_device(delta, settings.device)
    generator = site_generator(site, settings.seed, settings.device)
    exact = settings.exact or settings.noise_floor != "none"
    spectrum = measure(
        delta,
        settings.up_to,
        lambda found: question(site, denoised(found, delta, settings.noise_floor)),
        exact=exact,
        generator=generator,
    )
    return Measured(
        spectrum=denoised(spectrum, delta, settings.noise_floor),
        energy=delta.energy,
        relative_change=delta.relative_change,
        unchanged=delta.unchanged,
        noise_share=delta.noise_share,
        corrected=correctable(delta),
        stored_as=delta.stored_as,
        null_edge=null_edge(delta, generator) if delta.energy else 0.0,
        seconds=time.perf_counter() - started,
    )


def on_device(delta: Delta, device: str) -> Delta:
    if device == "cpu":
        return delta
    return Delta(**{**vars(delta), "matrix": delta.matrix.to(device)})


def correctable(delta: Delta) -> bool:
    """Whether rounding is large enough to matter and small enough to be white noise of known energy."""
    return NEGLIGIBLE < delta.noise_share <= TOO_NOISY and delta.unchanged <= TOO_NOISY


def denoised(spectrum: Spectrum, delta: Delta, noise_floor: str) -> Spectrum:
    if spectrum.is_zero:
        return spectrum
    if correctable(delta):
        spectrum = spectrum.without_noise(delta.rounding_energy)
    return spectrum if noise_floor == "none" else spectrum.cut(noise_floor)


def noise_share(measured: Mapping[Site, Measured]) -> float:
    """Share of all the deltas' energy that rounding to 16 bits is expected to have put there."""
    total = sum(row.energy for row in measured.values())
    return sum(row.energy * row.noise_share for row in measured.values()) / total if total else 0.0


def unchanged_share(measured: Mapping[Site, Measured]) -> float:
    """Share of entries that are equal in both checkpoints, over the sites that changed at all."""
    rows = [(site.size, row.unchanged) for site, row in measured.items() if row.energy > 0]
    return sum(size * share for size, share in rows) / sum(size for size, _ in rows) if rows else 0.0


def refuse_noise(measured: Mapping[Site, Measured], allowed: bool, warnings: list[str]) -> None:
    """Refuse to plan from rounding noise; warn where the spectra were corrected for it."""
    rounded = {site: row for site, row in measured.items() if row.noise_share > 0}
    if not rounded:
        return
    noise, unchanged = noise_share(rounded), unchanged_share(rounded)
    kinds = "/".join(sorted({row.stored_as for row in rounded.values()}))
    finding = f"{kinds} weights: {noise:.0%} of the delta's energy is rounding, {unchanged:.0%} of entries unchanged"
    if noise > TOO_NOISY or unchanged > TOO_NOISY:
        if not allowed:
            raise DataError(
                f"{finding}. No ranks can be read from this: save the fine-tune in float32 (`rankwise finetune` does), "
                "train longer or with a larger rate, or pass --allow_noise to get ranks of the noise"
            )
        warnings.append(f"{finding}: THESE RANKS DESCRIBE NOISE (--allow_noise)")
    elif noise > NEGLIGIBLE:
        warnings.append(f"{finding}; spectra corrected for it (optimal shrinkage): ranks are estimates")
    lost = [site.path for site, row in rounded.items() if row.noise_share > NEGLIGIBLE and not row.corrected]
    if lost and noise <= TOO_NOISY and unchanged <= TOO_NOISY:
        warnings.append(f"{len(lost)} sites are mostly rounding and could not be corrected ({lost[0]} …)")


def dtypes(measured: Mapping[Site, Measured]) -> tuple[str, ...]:
    return tuple(sorted({row.stored_as for row in measured.values()}))


def measure_adapter(adapter: LoraAdapter, sites: Mapping[str, Site]) -> dict[Site, Measured]:
    """Exact spectra of scale·B·A from its factors: two thin QRs and an r×r SVD each, never the dense matrix."""
    measured = {}
    for path, site in sites.items():
        started = time.perf_counter()
        spectrum = adapter.pairs[path].factors().spectrum()
        measured[site] = Measured(
            spectrum=spectrum,
            energy=spectrum.energy_total,
            relative_change=float("nan"),
            unchanged=0.0,
            noise_share=0.0,
            corrected=False,
            stored_as=str(adapter.pairs[path].lora_A.dtype).removeprefix("torch."),
            null_edge=marchenko_pastur_edge(spectrum.energy_total, site.shape),
            seconds=time.perf_counter() - started,
        )
    return measured
