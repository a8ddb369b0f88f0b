"""What `rankwise card` reads: the run's records, and those that they name as where they came from.

RUN ── export.json: model ──▶ merged folder ── manifest: adapter ──▶ training run ── manifest: model ──▶ base
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.files.adapter import CONFIG_NAME, is_adapter
from rankwise.files.atomic import read_object
from rankwise.files.lineage import EXPORT, adapters_of, chain, named, walk
from rankwise.files.run_folder import CONFIG, MANIFEST
from rankwise.show.contents import Contents, Scored
from rankwise.show.reading import read_run

BUNDLE = "bundle.json"
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
