"""SAMSum, WikiSQL and MultiNLI: official files and archives read whole; what is left out is counted; traps refused."""

from __future__ import annotations

import bz2
import io
import json
import re
import shutil
import stat
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rankwise.data.example import Example
from rankwise.data.sources import official as archives
from rankwise.data.sources.load import load
from rankwise.data.sources.slots import FORMS
from rankwise.data.sources.table import SOURCES
from rankwise.data.sources.wikisql import DATABASE, TABLES
from rankwise.errors import DataError, UsageError
from rankwise.options.sections import TASKS, DataSection


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RANKWISE_CACHE", str(folder))
    return folder


def sections(example: Example) -> dict[str, str]:
    return {turn.heading: turn.text for turn in example.turns}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_task_has_a_source() -> None:
    assert set(TASKS) == set(SOURCES)
    assert SOURCES["conversations"].marks == tuple(map(" ".join, FORMS))  # told apart before `slots` is imported
    assert SOURCES["wikisql"].companions == (TABLES, DATABASE)


# --- SAMSum ------------------------------------------------------------------------------------------------------


def test_samsum_official_rows(shared_data: Path) -> None:
    train, dev = (load("samsum", shared_data / "samsum", split) for split in ("train", "validation"))
    assert (len(train), len(dev)) == (14731, 818)
    assert train.notes() == ["note: 1 left out: the official row 13828807, whose dialogue is empty"]
    assert not train.skipped and not dev.notes()
    assert not any("\r" in turn.text for example in train for turn in example.turns)
    first = train[0]
    assert (first.id, first.group) == ("13818513", "13818513")
    assert list(sections(first)) == ["Instruction", "Dialogue", "Summary"]
    assert sections(first)["Dialogue"].splitlines()[1] == "Jerry: Sure!"
    assert first.answer == "Amanda baked cookies and will bring Jerry some tomorrow."


def test_samsum_csv_has_the_same_rows(shared_data: Path) -> None:
    official, copy = (load("samsum", shared_data / "samsum" / name, "dev") for name in ("val.json", "csv"))
    assert [sections(example) for example in copy] == [sections(example) for example in official]
    assert [example.id for example in copy] == [example.id for example in official]


def test_samsum_official_archive(shared_data: Path, cache: Path) -> None:
    folder = shared_data / "samsum" / "official_mini"
    train, dev, test = (load("samsum", folder, split) for split in ("train", "dev", "test"))
    assert [len(part) for part in (train, dev, test)] == [5, 5, 5]
    assert train.items == load("samsum", shared_data / "samsum").items[:5]
    assert load("samsum", folder / "corpus.7z", "dev").items == dev.items
    assert all(cache in file.parents for file in train.files)


@pytest.mark.parametrize("row", [{"dialogue": ""}, {"dialogue": "a: b", "summary": " "}, {"dialogue": 3}])
def test_other_empty_rows_of_samsum_are_bad(tmp_path: Path, row: dict[str, Any]) -> None:
    rows = [{"id": "1", "dialogue": "a: b", "summary": "c"}, {"id": "2", "summary": "c"} | row]
    file = write(tmp_path / "train.json", rows)
    with pytest.raises(DataError, match=r"sample 2: .* must be a text"):
        load("samsum", file)
    assert len(load("samsum", file, how=DataSection(skip_bad=True))) == 1


def test_a_broken_samsum_csv_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "test.csv", 'id,dialogue,summary\n"1,""a: b\n";;\n"2,""c";;\n')
    with pytest.raises(DataError, match=r"test\.csv, line 2"):
        load("samsum", file, "test")


# --- MultiNLI ----------------------------------------------------------------------------------------------------


