"""The table of data sources. To add one: a module with a `read` function and one row here.

A source turns the official files of a data set into Examples. It never downloads behind the user's back, never
invents rows, and names file and line of what it can't read.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rankwise.data.example import Example, Examples, share_references
from rankwise.data.sources import conversations, cota, e2e_nlg, labels, multi_nli, samsum, slots, wikisql
from rankwise.data.sources.archives import is_archive
from rankwise.data.sources.download import Download, fetch
from rankwise.data.sources.files import LARGE, Sought, find_file, first_of, indexed
from rankwise.data.sources.rows import JSON_SUFFIXES, PARQUET, Build, Reading, RowFile, csv_rows, json_rows, tsv_rows
from rankwise.errors import DataError, UsageError

SPLITS = {"train": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test"} | {
    "dev_matched": "dev",
    "validation_matched": "dev",
    "dev_mismatched": "dev_mismatched",
    "validation_mismatched": "dev_mismatched",
}


@dataclass(frozen=True)
class Source:
    """One kind of data set.

    read: file → samples; bad rows go to the file's `reject`. files: the official file names of each split, to look
    for in folders, archives and on the hub; empty where any file will do. archives: official archives of those files.
    companions: suffixes of files that belong beside each. downloads: where the official files can be had. build: how
    one JSON row becomes a sample, where rows need nothing of each other: such a source's big files are indexed and not
    held in memory. Of the other sources, samples with one prompt share their references. reasons: rows say why their
    answer is right, for `aux_reason`. marks: sets of columns; a row that has all of one is this source's (`kind_of`).
    """

    name: str
    read: Callable[[RowFile], Iterator[Example]]
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    archives: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()
    build: Callable[[RowFile], Build] | None = None
    reasons: bool = False
    marks: tuple[frozenset[str], ...] = ()

    def sought(self, split: str) -> Sought:
        """What to look for; UsageError where the official data have no such split with answers."""
        wanted = SPLITS[split]
        if self.files and wanted not in self.files:
            raise UsageError(f"{self.name} has no split {split} with answers; it has {', '.join(self.files)}")
        names = self.files.get(wanted, ())
        return Sought(f"the {wanted} split of {self.name}", names, self.archives, self.companions)


def marks(*columns: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in columns)


SOURCES = {
    source.name: source
    for source in (
        Source("e2e_nlg", e2e_nlg.read, e2e_nlg.FILES, downloads=e2e_nlg.DOWNLOADS, marks=marks("mr ref")),
        Source(
            "samsum",
            samsum.read,
            samsum.FILES,
            samsum.ARCHIVES,
            downloads=samsum.DOWNLOADS,
            marks=marks("dialogue summary"),
        ),
        Source(
            "wikisql",
            wikisql.read,
            wikisql.FILES,
            wikisql.ARCHIVES,
            wikisql.COMPANIONS,
            wikisql.DOWNLOADS,
            marks=marks("question sql table_id"),
        ),
        Source(
            "multi_nli",
            multi_nli.read,
            multi_nli.FILES,
            multi_nli.ARCHIVES,
            downloads=multi_nli.DOWNLOADS,
            marks=marks("gold_label sentence1 sentence2"),
        ),
        Source("labels", labels.read, labels.FILES, reasons=True, marks=marks("image_id image_path")),
        Source("conversations", conversations.read, build=conversations.build, marks=marks(*slots.MARKS)),
        Source("cota", cota.read, build=cota.build, marks=marks("question answer")),
    )
}


def source(name: str) -> Source:
    """The source of that name, or a UsageError with the nearest names."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES) or sorted(SOURCES)
        raise UsageError(f"no data source is called {name!r}; did you mean {', '.join(near)}?")
    return SOURCES[name]


ROWS = {".csv": csv_rows, ".tsv": tsv_rows, ".txt": tsv_rows} | dict.fromkeys((*JSON_SUFFIXES, PARQUET), json_rows)


