"""What a run folder holds, read into plain values for the report. Missing pieces are empty; broken ones are errors.

Found anywhere below the folder (checkpoints, hidden folders and links aside): manifest.json, resolved_config*.json,
lora_rank_config.json, evaluation_results.json with predictions.jsonl beside it, training_log.csv, gain.json,
fidelity*.csv|json, sites.json, and the PNGs of `plots/` folders.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.core.plan import RankPlan
from rankwise.errors import DataError
from rankwise.score.result import FILE as RESULTS
from rankwise.score.result import EvaluationResult
from rankwise.show.format import is_number
from rankwise.store.files import read_bytes, read_json, read_object
from rankwise.store.plan_file import read_plan
from rankwise.store.run import FORMAT as MANIFEST_FORMAT
from rankwise.store.run import MANIFEST

GENERIC = ("evaluation", "evaluate", "results", "predictions", "final_model")
BEFORE = re.compile(r"(^|[_\-/])(before|base|pretrained|untrained)($|[_\-/.])")
SECRET = re.compile(r"api_?key|password|secret|(access|hf|auth)_token", re.IGNORECASE)
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, eq=False)
class Stage:
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
    """One evaluation_results.json with the label it is shown under and its predictions by id."""

    label: str
    folder: str
    result: EvaluationResult
    written: float
    predictions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_before(self) -> bool:
        """Whether the name says that this is what training started from."""
        return bool(BEFORE.search(f"{self.folder}/{self.label}"))


@dataclass(frozen=True)
class Adapted:
    """What a sites.json says was adapted: the ranks, their parameters Σ r(m + n), and how many sites were left out."""

    ranks: list[int]
    parameters: int
    left_out: int


@dataclass(frozen=True)
class Contents:
    """Everything found; the first member of each pair is the file's folder (or path) relative to the run."""

    run: Path
    stages: tuple[Stage, ...] = ()
    plans: tuple[tuple[str, RankPlan], ...] = ()
    scores: tuple[Scored, ...] = ()
    logs: tuple[tuple[str, list[dict[str, str]]], ...] = ()
    gains: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    fidelity: tuple[tuple[str, list[Mapping[str, Any]]], ...] = ()
    sites: tuple[tuple[str, Adapted], ...] = ()
    pictures: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def is_empty(self) -> bool:
        return not any(
            (self.stages, self.plans, self.scores, self.logs, self.gains, self.fidelity, self.sites, self.pictures)
        )


def read_run(run: Path) -> Contents:
    """Read a run folder. DataError (exit 3): no such folder, nothing to report, or a file that is broken."""
    if not run.is_dir():
        raise DataError(f"{run}: no such folder; `rankwise report` takes the folder that a run has written")
    files = list(walk(run))
    contents = Contents(
        run=run,
        stages=tuple(sorted(read_stages(run, files), key=lambda stage: stage.started)),
        plans=tuple(read_plans(run, files)),
        scores=tuple(in_order(read_scores(run, files))),
        logs=tuple((folder(run, path), read_csv(path)) for path in named(files, "training_log.csv")),
        gains=tuple((folder(run, path), read_gain(path)) for path in named(files, "gain.json")),
        fidelity=tuple(read_fidelity(run, files)),
        sites=tuple((folder(run, path), read_sites(path)) for path in named(files, "sites.json")),
        pictures=tuple(relative(run, path) for path in files if is_plot(path)),
        settings=tuple(read_settings(run, files)),
    )
    if contents.is_empty:
        raise DataError(
            f"{run}: nothing to report: no manifest.json, lora_rank_config.json, evaluation_results.json, "
            "training_log.csv or plots below it. Name the folder that a rankwise command wrote."
        )
    return contents


def walk(run: Path) -> Iterator[Path]:
    """Files below the folder in name order; not of checkpoints, of hidden folders, of earlier reports, nor links."""
    for root, folders, files in os.walk(run):
        reports = {name.removesuffix(".html") + "_files" for name in files if name.endswith(".html")}
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "checkpoint-")) and name not in reports
        )
        yield from (Path(root, name) for name in sorted(files) if not Path(root, name).is_symlink())


def named(files: list[Path], name: str) -> list[Path]:
    return [path for path in files if path.name == name]


def relative(run: Path, path: Path) -> str:
    return path.relative_to(run).as_posix()


def folder(run: Path, path: Path) -> str:
    return relative(run, path.parent)


def is_plot(path: Path) -> bool:
    return path.suffix == ".png" and (path.parent.name == "plots" or (path.parent / MANIFEST).is_file())