def test_multi_nli_official_forms_agree(shared_data: Path) -> None:
    folder = shared_data / "multinli" / "official_mini"
    for split in ("dev", "dev_mismatched"):
        rows = load("multi_nli", folder, split)
        name = "dev_matched" if split == "dev" else split
        table = load("multi_nli", folder / "multinli_1.0" / f"multinli_1.0_{name}.txt", split)
        assert len(rows) == 5 and len(table) in (4, 5)
        assert table.items == rows.items[: len(table)]
    assert load("multi_nli", folder, "dev_matched").items == load("multi_nli", folder, "validation").items
    first = load("multi_nli", folder)[0]
    assert list(sections(first)) == ["Instruction", "Premise", "Hypothesis", "Classification"]
    assert (first.id, first.group, first.answer) == ("31193n", sections(first)["Premise"], "neutral")
    classes = ("entailment", "neutral", "contradiction")
    assert first.facts == {"label": "neutral", "labels": classes, "genre": "government"}


def test_a_cut_table_is_a_bad_row(shared_data: Path) -> None:
    file = shared_data / "multinli" / "official_mini" / "multinli_1.0" / "multinli_1.0_train.txt"
    with pytest.raises(DataError, match="line 5: 11 fields, the header has 15"):
        load("multi_nli", file)
    rows = load("multi_nli", file, how=DataSection(skip_bad=True))
    assert rows.items == load("multi_nli", file.with_suffix(".jsonl")).items[: len(rows)]
    assert len(rows.skipped) == 1


def test_multi_nli_train_rows_and_glue_tables(shared_data: Path) -> None:
    folder = shared_data / "multinli"
    whole = load("multi_nli", folder / "derived" / "multinli_1.0_train.subset480.jsonl")
    assert len(whole) == 480 and Counter(e.answer for e in whole) == dict.fromkeys(e.answer for e in whole) | {
        "entailment": 160,
        "neutral": 160,
        "contradiction": 160,
    }
    by_id = {example.id: example for example in whole}
    for shot in sorted((folder / "glue_kshot").iterdir()):
        for split in ("train", "dev"):  # lone quotation marks occur there
            rows = load("multi_nli", shot, split)
            assert len(rows) == 48
            assert all(sections(by_id[example.id]) == sections(example) for example in rows)


def test_pairs_without_a_majority_are_left_out_and_counted(tmp_path: Path) -> None:
    def pair(number: int, label: str) -> dict[str, str]:
        return {"pairID": str(number), "gold_label": label, "sentence1": "It rains.", "sentence2": f"Wet {number}."}

    file = write(tmp_path / "d.jsonl", lines(*(pair(n, label) for n, label in enumerate(["-", "neutral", "-"]))))
    rows = load("multi_nli", file)
    assert [example.id for example in rows] == ["1"]
    assert (
        rows.notes() == ["note: 2 left out: pairs on whose label the annotators did not agree (gold_label -)"]
        and not rows.skipped
    )
    write(file, lines(pair(1, "neutral"), pair(2, "hidden"), pair(1, "neutral")))
    with pytest.raises(DataError, match="line 2: sample 2: gold_label must be"):
        load("multi_nli", file)
    assert "this id occurred before" in str(load("multi_nli", file, how=DataSection(skip_bad=True)).skipped[1])


def test_splits_that_a_task_lacks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multi_nli has no split test with answers; it has train, dev, dev_mismatched"):
        load("multi_nli", tmp_path, "test")
    with pytest.raises(UsageError, match="samsum has no split dev_mismatched"):
        load("samsum", tmp_path, "dev_mismatched")


# --- WikiSQL -----------------------------------------------------------------------------------------------------


@pytest.fixture
def official_dev(shared_data: Path, tmp_path: Path) -> Path:
    """The official questions with the column names that could be recovered."""
    (tmp_path / "data").mkdir()
    shutil.copyfile(shared_data / "wikisql" / "data" / "dev.jsonl", tmp_path / "data" / "dev.jsonl")
    tables = shared_data / "wikisql" / "derived" / "dev.tables.partial.jsonl"
    shutil.copyfile(tables, tmp_path / "data" / "dev.tables.jsonl")
    return tmp_path


