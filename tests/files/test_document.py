"""Our own file formats: what is written is read back, and nothing else passes for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import read_object, write_json
from rankwise.files.document import Document, append_lines, lines_of, read_lines


@dataclass(frozen=True)
class Part:
    name: str
    share: float | None = None


@dataclass(frozen=True)
class Whole:
    part: Part
    sizes: tuple[int, ...]
    done: bool
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise UsageError("--sizes is empty")


WHOLE = Document("whole.json", "rankwise-whole/1", "a whole", "rankwise make", ("sizes",))
VALUE = Whole(Part("a", 0.5), (1, 2), True, {"x": [1]})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = WHOLE.write(tmp_path, VALUE)
    assert list(read_object(file)) == ["format", "part", "sizes", "done", "facts"]
    assert WHOLE.read_as(Whole, file) == WHOLE.read_as(Whole, tmp_path) == VALUE
    assert WHOLE.read_own(file) == WHOLE.read(file) and WHOLE.read_own(write_json(tmp_path / "x.json", {})) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "rankwise-whole/2"}, "not a whole of this version .format 'rankwise-whole/2', expected"),
        ({"sizes": ["1"]}, "sizes: '1' is not int"),
        ({"sizes": [True]}, "sizes: True is not int"),
        ({"done": 1}, "done: 1 is not bool"),
        ({"part": {"name": "a"}}, "part: share: missing"),
        ({"part": {"name": "a", "share": "x"}}, "part: share: 'x' is not"),
        ({"more": 1, "done": None}, "done: None is not bool, more: unknown"),
        ({"sizes": []}, ": --sizes is empty"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = WHOLE.write(tmp_path, VALUE)
    write_json(file, read_object(file) | change)
    with pytest.raises(DataError, match=rf"whole\.json.*{message}"):
        WHOLE.read_as(Whole, file)


def test_a_part_or_a_file_that_is_missing_is_said_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"whole\.json: no such file; `rankwise make` makes it"):
        WHOLE.read(tmp_path / "whole.json")
    WHOLE.write(tmp_path, {"part": 1})
    with pytest.raises(DataError, match=r"incomplete: sizes missing; run `rankwise make` again"):
        WHOLE.read(tmp_path)
    WHOLE.write(tmp_path, {"name": "b"}, "part.json")
    small = Document("part.json", WHOLE.format, "a part")
    assert small.read_as(Part, tmp_path, partial=True) == Part("b")


def test_lines_follow_what_a_killed_process_left(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert list(read_lines(file, "a row", dict)) == []
    append_lines(file, [{"n": 1}, {"n": "é"}])
    with file.open("a") as stream:
        stream.write('{"n": 3')
    assert [row["n"] for row in read_lines(file, "a row", dict)] == [1, "é"]
    append_lines(file, [{"n": 4}])
    assert file.read_text(encoding="utf-8") == lines_of([{"n": 1}, {"n": "é"}, {"n": 4}])
    for bad in ("[1]\n", "{\n", '{"m": 1}\n'):
        file.write_text('{"n": 1}\n' + bad)
        with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not a row"):
            list(read_lines(file, "a row", lambda row: row["n"]))
    with pytest.raises(ValueError, match="JSON compliant"):
        append_lines(file, [{"n": float("nan")}])
