"""rankwise ranks: two checkpoints (or saved deltas, or an adapter) → the spectrum of every matrix → a rank plan.

rankwise ranks BASE TUNED --budget uniform:16 --gain data/devset.csv --task e2e_nlg
rankwise ranks BASE --adapter ADAPTER                       # and its intruder dimensions (`intruders`)

    open the deltas ─ measure spectra ─ refuse rounding noise ─ decide ranks ─ gather evidence ─ write plan and summary
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.errors import UsageError
from rankwise.files.adapter import LoraPair
from rankwise.files.atomic import about_to_write, fingerprint
from rankwise.files.lineage import row_options, rows_of
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.files.processes import finish, process_index
from rankwise.files.run_folder import RunFolder
from rankwise.models.load import another_base
from rankwise.options.commands import RanksConfig
from rankwise.page.text import command_line, plural
from rankwise.pipeline.idle import refuse_idle
from rankwise.ranks.decide import (
    Decision,
    Evidence,
    Histories,
    decide,
    ranks_by_history,
    repeatability,
    rule_of,
    runs_the_model,
    unsettled_sites,
)
from rankwise.ranks.deltas import DeltaSource, dense
from rankwise.ranks.expert_map import expert_facts, few_hold_all
from rankwise.ranks.fidelity import require_change, sentences, unpaired
from rankwise.ranks.gain import Gain
from rankwise.ranks.intruders import BaseMatrices, IntruderTable, examine, time_note
from rankwise.ranks.measured import ALLOWED, dtypes, refuse_noise
from rankwise.ranks.outputs import RAW_DATA, SVD_FOLDER, write_delta_weights, write_plots, write_raw_data
from rankwise.ranks.probe import AdapterDeltas, Probe, measure_source, open_source, other_probe, source_metadata
from rankwise.ranks.summary import render, summarise


def run(config: RanksConfig) -> RankPlan | None:
    """The whole command. Processes other than the first measure their share of the sites and return None.

    UsageError at the end, when everything is written, where a trainer of `--emit` cannot take the plan.
    """
    config = check(config)
    if config.metric == "auto":
        sub_task("running").gain_halves(config)  # refuses too few rows before anything is measured
    started = time.perf_counter()
    if process_index()[0] != 0:
        measure_probes(config)
        return None
    folder = RunFolder(config.output_dir)
    with folder.lock(), folder.recording("ranks", inputs(config)) as record:
        probe, *others = measure_probes(config)
        warnings = refuse_unmoved(config, [probe, *others])
        rounding = refuse_rounding(config, [probe, *others], warnings)
        if (moved := expert_facts(probe.measured, config.spectrum.svd_threshold)) and (few := few_hold_all(moved)):
            warnings.append(few)
        decision = decide_ranks(config, probe)
        plan = annotate(config, decision, probe, rounding, warnings)
        plan.require_ranks(f"--budget {config.spectrum.budget}" if config.spectrum.budget else probe.source.description)
        evidence = Evidence(
            rounding=rounding,
            gain=kept_gain(config, decision, probe) if config.gain else None,
            repeats=compare_probes(config, probe, others) if others else None,
            explained_loss=decision.explained_loss,
            choice=decision.choice,
            intruders=count_intruders(config, probe),
        )
        record.outputs["plan"] = write_plan(folder / str(PLAN_FILE), plan)
        files = [folder / str(PLAN_FILE), *write_outputs(config, plan, probe, evidence)]
        emitted, refused = sub_task("emit").write_emitted(config, plan, probe) if config.emit else ([], [])
        folder.save_config(config)
        for note in [*(f"note: {note}" for note in probe.notes), *(f"warning: {warning}" for warning in warnings)]:
            print(note)
        seconds, memory = time.perf_counter() - started, record.memory.bytes
        summary = summarise(plan, probe.measured, rule_of(config.spectrum), decision.budget, evidence, seconds, memory)
        command, shown = next_command(config, plan, probe, files[0]), tuple(map(str, [*files, *emitted]))
        following = (command,) if command else ()
        print(render(replace(summary, warnings=tuple(warnings), next_commands=following, files=shown)))
    if refused:
        raise UsageError(f"{'; '.join(refused)}. The plan and everything else is written")
    return plan


def describe(config: RanksConfig) -> list[str]:
    source = config.deltas or config.adapter or f"{config.base} and {config.tuned}"
    how = f"within {config.spectrum.budget}" if config.spectrum.budget else f"at {config.spectrum.svd_threshold} energy"
    auto = ["choose the metric by gain kept on half of --gain, confirm it against uniform rank on the other half"]
    return [
        f"measure the spectra of {source} ({', '.join(config.sites.towers)} tower)",
        f"plan ranks {how}, between {config.spectrum.min_rank} and {config.spectrum.max_rank}",
        *(auto if config.metric == "auto" else []),
        *(["count intruder dimensions of base + adapter"] if config.base and config.adapter else []),
    ]


def sub_task(name: str) -> Any:
    """Modules that only some options need, imported on demand: `running` reads data and runs the model (--gain,
    --metric, --signal), `emit` writes other trainers' configs."""
    return importlib.import_module(f"rankwise.ranks.{name}")


