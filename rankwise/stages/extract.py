"""rankwise extract: two checkpoints (or saved deltas) → LoRA adapter, by truncated SVD of each delta.

rankwise extract BASE TUNED --plan configs/lora_rank_config.json -o adapter/
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rankwise.config import ExtractConfig
from rankwise.core.factors import Factors, truncate
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.plan_content import clamped
from rankwise.core.site import TOWERS
from rankwise.data.contracts import carry
from rankwise.errors import DataError, UsageError
from rankwise.nets.probe import open_source, source_metadata
from rankwise.stages.fidelity import Fidelity, SiteFidelity
from rankwise.stages.sites import site_filter
from rankwise.store.adapter import CONFIG_NAME, LoraAdapter, LoraPair, write_adapter
from rankwise.store.adapter_config import lora_config
from rankwise.store.checkpoint import ADAPTER_NAMES
from rankwise.store.deltas import CheckpointPair, DeltaSource, check_finite, deltas
from rankwise.store.plan_file import find_plan, read_plan
from rankwise.store.run import RunFolder
from rankwise.store.spectra import on_device, site_generator

TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def run(config: ExtractConfig) -> Fidelity:
    check(config)
    notes: list[str] = []
    source = open_pair_or_deltas(config, notes)
    plan = planned(config, source, notes)
    folder = RunFolder(config.output_dir)
    with folder.lock(), folder.recording("extract", inputs(config)) as record:
        pairs, fidelity = extracted(source, plan, config.device, config.seed)
        notes += changes_elsewhere(source, plan)
        write_adapter(folder.path, LoraAdapter(settings(config, source, plan), pairs))
        record.outputs |= {name: folder / name for name in (ADAPTER_NAMES[0], CONFIG_NAME)}
        record.outputs |= carry(Path(str(config.deltas or config.tuned)), folder.path)
        record.outputs["fidelity"] = fidelity.write(folder.path)
        record.facts["energy_kept"] = fidelity.energy_kept
        folder.save_config(config)
    report(config, fidelity, notes)
    return fidelity


def check(config: ExtractConfig) -> None:
    """Combinations that cannot work, before anything is read."""
    if bool(config.base and config.tuned) == bool(config.deltas) or bool(config.base) != bool(config.tuned):
        raise UsageError("extract needs one of: BASE TUNED (two checkpoints), --deltas DIR")
    if (config.plan is None) == (config.rank is None):
        raise UsageError("extract needs one of: --plan FILE (from `rankwise ranks`), --rank R")
    if config.rank is not None and config.rank < 1:
        raise UsageError(f"--rank is a whole number from 1; got {config.rank}")
    if config.sites.flatten_conv:
        raise UsageError("--flatten_conv is for `ranks`: an adapter of flattened convolutions fits no model")


def inputs(config: ExtractConfig) -> dict[str, Path | str]:
    plan = find_plan(Path(config.plan)) if config.plan else None
    names = {"base": config.base, "tuned": config.tuned, "deltas": config.deltas, "plan": plan}
    return {name: value for name, value in names.items() if value}


def open_pair_or_deltas(config: ExtractConfig, notes: list[str]) -> DeltaSource:
    """With a plan every site is opened, so that a site that the plan names and the model lacks can be told from one
    that --towers, --include and --exclude leave out."""
    chosen = site_filter(config.sites)
    if config.plan:
        chosen = replace(chosen, towers=TOWERS, include=None, exclude=None)
    return open_source(
        base=config.base, tuned=config.tuned, deltas=config.deltas, adapter=None, filter_=chosen, notes=notes
    )


def planned(config: ExtractConfig, source: DeltaSource, notes: list[str]) -> RankPlan:
    """One rank everywhere, or the plan's sites as far as the options ask for them."""
    if config.rank is not None:
        return RankPlan(tuple(clamped(site, config.rank, {}) for site in source.sites.values()))
    plan = read_plan(Path(config.plan or ""), source.sites)
    kept = site_filter(config.sites).apply({row.site.path: row.site for row in plan.sites})
    left_out = [row.site.path for row in plan.sites if row.site.path not in kept]
    if left_out:
        notes.append(
            f"{len(left_out)} sites of the plan are left out by --towers, --include or --exclude ({left_out[0]} …)"
        )
    return replace(plan, sites=tuple(row for row in plan.sites if row.site.path in kept))


