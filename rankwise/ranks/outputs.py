"""A rank plan as a config for the trainer that people already use: exactly the plan, or why it cannot be said.

What each trainer takes was read in its package (November 2026): axolotl 0.19.0 and unsloth 2026.10.9 hand
`rank_pattern` and `alpha_pattern` on to PEFT; ms-swift 4.6.0 and LLaMA-Factory 0.9.5 have one rank. Targets are whole
module paths everywhere: a bare projection name would train it in every layer and tower. LLaMA-Factory takes names only,
and its table of model families decides what of a vision tower or projector may train.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from tqdm import tqdm

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.errors import UsageError
from rankwise.files.atomic import atomic_write, write_json, write_text
from rankwise.models.adapt import lora_config
from rankwise.ranks.deltas import DeltaSource
from rankwise.ranks.gain import Gain
from rankwise.ranks.histories import Histories
from rankwise.ranks.plots import plot_decay, plot_energy_heatmap, plot_gain, plot_ranks_heatmap
from rankwise.ranks.spectra import Measured

INSTEAD = "train it with `rankwise train --lora-config`, or emit"
# PEFT takes these names of a model with fused experts for the experts themselves.
EXPERT_NAMES = frozenset(["gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"])
Fields = dict[str, Any]
Targets = str | list[str]


def lora_fields(plan: RankPlan) -> Fields:
    """PEFT's fields as `train` has them, without what is empty or off, and without targets."""
    config = lora_config(plan)
    fields = {
        "r": config.r,
        "lora_alpha": whole(config.lora_alpha),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {key: whole(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": config.fan_in_fan_out,
    }
    return {name: value for name, value in fields.items() if value}


def whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def full_paths(plan: RankPlan, trainer: str) -> list[str]:
    """The paths as names, which match every module whose path ends like one. UsageError where another site's does."""
    for path in plan.ranks:
        other = next((row.site.path for row in plan.sites if row.site.path.endswith(f".{path}")), None)
        if other:
            raise UsageError(f"--emit {trainer} takes names, and {path} is the end of {other} too; {INSTEAD} peft")
    return list(plan.ranks)


def targets(plan: RankPlan, trainer: str, experts: bool) -> Targets:
    """All sites as one anchored regex; as full paths for a model with fused experts, of whose regex PEFT keeps the
    bare names. UsageError for names that it takes for the experts."""
    if not experts:
        return str(lora_config(plan).target_modules)
    taken = [row.site.path for row in plan.sites if row.rank and row.site.projection in EXPERT_NAMES]
    if taken:
        raise UsageError(
            f"--emit {trainer}: the model has fused experts, and PEFT would train those in place of {taken[0]}; make a "
            "plan without such sites (--exclude)"
        )
    return full_paths(plan, trainer)


def peft(plan: RankPlan, experts: bool) -> Fields:
    """`LoraConfig(**json.load(open(...)))`."""
    return {**lora_fields(plan), "target_modules": targets(plan, "peft", experts), "task_type": "CAUSAL_LM"}


def unsloth(plan: RankPlan, experts: bool) -> Fields:
    """`FastLanguageModel.get_peft_model(model, **json.load(open(...)))`; what it does not know goes to LoraConfig."""
    if experts:
        raise UsageError(f"--emit unsloth: it adds a model's fused experts to what trains; {INSTEAD} peft or axolotl")
    return {**lora_fields(plan), "target_modules": targets(plan, "unsloth", experts)}


def axolotl(plan: RankPlan, experts: bool) -> Fields:
    """Whole alphas only."""
    names = {
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "rank_pattern": "lora_rank_pattern",
        "alpha_pattern": "lora_alpha_pattern",
        "use_rslora": "peft_use_rslora",
        "fan_in_fan_out": "lora_fan_in_fan_out",
    }
    fields = lora_fields(plan)
    require_whole([fields["lora_alpha"], *fields.get("alpha_pattern", {}).values()], "axolotl", "peft or unsloth")
    return {
        **model("base_model", plan),
        "adapter": "lora",
        **{names[name]: value for name, value in fields.items()},
        "lora_target_modules": targets(plan, "axolotl", experts),
    }


def swift(plan: RankPlan, experts: bool) -> Fields:
    """`swift sft swift.yaml …`."""
    found = targets(plan, "swift", experts)
    return {
        **model("model", plan),
        "tuner_type": "lora",
        **one_rank(plan, "swift"),
        ("target_regex" if isinstance(found, str) else "target_modules"): found,
    }


def llamafactory(plan: RankPlan, experts: bool) -> Fields:
    """`llamafactory-cli train llamafactory.yaml`."""
    outside = sorted({row.site.tower for row in plan.sites if row.rank} - {"language"})
    if outside:
        raise UsageError(
            f"--emit llamafactory: what trains of a {outside[0]} tower is decided by its own table of model families, "
            f"not by names; {INSTEAD} peft, axolotl, swift or unsloth"
        )
    fields = one_rank(plan, "llamafactory")
    require_whole([fields["lora_alpha"]], "llamafactory", "peft or unsloth")
    found = targets(plan, "llamafactory", experts)
    names = found if isinstance(found, list) else full_paths(plan, "llamafactory")
    return {**model("model_name_or_path", plan), "finetuning_type": "lora", **fields, "lora_target": ",".join(names)}


def model(key: str, plan: RankPlan) -> Fields:
    return {key: plan.model_name} if plan.model_name else {}


def one_rank(plan: RankPlan, trainer: str) -> Fields:
    """Rank and alpha of a trainer that has one of each. UsageError for a plan of several."""
    fields, ranks = lora_fields(plan), plan.ranks.values()
    if "rank_pattern" in fields or "alpha_pattern" in fields:
        raise UsageError(
            f"--emit {trainer}: it takes one rank for all matrices, and the plan has {min(ranks)} to {max(ranks)}; "
            f"{INSTEAD} peft, axolotl or unsloth"
        )
    rslora = {"use_rslora": True} if plan.use_rslora else {}
    return {"lora_rank": fields["r"], "lora_alpha": fields["lora_alpha"], **rslora}


def require_whole(alphas: list[int | float], trainer: str, instead: str) -> None:
    odd = next((alpha for alpha in alphas if not isinstance(alpha, int)), None)
    if odd is not None:
        raise UsageError(f"--emit {trainer}: it takes whole alphas, and the plan has {odd:g}; {INSTEAD} {instead}")


def as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=1)


def as_yaml(fields: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(fields), sort_keys=False, width=1000)


TRAINERS: dict[str, tuple[Callable[[RankPlan, bool], Fields], Callable[[Mapping[str, Any]], str], str]] = {
    "peft": (peft, as_json, "json"),
    "axolotl": (axolotl, as_yaml, "yaml"),
    "swift": (swift, as_yaml, "yaml"),
    "unsloth": (unsloth, as_json, "json"),
    "llamafactory": (llamafactory, as_yaml, "yaml"),
}


def emit(plan: RankPlan, trainer: str, experts: bool = False) -> tuple[str, str]:
    """(text, file suffix) of the plan for one trainer. experts: the model has fused experts.

    Raises UsageError, naming what this trainer cannot express and what can, where it would train anything else.
    """
    if trainer not in TRAINERS:
        raise UsageError(f"--emit {trainer}: known trainers are {', '.join(TRAINERS)}")
    plan.require_ranks(f"--emit {trainer}: the plan")
    fields, written, suffix = TRAINERS[trainer]
    return written(fields(plan, experts)), suffix


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