def with_task(config: RanksConfig) -> RanksConfig:
    """The config with the task of its data, or of the held-out ones, where none is given."""
    return sub_task("running").with_task(config) if config.gain or config.data.data_path else config


def check(config: RanksConfig) -> RanksConfig:
    """The config with its data's task; invalid combinations of options are refused before anything is read."""
    config = with_task(config)
    rule_of(config.spectrum)
    given = [bool(config.base and config.tuned), bool(config.deltas), bool(config.adapter)]
    alone = config.base and not config.tuned and not config.probe2 and not config.adapter
    if sum(given) != 1 or alone or (config.tuned and not config.base):
        raise UsageError(
            "ranks needs one of: BASE TUNED (two checkpoints), --deltas DIR, --adapter DIR (with or without BASE)"
        )
    if config.signal in ("uniform", "random") and not config.spectrum.budget:
        raise UsageError(f"--signal {config.signal} has no spectrum to read ranks from; it needs --budget")
    if config.metric == "auto":
        require_for_auto(config)
    if config.metric == "loss" and not config.spectrum.budget:
        raise UsageError("--metric loss gives shares of a loss, not of energy: no threshold applies; it needs --budget")
    if config.metric != "weight" and config.signal != "delta":
        raise UsageError("--metric and --signal are alternatives: give one of them")
    if runs_the_model(config) and config.metric != "auto" and not config.data.data_path:
        raise UsageError("--metric activation|loss and --signal activation|gradient run the model: give --data_path")
    if config.adapter and config.spectrum.noise_floor != "none":
        raise UsageError("--noise_floor estimates the noise of a dense delta; an adapter's B·A has none")
    refuse_idle(config)
    if (config.gain or config.data.data_path) and not config.data.task:
        raise UsageError("--gain and --data_path need --task, which says how rows become text; the data do not show it")
    return config


def require_for_auto(config: RanksConfig) -> None:
    absent = [name for name, value in (("--gain DATA", config.gain), ("--budget", config.spectrum.budget)) if not value]
    if absent:
        raise UsageError(
            f"--metric auto needs {' and '.join(absent)}: it compares plans of equal parameters by the gain that they "
            "keep; half of the rows choose, the other half confirms"
        )


def inputs(config: RanksConfig) -> dict[str, str | None]:
    """All inputs of the result, for the manifest."""
    further = {f"probe {index}": path for index, path in enumerate(config.probe2, 2)}
    return {**sources(config), **further, "data": config.data.data_path, "gain": config.gain}


def sources(config: RanksConfig) -> dict[str, str | None]:
    return {"base": config.base, "tuned": config.tuned, "deltas": config.deltas, "adapter": config.adapter}


def measure_probes(config: RanksConfig) -> list[Probe]:
    """The first probe and those of --probe2, measured by all processes together."""
    try:
        notes: list[str] = []
        known = config.model_name or (config.base if config.adapter else None)
        source = open_source(config.sites, notes, **sources(config), model_name=known)
        if process_index()[0] == 0 and (compared := compared_with_base(config, source)):
            print(time_note(*compared, config.device))
        refuse_for_experts(config, source.sites)
        notes += sentences(unpaired(source), 0.0)
        metadata = source_metadata(source)
        model_name = config.model_name or config.base or str(metadata.get("model_name") or "")
        notes += another_base(str(config.deltas), metadata.get("model_name"), model_name)
        name = config.deltas or config.adapter or str(config.tuned)
        first = Probe(name, source, measure(config, source), model_name, metadata, notes)
        others = [(path, other_probe(path, config.base, config.sites, [])) for path in config.probe2]
        return [first, *(Probe(path, other, measure(config, other), "") for path, other in others)]
    finally:
        finish()


