"""Outputs of `rankwise ranks` besides the plan: raw data, its plots, the analysed deltas.

write_raw_data(folder, plan, measured, threshold, evidence)     # detailed_svd_analysis.json, gain.json, …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.files.atomic import atomic_write, write_json
from rankwise.page.progress import progress
from rankwise.ranks.decide import Evidence
from rankwise.ranks.deltas import SHARD_BYTES, DeltaSource, dense, shards
from rankwise.ranks.expert_map import CHANGES, expert_facts, plot_expert_map
from rankwise.ranks.intruders import DOCUMENT as INTRUDERS
from rankwise.ranks.measured import Measured
from rankwise.ranks.plots import plot_decay, plot_energy_heatmap, plot_gain, plot_ranks_heatmap

SVD_FOLDER = Path("analysis_outputs") / "svd"
RAW_DATA = SVD_FOLDER / "raw_data"
OPTIONAL = (CHANGES.name, INTRUDERS.name, "gain.json", "repeatability.json")


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
    for earlier in OPTIONAL:  # an earlier run's, given more than this one
        (folder / earlier).unlink(missing_ok=True)
    files = [write_json(folder / "detailed_svd_analysis.json", content)]
    if experts := expert_facts(measured, threshold):
        files.append(CHANGES.write(folder, experts))
    if evidence.intruders:
        files.append(evidence.intruders.write(folder))
    if evidence.gain is not None:
        chosen = {"choice": evidence.choice.facts()} if evidence.choice else {}
        files.append(write_json(folder / "gain.json", evidence.gain.as_dict() | chosen))
    if evidence.repeats is not None:
        files.append(write_json(folder / "repeatability.json", dict(evidence.repeats)))
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
    if experts := expert_facts(measured, threshold):
        plot_expert_map(experts, plots / "expert_map.png")
    if evidence.gain is not None and evidence.gain.defined:
        plot_gain(evidence.gain.as_dict(), plots / "gain.png")
    for row in progress(plan.sites, desc="plots", unit="site"):
        found = measured[row.site]
        plot_decay(found.spectrum, row, threshold, plots / f"{row.site.path}.png", found.null_edge)


def write_delta_weights(
    folder: Path, source: DeltaSource, sites: Sequence[Site], limit: int = SHARD_BYTES
) -> list[Path]:
    """The analysed deltas in float32, in the orientation of the module: (out, in); experts (E, out, in).

    One safetensors file; of more than `limit` bytes shards and their index. One shard is in memory at a time.
    """
    named = {site.weight: site for site in sites}
    shapes = {name: torch.empty((site.matrices, *site.shape), device="meta") for name, site in named.items()}
    groups = list(shards(shapes, limit))
    places: dict[str, str] = {}
    files = []
    for number, names in enumerate(groups, 1):
        shard = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        files.append(folder / f"delta_weights{shard}.safetensors")
        with atomic_write(files[-1]) as temporary:
            save_file({name: dense(source, named[name]).matrix.contiguous() for name in names}, str(temporary))
        places |= dict.fromkeys(names, files[-1].name)
    if len(groups) > 1:
        size = 4 * sum(one.numel() for one in shapes.values())
        content = {"metadata": {"total_size": size}, "weight_map": places}
        files.append(write_json(folder / "delta_weights.safetensors.index.json", content))
    return files
