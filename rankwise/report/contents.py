"""Reading a run folder for the report: missing pieces are empty, broken ones are errors that name the file.

Found anywhere below the folder (checkpoints, hidden folders, earlier reports and links aside): manifest.json,
resolved_config*.json, lora_rank_config.json, evaluation_results.json with predictions.jsonl beside it,
forgetting.json, training_log.csv, phases.csv, the tables of gradient norms, gain.json, expert_changes.json,
intruders.json, fidelity.json, sites.json, study.json, validation.json, what the commands on features leave, and the
PNGs of `plots/` folders.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rankwise.core.plan import RankPlan
from rankwise.errors import DataError
from rankwise.evaluate.predictions import FORGETTING, RESULTS, EvaluationResult
from rankwise.files.atomic import read_bytes, read_json, read_object
from rankwise.files.document import read_lines
from rankwise.files.lineage import named, walk
from rankwise.files.plan import read_plan
from rankwise.files.run_folder import MANIFEST, SITES, STAGES, without_secrets
from rankwise.page.blocks import Finding, SourceFile
from rankwise.pipeline.table import imported
from rankwise.pipeline.times import StageTime, read_times
from rankwise.train.gradient_summary import GradientTables, read_phases, read_tables
from rankwise.train.gradient_table import GROUPS, NORMS


@dataclass(frozen=True, eq=False)
class StageRun:
    """One entry of a manifest: which stage ran where (folder relative to the run), when and for how long."""

    name: str
    folder: str
    entry: Mapping[str, Any]

    @property
    def started(self) -> str:
        return str(self.entry.get("started", ""))

    @property
    def seconds(self) -> float | None:
        found = self.entry.get("seconds")
        return float(found) if isinstance(found, (int, float)) else None


@dataclass(frozen=True)
class Scored:
    """One evaluation_results.json with the label it is shown under and its predictions by id.

    `is_before`: this is what training started from, by its name or because an adapter was put on the same model.
    """

    label: str
    folder: str
    result: EvaluationResult
    written: float
    is_before: bool = False
    predictions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file: str = RESULTS.name


@dataclass(frozen=True)
class Adapted:
    """Adapted sites, from sites.json: the ranks, their parameters Σ r(m + n), and how many sites were left out."""

    ranks: list[int]
    parameters: int
    left_out: int

    def span(self) -> str:
        """rank 4 · ranks 2 to 6"""
        low, high = min(self.ranks), max(self.ranks)
        return f"rank {low}" if low == high else f"ranks {low} to {high}"


@dataclass(frozen=True)
class Contents:
    """Everything found; the first member of each pair is the file's folder relative to the run, of plans its path."""

    run: Path
    stages: tuple[StageRun, ...] = ()
    plans: tuple[tuple[str, RankPlan], ...] = ()
    scores: tuple[Scored, ...] = ()
    logs: tuple[tuple[str, list[dict[str, str]]], ...] = ()
    sites: tuple[tuple[str, Adapted], ...] = ()
    gradients: tuple[tuple[str, GradientTables], ...] = ()
    findings: tuple[tuple[Finding, str, Any], ...] = ()
    phases: tuple[tuple[str, list[tuple[int, str]]], ...] = ()
    times: tuple[StageTime, ...] = ()
    pictures: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def source(self, where: str, name: str) -> SourceFile:
        """A file of one of the run's folders, as the page links to it."""
        path = (Path(where) / name).as_posix()
        return SourceFile(self.run / path, path)

    def norms(self, plan: RankPlan) -> tuple[dict[str, float], str]:
        """Mean gradient norms of the plan's sites, and the folder of their table: that of a run which trained these
        ranks, where there is one, and of those the one that has most of the sites."""
        paths, planned, adapted = {row.site.path for row in plan.sites}, Counter(plan.ranks.values()), dict(self.sites)
        held = []
        for where, tables in self.gradients:
            norms = {path: norm for path, norm in tables.sites.items() if path in paths}
            its_own = where in adapted and Counter(adapted[where].ranks) <= planned
            held.append((norms, where, its_own and bool(norms)))
        found = max(held, key=lambda one: (one[2], len(one[0])), default=({}, "", False))
        return found[:2]

    def was_trained(self, plan: RankPlan) -> bool:
        """Whether a plan's ranks, or a part of them, are those that were trained; so they are where nothing was yet."""
        planned = Counter(plan.ranks.values())
        return not self.sites or any(Counter(adapted.ranks) <= planned for _, adapted in self.sites)

    @property
    def is_empty(self) -> bool:
        return not any(getattr(self, one.name) for one in fields(self) if one.name not in ("run", "settings"))