def extracted(source: DeltaSource, plan: RankPlan, device: str, seed: int) -> tuple[dict[str, LoraPair], Fidelity]:
    """Pairs and their fidelity, one delta in memory at a time. DataError for entries that are not finite."""
    rows = {row.site.path: row for row in plan.sites}
    pairs: dict[str, LoraPair] = {}
    table: list[SiteFidelity] = []
    bar = tqdm(total=len(rows), desc="extract", unit="site", disable=not sys.stderr.isatty())
    for site, delta in deltas(source, [row.site for row in plan.sites]):
        check_finite(site, delta)
        row = rows[site.path]
        if row.rank and delta.energy:
            generator = site_generator(site, seed, device)
            factors = truncate(on_device(delta, device).matrix, row.rank, generator)
            factors = Factors(factors.left.cpu(), factors.right.cpu())
            pairs[site.path] = LoraPair.of(factors, scale_of(plan, row.rank), site.transposed)
            kept = min(1.0, factors.spectrum().energy_total / delta.energy)
            table.append(SiteFidelity(site, row.rank, delta.energy, kept, note=clip_note(row)))
        else:
            why = "rank 0 in the plan: left out" if delta.energy else "the delta is zero: left out"
            table.append(SiteFidelity(site, 0, delta.energy, float(not delta.energy), note=why))
        bar.update()
    bar.close()
    if not pairs:
        raise DataError(f"{source.description}: none of the {len(rows)} sites has changed; there is no adapter in this")
    return pairs, Fidelity(tuple(table))


def scale_of(plan: RankPlan, rank: int) -> float:
    """alpha/r, or alpha/√r where the plan is one of rsLoRA."""
    return plan.alpha(rank) / (math.sqrt(rank) if plan.use_rslora else rank)


def clip_note(row: PlannedSite) -> str:
    return f"rank {row.clipped}: clamped" if row.clipped and "above min" in row.clipped else ""


def changes_elsewhere(source: DeltaSource, plan: RankPlan) -> list[str]:
    """A note on tensors that training changed and the adapter does not carry (embeddings, norms, other towers)."""
    if not isinstance(source, CheckpointPair):
        return []
    carried = {source.weights(row.site)[0].key for row in plan.sites if row.rank}
    changed = [key for key in source.base if key not in carried and differs(source, key)]
    if not changed:
        return []
    return [
        f"{len(changed)} tensors outside these sites changed as well, and the adapter does not carry them "
        f"({', '.join(changed[:3])} …): base + adapter is not the tuned model"
    ]


def differs(pair: CheckpointPair, key: str) -> bool:
    if key not in pair.tuned or pair.base.shape(key) != pair.tuned.shape(key):
        return False
    before = pair.base.tensor(key)
    return not torch.equal(before, pair.tuned.tensor(key).to(before.dtype))


def settings(config: ExtractConfig, source: DeltaSource, plan: RankPlan) -> dict[str, Any]:
    """What of the adapter's config does not follow from its tensors."""
    base = config.base or str(source_metadata(source).get("model_name") or plan.model_name) or None
    known = source.config if isinstance(source, CheckpointPair) else None
    return lora_config(base, task_type(known)) | {"use_rslora": plan.use_rslora}


def task_type(model_config: Mapping[str, Any] | None) -> str:
    """PEFT's name for what the base does, by its architecture; causal language model unless it says otherwise."""
    architecture = str(((model_config or {}).get("architectures") or [""])[0])
    return next((kind for suffix, kind in TASK_TYPES.items() if architecture.endswith(suffix)), "CAUSAL_LM")


def report(config: ExtractConfig, fidelity: Fidelity, notes: list[str]) -> None:
    for note in [*notes, *fidelity.notes()]:
        print(f"note: {note}")
    source = config.deltas or config.tuned
    print(f"extracted from {source}: {fidelity.summary()}")
    print(f"adapter and fidelity.json in {config.output_dir}")
    base = f" --base_model {config.base}" if config.base else ""
    print(f"next: rankwise merge {config.output_dir}{base}")


def describe(config: ExtractConfig) -> list[str]:
    check(config)
    source = config.deltas or f"{config.base} and {config.tuned}"
    ranks = f"the ranks of {config.plan}" if config.plan else f"rank {config.rank}"
    return [
        f"factor the deltas of {source} with {ranks} (truncated SVD, {', '.join(config.sites.towers)} tower)",
        f"write the adapter and fidelity.json to {config.output_dir}",
    ]
