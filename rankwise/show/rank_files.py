"""What `rankwise ranks` leaves on the disk besides the plan: raw data, plots, deltas, configs for other trainers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.errors import UsageError
from rankwise.files.atomic import atomic_write, write_json, write_text
from rankwise.score.gain import Gain
from rankwise.score.histories import Histories
from rankwise.show.emit import emit
from rankwise.show.plots import plot_decay, plot_energy_heatmap, plot_gain, plot_ranks_heatmap
from rankwise.store.deltas import DeltaSource
from rankwise.store.spectra import Measured

SVD_FOLDER = Path("analysis_outputs") / "svd"


@dataclass(frozen=True)
class Evidence:
    """What was measured about the plan beyond its spectra; None where there was nothing to measure."""

    gain: Gain | None = None
    repeats: Mapping[str, Any] | None = None
    explained_loss: float | None = None
    rounding: Histories | None = None


def write_raw_data(
    folder: Path, plan: RankPlan, measured: Mapping[Site, Measured], threshold: float, evidence: Evidence
) -> list[Path]:
    """`detailed_svd_analysis.json` per site, and what was measured about the plan as a whole."""
    rows = {row.site.path: row for row in plan.sites}
    details = {
        site.path: {
            "original_shape": list(site.shape),
            "r_raw": rows[site.path].r_raw,
            "r_final": rows[site.path].rank,
            "rank_if_base_rounded": rows[site.path].rank_if_base_rounded,
            "energy_retained": rows[site.path].energy_retained,
            "decay_rate": rows[site.path].as_dict()["decay_rate"],
            "compression_ratio": rows[site.path].compression_ratio,
            "singular_values": found.spectrum.values.tolist(),
            "complete": found.spectrum.complete,
            "residual": found.spectrum.residual,
            "entropy_rank": found.spectrum.entropy_rank,
            "entropy_rank_missing_because": None
            if found.spectrum.entropy_rank is not None
            else "needs every value: --exact",
            "stable_rank": found.spectrum.stable_rank,
            "saturated": rows[site.path].saturated,
            "method": found.spectrum.method,
            **{name: finite(value) for name, value in found.facts().items()},
        }
        for site, found in measured.items()
    }
    content = {"svd_threshold": threshold, "sites": details, "explained_loss": evidence.explained_loss}
    files = [write_json(folder / "raw_data" / "detailed_svd_analysis.json", content)]
    if evidence.gain is not None:
        files.append(write_json(folder / "raw_data" / "gain.json", evidence.gain.as_dict()))
    if evidence.repeats is not None:
        files.append(write_json(folder / "raw_data" / "repeatability.json", dict(evidence.repeats)))
    return files


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return value if not isinstance(value, float) or abs(value) < float("inf") else None


def write_plots(
    folder: Path, plan: RankPlan, measured: Mapping[Site, Measured], threshold: float, evidence: Evidence
) -> None:
    """Two heatmaps, one decay plot per site, and the gain kept where it was measured."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    plot_ranks_heatmap(plan, plots / "ranks_heatmap.png")
    plot_energy_heatmap(plan, plots / "energy_heatmap.png")
    if evidence.gain is not None and evidence.gain.defined:
        plot_gain(evidence.gain.as_dict(), plots / "gain.png")
    for row in tqdm(plan.sites, desc="plots", unit="site", disable=not sys.stderr.isatty()):
        found = measured[row.site]
        plot_decay(found.spectrum, row, threshold, plots / f"{row.site.path}.png", found.null_edge)


def write_delta_weights(folder: Path, source: DeltaSource, sites: Sequence[Site]) -> Path:
    """The analysed deltas as one float32 safetensors file, in the orientation of the module: (out, in)."""
    path = folder / "delta_weights.safetensors"
    with atomic_write(path) as temporary:
        save_file({f"{site.path}.weight": source.read(site).matrix.contiguous() for site in sites}, str(temporary))
    return path


def write_emitted(folder: Path, plan: RankPlan, trainers: Sequence[str], experts: bool) -> tuple[list[Path], list[str]]:
    """One config per trainer, and why the others cannot take the plan: known only now that it has been measured."""
    files, refused = [], []
    for trainer in trainers:
        try:
            text, suffix = emit(plan, trainer, experts)
        except UsageError as error:
            refused.append(str(error))
            continue
        files.append(write_text(folder / f"{trainer}.{suffix}", text + "\n"))
    return files, refused
