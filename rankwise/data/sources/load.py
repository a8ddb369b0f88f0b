"""Read a command's rows: determine their task, find their file, report what was left out.

--data_path: a file, a folder of official files, an archive, a hub id ── find_file ──▶ file ── load ──▶ Examples
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rankwise.data.example import Example, Examples, share_references
from rankwise.data.sources.official import fetch, is_archive, unpacked
from rankwise.data.sources.rows import LARGE, RowFile, index_rows, speakers_of
from rankwise.data.sources.table import OFFICIAL, SPLITS, Sought, Source, first_of, kind_of, source
from rankwise.errors import DataError, UsageError
from rankwise.files.processes import announce
from rankwise.options.advise import AdviseConfig
from rankwise.options.commands import CheckConfig, EvaluateConfig, FinetuneConfig, TrainConfig, ValidateConfig
from rankwise.options.sections import DataSection

Configured = TypeVar(
    "Configured", FinetuneConfig, TrainConfig, CheckConfig, EvaluateConfig, ValidateConfig, AdviseConfig
)
HUB_ID = re.compile(r"(hf://)?(?P<id>[\w.-]+/[\w.-]+)")
BY_DEFAULT = DataSection()
DATA_SUFFIXES = set(".csv .json .jsonl .ndjson .tsv .txt .parquet .7z .bz2 .zip .gz .tgz .tar".split())


def settle(config: Configured) -> Configured:
    """The config with the task that its data show, where none is given."""
    return replace(config, data=replace(config.data, task=task_of(config.data)))


def task_of(data: DataSection) -> str | None:
    """The task as given, else as the data show it (`kind_of`)."""
    return data.task or (kind_of(data.data_path) if data.data_path else None)


def check_data(data: DataSection, command: str) -> None:
    if not data.task:
        where = f", and {data.data_path} does not show it" if data.data_path else ""
        raise UsageError(f"{command}: --task is missing{where}; it says how rows become text")
    if not data.data_path:
        raise UsageError(f"{command}: --data_path is missing: give the file or folder of the rows")
    speakers_of(data.roles)


def read_examples(data: DataSection, path: str, split: str = "train", *, sees_images: bool = False) -> Examples:
    """The rows of a data set, with what was left out said aloud. `--download` fills the folder of --data_path; a file
    named beside it is read as it is. Of several processes the first one downloads while the others wait."""
    fetches = data.download and path == data.data_path
    with PartialState().local_main_process_first() if fetches else nullcontext():
        examples = load(data.task or "", path, split, replace(data, download=fetches))
    for note in examples.notes(sees_images=sees_images):
        announce(note)
    return examples


def load(
    name: str,
    path: str | Path,
    split: str = "train",
    how: DataSection = BY_DEFAULT,
    *,
    allow_empty: bool = False,
) -> Examples:
    """Read a data set from its official file, the folder of its files, its archive, or a hub id.

    split: which file of a folder, archive or hub data set; a path to one file is read whatever the split. Bad rows are
    a DataError with file and line, or with `how.skip_bad` left out and listed in the result's `skipped`. how.download:
    `path` is a folder; official files that it lacks are fetched into it and checked (ServiceError where that fails).
    allow_empty: a file without a sample is no error.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    chosen = source(name)
    sought = chosen.sought(split)
    if how.download:
        _complete(chosen, Path(path), sought)
    if how.aux_reason and not chosen.reasons:
        raise UsageError(f"--aux_reason: rows of {name} have no reasons; those of a labelled data set (labels) have")
    rows = RowFile(find_file(path, sought), how.skip_bad, how)
    items = _items(chosen, rows)
    if not items and not allow_empty:
        raise DataError(f"{rows.path}: no usable samples ({len(rows.rejected)} bad rows); is it a {name} file?")
    return Examples(items, (rows.path, *rows.companions), tuple(rows.rejected), dict(rows.left_out), dict(rows.changes))


def _items(source: Source, rows: RowFile) -> Sequence[Example]:
    if not source.builder:
        return tuple(share_references(source.read(rows)))
    if rows.is_lines and rows.path.stat().st_size > LARGE:
        return index_rows(rows, source.build(rows))
    return tuple(source.read(rows))


def _complete(source: Source, folder: Path, sought: Sought) -> None:
    """Fetch what the split needs, unless the folder has a file of that split already."""
    downloads = [download for download in OFFICIAL if download.name in sought.all_names]
    if not downloads:
        raise UsageError(f"--download: {source.name} has no official files to fetch; pass a file with --data_path")
    if folder.is_file():
        raise UsageError(f"--download fetches into a folder, and {folder} is a file; leave --download out to read it")
    found = first_of(folder, sought.all_names)
    for download in downloads:
        if found is None or found == folder / download.name:
            fetch(download, folder)


def find_file(path: str | Path, sought: Sought) -> Path:
    """The file that `path` means; an archive is unpacked, a hub data set asked for the official names.

    A path that exists is never taken for a hub id, and neither is one with the suffix of a data file.
    """
    local = Path(path)
    if local.is_dir():
        return _opened(_in_folder(local, sought), sought)
    if local.exists():
        return _opened(local, sought)
    hub = HUB_ID.fullmatch(str(path))
    if hub and local.suffix not in DATA_SUFFIXES and sought.names:
        return _opened(_on_hub(hub["id"], sought), sought)
    raise DataError(f"{local} does not exist; pass the path of a data file, or of the folder that holds it")


def _opened(file: Path, sought: Sought) -> Path:
    if not is_archive(file) or not sought.names:
        return file
    folder = unpacked(file, sought.members)
    found = first_of(folder, [Path(name).name for name in sought.names])
    if found is None:
        raise DataError(f"{file} lacks {sought.what}")
    return found


def _in_folder(folder: Path, sought: Sought) -> Path:
    found = first_of(folder, sought.all_names)
    if found:
        return found
    if not sought.names:
        raise DataError(f"{folder} is a folder; pass the path of the file that holds {sought.what}")
    names = ", ".join(sought.all_names)
    raise DataError(f"{folder} lacks {sought.what}: looked for {names}; pass the file itself if its name differs")


def _on_hub(repository: str, sought: Sought) -> Path:
    reasons = []
    for name in sought.all_names:
        try:
            file = Path(hf_hub_download(repository, name, repo_type="dataset"))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        for companion in sought.beside(name) if name in sought.names else []:
            with suppress(HfHubHTTPError, OSError):  # a source that cannot do without says so when it reads
                hf_hub_download(repository, companion, repo_type="dataset")
        return file
    tried = "\n    ".join(reasons)
    raise DataError(
        f"no file or folder {repository}, and {sought.what} could not be fetched from the hub data set of that name:"
        f"\n    {tried}\n  Without a network, pass the path of the official file."
    )