def test_wikisql_official_rows(official_dev: Path) -> None:
    rows = load("wikisql", official_dev, "dev")
    assert len(rows) == 8421 and len({example.group for example in rows}) == 2630
    assert [file.name for file in rows.files] == ["dev.jsonl", "dev.tables.jsonl"]
    assert sum(" WHERE " not in example.answer for example in rows) == 64
    first = rows[0]
    assert list(sections(first)) == ["Instruction", "Table", "Question", "SQL"]
    assert sections(first)["Table"] == "Player, No., col2, Position, Years in Toronto, School/Club Team"
    assert first.answer == "SELECT Position FROM table WHERE School/Club Team = Butler CC (KS)"
    assert (first.id, first.group) == ("dev-1", "1-10015132-11")
    assert first.facts["header"][1] == "No." and first.facts["database"] is None
    assert first.facts["sql"] == {"sel": 3, "conds": [[5, 0, "Butler CC (KS)"]], "agg": 0}


def test_wikisql_text_is_the_published_human_readable_one(shared_data: Path, official_dev: Path) -> None:
    """Which writes COUNT x for COUNT(x); compared where all columns of the query have a recovered name."""
    rows = load("wikisql", official_dev, "dev")
    published = json.loads((shared_data / "wikisql" / "human_readable" / "wikisql_validation.json").read_text())
    pairs = [
        (re.sub(r"^SELECT (MAX|MIN|COUNT|SUM|AVG)\((.*?)\) FROM", r"SELECT \1 \2 FROM", example.answer), row["answer"])
        for example, row in zip(rows, published, strict=True)
        if not re.search(r"\bcol\d", example.answer)
    ]
    assert len(pairs) > 8000
    assert [pair for pair in pairs if pair[0].split() != pair[1].split()] == []


def test_wikisql_subsets_and_sample(shared_data: Path) -> None:
    folder = shared_data / "wikisql" / "derived"
    for name, count, tables in (("train.subset", 984, 247), ("dev.subset", 94, 24), ("train.sample", 5, 2)):
        rows = load("wikisql", folder / f"{name}.jsonl")
        assert (len(rows), len({example.group for example in rows})) == (count, tables)


