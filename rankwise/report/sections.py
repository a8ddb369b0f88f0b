"""From the contents of a run folder to the pictures and sections of its report: what was found, in order of time.

    contents ── draw ──▶ Drawings ── sections_of ──▶ Section*

An artefact belongs to the stage of its kind whose folder holds it; without a manifest it gets a section of its own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.core.plan import RankPlan
from rankwise.device.validation_page import CONFUSION, validation_blocks
from rankwise.evaluate.classify import plot_confusion
from rankwise.features.downstream_page import HEADER, RIGHT_ALIGNED, cells, on_what, reading
from rankwise.features.history import best_row
from rankwise.features.page import PLOTS, comparison_blocks
from rankwise.page.blocks import Block, Folded, Picture, Section, Table, Words
from rankwise.page.text import clip, duration, is_number, memory, number, percent, plural, printable
from rankwise.pipeline.times import time_table
from rankwise.ranks.plots import is_shuffle, plot_energy_heatmap, plot_gain, plot_ranks_heatmap
from rankwise.ranks.summary import layer_ranges
from rankwise.report.contents import (
    CURVES,
    DOWNSTREAM,
    Adapted,
    Contents,
    RecordedFidelity,
    Scored,
    StageRun,
    feature_pictures,
)
from rankwise.study.page import PLOTS as STUDY_PLOTS
from rankwise.study.page import study_blocks
from rankwise.train.gradient_plots import GRADIENT_PLOTS, gradient_blocks, gradient_pictures
from rankwise.train.gradient_summary import boundaries
from rankwise.train.loss_plots import plot_loss, plot_scores, points, shared_metrics


@dataclass(frozen=True)
class Drawings:
    """What was drawn: (folder or task, name) → picture. Empty where matplotlib is not installed."""

    pictures: dict[tuple[str, str], Picture]
    possible: bool

    @property
    def names(self) -> set[str]:
        return {name for _, name in self.pictures}

    def of(self, where: str, *names: str) -> list[Picture]:
        return [self.pictures[where, name] for name in names if (where, name) in self.pictures]


def draw(contents: Contents, tasks: dict[str, list[Scored]], folder: Path) -> Drawings:
    """Draw every plan, training log, table of gradient norms, gain and task of scores into `folder`."""
    if importlib.util.find_spec("matplotlib") is None:
        return Drawings({}, possible=False)
    found: dict[tuple[str, str], Picture] = {}

    def target(where: str, name: str, caption: str) -> Path:
        path = folder / f"{len(found):02d}_{name}.png"
        found[where, name] = Picture(path, caption)
        return path

    for where, plan in contents.plans:
        plot_ranks_heatmap(plan, target(where, "ranks_heatmap", "Rank of every site: projection types × layers"))
        if any(row.energy_retained is not None for row in plan.sites):
            caption = "Share of each delta's energy that its rank keeps"
            plot_energy_heatmap(plan, target(where, "energy_heatmap", caption))
    for where, gain in contents.gains:
        if gain.get("defined") is False:
            continue
        caption = "Share of the loss gain kept: the plan against uniform rank and shuffles of its own ranks"
        plot_gain(gain, target(where, "gain", caption))
    for where, rows in contents.logs:
        if points(rows, "loss") or points(rows, "eval_loss"):
            path = target(where, "training_loss", "Training and validation loss, minima marked")
            plot_loss(rows, path, boundaries(dict(contents.phases).get(where, ())))
    for where, tables in contents.gradients:
        for name, caption, plot in gradient_pictures(tables):
            plot(target(where, name, caption))
    for where, study in contents.studies:
        for name, (plot_study, caption) in STUDY_PLOTS.items():
            plot_study(study, target(where, name, caption))
    for where, validation in contents.validations:
        if CONFUSION in validation:
            path = target(where, CONFUSION, "What was taken for what: rows are true classes, columns answers")
            plot_confusion(validation["labels"], validation[CONFUSION], path, printable(validation["outtype"], 20))
    for where, name, caption, plot in feature_pictures(contents):
        plot(target(where, name, caption))
    for task, results in tasks.items():
        if shared_metrics(one.result for one in results):
            caption = "Scores with 95 % intervals, each metric on its own scale"
            plot_scores({one.label: one.result for one in results}, target(task, "scores", caption))
    return Drawings(found, possible=True)


Found = tuple[tuple[str, ...], str, list[Block]]  # kinds of stage that make it, folder, what is shown
TRAIN, COMPARE, ANSWERS = "features train", "features compare", "features downstream"


def trained(where: str, rows: Sequence[dict[str, Any]]) -> str:
    """ResMLP: 20 epochs; kept with validation MSE 0.412 at epoch 17, where the relative error is 0.642."""
    kept = best_row(rows)
    name = "" if where == "." else f"{printable(where, 80)}: "
    said = (
        f"{name}{plural(len(rows), 'epoch')}; kept with validation MSE {kept['val_mse']:.4g} at epoch {kept['epoch']}"
    )
    if kept.get("val_rel_f") is not None:
        said += f", where the relative error is {kept['val_rel_f']:.4f}"
    ranks = [row["effective_rank"] for row in rows]
    return said + (f"; effective rank {ranks[0]} → {ranks[-1]}." if ranks[0] != ranks[-1] else ".")


def answer_blocks(answers: Mapping[str, Any]) -> list[Block]:
    rows = [[printable(cell, 80) for cell in cells(row)] for row in answers["rows"]]
    return [
        Words(printable(on_what(answers))),
        Table(HEADER, rows, first_number=RIGHT_ALIGNED),
        *(Words(printable(line)) for line in reading(answers)),
        *(Words(f"Note: {printable(note)}.") for note in answers["notes"]),
    ]


ORDER = (
    *("label", "check", "finetune", "ranks", "extract", "compress", "train", "evaluate", "study"),
    *("merge", "export", "validate", "bundle"),
    *("features capture", "features train", "features compare", "features downstream"),
)
STAGE_KEYS = {"stage", "energy_kept", "started", "finished", "seconds", "python", "versions", "inputs", "outputs"}
MOST_ROWS, MOST_PICTURES, MOST_FACTS = 14, 8, 16
Owned = tuple[StageRun | None, str]


def sections_of(contents: Contents, drawings: Drawings) -> list[Section]:
    """Every stage with what it left behind, in order of time; pieces without a stage follow in the flow's order."""
    stages = sorted(contents.stages, key=lambda stage: (stage.started, position(stage.name)))  # times are in seconds
    pieces: dict[Owned, list[Block]] = {(stage, stage.name): [] for stage in stages}
    for kinds, where, blocks in found_blocks(contents, drawings):
        if blocks:
            stage = owner(contents.stages, kinds, where)
            pieces.setdefault((stage, stage.name if stage else kinds[0]), []).extend(blocks)
    timed = [key for key in pieces if key[0] is not None]
    loose = sorted((key for key in pieces if key[0] is None), key=lambda key: position(key[1]))
    spent = [Section("time and memory", [time_table(contents.times)])] if contents.times else []
    return [*(section(stage, name, pieces[stage, name]) for stage, name in [*timed, *loose]), *spent]