def read_stages(run: Path, files: list[Path]) -> Iterator[Stage]:
    for path in named(files, MANIFEST):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != MANIFEST_FORMAT:
            continue  # other programs call their files so too
        stages = content.get("stages")
        if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
            raise DataError(f"{path}: `stages` is not an object of stages; delete the file or run the stage again")
        for name, entry in stages.items():
            yield Stage(name, folder(run, path), entry)


def read_plans(run: Path, files: list[Path]) -> Iterator[tuple[str, RankPlan]]:
    """Plans that name their sites; the minimal form with `layer_ranks` alone has nothing to draw."""
    for path in named(files, "lora_rank_config.json"):
        content = read_object(path)
        if content.get("rank_pattern") and content.get("layer_metadata"):
            yield folder(run, path), read_plan(path)


def read_scores(run: Path, files: list[Path]) -> Iterator[Scored]:
    for path in named(files, RESULTS):
        where = folder(run, path)
        predictions = path.with_name("predictions.jsonl")
        rows = read_predictions(predictions) if predictions.is_file() else {}
        yield Scored(label_of(where), where, EvaluationResult.load(path), path.stat().st_mtime, rows)


def label_of(where: str) -> str:
    """The last telling part of the folder: `evaluate_before` → before, `trained/evaluation` → trained."""
    parts = [part for part in Path(where).parts if part not in GENERIC]
    name = re.sub(r"^(evaluate|evaluation|eval|scores?)[_\-]", "", parts[-1]) if parts else ""
    return name.replace("_", " ") or "result"


def in_order(scores: Iterator[Scored]) -> list[Scored]:
    """What was there before training first, then by time; equal labels are told apart by their folder."""
    found = sorted(scores, key=lambda one: (not one.is_before, one.written, one.folder))
    labels = [one.label for one in found]
    return [one if labels.count(one.label) == 1 else replace(one, label=one.folder) for one in found]


def read_predictions(path: Path) -> dict[str, Mapping[str, Any]]:
    """id → row. A last line without its end is what an interrupted evaluation leaves, and is left out."""
    rows: dict[str, Mapping[str, Any]] = {}
    text = read_bytes(path).decode("utf-8", errors="replace")
    complete = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
    for line, row in enumerate(complete.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            content = json.loads(row)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line}: not JSON: {error.msg}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}, line {line}: expected an object {{…}}, found {type(content).__name__}")
        rows[str(content.get("id", line))] = content
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    return [{key: value for key, value in row.items() if key is not None} for row in csv.DictReader(text.splitlines())]


def read_gain(path: Path) -> Mapping[str, Any]:
    content = read_object(path)
    arms = content.get("arms")
    whole = isinstance(arms, list) and all(isinstance(arm, dict) and "name" in arm for arm in arms)
    if not whole or not all(is_number(arm.get(name)) for arm in arms for name in ("kept", "low", "high")):
        raise DataError(f"{path}: expected `arms`, a list of objects with name, kept, low and high")
    return content


def read_sites(path: Path) -> Adapted:
    """The adapted sites of a training run, summed up."""
    content = read_object(path)
    rows = content.get("sites")
    try:
        ranks = [int(row["rank"]) for row in rows or []]
        return Adapted(ranks, sum(row["rank"] * sum(row["shape"]) for row in rows or []), len(content["left_out"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected `sites` with rank and shape, and `left_out`: {error!r}") from error


def read_fidelity(run: Path, files: list[Path]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for path in files:
        if path.name.startswith("fidelity") and path.suffix == ".csv":
            yield relative(run, path), list(read_csv(path))
        elif path.name.startswith("fidelity") and path.suffix == ".json":
            content = read_json(path)
            rows = content.get("sites", []) if isinstance(content, dict) else content
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise DataError(f"{path}: expected a list of objects, or an object with `sites`")
            yield relative(run, path), rows


def read_settings(run: Path, files: list[Path]) -> Iterator[tuple[str, Any]]:
    for path in files:
        if path.name.startswith("resolved_config") and path.suffix == ".json":
            yield relative(run, path), without_secrets(read_json(path))


def without_secrets(content: Any) -> Any:
    """The settings with the values of keys that name a secret struck out."""
    if isinstance(content, dict):
        return {
            key: "(not shown)" if SECRET.search(str(key)) and isinstance(value, str) else without_secrets(value)
            for key, value in content.items()
        }
    return [without_secrets(item) for item in content] if isinstance(content, list) else content


def printable(text: Any, most: int = 700) -> str:
    """Text from a file as one may show it: no control characters, no direction overrides, not endless."""
    shown = UNPRINTABLE.sub("�", str(text).replace("\r\n", "\n"))
    return shown if len(shown) <= most else shown[:most].rstrip() + " …"
