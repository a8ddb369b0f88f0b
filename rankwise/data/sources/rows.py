"""Rows of CSV, TSV, JSON and JSON Lines files with their line numbers; what is wrong is named, raised or counted."""

from __future__ import annotations

import csv
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import stat_result
from pathlib import Path
from typing import Any

from rankwise.data.example import ROLES, Example, Rejected, View
from rankwise.errors import DataError, UsageError, need
from rankwise.files.atomic import read_json
from rankwise.options.field import RepeatedName, unique
from rankwise.options.sections import DataSection

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PARQUET = ".parquet"
OTHERS = (".csv", ".tsv", ".gz", ".zst", ".bz2", ".arrow", ".feather", ".xlsx", ".yaml", ".yml")  # never JSON
SPEAKER = {"from", "role"}  # keys of a turn
NAMED_AGAIN = "an id that occurred before; named by its number in the file too"
LARGE = 64 * 2**20  # bytes; from here on a JSON Lines file is indexed and not held: its objects would be ten times that
LONGEST_LINE = 64 * 2**20  # bytes; a line beyond it is a broken file, not a sample
Row = tuple[int, dict[str, Any]]
Build = Callable[[str, dict[str, Any]], Example]  # (id, row) → sample


def speakers_of(given: Sequence[str]) -> dict[str, str]:
    """--roles: who says what, `bot=assistant`. UsageError for anything else."""
    pairs = [pair.partition("=")[::2] for pair in given]
    for (name, role), pair in zip(pairs, given, strict=True):
        if not name.strip() or role.strip() not in ROLES:
            raise UsageError(f"--roles {pair}: a name of the rows and {', '.join(ROLES)}: bot=assistant,customer=user")
    named: dict[str, str] = {}
    for name, role in ((name.strip().lower(), role.strip()) for name, role in pairs):
        if named.setdefault(name, role) != role:
            raise UsageError(f"--roles: {name} is named {named[name]} and {role}; give one role")
    return named


class BadRow(Exception):
    """Why a row can't be a sample; raised by a source, located and reported by `samples`."""


class LeftOut(Exception):
    """Why a row of the official files is not a sample although nothing is wrong with the file; `samples` counts it."""


@dataclass
class RowFile:
    """A file being read and its bad rows: the first one raises, or with `skip` all are listed with their reasons.

    left_out: rows that the official files are known to hold and that are no samples, by reason: never an error.
    changes: what was done to rows to make samples of them, with the number of rows.
    companions: other files that the source read with this one.
    how: the options that decide where rows leave it open (repeat_image, image_first, roles, aux_reason).
    start, number, again: the byte at which the line read last starts, the number of its row, and whether its id
    occurred before, for an index.
    """

    path: Path
    skip: bool = False
    how: DataSection = field(default_factory=DataSection)
    rejected: list[Rejected] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    companions: list[Path] = field(default_factory=list)
    start: int = 0
    number: int = 0
    again: bool = False

    @property
    def is_lines(self) -> bool:
        """Whether the file has one JSON object a line."""
        return self.path.suffix.lower() in {".jsonl", ".ndjson"}

    def reject(self, line: int, reason: str, sample: str | None = None) -> None:
        rejected = Rejected(self.path, line, reason, sample)
        if not self.skip:
            raise DataError(f"{rejected}; correct the row, or pass --skip-bad to leave such rows out and count them")
        self.rejected.append(rejected)


def csv_rows(source: RowFile) -> Iterator[Row]:
    """Records of a CSV file with a header, as dictionaries; the line is that on which the record starts."""
    records = _csv_records(source)
    header = [name.strip() for name in next(records, (0, []))[1]]
    for line, record in records:
        if len(record) == len(header):
            yield line, dict(zip(header, record, strict=True))
        elif record:
            source.reject(line, f"{len(record)} fields, the header has {len(header)} ({', '.join(header)})")


def tsv_rows(source: RowFile) -> Iterator[Row]:
    """Records of a tab-separated file with a header, as dictionaries. Quotation marks are characters like others."""
    header: list[str] = []
    for number, line in enumerate(_text_lines(source), 1):
        record = line.rstrip("\r\n").split("\t")
        if number == 1:
            header = record
        elif len(record) == len(header):
            yield number, dict(zip(header, record, strict=True))
        elif record != [""]:
            source.reject(number, f"{len(record)} fields, the header has {len(header)}")