def found_blocks(contents: Contents, drawings: Drawings) -> Iterator[Found]:
    """Every artefact but the scores, which have the headline."""
    for where, plan in contents.plans:
        yield ("ranks",), where, plan_blocks(plan, drawings.of(where, "energy_heatmap"))
    for where, gain in contents.gains:
        yield ("ranks",), where, gain_blocks(gain, drawings.of(where, "gain"))
    for where, adapted in contents.sites:
        yield ("train",), where, [Words(adapted_sites(adapted))]
    for where, _ in contents.logs:
        yield ("train", "finetune"), where, [*drawings.of(where, "training_loss")]
    for where, tables in contents.gradients:
        yield ("train", "finetune"), where, gradient_blocks(tables, drawings.of(where, *GRADIENT_PLOTS))
    for where, study in contents.studies:
        yield ("study",), where, study_blocks(study, drawings.of(where, *STUDY_PLOTS))
    for where, validation in contents.validations:
        yield ("validate",), where, validation_blocks(validation, drawings.of(where, CONFUSION))
    for where, rows in contents.histories:
        yield (TRAIN,), where, [Words(trained(where, rows)), *drawings.of(where, CURVES)]
    for where, comparison in contents.factors:
        yield (COMPARE,), where, comparison_blocks(comparison, drawings.of(where, *PLOTS))
    for where, answers in contents.downstream:
        yield (ANSWERS,), where, [*answer_blocks(answers), *drawings.of(where, DOWNSTREAM)]
    for where, fidelity in contents.fidelity:
        yield ("extract", "compress", "merge"), where, fidelity_blocks(fidelity)
    for where, pictures in loose_pictures(contents, drawings).items():
        yield ("ranks",) if "analysis_outputs" in where else ("train", *ORDER), where, pictures


