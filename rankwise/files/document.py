"""Documents: the project's own JSON files, each with the version of its format. One writer, one strict reader.

DEVICE = Document("device.json", "rankwise-device/1", "a device target", made_by="rankwise label")
DEVICE.write(folder, target)            # {"format": …, …} of a dataclass or a mapping, whole or not at all
DEVICE.read(folder)                     # the same without `format`; DataError for another version, or a part missing
DEVICE.read_as(DeviceTarget, folder)    # as the dataclass; DataError for fields missing, unknown or of another type

JSON Lines (ledgers, predictions) are appended line by line; a process that is killed leaves half a line at most:
append_lines(file, rows)                # on the disk when this returns
read_lines(file, "a prediction", parse) # one value per finished line; DataError naming the line
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import explained, json_text, read_json, read_object, write_text
from rankwise.options.field import hints_of

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A kind of file. what: "an export", for messages. made_by: the command that writes it. parts: keys it must have.

    indent: of its JSON; None puts all on one line.
    """

    name: str
    format: str
    what: str
    made_by: str = ""
    parts: tuple[str, ...] = ()
    indent: int | None = 2

    def stamped(self, content: Any) -> dict[str, Any]:
        """A mapping, or the fields of a dataclass, with the format."""
        return {"format": self.format, **(content if isinstance(content, Mapping) else asdict(content))}

    def text(self, content: Any) -> str:
        return json_text(self.stamped(content), self.indent)

    def write(self, folder: os.PathLike[str] | str, content: Any, name: str = "") -> Path:
        """Write it into a folder, under another name where one is given; returns the path."""
        return write_text(Path(folder) / (name or self.name), self.text(content))

    def file(self, place: os.PathLike[str] | str) -> Path:
        """The file itself, or that of a folder."""
        return Path(place) / self.name if Path(place).is_dir() else Path(place)

    def read(self, place: os.PathLike[str] | str) -> dict[str, Any]:
        """The content of a file, or of a folder's, without `format`.

        DataError where there is none, for another format or version, and where a part is missing.
        """
        path = self.file(place)
        if not path.is_file():
            raise DataError(f"{path}: no such file{f'; `{self.made_by}` makes it' if self.made_by else ''}")
        content = read_object(path)
        found = content.pop("format", None)
        if found != self.format:
            raise DataError(f"{path}: not {self.what} of this version (format {found!r}, expected {self.format!r})")
        self._require_parts(path, content)
        return content

    def read_as(self, kind: type[T], place: os.PathLike[str] | str, *, partial: bool = False) -> T:
        """As a dataclass (`build`). DataError for other fields, too, and for values that the class refuses."""
        path, content = self.file(place), self.read(place)
        try:
            return build(kind, content, partial=partial)
        except TypeError as error:
            raise DataError(f"{path}: not {self.what} of this version ({error})") from error
        except (UsageError, DataError) as error:
            raise DataError(f"{path}: {error}") from error

    def read_own(self, path: Path) -> dict[str, Any] | None:
        """`read`; None for a file of that name in no format of ours: other programs call their files so too."""
        content = read_json(path)
        return self.read(path) if isinstance(content, dict) and content.get("format") == self.format else None

    def _require_parts(self, path: Path, content: Mapping[str, Any]) -> None:
        if missing := [part for part in self.parts if part not in content]:
            again = f"run `{self.made_by}` again" if self.made_by else "run the command that wrote it again"
            raise DataError(f"{path}: incomplete: {', '.join(missing)} missing; {again}")


def build(kind: type[T], content: Mapping[str, Any], *, partial: bool = False) -> T:
    """A dataclass from its fields as JSON has them: lists become tuples and objects dataclasses where the field is one.

    partial: fields with a default may be left out. TypeError naming every field that is missing, unknown or of another
    type.
    """
    hints, known = hints_of(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = [each.name for each in known if not partial or each.default is each.default_factory]  # both MISSING
    values, wrong = {}, [f"{name}: missing" for name in needed if name not in content]
    for name, value in content.items():
        try:
            values[name] = typed(value, hints[name])
        except KeyError:
            wrong.append(f"{name}: unknown")
        except TypeError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise TypeError(", ".join(wrong))
    return kind(**values)


def typed(value: Any, kind: Any) -> Any:
    """A JSON value as an annotated type has it. TypeError for one of another type."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    for one in typing.get_args(kind) if union else (kind,):
        plain = typing.get_origin(one) or one
        kinds = (int, float) if plain is float else plain  # JSON may write 1.0 as 1
        if plain is tuple and isinstance(value, list):
            return tuple(typed(each, typing.get_args(one)[0]) for each in value)
        if isinstance(plain, type) and dataclasses.is_dataclass(plain) and isinstance(value, dict):
            return build(plain, value)
        if plain is Any or (isinstance(value, kinds) and (plain is bool or type(value) is not bool)):
            return value
    raise TypeError(f"{value!r:.60} is not {getattr(kind, '__name__', kind)}")


def as_plain(content: Any, **how: Any) -> Any:
    """What is read back of content once it is written: tuples as lists, keys as texts. how: `json.dumps`'s options."""
    return json.loads(json.dumps(content, **how))


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def lines_of(rows: Iterable[Mapping[str, Any]], *, allow_nan: bool = False) -> str:
    """JSON Lines. NaN and infinity, which are not JSON, are a ValueError unless allowed."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=allow_nan) + "\n" for row in rows)


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows, in place of what a killed process has left of one; they are on the disk when this returns."""
    drop_cut_line(path)
    with explained(path), path.open("a", encoding="utf-8", newline="\n") as stream:
        stream.write(lines_of(rows))
        stream.flush()
        os.fsync(stream.fileno())


def finished_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of those that have their end; none where there is no file."""
    content = path.read_bytes() if path.is_file() else b""
    return enumerate(content.split(b"\n")[:-1], 1)


def given_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file that another program wrote: the last line may lack its end; blank lines and a BOM do not
    count."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())


def read_lines(
    path: Path,
    what: str,
    parse: Callable[[dict[str, Any]], T],
    remedy: str = "restore the file, or delete it to start anew",
    lines: Callable[[Path], Iterator[tuple[int, bytes]]] = finished_lines,
) -> Iterator[T]:
    """One value per line, by default per finished one. DataError, naming it, for one that is no JSON object, or that
    `parse` refuses with a KeyError, TypeError, ValueError, AttributeError or OverflowError: what values of another type
    end in."""
    for number, line in lines(path):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"expected an object {{…}}, found {type(row).__name__}")
            yield parse(row)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}, line {number}: not {what}: {error!r}; {remedy}") from error


def drop_cut_line(path: Path) -> None:
    """Take away the beginning of a line that a killed process has left, so that the next one starts afresh."""
    if not path.is_file():
        return
    with path.open("rb+") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        if stream.read() not in (b"", b"\n"):
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
