"""What was measured of a site, and what rounding did to it: corrected where it can be, refused where it is most of it.

    first, second = histories(spectrum, delta, section)       # the spectrum under both histories of its rounding
    refuse_noise(measured, config.allow_noise, warnings)

A parameter with experts has a row for each (`Measured.experts`): rounding is judged expert by expert.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rankwise.core.measure import Delta, marchenko_pastur_edge
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum, together
from rankwise.errors import DataError
from rankwise.files.adapter import LoraPair
from rankwise.options.sections import SpectrumSection

NEGLIGIBLE = 0.01  # a share of rounding noise; sites with more that cannot be corrected are reported
IDLE_NOISE = 0.001  # under a budget, which would spend on noise what nothing else wants
TOO_NOISY = 0.5  # above this share of noise, or of unchanged entries, a correction would be a guess
ALLOWED = "(--allow_noise)"
FLOAT32_DELTAS = "save float32 deltas (`rankwise finetune` does, `rankwise ranks --deltas` reads them)"


@dataclass(frozen=True)
class Measured:
    """Spectrum and statistics of one site's delta. `null_edge`: largest singular value without structure.

    `spectrum` and `noise_share` are those of weights that were rounded after training, `spectrum_both` and
    `noise_share_both` those of a base that was rounded as well; None where that makes no difference. `experts`: of a
    parameter with experts the same of each.
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
    experts: tuple[Measured, ...] = ()

    @classmethod
    def of(cls, spectrum: Spectrum, delta: Delta, section: SpectrumSection, edge: float, seconds: float) -> Measured:
        """A matrix's, by the spectrum and the statistics of its delta; edge: the `null_edge`."""
        first, both = histories(spectrum, delta, section)
        return cls(
            spectrum=first,
            spectrum_both=both,
            energy=delta.energy,
            relative_change=delta.relative_change,
            unchanged=delta.unchanged,
            noise_share=delta.noise_share,
            noise_share_both=delta.noise_share_both,
            corrected=correctable(delta, negligible(section)),
            stored_as=delta.stored_as if delta.energy else None,
            null_edge=edge,
            seconds=seconds,
        )

    @classmethod
    def of_pair(cls, pair: LoraPair) -> Measured:
        """Exact, of scale·B·A from the factors; nothing is rounded, and the base is not known."""
        started, spectrum = time.perf_counter(), pair.factors().spectrum()
        dtype, total = str(pair.lora_A.dtype).removeprefix("torch."), spectrum.energy_total
        edge, seconds = marchenko_pastur_edge(total, pair.shape), time.perf_counter() - started
        return cls(spectrum, None, total, math.nan, 0.0, 0.0, 0.0, False, dtype, edge, seconds)

    @property
    def above_null(self) -> bool:
        """Whether the delta has at least one direction that permuted entries would not produce."""
        return len(self.spectrum) > 0 and float(self.spectrum.values[0]) > self.null_edge

    @property
    def if_base_rounded(self) -> Spectrum:
        return self.spectrum_both or self.spectrum

    def facts(self) -> dict[str, Any]:
        """The plain numbers, for JSON."""
        names = [field.name for field in fields(self) if not field.name.startswith(("spectrum", "experts"))]
        return {name: getattr(self, name) for name in names}


def of_experts(rows: Sequence[Measured], base_energy: float, seconds: float) -> Measured:
    """What was measured of the parameter, by its experts' own rows. Of rounding and unchanged entries the moved experts
    tell; one that no token was routed to is as it was."""
    energy = sum(row.energy for row in rows)
    moved = [row for row in rows if row.energy]
    told = [row for row in moved if row.noise_share > NEGLIGIBLE]

    def share(value: Callable[[Measured], float]) -> float:
        return sum(row.energy * value(row) for row in moved) / energy if energy else 0.0

    return Measured(
        spectrum=together([row.spectrum for row in rows]),
        spectrum_both=together([row.if_base_rounded for row in rows]) if any(r.spectrum_both for r in rows) else None,
        energy=energy,
        relative_change=math.sqrt(energy / base_energy) if base_energy else math.inf if energy else 0.0,
        unchanged=sum(row.unchanged for row in moved) / len(moved) if moved else 1.0,
        noise_share=share(lambda row: row.noise_share),
        noise_share_both=share(lambda row: row.noise_share_both),
        corrected=any(row.corrected for row in rows) and all(row.corrected for row in told),
        stored_as="/".join(sorted({row.stored_as for row in moved if row.stored_as})) or None,
        null_edge=math.sqrt(sum(row.null_edge**2 for row in rows)),
        seconds=seconds,
        experts=tuple(rows),
    )


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
    rows = [(site.size * moved_share(row), row.unchanged) for site, row in measured.items() if row.energy > 0]
    return sum(size * share for size, share in rows) / sum(size for size, _ in rows) if rows else 0.0


def moved_share(row: Measured) -> float:
    """Share of the experts that changed at all; 1 of a single matrix."""
    return sum(each.energy > 0 for each in row.experts) / len(row.experts) if row.experts else 1.0


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
    if noise <= TOO_NOISY and unchanged <= TOO_NOISY:
        for kind, lost in uncorrected(rounded).items():
            warnings.append(f"{len(lost)} {kind} are mostly rounding and could not be corrected ({lost[0]} …)")


def uncorrected(rounded: Mapping[Site, Measured]) -> dict[str, list[str]]:
    """Matrices with more rounding than is negligible, left as they are: sites, and experts, by name."""
    found: dict[str, list[str]] = {}
    for site, row in rounded.items():
        for expert, each in enumerate(row.experts or [row]):
            if each.noise_share > NEGLIGIBLE and not each.corrected:
                kind, name = ("experts", f"{site.path}, expert {expert}") if row.experts else ("sites", site.path)
                found.setdefault(kind, []).append(name)
    return found


def dtypes(measured: Mapping[Site, Measured]) -> tuple[str, ...]:
    """Formats that the tuned values went through; sites that have not changed tell nothing."""
    found = (each.stored_as for row in measured.values() for each in row.experts or [row])
    return tuple(sorted(filter(None, set(found))))