def json_rows(source: RowFile) -> Iterator[Row]:
    """Objects of a JSON list, a `{"data": […]}` object or, by suffix, of JSON Lines (.jsonl, .ndjson) or a parquet
    file, whose lines are its rows."""
    suffix = source.path.suffix.lower()
    if suffix in OTHERS:
        raise DataError(f"{source.path}: unsupported file type {suffix}; give {', '.join(JSON_SUFFIXES)} or {PARQUET}")
    if suffix == PARQUET:
        rows = _parquet(source)
    else:
        rows = _json_lines(source) if source.is_lines else _json_list(source)
    for line, row in rows:
        if isinstance(row := as_object(row), dict):
            yield line, row
        else:
            misnamed = isinstance(row, list) and source.is_lines
            hint = "; a list of samples belongs in a file named .json" if misnamed else ""
            source.reject(line, f"a sample must be a JSON object, this is {_kind(row)}{hint}")


def as_object(row: Any) -> Any:
    """A row that is a conversation's turns and nothing else, as the object that holds them; others as they are."""
    turns = isinstance(row, list) and row and all(isinstance(turn, dict) and SPEAKER & turn.keys() for turn in row)
    return {"messages": row} if turns else row


def json_samples(source: RowFile, build: Build) -> Iterator[Example]:
    """Samples built from JSON rows."""
    return samples(source, json_rows(source), build, unique=False)


def samples(
    source: RowFile, rows: Iterable[Row], build: Build, id_key: str = "id", *, unique: bool = True
) -> Iterator[Example]:
    """Samples built from rows; a row without an id is named by the file and its number.

    unique: a second row of one id is bad; else it is named by its number too (LLaVA names rows by their image).
    """
    seen: set[str] = set()
    for number, (line, row) in enumerate(rows, 1):
        source.number, source.again = number, False
        identity = identity_of(row, source.path, number, id_key)
        try:
            if identity in seen and unique:
                raise BadRow("this id occurred before; ids must be unique")
            if identity in seen:
                identity, source.again = again(identity, number), True
            sample = build(identity, row)
        except BadRow as reason:
            source.reject(line, str(reason), identity)
            continue
        except LeftOut as reason:
            source.left_out[str(reason)] += 1
            continue
        seen.add(identity)
        source.changes.update([*sample.changes, *([NAMED_AGAIN] if source.again else [])])
        yield with_line(sample, line)


def identity_of(row: Mapping[str, Any], file: Path, number: int, id_key: str = "id") -> str:
    """The id that a row gives, else the name of its file and its number there."""
    given = row.get(id_key)
    return f"{file.stem}-{number}" if given is None else str(given)


def again(identity: str, number: int) -> str:
    """The name of another row of the same id."""
    return f"{identity}~{number}"


def with_line(sample: Example, line: int) -> Example:
    """The sample, knowing the line on which its row starts."""
    return replace(sample, line=line)


def as_found(value: Any) -> str:
    """A value as a message shows it: JSON where it can be, its beginning only."""
    return json.dumps(value, ensure_ascii=False, default=repr)[:60]


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A text of a row, without space around it and with plain line ends; BadRow where there is none."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{key} must be a text, found {value!r:.60}")
    return value.replace("\r\n", "\n").replace("\r", "\n").strip()


def _csv_records(source: RowFile) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_text_lines(source), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            source.reject(line, f"not valid CSV ({error})")


def _text_lines(source: RowFile) -> Iterator[str]:
    """Lines with their ends, decoded one by one so that a wrong byte has a line number.

    A line that can't be decoded is passed on as an empty one: line numbers stay right.
    """
    following = 0
    with source.path.open("rb") as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
            source.start, following = following, following + len(raw)
            if len(raw) > LONGEST_LINE:
                raise DataError(f"{source.path}, line {number}: longer than {LONGEST_LINE:,} bytes; is it a data file?")
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                source.reject(number, f"not UTF-8 at byte {error.start}")
                yield "\n"


