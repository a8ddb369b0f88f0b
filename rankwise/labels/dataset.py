"""A labelled data set: a folder with images as the device sees them, one row for each, and a split that parts no twins.

    labels.jsonl  train.jsonl  val.jsonl     rows: image_id, image_path, element, reason, …, image_sha256
    images/00017_000000000139.png            exactly the device's pixels
    originals/00017_000000000139.jpeg        a few of the files that they were made of
    task.json  device.json                   what was asked, and of which pixels
    conversations/train.json, val.json       the same as LLaVA conversations

stored = store_image(folder, photo.id, picture, target)          # images/….png and the hash of its pixels
row = LabelledRow.of_answer(photo.id, stored, answer, task)
written = write_dataset(folder, rows, task, target, val_fraction=0.1, seed=42)
rows = read_rows(folder / "train.jsonl")

Other files of the folder (a ledger, say) are left alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from rankwise.data.device import DeviceTarget
from rankwise.data.example import IMAGE_SLOT
from rankwise.data.label_answer import label_called, problem
from rankwise.data.label_task import LabelTask, read_task
from rankwise.data.pixels import BROKEN
from rankwise.data.sources.rows import BadRow, RowFile, json_rows
from rankwise.errors import DataError
from rankwise.files.atomic import atomic_files, atomic_write, json_text
from rankwise.files.document import lines_of
from rankwise.labels.images import ImageIds, Originals, drawn_order, shares

IMAGES, CONVERSATIONS = "images", "conversations"
ALL, TRAIN, VAL = "labels.jsonl", "train.jsonl", "val.jsonl"
TEXTS = ("image_id", "image_path", "image_sha256")


@dataclass(frozen=True)
class StoredImage:
    """path: below the data folder. sha256: of the pixels, the same for every file that shows them."""

    path: str
    sha256: str


@dataclass(frozen=True)
class LabelledRow:
    """One image with its label and what the teacher said of it; what nobody said is empty, null or None.

    label, alternative: written under the task's own names (`element`, `alternative_element`). source_path: the
    original, where it is kept.
    """

    image_id: str
    image_path: str
    image_sha256: str
    label: str
    reason: str = ""
    visual_features: tuple[str, ...] = ()
    color_breakdown: str = ""
    texture: str = ""
    confidence: float | None = None
    alternative: str | None = None
    ambiguity_note: str | None = None
    source_path: str | None = None

    @classmethod
    def of_answer(cls, image_id: str, stored: StoredImage, answer: Mapping[str, Any], task: LabelTask) -> LabelledRow:
        """The row of a teacher's answer that `task.validate_answer` has passed."""
        own = {key: answer[key] for key in task.schema["properties"] if key not in (task.field, task.alternative)}
        own["visual_features"] = tuple(own["visual_features"])
        label, alternative = answer[task.field], answer[task.alternative]
        return cls(image_id, stored.path, stored.sha256, label, alternative=alternative, **own)

    def record(self, task: LabelTask) -> dict[str, Any]:
        """The row as its file has it: the hash last, and the original only where there is one."""
        own = {"label": task.field, "alternative": task.alternative}
        row = {
            own.get(name, name): value
            for name, value in vars(self).items()
            if name not in ("image_sha256", "source_path")
        }
        row |= {"visual_features": list(self.visual_features), "image_sha256": self.image_sha256}
        return row | ({"source_path": self.source_path} if self.source_path else {})


@dataclass(frozen=True)
class Labels:
    """All that becomes a data set. facts: for label.json; ids: the names of images, those of earlier runs too."""

    task: LabelTask
    rows: list[LabelledRow]
    originals: Originals
    facts: dict[str, Any]
    ids: ImageIds


@dataclass(frozen=True)
class WrittenDataset:
    """What `write_dataset` wrote. disputed: ids of images whose twins (the same pixels) bear another label."""

    train: tuple[LabelledRow, ...]
    val: tuple[LabelledRow, ...]
    disputed: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[LabelledRow, ...]:
        return (*self.train, *self.val)

    @property
    def twins(self) -> int:
        """Number of rows whose pixels an earlier row has."""
        return len(self.rows) - len({row.image_sha256 for row in self.rows})

    def counts(self, task: LabelTask) -> dict[str, dict[str, int]]:
        """Per class, rows in train and in val; a class without rows has zeros."""
        parts = {"train": Counter(r.label for r in self.train), "val": Counter(r.label for r in self.val)}
        return {label: {name: part[label] for name, part in parts.items()} for label in task.labels}