def owner(stages: Sequence[StageRun], kinds: Sequence[str], where: str) -> StageRun | None:
    """The stage of one of these kinds in the deepest folder that holds `where`."""
    fitting = [
        stage
        for stage in stages
        if stage.name.startswith(tuple(kinds)) and (stage.folder == "." or f"{where}/".startswith(f"{stage.folder}/"))
    ]
    rank = {kind: -i for i, kind in enumerate(kinds)}
    return max(
        fitting,
        key=lambda stage: (stage.folder != ".", len(stage.folder), rank.get(stage.name, -len(kinds))),
        default=None,
    )


def position(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def section(stage: StageRun | None, name: str, blocks: list[Block]) -> Section:
    if stage is None:
        return Section(name, blocks)
    facts = stage_facts(stage.entry)
    aside = "" if stage.seconds is None else duration(stage.seconds)
    title = name if stage.folder in (".", name) else f"{name} · {stage.folder}"
    return Section(printable(title, 90), [*facts, *blocks], stage.started, aside)


def stage_facts(entry: Mapping[str, Any]) -> list[Block]:
    """The stage's plain facts (numbers, words) and where its outputs are."""
    rows = []
    for name, value in entry.items():
        if name in STAGE_KEYS or isinstance(value, (dict, list)) or value is None:
            continue
        shown = memory(value) if name.endswith("_bytes") and is_number(value) else plain(value)
        rows.append((printable(name.replace("_bytes", "_memory").replace("_", " "), 60), shown))
    outputs = entry.get("outputs")
    if isinstance(outputs, dict) and outputs:
        paths = [str(row.get("path", name)) if isinstance(row, dict) else str(row) for name, row in outputs.items()]
        rows.append(("written", clip(printable(", ".join(paths), 400), 160)))
    return [Table((), rows[:MOST_FACTS])] if rows else []


def plain(value: Any) -> str:
    return number(value) if is_number(value) else clip(printable(value, 200), 120)


def plan_blocks(plan: RankPlan, energy: Sequence[Picture]) -> list[Block]:
    """The plan in a sentence, its ranks as a table, and the energy they keep."""
    ranks = [row.rank for row in plan.sites]
    saturated = sum(row.saturated for row in plan.sites)
    said = f"{plural(len(plan.ranks), 'site')} with ranks from {min(ranks)} to {max(ranks)}: {plan.parameters:,} "
    said += f"trainable parameters, {percent(plan.kept_fraction)} of the analysed matrices."
    if saturated:
        said += f" {plural(saturated, 'site')} did not reach the energy threshold within the largest rank."
    budget = plan.metadata.get("budget")
    said += f" Chosen within a budget of {printable(budget, 40)}." if budget else ""
    return [Words(said), *energy, Folded("Ranks by layer", [ranks_table(plan)])]


def adapted_sites(adapted: Adapted) -> str:
    if not adapted.ranks:
        return "No site was adapted."
    low, high = min(adapted.ranks), max(adapted.ranks)
    ranks = f"rank {low}" if low == high else f"ranks from {low} to {high}"
    said = f"{plural(len(adapted.ranks), 'site')} adapted with {ranks}: {adapted.parameters:,} parameters."
    return said + (f" {plural(adapted.left_out, 'site')} of the plan left out." if adapted.left_out else "")


def ranks_table(plan: RankPlan) -> Table:
    columns = list(dict.fromkeys(row.site.projection for row in plan.sites))
    rows = []
    for name, members in layer_ranges(plan.sites, len(plan.sites)):
        ranks = {column: [row.rank for row in members if row.site.projection == column] for column in columns}
        cells = [" ".join(map(str, sorted(set(ranks[column])))) for column in columns]
        rows.append((name, *(clip(cell, 24) for cell in cells)))
    return Table(("", *columns), rows)


def gain_blocks(gain: Mapping[str, Any], picture: Sequence[Picture]) -> list[Block]:
    """Share of the loss gain that each arm keeps, shuffles summed up in one row."""
    rows = [
        (printable(arm["name"], 40), percent(arm["kept"]), f"{percent(arm['low'])} to {percent(arm['high'])}")
        for arm in gain["arms"]
        if not is_shuffle(arm)
    ]
    shuffles = [arm["kept"] for arm in gain["arms"] if is_shuffle(arm)]
    if shuffles:
        spread = f"{percent(min(shuffles))} to {percent(max(shuffles))}"
        rows.append((f"{len(shuffles)} shuffles, mean and range", percent(sum(shuffles) / len(shuffles)), spread))
    note = "Share of the preliminary fine-tune's loss improvement that survives truncation to the plan's parameters."
    if gain.get("defined") is False:
        note = "The fine-tune's own gain is not clearly above zero, so these shares mean nothing. " + note
    return [*picture, Table(("gain kept", "share", "95 % interval"), rows, note=note)]


def fidelity_blocks(fidelity: RecordedFidelity) -> list[Block]:
    """What is kept in total, and the sites that lose most."""
    totals = [(name.replace("_", " "), share_or_number(name, value)) for name, value in fidelity.totals.items()]
    before = any("rank_before" in row for row in fidelity.rows)
    columns = ["rank_before"] * before + ["rank", "parameters", "energy_kept"]
    worst = sorted(fidelity.rows, key=lambda row: float(row["energy_kept"]))[:MOST_ROWS]
    rows = [[printable(row["path"], 120), *(share_or_number(name, row.get(name)) for name in columns)] for row in worst]
    note = f"The {len(rows)} of {plural(len(fidelity.rows), 'site')} that lose most." if len(rows) > 1 else ""
    table = Table(("site", *(name.replace("_", " ") for name in columns)), rows, note=note)
    return [Table((), totals), Folded("Sites", [table])]


def share_or_number(name: str, value: Any) -> str:
    if not is_number(value):
        return ""
    return f"{100 * value:.2f} %" if name == "energy_kept" else number(value)


def loose_pictures(contents: Contents, drawings: Drawings) -> dict[str, list[Block]]:
    """Plots of the run that the report has not drawn itself, a few of each folder, by folder."""
    folders: dict[str, list[str]] = {}
    for picture in contents.pictures:
        if picture.rsplit("/", 1)[-1].removesuffix(".png") not in drawings.names:
            folders.setdefault(picture.rpartition("/")[0] or ".", []).append(picture)
    found: dict[str, list[Block]] = {}
    for where, names in folders.items():
        step = -(-len(names) // MOST_PICTURES)
        shown = [Picture(contents.run / name, clip(name.rsplit("/", 1)[-1].removesuffix(".png"), 90)) for name in names]
        kept: list[Block] = list(shown[::step])
        title = f"{plural(len(names), 'plot')} in {where}" + (f", {len(kept)} shown" if step > 1 else "")
        found[where] = [Folded(title, kept)]
    return found


def appendix(contents: Contents) -> list[Block]:
    """Versions and settings, for reproduction."""
    found: list[Block] = []
    versions = {f"{name} {version}" for stage in contents.stages for name, version in known_versions(stage)}
    if versions:
        found.append(Folded("Versions", [Words(", ".join(printable(text, 80) for text in sorted(versions)))]))
    for path, settings in contents.settings:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        found.append(Folded(f"Settings · {printable(path, 120)}", verbatim=printable(text, 8000)))
    return found


def known_versions(stage: StageRun) -> list[tuple[str, str]]:
    listed = stage.entry.get("versions")
    found = [(name, version) for name, version in (listed if isinstance(listed, dict) else {}).items() if version]
    return found + ([("Python", stage.entry["python"])] if stage.entry.get("python") else [])