def _json_lines(source: RowFile) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text_lines(source), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique)
        except json.JSONDecodeError as error:
            source.reject(number, f"not valid JSON ({error.msg} at column {error.colno})")
        except RepeatedName as error:
            source.reject(number, f"the key {str(error)!r} appears twice in one object")
        except (ValueError, RecursionError) as error:
            source.reject(number, f"cannot be read ({error})")
        else:
            if not _may_be_halves(line) or _is_text(row, source, number):
                yield number, row


def _may_be_halves(written: str) -> bool:
    """Whether JSON holds escapes that can be halves of characters."""
    return "\\ud" in written or "\\uD" in written


def _is_text(row: Any, source: RowFile, line: int) -> bool:
    """Whether all of a row is text: an escape of half a character (\\ud83d) is valid JSON, and nothing in UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        source.reject(line, f"holds {half!a}, half of a character (a surrogate without its other half)")
        return False
    return True


def _parquet(source: RowFile) -> Iterator[tuple[int, Any]]:
    parquet = need("pyarrow.parquet", extra="data")
    try:
        batches = parquet.ParquetFile(source.path).iter_batches(batch_size=1000)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{source.path}: not a valid parquet file ({error})") from error


def _json_list(source: RowFile) -> Iterator[tuple[int, Any]]:
    file = source.path
    try:
        content = read_json(file)
    except DataError as error:
        if "Extra data" in str(error):
            raise DataError(f"{error}; if it has one object a line, name the file .jsonl") from error
        raise
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f'{file}: expected a JSON list or {{"data": [...]}}, found {_kind(content)}')
    text = file.read_text(encoding="utf-8-sig")
    numbers = _line_numbers(text, len(rows), nested=isinstance(content, dict))
    suspicious = _may_be_halves(text)
    for line, row in zip(numbers, rows, strict=True):
        if not suspicious or _is_text(row, source, line):
            yield line, row


def _line_numbers(text: str, count: int, *, nested: bool) -> Iterator[int]:
    """The line on which each element of the (already parsed) list starts."""
    found = re.search(r'"data"\s*:\s*\[' if nested else r"\[", text)
    assert found
    position, line, decoder = found.end(), text.count("\n", 0, found.end()) + 1, json.JSONDecoder()
    for _ in range(count):
        separator = re.compile(r"[\s,]*").match(text, position)
        assert separator
        line += text.count("\n", position, separator.end())
        yield line
        position = decoder.raw_decode(text, separator.end())[1]
        line += text.count("\n", separator.end(), position)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")


@dataclass(frozen=True, eq=False)
class IndexedSamples(View):
    """Samples of a JSON Lines file by the places of their lines. repeated: of those whose id occurred before.

    The file must stay as it was: DataError once its size or time differs. Copies of this object (in the workers of a
    data loader) open the file for themselves.
    """

    path: Path
    build: Build
    version: tuple[int, int]
    starts: array[int] = field(repr=False)
    lines: array[int] = field(repr=False)
    numbers: array[int] = field(repr=False)
    repeated: frozenset[int] = field(default=frozenset(), repr=False)

    def __len__(self) -> int:
        return len(self.starts)

    def made(self, index: int) -> Example:
        row = as_object(json.loads(self._line(self.starts[index])))
        number = self.numbers[index]
        identity = identity_of(row, self.path, number)
        if index in self.repeated:
            identity = again(identity, number)
        return with_line(self.build(identity, row), self.lines[index])

    def _line(self, start: int) -> str:
        with self.path.open("rb") as stream:
            if _stamp(self.path.stat()) != self.version:
                raise DataError(f"{self.path} has changed since it was checked; start again")
            stream.seek(start)
            return stream.readline().decode("utf-8-sig")


def index_rows(source: RowFile, build: Build) -> IndexedSamples:
    """Parse and check every row once; bad ones are rejected as in memory. The source's file must be JSON Lines."""
    version = _stamp(source.path.stat())
    starts, lines, numbers = array("Q"), array("Q"), array("Q")
    repeated: set[int] = set()
    for sample in json_samples(source, build):
        repeated |= {len(starts)} if source.again else set()
        starts.append(source.start)
        lines.append(sample.line)
        numbers.append(source.number)
    return IndexedSamples(source.path, build, version, starts, lines, numbers, frozenset(repeated))


def _stamp(status: stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