# --- writing ------------------------------------------------------------------------------------------------------


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels."""
    assert image.mode == "RGB", image.mode
    return hashlib.sha256(f"{image.width} {image.height}\n".encode() + image.tobytes()).hexdigest()


def store_image(folder: Path, image_id: str, image: Image.Image, target: DeviceTarget) -> StoredImage:
    """Write the device's pixels of an image as `images/<id>.png`, unless that file has them already."""
    seen = target.resize(image)
    path, content = f"{IMAGES}/{image_id}.png", target.png(seen)
    file = folder / path
    if not file.is_file() or file.read_bytes() != content:
        with atomic_write(file) as temporary:
            temporary.write_bytes(content)
    return StoredImage(path, pixel_hash(seen))


def write_dataset(
    folder: Path,
    rows: Iterable[LabelledRow],
    task: LabelTask,
    target: DeviceTarget,
    val_fraction: float = 0.1,
    seed: int = 42,
    originals: Originals | None = None,
) -> WrittenDataset:
    """Write the tables of a data set whose images are stored; all are replaced together or none.

    originals: where the images came from; a few of those that validate are kept. DataError where there is no row, ids
    repeat, a label is not of the task, or an image is not in the folder.
    """
    listed = sorted(rows, key=lambda row: row.image_id)
    _check(folder, listed, task)
    written = _split(listed, val_fraction, seed)
    if originals:
        written = with_originals(folder, written, originals, target)
    whole = tuple(sorted(written.rows, key=lambda row: row.image_id))
    tables = {ALL: whole, TRAIN: written.train, VAL: written.val}
    contents = {name: lines_of(row.record(task) for row in part) for name, part in tables.items()}
    for name, part in (("train", written.train), ("val", written.val)):
        talks = [conversation(row, task) for row in part]
        contents[f"{CONVERSATIONS}/{name}.json"] = json_text(talks, indent=1)
    task.save(folder)
    target.save(folder)
    with atomic_files(*(folder / name for name in contents)) as temporaries:
        for temporary, content in zip(temporaries, contents.values(), strict=True):
            temporary.write_text(content, encoding="utf-8")
    return written


def with_originals(folder: Path, written: WrittenDataset, originals: Originals, target: DeviceTarget) -> WrittenDataset:
    """The rows with the paths of those originals that are kept: of the validation rows, if there are any."""
    kept = originals.keep(folder, [row.image_id for row in written.val or written.train], target)
    train, val = (
        tuple(replace(row, source_path=kept.get(row.image_id)) for row in p) for p in (written.train, written.val)
    )
    return replace(written, train=train, val=val)


def conversation(row: LabelledRow, task: LabelTask) -> dict[str, Any]:
    """A row as a LLaVA conversation: the student's prompt, and the bare class name as the answer."""
    turns = [{"from": "human", "value": f"{IMAGE_SLOT}\n{task.student_prompt}"}, {"from": "gpt", "value": row.label}]
    return {"id": row.image_id, "image": row.image_path, "task_type": row.label, "conversations": turns}


def _check(folder: Path, rows: Sequence[LabelledRow], task: LabelTask) -> None:
    if not rows:
        raise DataError(f"{folder}: no image has a label that was kept; there is nothing to write")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if following is not None and row.image_id == following.image_id:
            raise DataError(f"{folder}: the image id {row.image_id} is used twice")
        if row.label not in task.labels:
            raise DataError(f"{row.image_id}: {row.label!r} is not among {', '.join(task.labels)} (task {task.name})")
        if not (folder / row.image_path).is_file():
            raise DataError(f"{row.image_id}: the image {folder / row.image_path} was not stored")


