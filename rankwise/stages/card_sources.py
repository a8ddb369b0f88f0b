"""What `rankwise card` reads: the run's records, and those that they name as where they came from.

RUN ── export.json: model ──▶ merged folder ── manifest: adapter ──▶ training run ── manifest: model ──▶ base
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.config import SCORED_TASKS
from rankwise.errors import DataError
from rankwise.ship.gguf.export import FILE as EXPORT
from rankwise.show.contents import Contents, Scored
from rankwise.show.reading import named, read_run, walk
from rankwise.store.adapter import CONFIG_NAME, is_adapter
from rankwise.store.files import read_object
from rankwise.store.run import CONFIG, MANIFEST, RunFolder

BUNDLE = "bundle.json"
ROWS = (
    *("task", "data_path", "image_folder", "allow_outside", "allow_urls", "repeat_image", "image_first", "roles"),
    *("skip_bad", "device_target"),
)
KINDS = ("bundle", "export", "merged", "adapter")  # the furthest along first


@dataclass(frozen=True)
class Recorded:
    """A stage's entry in a manifest, and the folder that it stands in."""

    folder: Path
    entry: Mapping[str, Any]

    def input(self, name: str) -> str | None:
        """The path or name of something the stage started from."""
        row = self.entry.get("inputs", {}).get(name, {})
        found: str | None = row.get("path") or row.get("name")
        return found

    @property
    def config(self) -> dict[str, Any]:
        file = self.folder / CONFIG
        return read_object(file) if file.is_file() else {}


@dataclass(frozen=True)
class Sources:
    """All that is known of a model. `roots`: the run first, then the folders that its records name."""

    roots: tuple[Path, ...]
    contents: tuple[Contents, ...]

    def files(self, name: str) -> list[Path]:
        return [path for root in self.roots for path in named(list(walk(root)), name)]

    def stage(self, name: str) -> Recorded | None:
        """The newest entry of a stage."""
        found = [
            Recorded(one.run / stage.folder, stage.entry)
            for one in self.contents
            for stage in one.stages
            if stage.name == name
        ]
        return max(found, key=lambda one: str(one.entry.get("started", "")), default=None)

    @property
    def scores(self) -> list[Scored]:
        return [scored for one in self.contents for scored in one.scores]

    @property
    def phases(self) -> list[str]:
        return [name for one in self.contents for _, table in one.phases for _, name in table]

    def json(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        return [(path.parent, read_object(path)) for path in self.files(name)]


def sources_of(run: Path) -> Sources:
    """DataError where there is no such folder, or nothing in it that a card could say."""
    if not run.is_dir():
        raise DataError(f"{run}: no such folder; `rankwise card` takes a run folder, an adapter, a model or an export")
    roots: list[Path] = []
    for root in chain(run):
        if not any(root.resolve().is_relative_to(other.resolve()) for other in roots):
            roots.append(root)
    contents = tuple(read_run(root) if has_records(root) else Contents(root) for root in roots)
    return Sources(tuple(roots), contents)


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
    """Of a config, how its rows are read by a command that scores them."""
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
    return next((row_options(Recorded(run, {}).config) for run in runs), {})


def model_of(export: Path) -> str | None:
    return (read_object(export).get("model") or {}).get("path")


def adapters_of(manifest: Path, stages: Sequence[str] = ("merge", "compress")) -> list[str]:
    """Paths of the adapters that these stages of a folder started from."""
    entries = read_object(manifest).get("stages") or {}
    rows = [((entries.get(stage) or {}).get("inputs") or {}).get("adapter") or {} for stage in stages]
    return [row["path"] for row in rows if row.get("path")]


def has_records(root: Path) -> bool:
    return bool(named(list(walk(root)), MANIFEST))


def folders_of(run: Path, kind: str) -> list[Path]:
    """Folders of that kind in the run, the newest first."""
    files = list(walk(run))
    if kind in ("export", "bundle"):
        found = [path.parent for path in named(files, EXPORT if kind == "export" else BUNDLE)]
    elif kind == "merged":
        found = [path.parent for path in named(files, MANIFEST) if adapters_of(path, ["merge"])]
    else:
        found = [path.parent for path in named(files, CONFIG_NAME) if is_adapter(path.parent)]
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def chosen(run: Path, asked: str) -> tuple[str, Path]:
    """(kind, folder) that the card is for. DataError where the run has none."""
    for kind in KINDS if asked == "auto" else (asked,):
        for folder in folders_of(run, kind):
            return kind, folder
    wanted = "adapter, merged model or export" if asked == "auto" else asked
    raise DataError(f"{run}: holds no {wanted} that a card could be for")