# What is shown where it lies: file → where its `Finding` is, which says how. Loaded where such a file is found, since
# together they import half of the package.
FINDINGS = {
    "gain.json": ("ranks.plots", "GAIN"),
    "expert_changes.json": ("ranks.expert_map", "EXPERT_MAP"),
    "intruders.json": ("ranks.intruders", "INTRUDERS"),
    "advice.json": ("study.advice_page", "ADVICE"),
    "study.json": ("study.page", "STUDY"),
    "validation.json": ("device.validation_page", "VALIDATION"),
    "handoff.json": ("device.handoff.page", "FINDING"),
    "history.json": ("features.history", "EPOCHS"),
    "comparison.json": ("features.page", "FACTORS"),
    "downstream.json": ("features.downstream_page", "ANSWERS"),
    "fidelity.json": ("ranks.fidelity", "FIDELITY"),
}
VALIDATION, EPOCHS = "validation.json", "history.json"


GENERIC = ("evaluation", "evaluate", "results", "predictions", "final_model")
BEFORE = re.compile(r"(^|[_\-/])(before|base|pretrained|untrained)($|[_\-/.])")


def read_run(run: Path) -> Contents:
    """Read a run folder. DataError (exit 3): no such folder, nothing to report, or a file that is broken."""
    if not run.is_dir():
        raise DataError(f"{run}: no such folder; `rankwise report` takes the folder that a run has written")
    files = list(walk(run))
    findings = tuple(read_findings(run, files))
    of_factors = {where for finding, where, _ in findings if finding.file == EPOCHS}
    contents = Contents(
        run=run,
        stages=tuple(sorted(read_stages(run, files), key=lambda stage: stage.started)),
        plans=tuple(read_plans(run, files)),
        scores=tuple(in_order(read_scores(run, files))),
        logs=tuple(
            (folder(run, path), read_csv(path))
            for path in named(files, "training_log.csv")
            if folder(run, path) not in of_factors  # its loss is not in nats per token
        ),
        sites=tuple((folder(run, path), read_sites(path)) for path in named(files, "sites.json")),
        gradients=tuple(read_gradients(run, files)),
        findings=findings,
        phases=tuple((folder(run, path), read_phases(path)) for path in named(files, "phases.csv")),
        times=read_times(run),
        pictures=tuple(
            relative(run, path)
            for path in files
            if path.suffix == ".png" and (path.parent.name == "plots" or (path.parent / MANIFEST).is_file())
        ),
        settings=tuple(read_settings(run, files)),
    )
    if contents.is_empty:
        raise DataError(
            f"{run}: nothing to report: no manifest.json, lora_rank_config.json, evaluation_results.json, "
            "training_log.csv or plots below it. Name the folder that a rankwise command wrote."
        )
    return contents


def read_findings(run: Path, files: list[Path]) -> Iterator[tuple[Finding, str, Any]]:
    for name, (module, attribute) in FINDINGS.items():
        for path in named(files, name):
            finding: Finding = getattr(imported(f"rankwise.{module}"), attribute)
            content = finding.read(path)
            if content is not None:
                yield finding, folder(run, path), content


def relative(run: Path, path: Path) -> str:
    return path.relative_to(run).as_posix()


def folder(run: Path, path: Path) -> str:
    return relative(run, path.parent)


