"""rankwise ranks: two checkpoints (or saved deltas, or one adapter) → spectra → rank plan, with the evidence for it.

rankwise ranks BASE TUNED --budget uniform:16 --gain data/devset.csv --task e2e_nlg
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankwise.core.allocate import Rule
from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.data.example import one_per_prompt
from rankwise.data.reading import reading, task_of
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources import load
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import Batch, answer_losses, training_batches
from rankwise.files.atomic import fingerprint
from rankwise.files.checkpoint import resolve
from rankwise.files.lineage import row_options, rows_of, warn_of_training_rows
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.files.processes import finish, process_index
from rankwise.files.run_folder import RunFolder
from rankwise.models.load import load_model, meta_model
from rankwise.models.sites import fused_experts
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import ModelSection, SitesSection
from rankwise.page.text import command_line
from rankwise.pipeline.idle import refuse_idle
from rankwise.ranks.decide import Decision, DecisionSettings, Running, decide, repeatability, unsettled_sites
from rankwise.ranks.gain import Gain, arms_of, gain_kept
from rankwise.ranks.histories import Histories, ranks_by_history
from rankwise.ranks.left_out import sentences, unpaired
from rankwise.ranks.outputs import SVD_FOLDER, Evidence, write_delta_weights, write_emitted, write_plots, write_raw_data
from rankwise.ranks.pair import SiteFilter
from rankwise.ranks.probe import Probe, measure_source, open_source, other_probe, source_metadata
from rankwise.ranks.spectra import ALLOWED, IDLE_NOISE, MeasureSettings, dtypes, refuse_noise
from rankwise.ranks.summary import render, summarise


def running_model(config: RanksConfig, probe: Probe, path: str | None = None, split: str = "train") -> Running:
    """The base model and up to `num_samples` items, one per prompt, drawn with the seed."""
    name = probe.model_name
    if not name:
        raise UsageError("give the base model with --model_name: --gain, --metric and --signal run it")
    model = load_model(name, torch.float32).to(config.device).eval()
    tuned = [Path(each) for each in (config.deltas, config.adapter, config.tuned) if each]
    data = replace(config.data, data_path=path or config.data.data_path)  # beside which pictures and device.json lie
    renderer = renderer_for(data, ModelSection(model_name=name), name, model.config, tuned)
    batches = probe_batches(config, renderer, data.data_path, split)
    return Running(model, [{key: value.to(config.device) for key, value in batch.items()} for batch in batches])


def probe_batches(config: RanksConfig, renderer: Renderer, path: str | None, split: str) -> list[Batch]:
    data = config.data
    assert data.task is not None
    assert path is not None
    examples = load(data.task, Path(path), split, download=data.download and not Path(path).is_file(), **reading(data))
    for note in examples.notes(sees_images=renderer.sight is not None):
        print(note)
    items = one_per_prompt(examples)
    random.Random(config.seed).shuffle(items)
    return training_batches(items[: config.num_samples], renderer, config.batch_size)


def measure_gain(config: RanksConfig, plan: RankPlan, probe: Probe) -> Gain:
    """The share of the loss gain that the plan keeps, against uniform, inverted and shuffled plans."""
    held_out = Path(str(config.gain))
    if config.deltas and held_out.is_file():
        warn_of_training_rows(Path(config.deltas), held_out, "the gain tells")
    running = running_model(config, probe, config.gain, "dev")
    ranks = {row.site: row.rank for row in plan.sites}
    generator = torch.Generator().manual_seed(config.seed)
    deltas = {site: probe.source.read(site).matrix.to(config.device) for site in ranks}
    losses = functools.partial(answer_losses, batches=running.batches)
    return gain_kept(running.model, deltas, arms_of(ranks, generator), losses, config.seed)


def site_filter(sites: SitesSection) -> SiteFilter:
    return SiteFilter(
        include=sites.include,
        exclude=sites.exclude,
        towers=tuple(sites.towers),
        rename=tuple(sites.rename),
        allow_unmatched=sites.allow_unmatched,
        flatten_conv=sites.flatten_conv,
    )


def run(config: RanksConfig) -> RankPlan | None:
    """The whole command. Processes other than rank 0 measure their share and return None. UsageError at its end where
    a trainer of `--emit` cannot take the plan."""
    config = settled(config)
    check(config)
    started = time.perf_counter()
    if process_index()[0] != 0:
        probes(config)
        return None
    folder = RunFolder(config.output_dir)
    with folder.lock(), folder.recording("ranks", inputs(config)) as record:
        probe, *others = probes(config)
        warnings: list[str] = []
        for each in (probe, *others):
            refuse_noise(each.measured, config.allow_noise, warnings)
        rounding = ranks_by_history(decision_settings(config), probe.measured, probe.source.read)
        if rounding:
            rounding.refuse(config.allow_noise, warnings)
        running = running_model(config, probe) if decision_settings(config).runs_the_model else None
        decision = decide(decision_settings(config), probe.spectra, probe.source.read, running)
        plan = described(config, decision.plan, probe, rounding, warnings)
        plan.require_ranks(f"--budget {config.spectrum.budget}" if config.spectrum.budget else probe.source.description)
        evidence = Evidence(
            rounding=rounding,
            gain=measure_gain(config, plan, probe) if config.gain else None,
            repeats=repeats_of(config, probe, others),
            explained_loss=decision.explained_loss,
        )
        record.outputs["plan"] = write_plan(folder / str(PLAN_FILE), plan)
        files = write_outputs(config, plan, probe, evidence)
        emitted, refused = write_emitted(folder / "configs", plan, config.emit, has_experts(config, probe))
        files += emitted
        folder.save_config(config)
        written = [folder / str(PLAN_FILE), *files]
        report(
            config,
            plan,
            probe,
            decision,
            evidence,
            warnings,
            written,
            time.perf_counter() - started,
            record.memory.bytes,
        )
    if refused:
        raise UsageError(f"{'; '.join(refused)}. The plan and everything else is written")
    return plan


def settled(config: RanksConfig) -> RanksConfig:
    """The config with the task of its data, or of the held-out ones, where none is given."""
    shown = replace(config.data, data_path=config.data.data_path or config.gain)
    return replace(config, data=replace(config.data, task=task_of(shown)))


def probes(config: RanksConfig) -> list[Probe]:
    """The first probe and the further ones, measured by all processes together."""
    try:
        return [first_probe(config), *(further_probe(config, path) for path in config.probe2)]
    finally:
        finish()


def check(config: RanksConfig) -> None:
    """Combinations that cannot work, before anything is read."""
    rule_of(config)
    given = [bool(config.base and config.tuned), bool(config.deltas), bool(config.adapter)]
    half = (config.tuned and not config.base) or (config.base and not config.tuned and not config.probe2)
    if sum(given) != 1 or half:
        raise UsageError("ranks needs one of: BASE TUNED (two checkpoints), --deltas DIR, --adapter DIR")
    if config.signal in ("uniform", "random") and not config.spectrum.budget:
        raise UsageError(f"--signal {config.signal} has no spectrum to read ranks from; it needs --budget")
    if config.metric == "loss" and not config.spectrum.budget:
        raise UsageError(
            "--metric loss gives shares of a loss, to which no energy threshold applies; it needs --budget"
        )
    if config.metric != "weight" and config.signal != "delta":
        raise UsageError("--metric and --signal are alternatives: give one of them")
    if decision_settings(config).runs_the_model and not config.data.data_path:
        raise UsageError("--metric activation|loss and --signal activation|gradient run the model: give --data_path")
    if config.adapter and config.spectrum.noise_floor != "none":
        raise UsageError("--noise_floor estimates the noise of a dense delta; an adapter's B·A has none")
    refuse_idle(config)
    if (config.gain or config.data.data_path) and not config.data.task:
        raise UsageError("--gain and --data_path need --task, which says how rows become text; the data do not show it")


def rule_of(config: RanksConfig) -> Rule:
    spectrum = config.spectrum
    return Rule(
        threshold=spectrum.svd_threshold,
        min_rank=spectrum.min_rank,
        max_rank=spectrum.max_rank,
        smoothing=spectrum.smoothing_factor,
        round=spectrum.round,
        per=spectrum.per,
    )


def decision_settings(config: RanksConfig) -> DecisionSettings:
    return DecisionSettings(
        rule=rule_of(config),
        budget=config.spectrum.budget,
        normalise=config.spectrum.normalise,
        signal=config.signal,
        metric=config.metric,
        seed=config.seed,
    )


def first_probe(config: RanksConfig) -> Probe:
    notes: list[str] = []
    source = open_source(
        base=config.base,
        tuned=config.tuned,
        deltas=config.deltas,
        adapter=config.adapter,
        filter_=site_filter(config.sites),
        notes=notes,
        model_name=config.model_name,
    )
    notes += sentences(unpaired(source), 0.0)
    metadata = source_metadata(source)
    model_name = config.model_name or config.base or str(metadata.get("model_name") or "")
    name = config.deltas or config.adapter or str(config.tuned)
    return Probe(name, source, measured(config, source), model_name, metadata, notes)


def further_probe(config: RanksConfig, path: str) -> Probe:
    notes: list[str] = []
    source = other_probe(path, config.base, site_filter(config.sites), notes)
    return Probe(path, source, measured(config, source), "", source_metadata(source), notes)


def measured(config: RanksConfig, source: Any) -> Any:
    """Spectra that can answer the threshold question, or that settle how the budget is divided."""
    rule = rule_of(config)

    def question(site: Site, spectrum: Spectrum) -> None:
        if config.spectrum.budget:
            spectrum.require_refined()
        else:
            spectrum.rank_for(rule.threshold, rule.least(site), rule.most(site))

    settings = MeasureSettings(
        up_to=rule.max_rank,
        exact=config.spectrum.exact,
        noise_floor=config.spectrum.noise_floor,
        device=config.device,
        seed=config.seed,
        negligible=IDLE_NOISE if config.spectrum.budget else (1 - rule.threshold) / 10,
    )
    return measure_source(source, settings, question, partial(unsettled_sites, decision_settings(config)))


def inputs(config: RanksConfig) -> dict[str, Path | str]:
    """Everything the result depends on, for the manifest."""
    further = {f"probe {index}": path for index, path in enumerate(config.probe2, 2)}
    named = {**sources(config), **further, "data": config.data.data_path, "gain": config.gain}
    return {name: value for name, value in named.items() if value}


def sources(config: RanksConfig) -> dict[str, str | None]:
    return {"base": config.base, "tuned": config.tuned, "deltas": config.deltas, "adapter": config.adapter}


def described(
    config: RanksConfig, plan: RankPlan, probe: Probe, rounding: Histories | None, warnings: Sequence[str]
) -> RankPlan:
    """The plan with what a reader of the file wants to know of its making."""
    spectrum = config.spectrum
    asked = {"svd_threshold", "min_rank", "max_rank", "smoothing_factor", "round", "per", "budget", "normalise"}
    found = {name: Path(value) for name, value in sources(config).items() if value}
    hashes = {name: fingerprint(path) for name, path in found.items() if path.exists()}
    doubt = " ".join(warning for warning in warnings if warning.endswith(ALLOWED))
    return replace(
        rounding.marked(plan) if rounding else plan,
        model_name=probe.model_name,
        description=f"ranks from {probe.source.description}",
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        metadata={
            "num_samples": probe.metadata.get("num_samples"),
            **{name: value for name, value in vars(spectrum).items() if name in asked},
            "signal": config.signal,
            "metric": config.metric,
            "seed": config.seed,
            "inputs": hashes,
            "stored_as": list(dtypes(probe.measured)),
            **({"rounding": rounding.facts()} if rounding else {}),
            **({"doubt": doubt} if doubt else {}),
        },
    )


def wanted_ranks(config: RanksConfig, probe: Probe) -> dict[Site, float]:
    """What a probe's own spectra ask for: ranks under the budget, or r_raw before bounds and smoothing."""
    settings = replace(decision_settings(config), signal="delta", metric="weight")
    plan = decide(settings, probe.spectra, probe.source.read, None).plan
    return {row.site: float(row.rank if config.spectrum.budget else row.r_raw or 0) for row in plan.sites}


