"""Labels that exist already, as a labelled data set. No teacher is asked.

    photos/cat/1.jpg, photos/dog/2.jpg        the folder is the class
    labels.csv, labels.jsonl                  columns image, label (or others, by name); paths start at --image_folder

existing = read_existing("photos")
task = task_for(existing, task=None)          # classes as found, a general student prompt
found = label_rows(existing, task, target, out)
write_dataset(out, found.rows, task, target)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rankwise.data.device import DeviceReader, DeviceTarget
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.label_answer import label_called, name_key, spellings
from rankwise.data.label_task import LabelTask, task_of_labels
from rankwise.data.sources.rows import BadRow, Row, RowFile, csv_rows, json_rows
from rankwise.errors import DataError, UsageError
from rankwise.labels.dataset import LabelledRow, pixel_hash, store_image
from rankwise.labels.images import ImageIds, Photo, images_below
from rankwise.options.field import unknown

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "file", "path")
LABEL_COLUMNS = ("label", "class", "category")
MENTIONED = 5


@dataclass(frozen=True)
class Given:
    """One image and the label it was given. place: where that is written, for messages."""

    photo: Photo
    label: str
    place: str


@dataclass(frozen=True)
class Existing:
    """Labels and the reader of their images; `skipped` says which rows could not be read.

    A class that is spelt in several ways (`Café`, `café`, `cafe` + accent) is one, as most have it; `respelt`: the
    other spellings → that one.
    """

    given: tuple[Given, ...]
    reader: ImageReader
    skipped: tuple[str, ...] = ()
    respelt: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Iterable[Given], reader: ImageReader, skipped: tuple[str, ...] = ()) -> Existing:
        listed = tuple(given)
        spelt = spellings(each.label for each in listed)
        respelt = {name: label for name, label in sorted(spelt.items()) if name != label}
        return cls(tuple(replace(each, label=spelt[each.label]) for each in listed), reader, skipped, respelt)

    @property
    def labels(self) -> list[str]:
        """The different labels, in the order of the alphabet."""
        return sorted({each.label for each in self.given})


@dataclass(frozen=True)
class Found:
    """Rows of images that could be decoded, and why the others could not. references: of the images, by id."""

    rows: tuple[LabelledRow, ...]
    skipped: tuple[str, ...] = ()
    references: Mapping[str, str] = field(default_factory=dict)


def read_existing(
    path: str | Path,
    *,
    image_folder: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad: bool = False,
    allow_outside: bool = False,
) -> Existing:
    """The labels of a folder (class = subfolder), a CSV file with a header, or JSON (Lines) rows.

    image_column, label_column: where not given, the one column that bears a usual name. image_folder: where the paths
    of a file start; default its own folder. DataError with file and line; with `skip_bad` bad rows are listed instead.
    """
    path = Path(path)
    if path.is_dir():
        if image_column or label_column:
            raise UsageError(f"{path} is a folder, whose classes are its subfolders; columns are those of a file")
        return Existing.of(_in_folders(path), ImageReader(path, allow_outside))
    if not path.is_file():
        raise DataError(f"{path} does not exist; pass a folder with one subfolder per class, a CSV or a JSONL file")
    source = RowFile(path, skip=skip_bad)
    given = tuple(_in_file(source, image_column, label_column))
    if not given:
        raise DataError(f"{path}: no labels found ({len(source.rejected)} bad rows)")
    reader = ImageReader(Path(image_folder or path.parent), allow_outside)
    return Existing.of(given, reader, tuple(str(each) for each in source.rejected))


def task_for(existing: Existing, task: LabelTask | None, name: str = "labels") -> LabelTask:
    """The task of these labels: the given one if it has them all, else one whose classes are those found.

    DataError naming the labels that the given task lacks, and the nearest of its classes.
    """
    if task is None:
        try:
            return task_of_labels(existing.labels, name)
        except UsageError as error:
            raise DataError(f"the labels found cannot be the classes of a task: {error}") from error
    strange = [label for label in existing.labels if label_called(label, task.labels) is None]
    if strange:
        first = next(each for each in existing.given if each.label == strange[0])
        more = f" (and {len(strange) - 1} more: {', '.join(strange[1:MENTIONED])})" if len(strange) > 1 else ""
        nearest = unknown(strange[0], task.labels, first.place, f"class of the task {task.name}")
        raise DataError(f"{nearest}{more}; the task has {', '.join(task.labels)}")
    return task


def label_rows(
    existing: Existing,
    task: LabelTask,
    target: DeviceTarget,
    folder: Path,
    *,
    skip_bad: bool = False,
    ids: ImageIds | None = None,
) -> Found:
    """Store every image as the device sees it, and its row, with the task's own spelling of its label (`task_for`).
    ids: the names of an earlier run.

    DataError where the same pixels have two labels, BadImage (with its place) where an image cannot be decoded; with
    `skip_bad` such an image is listed instead.
    """
    rows: list[LabelledRow] = []
    skipped: list[str] = []
    references: dict[str, str] = {}
    ids = ids or ImageIds()
    first: dict[str, Given] = {}
    reader = DeviceReader(existing.reader, target)
    for each in existing.given:
        try:
            picture = reader.open(each.photo.reference)
        except BadImage as error:
            if not skip_bad:
                raise BadImage(f"{each.place}: {error}; or leave such images out with --skip-bad") from error
            skipped.append(f"{each.place}: {error}")
            continue
        image_id = ids.claim(each.photo, pixel_hash(picture))
        stored = store_image(folder, image_id, picture, target)
        _refuse_dispute(first.setdefault(stored.sha256, each), each)
        label = label_called(each.label, task.labels)
        assert label is not None, "task_for has held the labels against the task"
        rows.append(LabelledRow(image_id, stored.path, stored.sha256, label))
        references[image_id] = each.photo.reference
    return Found(tuple(rows), tuple(skipped), references)


def _refuse_dispute(first: Given, each: Given) -> None:
    if name_key(first.label) != name_key(each.label):
        raise DataError(
            f"{each.photo.reference} is {each.label!r} ({each.place}), and {first.photo.reference}, the same image, is "
            f"{first.label!r} ({first.place}); keep one of them"
        )


# --- where labels are ---------------------------------------------------------------------------------------------


def _in_folders(folder: Path) -> Iterator[Given]:
    """The first folder below is the class; deeper ones are the user's own order."""
    photos = images_below(folder).photos
    loose = [photo.reference for photo in photos if "/" not in photo.reference]
    if loose:
        named = ", ".join(loose[:MENTIONED])
        advice = "put each image into a subfolder named after its class"
        raise DataError(f"{folder}: {len(loose)} images are in no class folder ({named}); {advice}")
    for photo in photos:
        yield Given(photo, photo.reference.split("/")[0], str(folder / photo.reference))


