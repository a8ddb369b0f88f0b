"""Lineage of a folder, from its records, and the reading options of its training rows.

RUN ── export.json: model ──▶ merged folder ── manifest: adapter ──▶ training run ── manifest: model ──▶ base
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import VerificationError
from rankwise.files.adapter import is_adapter
from rankwise.files.atomic import fingerprint, read_if_there, read_object
from rankwise.files.processes import announce
from rankwise.files.run_folder import CONFIG, MANIFEST, RunFolder
from rankwise.options.sections import SCORED_TASKS

EXPORT = "export.json"
ROWS = (
    *("task", "data_path", "image_folder", "allow_outside", "allow_urls", "repeat_image", "image_first", "roles"),
    *("skip_bad", "device_target"),
)
TRAINING = ("train", "finetune")
MODEL_FILES = (".safetensors", ".safetensors.index.json", ".gguf")


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


def chain(run: Path) -> Iterator[Path]:
    """The folder, and every folder that it and its predecessors were made from and that is still there."""
    waiting, seen = [run], set()
    while waiting:
        folder = waiting.pop(0)
        if folder in seen or not folder.is_dir():
            continue
        seen.add(folder)
        yield folder
        files = list(walk(folder))
        waiting += [Path(path) for file in named(files, EXPORT) if (path := model_of(file))]
        waiting += [Path(path) for file in named(files, MANIFEST) for path in adapters_of(file)]


def row_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a config that set how a scoring command reads its rows."""
    return {name: config[name] for name in ROWS if config.get(name)}


def trained_rows(folder: Path) -> dict[str, Any]:
    """Those of the run that an adapter, a merged model or an export was made from; empty where its folder does not say,
    or the task has no scores."""
    places = [place for root in chain(folder) for place in ((root, root.parent) if is_adapter(root) else (root,))]
    found = rows_of(places, "train")
    return found if found.get("task") in SCORED_TASKS else {}


def rows_of(places: Iterable[Path], *stages: str) -> dict[str, Any]:
    """Those of the first of these folders that is a run of one of the stages; empty where none is."""
    runs = (place for place in places if not set(stages).isdisjoint(RunFolder(place).stages()))
    return next((row_options(config_of(run)) for run in runs), {})


def config_of(run: Path) -> dict[str, Any]:
    return read_if_there(run / CONFIG)


def model_of(export: Path) -> str | None:
    return (read_object(export).get("model") or {}).get("path")


def adapters_of(manifest: Path, stages: Sequence[str] = ("merge", "compress")) -> list[str]:
    """Paths of the adapters that these stages of a folder started from."""
    entries = read_object(manifest).get("stages") or {}
    rows = [((entries.get(stage) or {}).get("inputs") or {}).get("adapter") or {} for stage in stages]
    return [row["path"] for row in rows if row.get("path")]


def altered(folder: Path, stage: str) -> str | None:
    """What to say of a folder with other model files (weights, their index, config.json, GGUF) than a stage wrote and
    recorded there; None where they are the same. Large files are compared by `fingerprint`'s samples."""
    rows = RunFolder(folder).stages().get(stage, {}).get("outputs") or {}
    names = [
        name
        for name, row in rows.items()
        if (name == "config.json" or name.endswith(MODEL_FILES)) and not as_recorded(folder, row)
    ]
    if not names:
        return None
    verb = "is" if len(names) == 1 else "are"
    return (
        f"{folder}: {', '.join(names)} {verb} not what `rankwise {stage}` wrote: run it again (where the change is "
        "meant, delete manifest.json there: nothing says then what the model was made from)"
    )


def as_recorded(folder: Path, row: Any) -> bool:
    """Whether an output is there as the manifest describes it; a row that does not describe it proves no change."""
    try:
        file, recorded = folder / row["path"], row["fingerprint"]
    except (KeyError, TypeError):
        return True
    return file.is_file() and bool(fingerprint(file) == recorded)


def require_unaltered(folder: Path, stage: str) -> None:
    """VerificationError where the folder's model is no longer what the stage wrote."""
    if doubt := altered(folder, stage):
        raise VerificationError(doubt)


def warn_of_training_rows(run: Path, file: Path, measured: str) -> None:
    """Warn where a training run in this folder, or its parent, was trained on this file."""
    entries = [RunFolder(folder).stages().get(stage, {}) for folder in (run, run.parent) for stage in TRAINING]
    learnt_from = {entry.get("inputs", {}).get("data", {}).get("fingerprint") for entry in entries}
    if fingerprint(file) in learnt_from:
        announce(f"warning: {file} is what {run} was trained on, so {measured} how well its rows are remembered")