def refuse_for_experts(config: RanksConfig, sites: Mapping[str, Site]) -> None:
    """UsageError for what needs the inputs of a matrix: those of a layer's experts never come as one tensor."""
    experts = [path for path, site in sites.items() if site.experts]
    of_inputs = [f"--metric {config.metric}"] if config.metric in ("activation", "auto") else []
    of_inputs += ["--signal activation"] if config.signal == "activation" else []
    if experts and of_inputs:
        raise UsageError(
            f"{of_inputs[0]} needs the inputs of every matrix, and those of experts differ by what is routed to each "
            f"({experts[0]} …): use --metric weight or loss, or leave the experts out (--exclude experts)"
        )


def measure(config: RanksConfig, source: DeltaSource) -> Any:
    """Spectra that can answer the threshold question, or that settle how the budget is divided."""
    own, rule = config.spectrum, rule_of(config.spectrum)

    def question(site: Site, spectrum: Spectrum) -> None:
        if own.budget:
            spectrum.require_refined()
        else:
            spectrum.rank_for(rule.threshold, rule.least(site), rule.most(site))

    about_to_write()
    return measure_source(source, config, question, partial(unsettled_sites, config))


def refuse_unmoved(config: RanksConfig, found: Sequence[Probe]) -> list[str]:
    """DataError where nothing of a probe has changed and its deltas decide; warnings of the sites of the first that
    have not: what they get is the minimum rank, or a neighbour's."""
    if config.signal == "delta":
        for probe in found:
            require_change(probe.source, {site.path: row.energy for site, row in probe.measured.items()})
    still = [site.path for site, row in found[0].measured.items() if not row.energy]
    if not still or config.signal != "delta":
        return []
    some = f"{still[0]} …" if len(still) > 1 else still[0]
    return [
        f"{len(still)} of {plural(len(found[0].measured), 'site')} changed in nothing ({some}): their rank is the "
        "minimum, or what smoothing gives; --exclude leaves them out"
    ]


def refuse_rounding(config: RanksConfig, found: Sequence[Probe], warnings: list[str]) -> Histories | None:
    """Refuse deltas that are mostly rounding, and ranks that depend on how the files were rounded; None: rounding is
    negligible. With --allow_noise both are warnings."""
    for probe in found:
        refuse_noise(probe.measured, config.allow_noise, warnings)
    rounding = ranks_by_history(config, found[0].measured, partial(dense, found[0].source))
    if rounding:
        rounding.refuse(config.allow_noise, warnings)
    return rounding


def count_intruders(config: RanksConfig, probe: Probe) -> IntruderTable | None:
    """Of an adapter whose base is given; None where no site has a count (experts alone, say), which a note tells."""
    compared = compared_with_base(config, probe.source)
    if compared is None:
        return None
    table, _ = examine(*compared, device=config.device)
    probe.notes.extend(table.notes())
    return table if table.rows else None


def compared_with_base(config: RanksConfig, source: DeltaSource) -> tuple[BaseMatrices, dict[str, LoraPair]] | None:
    """BASE and the pairs of --adapter at the analysed sites; None where it is not both that are given."""
    if not config.base or not isinstance(source, AdapterDeltas):
        return None
    return BaseMatrices.open(config.base), {path: source.adapter.pairs[path] for path in source.sites}


def decide_ranks(config: RanksConfig, probe: Probe) -> Decision:
    if config.metric == "auto":
        chosen: Decision = sub_task("running").choose_metric(config, probe)
        return chosen
    running = sub_task("running").running_model(config, probe) if runs_the_model(config) else None
    return decide(config, probe.spectra, partial(dense, probe.source), running)


def kept_gain(config: RanksConfig, decision: Decision, probe: Probe) -> Gain:
    """With `--metric auto` that on the rows that did not choose."""
    if decision.choice:
        return decision.choice.confirming
    measured: Gain = sub_task("running").measure_gain(config, decision.plan, probe)
    return measured