def repeats_of(config: RanksConfig, probe: Probe, others: Sequence[Probe]) -> Mapping[str, Any] | None:
    """Spearman's ρ of the wanted ranks, first probe against each other one (a sensitivity table where several)."""
    if not others:
        return None
    first = wanted_ranks(config, probe)
    by_path = {site.path: site for site in first}
    table = []
    for other in others:
        second = {by_path[s.path]: rank for s, rank in wanted_ranks(config, other).items() if s.path in by_path}
        overall, within = repeatability(first, second)
        table.append({"probe": other.name, "sites": len(second), "rho_all": overall, "rho_within": within})
    return {"first": probe.name, "compared": table}


def write_outputs(config: RanksConfig, plan: RankPlan, probe: Probe, evidence: Evidence) -> list[Path]:
    folder, threshold = Path(config.output_dir) / SVD_FOLDER, config.spectrum.svd_threshold
    files = write_raw_data(folder, plan, probe.measured, threshold, evidence)
    if not config.no_plots:
        write_plots(folder, plan, probe.measured, threshold, evidence)
        files.append(folder / "plots")
    if config.save_delta_weights:
        files.append(write_delta_weights(folder, probe.source, list(probe.measured)))
    return files


def has_experts(config: RanksConfig, probe: Probe) -> bool:
    """Whether the model has fused experts, which trainers may add to any target; False where it is not on this disk."""
    if not config.emit:
        return False
    folder = resolve(config.base) if config.base else Path(probe.model_name)
    return (folder / "config.json").is_file() and bool(fused_experts(meta_model(str(folder))))