def _in_file(source: RowFile, image_column: str | None, label_column: str | None) -> Iterator[Given]:
    columns: tuple[str, str] | None = None
    seen: dict[str, Given] = {}
    for line, row in _rows(source):
        columns = columns or (
            _column(source, row, image_column, IMAGE_COLUMNS, "image"),
            _column(source, row, label_column, LABEL_COLUMNS, "label"),
        )
        try:
            image, label = (_value(row, column) for column in columns)
            given = Given(Photo(len(seen), image), label, f"{source.path}, line {line}")
        except BadRow as reason:
            source.reject(line, str(reason))
            continue
        before = seen.setdefault(image, given)
        _refuse_dispute(before, given)
        if before is not given:
            source.reject(line, f"{image} stands before ({before.place})")
    # Numbered by name, as the images of a folder are, so that reordering a file changes no id.
    for index, each in enumerate(sorted(seen.values(), key=lambda one: one.photo.reference)):
        yield replace(each, photo=replace(each.photo, index=index))


def _rows(source: RowFile) -> Iterator[Row]:
    if source.path.suffix.lower() == ".csv":
        return csv_rows(source)
    if source.is_lines or source.path.suffix.lower() == ".json":
        return json_rows(source)
    raise DataError(f"{source.path}: labels are read from .csv, .jsonl and .json files")


def _column(source: RowFile, row: dict[str, object], named: str | None, usual: Sequence[str], what: str) -> str:
    """The column that is named, else the only one with a usual name; nothing is guessed between two."""
    if named is not None:
        if named not in row:
            raise unknown(named, row, str(source.path), "column")
        return named
    found = [column for column in usual if column in row]
    if len(found) != 1:
        which = f"several may be it ({', '.join(found)})" if found else f"none is called {', '.join(usual)}"
        wanted = f"say --{what}_column, of {', '.join(row)}"
        raise UsageError(f"{source.path}: which column is the {what}? {which}; {wanted}")
    return found[0]


def _value(row: dict[str, object], column: str) -> str:
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{column} must be a text, found {value!r:.60}")
    return value.strip()
