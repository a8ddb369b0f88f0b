"""The table of data sources. To add one: a module with a `read` function and one row here.

A source turns the official files of a data set into Examples. It never downloads behind the user's back, never
invents rows, and names file and line of what it can't read.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.data.example import Example, Examples, share_references
from rankwise.data.sources import conversations, cota, e2e_nlg
from rankwise.data.sources.files import find_file
from rankwise.data.sources.rows import RowFile
from rankwise.errors import DataError, UsageError

SPLITS = {"train": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test"}


@dataclass(frozen=True)
class Source:
    """One kind of data set.

    read: file → samples; bad rows go to the file's `reject`. files: the official file names of each split, to look
    for in folders and on the hub; empty where any file will do.
    """

    name: str
    read: Callable[[RowFile], Iterator[Example]]
    files: Mapping[str, tuple[str, ...]]


SOURCES = {
    source.name: source
    for source in (
        Source("e2e_nlg", e2e_nlg.read, e2e_nlg.FILES),
        Source("cota", cota.read, {}),
        Source("conversations", conversations.read, {}),
    )
}


def source(name: str) -> Source:
    """The source of that name, or a UsageError with the nearest names."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES) or sorted(SOURCES)
        raise UsageError(f"no data source is called {name!r}; did you mean {', '.join(near)}?")
    return SOURCES[name]


def load(name: str, path: str | Path, split: str = "train", *, skip_bad: bool = False) -> Examples:
    """Read a data set from its official file, the folder of its files, or a hub id.

    split: which file of a folder or hub data set; a path to one file is read whatever the split. Bad rows are a
    DataError with file and line, or with `skip_bad` left out and listed in the result's `skipped`.
    """
    if split not in SPLITS:
        raise UsageError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    chosen = source(name)
    file = find_file(path, chosen.files.get(SPLITS[split], ()), what=f"the {SPLITS[split]} split of {name}")
    rows = RowFile(file, skip=skip_bad)
    examples = share_references(chosen.read(rows))
    if not examples:
        raise DataError(f"{file}: no usable samples ({len(rows.rejected)} bad rows); is it a {name} file?")
    return Examples(tuple(examples), (file,), tuple(rows.rejected))