def kind_of(path: str | Path) -> str | None:
    """The source whose data a path holds, by the columns of its first row (of a folder: its official files').

    Where that tells nothing, by the path's own name (`data/samsum`, `someone/samsum`); a JSON or parquet file is
    conversations.
    None where nothing tells. DataError for a file that cannot be read.
    """
    place = Path(path).expanduser()
    if labels.is_dataset(place):
        return "labels"
    if place.is_dir():
        files = [file for each in SOURCES.values() for split in each.files for file in _files_of(each, split, place)]
    else:
        files = [place]
    found = next(filter(None, map(_kind_of_file, files)), None)
    by_name = place.name if place.name in SOURCES else None
    return found or by_name or ("conversations" if place.suffix.lower() in (*JSON_SUFFIXES, PARQUET) else None)


def _files_of(source: Source, split: str, folder: Path) -> list[Path]:
    found = first_of(folder, (*source.files[split], *source.archives))
    return [found] if found else []


def _kind_of_file(file: Path) -> str | None:
    if is_archive(file):
        return next((each.name for each in SOURCES.values() if file.name in each.archives), None)
    read = ROWS.get(file.suffix.lower())
    if read is None or not file.is_file():
        return None
    _, first = next(read(RowFile(file, skip=True)), (0, {}))
    columns = {name.lower() for name in first}
    return next((each.name for each in SOURCES.values() if any(mark <= columns for mark in each.marks)), None)


def load(
    name: str,
    path: str | Path,
    split: str = "train",
    *,
    skip_bad: bool = False,
    download: bool = False,
    repeat_image: bool = False,
    image_first: bool = False,
    roles: Sequence[str] = (),
    aux_reason: bool = False,
    allow_empty: bool = False,
) -> Examples:
    """Read a data set from its official file, the folder of its files, its archive, or a hub id.

    split: which file of a folder, archive or hub data set; a path to one file is read whatever the split. Bad rows are
    a DataError with file and line, or with `skip_bad` left out and listed in the result's `skipped`. download: `path`
    is a folder; official files that it lacks are fetched into it and checked (ServiceError where that fails).
    repeat_image, image_first, roles, aux_reason: see `Reading`. allow_empty: a file without a sample is no error.
    """
    if split not in SPLITS:
        raise UsageError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    chosen = source(name)
    sought = chosen.sought(split)
    if download:
        _complete(chosen, Path(path).expanduser(), sought)
    if aux_reason and not chosen.reasons:
        raise UsageError(f"--aux_reason: rows of {name} have no reasons; those of a labelled data set (labels) have")
    reading = Reading(repeat_image, image_first, tuple(roles), aux_reason)
    rows = RowFile(find_file(path, sought), skip=skip_bad, reading=reading)
    items = _items(chosen, rows)
    if not items and not allow_empty:
        raise DataError(f"{rows.path}: no usable samples ({len(rows.rejected)} bad rows); is it a {name} file?")
    return Examples(items, (rows.path, *rows.companions), tuple(rows.rejected), dict(rows.left_out), dict(rows.changes))


def _items(source: Source, rows: RowFile) -> Sequence[Example]:
    if source.build is None:
        return tuple(share_references(source.read(rows)))
    if rows.is_lines and rows.path.stat().st_size > LARGE:
        return indexed(rows, source.build(rows))
    return tuple(source.read(rows))


def _complete(source: Source, folder: Path, sought: Sought) -> None:
    """Fetch what the split needs, unless the folder has a file of that split already."""
    downloads = [download for download in source.downloads if download.name in sought.all_names]
    if not downloads:
        raise UsageError(f"--download: {source.name} has no official files to fetch; pass a file with --data_path")
    if folder.is_file():
        raise UsageError(f"--download fetches into a folder, and {folder} is a file; leave --download out to read it")
    found = first_of(folder, sought.all_names)
    for download in downloads:
        if found is None or found == folder / download.name:
            fetch(download, folder)
