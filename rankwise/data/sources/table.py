"""The table of data sources: what each one's files are called, where they can be had, and what reads them.

    kind_of(data_path) ──▶ "samsum" ── source ──▶ Source ── read, imported when it is asked for ──▶ Examples

To add one: a reader in this folder and a row of `SOURCES`. A source never downloads behind the user's back, never
invents rows, and names file and line of what it cannot read.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rankwise.data.example import Example
from rankwise.data.sources.official import Download, is_archive
from rankwise.data.sources.rows import JSON_SUFFIXES, PARQUET, RowFile, csv_rows, json_rows, tsv_rows
from rankwise.errors import UsageError
from rankwise.files.adapter import TASK
from rankwise.files.atomic import fingerprint, sha256

SPLITS = {"train": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test"} | {
    "dev_matched": "dev",
    "validation_matched": "dev",
    "dev_mismatched": "dev_mismatched",
    "validation_mismatched": "dev_mismatched",
}
E2E = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
SAMSUM = "https://arxiv.org/src/1911.12237v2/anc/corpus.7z"
WIKISQL = "https://github.com/salesforce/WikiSQL/raw/master/data.tar.bz2"
MULTI_NLI = "https://cims.nyu.edu/~sbowman/multinli/multinli_1.0.zip"
OFFICIAL = [  # where official files and archives can be had: URL, SHA-256, bytes
    Download(f"{E2E}trainset.csv", "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6", 9_340_189),
    Download(f"{E2E}devset.csv", "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9", 1_161_305),
    Download(f"{E2E}testset_w_refs.csv", "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd", 1_310_822),
    Download(SAMSUM, "a97674c66726f66b98a08ca5e8868fb8af9d4843f2b05c4f839bc5cfe91e8899", 2_944_100),
    Download(WIKISQL, "755c728ab188e364575705c8641f3fafd86fb089cb8b08e8c03f01832aae0881", 26_164_664),
    Download(MULTI_NLI, "049f507b9e36b1fcb756cfd5aeb3b7a0cfcb84bf023793652987f7e7e0957822", 226_850_426),
]
MNLI = tuple(f"{folder}multinli_1.0_{{}}{suffix}" for suffix in (".jsonl", ".txt") for folder in ("", "multinli_1.0/"))
CONVERSATIONS = (  # the forms of `slots.FORMS`
    *("conversations", "messages", "conversation", "texts", "query response", "instruction output"),
    *("instruction response", "system_prompt question response", "prompt completion", "prompt response"),
    "prefix suffix",
)


ON_HUB = {  # the same data sets, by their hub ids
    "e2e_nlg": "tuetschek/e2e_nlg",
    "samsum": "Samsung/samsum",
    "wikisql": "Salesforce/wikisql",
    "multi_nli": "nyu-mll/multi_nli",
}


@dataclass(frozen=True)
class Sought:
    """The official names of what is looked for, best first; `what` is for messages.

    archives: official archives that hold such a file. companions: suffixes of files that belong beside it and are
    fetched or unpacked with it where they exist.
    """

    what: str
    names: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        return (*self.names, *self.archives)

    def beside(self, name: str) -> list[str]:
        """Names of the companions of a file."""
        return [str(Path(name).with_suffix(suffix)) for suffix in self.companions]

    @property
    def members(self) -> list[str]:
        """File names that are taken out of an archive."""
        files = {Path(name).name for name in self.names}
        return sorted(files | {companion for name in files for companion in self.beside(name)})


@dataclass(frozen=True)
class Source:
    """One kind of data set.

    reader: `module:function` of this folder, imported when rows are read: file → samples; bad rows go to the file's
    `reject`. marks: sets of columns; a row that has all of one is this source's (`kind_of`). files: the official file
    names of each split, to look for in folders, archives and on the hub; empty where any file will do. archives:
    official archives of those files. companions: suffixes of files that belong beside each. builder: how one JSON row
    becomes a sample, where rows need nothing of each other: such a source's big files are indexed and not held in
    memory. Of the other sources, samples with one prompt share their references. reasons: rows say why their answer is
    right, for `aux_reason`.
    """

    name: str
    reader: str
    marks: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    archives: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    builder: str = ""
    reasons: bool = False

    def read(self, rows: RowFile) -> Iterator[Example]:
        found: Iterator[Example] = _imported(self.reader)(rows)
        return found

    def build(self, rows: RowFile) -> Any:
        return _imported(self.builder)(rows)

    def sought(self, split: str) -> Sought:
        """File names to look for; UsageError where the official data have no such split with answers."""
        wanted = SPLITS[split]
        if self.files and wanted not in self.files:
            raise UsageError(f"{self.name} has no split {split} with answers; it has {', '.join(self.files)}")
        names = self.files.get(wanted, ())
        return Sought(f"the {wanted} split of {self.name}", names, self.archives, self.companions)


def _imported(place: str) -> Callable[[RowFile], Any]:
    module, _, name = place.partition(":")
    found: Callable[[RowFile], Any] = getattr(import_module(f"{__package__}.{module}"), name)
    return found


SOURCES = {
    source.name: source
    for source in (
        Source(
            "e2e_nlg",
            "texts:read_e2e_nlg",
            ("mr ref",),
            {
                "train": ("trainset.csv", "train-fixed.no-ol.csv"),
                "dev": ("devset.csv", "devel-fixed.no-ol.csv"),
                "test": ("testset_w_refs.csv", "test-fixed.csv"),
            },
        ),
        Source(
            "samsum",
            "texts:read_samsum",
            ("dialogue summary",),
            {
                "train": ("train.json", "train.csv"),
                "dev": ("val.json", "validation.csv", "val.csv"),
                "test": ("test.json", "test.csv"),
            },
            ("corpus.7z",),
        ),
        Source(
            "wikisql",
            "wikisql:read",
            ("question sql table_id",),
            {split: (f"{split}.jsonl", f"data/{split}.jsonl") for split in ("train", "dev", "test")},
            ("data.tar.bz2",),
            (".tables.jsonl", ".db"),
        ),
        Source(
            "multi_nli",
            "texts:read_multi_nli",
            ("gold_label sentence1 sentence2",),
            {
                split: (*(name.format(part) for name in MNLI), f"{part}.tsv")
                for split, part in (("train", "train"), ("dev", "dev_matched"), ("dev_mismatched", "dev_mismatched"))
            },
            ("multinli_1.0.zip",),
        ),
        Source(
            "labels",
            "labels:read",
            ("image_id image_path",),
            {"train": ("train.jsonl",), "dev": ("val.jsonl",)},
            reasons=True,
        ),
        Source("conversations", "conversations:read", CONVERSATIONS, builder="conversations:build"),
        Source("cota", "cota:read", ("question answer",), builder="cota:build"),
    )
}


def source(name: str) -> Source:
    """The source of that name, or a UsageError with the nearest names."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES) or sorted(SOURCES)
        raise UsageError(f"unknown data source {name!r}; did you mean {', '.join(near)}?")
    return SOURCES[name]


