"""rankwise study: rank plans or phase schedules compared at equal parameters, by a protocol fixed beforehand.

rankwise study ranks --model_name MODEL --task e2e_nlg --data_path DIR -o runs/study

    designed ─ registered ─ probed ─ tuned on dev ─ seeds added until sharp ─ test read once ─ study.json, study.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.data.render import Renderer
from rankwise.data.split import PARTS, Parts, Sizes
from rankwise.files.atomic import digest
from rankwise.files.processes import announce, finish, gathered, process_index
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.load import load_structure
from rankwise.options.study import StudyConfig
from rankwise.page.blocks import lines
from rankwise.page.text import duration
from rankwise.study.arms import NULLS, OF_THE_BASE, RULES, STARTED, UNIFORM, check_mixture, rule_of
from rankwise.study.design import Design, arms_of, design_study, run_counts
from rankwise.study.execution import Bench, finished_runs, matched_steps
from rankwise.study.material import Material, inputs_of, load_material, open_probes, probe_cost, read_parts, sites_of
from rankwise.study.page import runs_rate, study_blocks, write_study
from rankwise.study.plans import Plans
from rankwise.study.predictions import power, power_lines
from rankwise.study.protocol import report, tune, tuning_batch
from rankwise.study.registration import Registration, declared_changes, register
from rankwise.study.results import FinishedStudy, conclude

check = design_study  # of options, before anything is read
WARM = ("warm", "plan-warm")


def run(config: StudyConfig) -> Path:
    """Run the command. Returns the run folder."""
    arms = arms_of(config)
    check_mixture(arms, config, sites_of(load_structure(config.model, str(config.model.model_name)), config.target))
    design = design_study(config)
    folder = RunFolder(config.output_dir)
    try:
        with held(folder, "study", inputs(config)) as record:
            parts, files = parts_of(config)

            def before_loading(renderer: Renderer, rows: object) -> None:
                read = inputs_of(config.model, files, renderer, config.probe.deltas)
                declared_changes(folder.path, design.content | {"inputs": read}, config.deviation)

            how = (config.target, config.device, (parts, files), before_loading)
            material = load_material(config.model, config.data, *how)
            registration = register_study(folder, design, material)
            bench = workbench(folder, design, material, registration)
            if config.time_only:
                time_one_batch(design, bench)
                return folder.path
            tuned = tune(design, bench)
            reported = report(design, bench, tuned)
            if process_index()[0] == 0:
                study = conclude(FinishedStudy(design, bench, tuned, reported), registration)
                record.outputs |= write_study(folder.path, study)
                record.facts |= {"runs": len(bench.ledger), "runs_per_hour": rate(bench)}
                print("\n".join(lines(study_blocks(study))))
                print(f"study: {len(bench.ledger):,} runs, {rate(bench):,} an hour and process; all in {folder.path}")
    finally:
        finish()
    return folder.path


def inputs(config: StudyConfig) -> dict[str, str | None]:
    return {"model": config.model.model_name, "data": config.data.data_path, "test": config.test_path}


def parts_of(config: StudyConfig) -> tuple[Parts, tuple[Path, ...]]:
    sizes = Sizes(config.train_size, config.dev_size, config.test_size)
    return read_parts(config.data, sizes, config.seed, config.dev_path, config.test_path)


def read_by(config: StudyConfig, material: Material) -> dict[str, Any]:
    return material.inputs(config.model, config.probe.deltas)


def register_study(folder: RunFolder, design: Design, material: Material) -> Registration:
    """The study on record before its first run; only the first process writes, the others wait for it."""
    if process_index()[0] == 0:
        content, judged = design.content | {"inputs": read_by(design.config, material)}, len(design.pairs())
        register(folder.path, content, material.record(), power(design.config, judged), design.config.deviation)
        folder.save_config(design.config)
        PARTS.write(folder, material.parts.record())
    gathered({})
    return Registration(folder.path)


def workbench(folder: RunFolder, design: Design, material: Material, registration: Registration) -> Bench:
    """Probes, plans and ledger; probes are trained only where an arm needs them."""
    recipe = digest([design.recipe, read_by(design.config, material)])[:16]
    probes = open_probes(material, design.config, folder.path, recipe) if needs_probe(design) else []
    plans = Plans(design.config, material, probes, folder / "plans" / recipe)
    plans.timed_steps = matched_steps(design, plans)
    extra = probe_cost(design.config) if "uniform+compute" in design.arms else 0
    return Bench(design.config, material, plans, finished_runs(folder.path, registration.chain), recipe, extra)


def needs_probe(design: Design) -> bool:
    if design.config.kind == "phases":
        return design.config.schedule_plan not in (UNIFORM, *OF_THE_BASE)
    return any(uses_a_probe(arm) for arm in design.arms)


def uses_a_probe(arm: str) -> bool:
    """Whether the arm's ranks or start come from a probe's deltas."""
    name = arm.partition(":")[0]
    by_rule = name in (*RULES, *STARTED, *NULLS, *WARM) and rule_of(arm) not in OF_THE_BASE
    return by_rule or name in WARM


def rate(bench: Bench) -> int:
    """Runs per hour of one process, by the time that all runs took."""
    return runs_rate([row["seconds"] for row in bench.ledger.rows.values()])


def time_one_batch(design: Design, bench: Bench) -> None:
    """One batch of tuning runs, which count; then what is left at that rate."""
    bench.finish(tuning_batch(design, bench), "timing")
    announce("\n".join(cost_lines(design, [row["seconds"] for row in bench.ledger.rows.values()])))


def cost_lines(design: Design, seconds: list[float]) -> list[str]:
    """Numbers of runs, and hours where a rate was measured; nothing is guessed."""
    counts = run_counts(design)
    lines = [
        f"{counts['tuning']:,} runs to tune (more where a grid grows), {counts['least']:,} to {counts['most']:,} in all"
    ]
    if not seconds:
        return [*lines, "how long that takes is not known yet: --time_only trains one batch of arms and says"]
    hourly = runs_rate(seconds)
    span = [duration(3600 * max(0, counts[name] - len(seconds)) / hourly) for name in ("least", "most")]
    return [*lines, f"{len(seconds):,} are done at {hourly:,} an hour and process; {span[0]} to {span[1]} are left"]


def describe(config: StudyConfig) -> list[str]:
    design = design_study(config)
    seconds = [row["seconds"] for row in finished_runs(Path(config.output_dir)).rows.values()]
    return [
        f"compare {', '.join(design.arms)} of {config.model.model_name} at {', '.join(config.budgets)}",
        "give a verdict on " + "; ".join(" vs ".join(pair) for pair in design.contrasts),
        *cost_lines(design, seconds),
        *power_lines(config, len(design.pairs())),
        *(f"predicted: {text}" for text in config.predictions),
        f"register {digest(design.content)[:16]}… (with fingerprints of model and data) in {config.output_dir}",
    ]