def annotate(
    config: RanksConfig, decision: Decision, probe: Probe, rounding: Histories | None, warnings: Sequence[str]
) -> RankPlan:
    """The plan with its provenance."""
    asked = {"svd_threshold", "min_rank", "max_rank", "smoothing_factor", "round", "per", "budget", "normalise"}
    found = {name: Path(value) for name, value in sources(config).items() if value}
    doubt = " ".join(warning for warning in warnings if warning.endswith(ALLOWED))
    return replace(
        rounding.marked(decision.plan) if rounding else decision.plan,
        model_name=probe.model_name,
        description=f"ranks from {probe.source.description}",
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        metadata={
            "num_samples": probe.metadata.get("num_samples"),
            **{name: value for name, value in vars(config.spectrum).items() if name in asked},
            "signal": config.signal,
            "metric": config.metric,
            **({"choice": decision.choice.facts()} if decision.choice else {}),
            "seed": config.seed,
            "inputs": {name: fingerprint(path) for name, path in found.items() if path.exists()},
            "stored_as": list(dtypes(probe.measured)),
            **({"rounding": rounding.facts()} if rounding else {}),
            **({"doubt": doubt} if doubt else {}),
        },
    )


def compare_probes(config: RanksConfig, probe: Probe, others: Sequence[Probe]) -> dict[str, Any]:
    """Spearman's ρ of the wanted ranks, first probe against each other one (a sensitivity table where several)."""
    first = wanted_ranks(config, probe)
    by_path = {site.path: site for site in first}
    table = []
    for other in others:
        second = {by_path[s.path]: rank for s, rank in wanted_ranks(config, other).items() if s.path in by_path}
        overall, within = repeatability(first, second)
        table.append({"probe": other.name, "sites": len(second), "rho_all": overall, "rho_within": within})
    return {"first": probe.name, "compared": table}


def wanted_ranks(config: RanksConfig, probe: Probe) -> dict[Site, float]:
    """Ranks by a probe's own spectra: ranks under the budget, or r_raw before bounds and smoothing."""
    by_weight = replace(config, signal="delta", metric="weight")
    plan = decide(by_weight, probe.spectra, partial(dense, probe.source), None).plan
    return {row.site: float(row.rank if config.spectrum.budget else row.r_raw or 0) for row in plan.sites}


def write_outputs(config: RanksConfig, plan: RankPlan, probe: Probe, evidence: Evidence) -> list[Path]:
    folder, threshold = Path(config.output_dir) / SVD_FOLDER, config.spectrum.svd_threshold
    files = write_raw_data(Path(config.output_dir) / RAW_DATA, plan, probe.measured, threshold, evidence)
    if not config.no_plots:
        write_plots(folder, plan, probe.measured, threshold, evidence)
        files.append(folder / "plots")
    if config.save_delta_weights:
        files += write_delta_weights(folder, probe.source, list(probe.measured))
    return files


def next_command(config: RanksConfig, plan: RankPlan, probe: Probe, file: Path) -> str | None:
    """Training with the plan; truncation, where it was chosen for that; where no model is known, what can be done with
    the files alone; None for a plan of flattened convolutions, which fits no model."""
    if all(row.site.tower == "unknown" for row in plan.sites):
        if config.adapter:
            return command_line("compress", config.adapter, energy=config.spectrum.svd_threshold)
        if config.sites.flatten_conv:
            return None
        sites = {"rename": config.sites.rename, "allow_unmatched": config.sites.allow_unmatched}
        return command_line("extract", config.base, config.tuned, plan=file, **sites)
    if config.metric == "auto":
        if config.adapter:
            return command_line("compress", config.adapter, plan=file)
        pair = [each for each in (config.base, config.tuned) if each and not config.deltas]
        return command_line("extract", *pair, deltas=config.deltas, plan=file, rename=config.sites.rename)
    towers = {row.site.tower for row in plan.sites if row.rank}
    others = {} if towers <= {"language"} else {"lora": ",".join(sorted(towers))}
    others |= {} if not others or "language" in towers else {"freeze": "language"}
    measured = [Path(value) for name, value in sources(config).items() if value and name != "base"]
    runs = [place for path in measured for place in (path, path.parent)]  # where what was measured may have been made
    rows = row_options(vars(config.data)) if config.data.data_path else rows_of(runs, "finetune", "train")
    return command_line(
        "train", lora_config=file, model_name=probe.model_name or "MODEL", **{"data_path": "ROWS"} | rows | others
    )