TABLE = {"id": "1-2-3", "header": ["A", "B"], "types": ["text", "real"], "rows": [["x", 1]]}
QUESTION = {"table_id": "1-2-3", "question": "Which?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, 1]]}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"table_id": "9"}, r"its table 9 is not in dev\.tables\.jsonl"),
        ({"question": " "}, "question must be a text"),
        ({"sql": {"sel": 2, "agg": 0, "conds": []}}, "names column 2; the table has 2"),
        ({"sql": {"sel": 0, "agg": 7, "conds": []}}, "aggregates"),
        ({"sql": None}, "needs sel, agg and conds"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write(tmp_path / "dev.tables.jsonl", lines(TABLE))
    file = write(tmp_path / "dev.jsonl", lines(QUESTION, QUESTION | change))
    with pytest.raises(DataError, match=f"line 2: sample dev-2: .*{reason}"):
        load("wikisql", file)
    assert len(load("wikisql", file, how=DataSection(skip_bad=True))) == 1


def test_questions_need_their_tables(tmp_path: Path) -> None:
    file = write(tmp_path / "dev.jsonl", lines(QUESTION))
    with pytest.raises(DataError, match=r"from dev\.tables\.jsonl in the same folder"):
        load("wikisql", file, how=DataSection(skip_bad=True))
    write(tmp_path / "dev.tables.jsonl", lines(TABLE | {"types": ["text"]}))
    with pytest.raises(DataError, match=r"dev\.tables\.jsonl, line 1: a table needs header and types"):
        load("wikisql", file, how=DataSection(skip_bad=True))


def test_wikisql_from_the_hub_with_its_companions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "dev.jsonl", lines(QUESTION))
    asked = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append(name)
        if name.endswith(".db"):
            raise FileNotFoundError("no such file")
        if name.endswith(".tables.jsonl"):
            write(tmp_path / name, lines(TABLE))
        return str(tmp_path / name)

    monkeypatch.setattr("rankwise.data.sources.load.hf_hub_download", download)
    assert len(load("wikisql", "someone/wikisql", "dev")) == 1
    assert asked == ["dev.jsonl", "dev.tables.jsonl", "dev.db"]


def test_an_archive_on_the_hub_is_opened(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = shared_data / "samsum" / "official_mini" / "corpus.7z"

    def download(repository: str, name: str, repo_type: str) -> str:
        if name != archive.name:
            raise FileNotFoundError("no such file")
        return str(archive)

    monkeypatch.setattr("rankwise.data.sources.load.hf_hub_download", download)
    assert len(load("samsum", "someone/samsum", "dev")) == 5


# --- archives ----------------------------------------------------------------------------------------------------

Content = list[tuple[str, bytes]]
WIKISQL: Content = [
    ("data/dev.jsonl", lines(QUESTION).encode()),
    ("data/dev.tables.jsonl", lines(TABLE).encode()),
    ("data/dev.db", b"SQLite"),
    ("data/train.jsonl", b"not read\n"),
    ("README.md", b"hello"),
]


def tar(path: Path, content: Content, *special: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:bz2") as file:
        for name, data in content:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
        for header in special:
            file.addfile(header)
    return path


def zipped(path: Path, content: Content) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content:
            file.writestr(name, data)
    return path


def everything_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.suffix != ".lock"}


def test_the_official_tar_is_read_by_split_and_unpacked_once(tmp_path: Path, cache: Path) -> None:
    archive = tar(tmp_path / "data.tar.bz2", WIKISQL)
    for path in (archive, tmp_path):
        rows = load("wikisql", path, "dev")
        assert len(rows) == 1 and rows.files[0].name == "dev.jsonl"
    names = {path.name for path in everything_below(cache) if path.is_file()}
    assert names == {"dev.jsonl", "dev.tables.jsonl", "dev.db"}
    assert Path(rows[0].facts["database"]).read_bytes() == b"SQLite"
    before = rows.files[0].stat().st_mtime_ns
    assert load("wikisql", archive, "dev").files[0].stat().st_mtime_ns == before
    assert set(tmp_path.iterdir()) == {archive}


def test_the_official_zip(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "multinli" / "official_mini" / "multinli_1.0"
    content = [(f"multinli_1.0/{file.name}", file.read_bytes()) for file in sorted(folder.iterdir())]
    content += [("__MACOSX/multinli_1.0/multinli_1.0_dev_matched.jsonl", b"fork")]
    archive = zipped(tmp_path / "multinli_1.0.zip", content)
    for split in ("train", "dev", "dev_mismatched"):
        assert load("multi_nli", archive, split).items == load("multi_nli", folder, split).items


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def device(name: str) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type = tarfile.CHRTYPE
    return header


@pytest.mark.parametrize(
    ("content", "special"),
    [
        ([*WIKISQL, ("../outside.jsonl", b"x")], ()),
        ([*WIKISQL, ("/tmp/outside.jsonl", b"x")], ()),
        ([("../dev.jsonl", b"x")], ()),
        (WIKISQL, (link("data/away", "../../outside"),)),
        (WIKISQL, (link("data/away", "/etc/passwd"),)),
        (WIKISQL, (link("data/hard", "../../outside", tarfile.LNKTYPE),)),
        (WIKISQL, (device("data/device"),)),
        (WIKISQL[1:], (link("data/dev.jsonl", "dev.tables.jsonl"),)),
        ([*WIKISQL, ("other/dev.jsonl", b"x")], ()),
        ([("data/other.txt", b"x")], ()),
    ],
)
def test_hostile_tars_are_refused_and_nothing_is_written(
    tmp_path: Path, cache: Path, content: Content, special: tuple[tarfile.TarInfo, ...]
) -> None:
    archive = tar(tmp_path / "data.tar.bz2", content, *special)
    with pytest.raises(DataError, match=r"data\.tar\.bz2"):
        load("wikisql", archive, "dev", how=DataSection(skip_bad=True))
    assert {path.name for path in everything_below(cache)} == {"archives"}
    assert set(tmp_path.iterdir()) == {archive}
    assert not Path("/tmp/outside.jsonl").exists()


@pytest.mark.parametrize("name", ["../train.json", "/train.json", "..\\train.json", "C:\\train.json", "a/../../x"])
def test_hostile_zips_are_refused(tmp_path: Path, cache: Path, name: str) -> None:
    archive = zipped(tmp_path / "x.zip", [(name, b"[]"), ("train.json", b"[]")])
    with pytest.raises(DataError, match="leads outside"):
        load("samsum", archive)
    assert {path.name for path in everything_below(cache)} == {"archives"}


def test_a_link_in_a_zip_is_no_data_file(tmp_path: Path) -> None:
    header = zipfile.ZipInfo("train.json")
    header.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(header, "/etc/passwd")
    with pytest.raises(DataError, match="not a plain file"):
        load("samsum", tmp_path / "x.zip")


def test_bombs_are_refused_before_they_unpack(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST", 10**6)
    monkeypatch.setattr(archives, "MOST_MEMBERS", 100)
    zeros = b"\0" * (2 * 10**6)
    bombs = [
        tar(tmp_path / "a.tar.bz2", [("data/bomb", zeros), *WIKISQL]),
        zipped(tmp_path / "b.zip", [("data/dev.jsonl", zeros)]),
        tar(tmp_path / "c.tar.bz2", [(f"data/{number}", b"") for number in range(archives.MOST_MEMBERS + 1)]),
    ]
    for bomb in bombs:
        with pytest.raises(DataError, match=r"would unpack to more than"):
            load("wikisql", bomb, "dev")
    assert not [path for path in everything_below(cache) if path.is_file()]


def test_a_zip_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", [("train.json", b"\0" * 10**6)])
    raw = archive.read_bytes().replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"not of the size|cannot be unpacked"):
        load("samsum", archive)


def test_a_seven_zip_bomb_is_refused(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST", 10**4)
    with pytest.raises(DataError, match="would unpack to more than"):
        load("samsum", shared_data / "samsum" / "official_mini" / "corpus.7z")


def test_cut_archives_say_so(shared_data: Path, tmp_path: Path, cache: Path) -> None:
    whole = {
        "data.tar.bz2": tar(tmp_path / "t", [*WIKISQL, ("noise", bytes(range(256)) * 4000)]).read_bytes(),
        "multinli_1.0.zip": zipped(tmp_path / "z", [("dev.jsonl", b"x" * 1000)]).read_bytes(),
        "corpus.7z": (shared_data / "samsum" / "official_mini" / "corpus.7z").read_bytes(),
        "random.7z": b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "random.zip": b"PK\x03\x04" + bytes(100),
        "random.tar.bz2": bz2.compress(b"x" * 2000),
    }
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data if name.startswith("random") else data[: len(data) // 2])
        task = "samsum" if "7z" in name else "wikisql"
        with pytest.raises(DataError, match="cannot be unpacked"):
            load(task, tmp_path / name, "dev")
    assert {path.name for path in everything_below(cache)} == {"archives"}


def test_an_archive_of_the_wrong_split_says_what_it_lacks(tmp_path: Path) -> None:
    archive = tar(tmp_path / "data.tar.bz2", WIKISQL[1:3])
    with pytest.raises(DataError, match="lacks the dev split of wikisql"):
        load("wikisql", archive, "dev")