ROWS = {".csv": csv_rows, ".tsv": tsv_rows, ".txt": tsv_rows} | dict.fromkeys((*JSON_SUFFIXES, PARQUET), json_rows)


def kind_of(path: str | Path) -> str | None:
    """The source whose data a path holds, by the columns of its first row (of a folder: its official files').

    Where that tells nothing, by the path's own name (`data/samsum`, `someone/samsum`); a JSON or parquet file is
    conversations.
    None where nothing tells. DataError for a file that cannot be read.
    """
    place = Path(path)
    if is_labelled(place):
        return "labels"
    if place.is_dir():
        files = [file for each in SOURCES.values() for split in each.files for file in _files_of(each, split, place)]
    else:
        files = [place]
    found = next(filter(None, map(_kind_of_file, files)), None)
    by_name = place.name if place.name in SOURCES else None
    return found or by_name or ("conversations" if place.suffix.lower() in (*JSON_SUFFIXES, PARQUET) else None)


def is_labelled(path: str | Path | None) -> bool:
    """Whether a path is the folder of a labelled data set: its task beside its training rows."""
    folder = Path(path or "")
    return bool(path) and all((folder / name).is_file() for name in (TASK, *SOURCES["labels"].files["train"]))


def own_validation(path: str | Path) -> str | None:
    """The folder of a labelled data set again where it has validation rows of its own, for the split `dev`."""
    file = Path(path) / SOURCES["labels"].files["dev"][0]
    return str(path) if file.is_file() and file.stat().st_size else None


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
    return next(
        (each.name for each in SOURCES.values() if any(columns.issuperset(mark.split()) for mark in each.marks)), None
    )


def first_of(folder: Path, names: Collection[str]) -> Path | None:
    """The first of the names that the folder holds."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def official_on_hub(path: Path, recorded: str | None) -> str | None:
    """The hub id of the data set whose official file was read, told by its content: the fingerprint on record, or that
    of the path where it is still what was recorded (a large archive, a folder in which all data are official files of
    one data set: which of them were read is not on record)."""
    names = {name: each for each in SOURCES.values() for split in each.files for name in each.sought(split).all_names}
    official = {each.sha256: names[each.name].name for each in OFFICIAL}
    found = official.get(recorded or "")
    if not found and recorded and path.exists() and fingerprint(path) == recorded:
        inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        files = [file for file in inside if file.suffix.lower() in ROWS or is_archive(file)]
        sizes = {each.size for each in OFFICIAL}
        if all(file.stat().st_size in sizes for file in files):
            kinds = {official.get(sha256(file)) for file in files}
            found = kinds.pop() if len(kinds) == 1 else None
    return ON_HUB.get(found or "")