def _split(rows: Sequence[LabelledRow], fraction: float, seed: int) -> WrittenDataset:
    """Images of the same pixels stay together. Every class with two different images or more has some in both parts."""
    labels: dict[str, str] = {}
    for row in rows:
        labels.setdefault(row.image_sha256, row.label)
    disputed = {row.image_sha256 for row in rows if labels[row.image_sha256] != row.label}
    held_out = held_out_groups(labels, fraction, seed)
    return WrittenDataset(
        tuple(row for row in rows if row.image_sha256 not in held_out),
        tuple(row for row in rows if row.image_sha256 in held_out),
        tuple(row.image_id for row in rows if row.image_sha256 in disputed),
    )


def held_out_groups(stratum_of: Mapping[str, str], fraction: float, seed: int) -> set[str]:
    """Validation groups: of every stratum its share of the fraction, one at least where it has two groups or more,
    and never all."""
    if not fraction:
        return set()
    members: dict[str, list[str]] = {}
    for group, stratum in stratum_of.items():
        members.setdefault(stratum, []).append(group)
    sizes = {stratum: len(groups) for stratum, groups in members.items()}
    least = {stratum: int(size > 1) for stratum, size in sizes.items()}
    most = {stratum: size - 1 for stratum, size in sizes.items()}
    wanted = shares(sizes, round(fraction * len(stratum_of)), least=least, most=most)
    return {group for stratum, groups in members.items() for group in drawn_order(groups, seed)[: wanted[stratum]]}


# --- reading ------------------------------------------------------------------------------------------------------


def read_rows(path: Path | str) -> tuple[LabelledRow, ...]:
    """The rows of `labels.jsonl`, `train.jsonl` or `val.jsonl` (of a folder: labels.jsonl), with the folder's task.

    DataError with file and line for a row that is broken, of no class of the task, or named twice.
    """
    file = Path(path) / ALL if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"{file} does not exist; a labelled data set has {ALL}, {TRAIN} and {VAL}")
    task, source, found = read_task(file.parent), RowFile(file), {}
    for line, content in json_rows(source):
        try:
            row = row_of(content, task)
            if row.image_id in found:
                raise BadRow(f"the image_id {row.image_id} occurred before")
            found[row.image_id] = row
        except BadRow as reason:
            source.reject(line, str(reason))
    return tuple(found.values())


def row_of(content: Mapping[str, Any], task: LabelTask) -> LabelledRow:
    """A row from its JSON object; BadRow says what is wrong with it. Only id, path, hash and label are needed."""
    given = {key: value for key, value in content.items() if value is not None}
    for key in TEXTS:
        if not isinstance(given.get(key), str) or not given[key]:
            raise BadRow(f"{key} must be a text, found {given.get(key)!r:.60}")
    if task.field not in given:
        raise BadRow(f"{task.field} is missing; the task {task.name} calls the label so")
    for key in (task.field, task.alternative):
        if isinstance(given.get(key), str):
            given[key] = label_called(given[key], task.labels) or given[key]
    for key, form in task.schema["properties"].items():
        wrong = problem(given[key], form, key) if key in given else None
        if wrong:
            raise BadRow(wrong)
    names = {"label": task.field, "alternative": task.alternative}
    own = {field.name: names.get(field.name, field.name) for field in fields(LabelledRow)}
    values = {key: given[name] for key, name in own.items() if name in given}
    return LabelledRow(**values | {"visual_features": tuple(values.get("visual_features", ()))})


def remove_orphans(folder: Path, ids: ImageIds, rows: Iterable[LabelledRow]) -> int:
    """Delete images of earlier runs that no row names, and the originals that earlier tables named; returns how many
    images. Only a file that still holds what was stored under its name is deleted."""
    rows, count = tuple(rows), 0
    used = {row.image_id for row in rows}
    for image_id, sha256 in ids.known.items():
        file = folder / IMAGES / f"{image_id}.png"
        if image_id not in used and file.is_file() and _holds(file, sha256):
            file.unlink()
            count += 1
    for original in ids.originals - {row.source_path for row in rows}:
        (folder / original).unlink(missing_ok=True)
    return count


def _holds(file: Path, sha256: str) -> bool:
    try:
        with Image.open(file) as image:
            return image.mode == "RGB" and pixel_hash(image) == sha256
    except BROKEN:
        return False