def read_stages(run: Path, files: list[Path]) -> Iterator[StageRun]:
    for path in named(files, MANIFEST):
        content = STAGES.read_own(path)
        if content is None:
            continue
        stages = content.get("stages")
        if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
            raise DataError(f"{path}: `stages` is not an object of stages; delete the file or run the stage again")
        for name, entry in stages.items():
            yield StageRun(name, folder(run, path), entry)


def read_plans(run: Path, files: list[Path]) -> Iterator[tuple[str, RankPlan]]:
    """Plans that name their sites; the minimal form with `layer_ranks` alone has nothing to draw."""
    for path in named(files, "lora_rank_config.json"):
        content = read_object(path)
        if content.get("rank_pattern") and content.get("layer_metadata"):
            yield relative(run, path), read_plan(path)


def read_scores(run: Path, files: list[Path]) -> Iterator[Scored]:
    """All scores but those that a validation has made for itself: it shows them in its own table."""
    within = {path.parent for path in named(files, VALIDATION)}
    for path in [*named(files, RESULTS.name), *named(files, FORGETTING)]:
        if within & set(path.parents):
            continue
        where = folder(run, path)
        predictions = path.with_name("predictions.jsonl")
        rows = read_predictions(predictions) if path.name == RESULTS.name and predictions.is_file() else {}
        result, label = EvaluationResult.load(path), label_of(where)
        is_before = bool(BEFORE.search(f"{where}/{label}"))
        yield Scored(label, where, result, path.stat().st_mtime, is_before, rows, path.name)


def label_of(where: str) -> str:
    """The last telling part of the folder: `evaluate_before` → before, `trained/evaluation` → trained."""
    parts = [part for part in Path(where).parts if part not in GENERIC]
    name = re.sub(r"^(evaluate|evaluation|eval|scores?)[_\-]", "", parts[-1]) if parts else ""
    return name.replace("_", " ") or "result"


def in_order(scores: Iterator[Scored]) -> list[Scored]:
    """What was there before training first, then by time; equal labels are told apart by their folder."""
    found = list(scores)
    sources = [one.result.settings.get("made_from") or {} for one in found]
    bases = [source["model"] for source in sources if "adapter" in source and "model" in source]
    known = [
        replace(one, is_before=one.is_before or ("adapter" not in source and source.get("model") in bases))
        for one, source in zip(found, sources, strict=True)
    ]
    labels = [one.label for one in known]
    ordered = sorted(known, key=lambda one: (not one.is_before, one.written, one.folder))
    return [one if labels.count(one.label) == 1 else replace(one, label=one.folder) for one in ordered]


def read_predictions(path: Path) -> dict[str, Mapping[str, Any]]:
    """id → row. A last line without its end is what an interrupted evaluation leaves, and is left out."""
    rows = enumerate(read_lines(path, "a prediction", dict), 1)
    return {str(row.get("id", line)): row for line, row in rows}


def read_csv(path: Path) -> list[dict[str, str]]:
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    return [{key: value for key, value in row.items() if key is not None} for row in csv.DictReader(text.splitlines())]


def read_gradients(run: Path, files: list[Path]) -> Iterator[tuple[str, GradientTables]]:
    """The tables of every folder that has measurements in them."""
    for where in sorted({path.parent for path in files if path.name in (NORMS, GROUPS)}):
        tables = read_tables(where)
        if tables is not None and tables.groups:
            yield relative(run, where), tables


def read_sites(path: Path) -> Adapted:
    """The adapted sites of a training run, summed up."""
    content = SITES.read(path)
    try:
        rows = content["sites"]
        parameters = sum(row["rank"] * sum(row["shape"]) for row in rows)
        return Adapted([int(row["rank"]) for row in rows], parameters, len(content["left_out"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected `sites` with rank and shape, and `left_out`: {error!r}") from error


def read_settings(run: Path, files: list[Path]) -> Iterator[tuple[str, Any]]:
    for path in files:
        if path.name.startswith("resolved_config") and path.suffix == ".json":
            yield relative(run, path), without_secrets(read_json(path))