def report(
    config: RanksConfig,
    plan: RankPlan,
    probe: Probe,
    decision: Decision,
    evidence: Evidence,
    warnings: Sequence[str],
    files: Sequence[Path],
    seconds: float,
    memory: int,
) -> None:
    """The one-screen summary, after the notes that are too long for it."""
    for note in probe.notes:
        print(f"note: {note}")
    for warning in warnings:
        print(f"warning: {warning}")
    summary = summarise(plan, probe.measured, rule_of(config), decision.budget, evidence, seconds, memory)
    command = next_command(config, plan, probe, files[0])
    following = (command,) if command else ()
    print(render(replace(summary, warnings=tuple(warnings), next_commands=following, files=tuple(map(str, files)))))


def next_command(config: RanksConfig, plan: RankPlan, probe: Probe, file: Path) -> str | None:
    """Training with the plan; where no model is known, what can be done with the files alone; None for a plan of
    flattened convolutions, which fits no model."""
    if all(row.site.tower == "unknown" for row in plan.sites):
        if config.adapter:
            return command_line("compress", config.adapter, energy=config.spectrum.svd_threshold)
        if config.sites.flatten_conv:
            return None
        sites = {"rename": config.sites.rename, "allow_unmatched": config.sites.allow_unmatched}
        return command_line("extract", config.base, config.tuned, plan=file, **sites)
    towers = {row.site.tower for row in plan.sites if row.rank}
    others = {} if towers <= {"language"} else {"lora": ",".join(sorted(towers))}
    others |= {} if not others or "language" in towers else {"freeze": "language"}
    rows = row_options(vars(config.data)) if config.data.data_path else rows_of(runs(config), "finetune", "train")
    return command_line(
        "train", lora_config=file, model_name=probe.model_name or "MODEL", **{"data_path": "ROWS"} | rows | others
    )


def runs(config: RanksConfig) -> list[Path]:
    """Where the run may be that made what was measured."""
    given = [Path(value) for name, value in sources(config).items() if value and name != "base"]
    return [place for path in given for place in (path, path.parent)]


def describe(config: RanksConfig) -> list[str]:
    config = settled(config)
    check(config)
    source = config.deltas or config.adapter or f"{config.base} and {config.tuned}"
    how = f"within {config.spectrum.budget}" if config.spectrum.budget else f"at {config.spectrum.svd_threshold} energy"
    return [
        f"measure the spectra of {source} ({', '.join(config.sites.towers)} tower)",
        f"plan ranks {how}, between {config.spectrum.min_rank} and {config.spectrum.max_rank}",
        f"write {Path(config.output_dir) / PLAN_FILE} and {Path(config.output_dir) / SVD_FOLDER}",
    ]
