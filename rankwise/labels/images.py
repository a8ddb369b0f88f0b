"""Images to label: find them, select them, name them, and keep the originals.

    val2017/000000000139.jpg …                     ── find_images ──▶ ImageSet ── select(photos, 1000, seed=42)
    annotations/instances_val2017.json                                  folder, photos (index, reference, strata)

    labels.jsonl, ledger.jsonl of earlier runs ── of_folder ──▶ ImageIds ── claim(photo, pixels' hash) ──▶ 00017_beach
    originals/00017_IMG_2041.jpeg                  a few files as they were, metadata (place, camera) included

Any folder will do; where it has COCO's layout, the stratum of an image is the category that fills most of it. A new
image is named by its place among all images and its file, and where an earlier image has that name, by its content too
(`00017_beach-3fa9c1d2`): no name ever means two images, and none changes because a folder grows.

Validation and golden vectors start from the originals: the data set's own images have the device's size, which any
resizer passes on, so with them alone nobody could tell whether an app scales, turns and pads as training saw it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from rankwise.data.device import DeviceTarget, changes, read_target
from rankwise.data.images import ImageReader
from rankwise.data.label_answer import name_key
from rankwise.data.pixels import kind_of, suffix_of
from rankwise.data.sources.official import Download, fetch, unpacked, unpacked_into
from rankwise.data.split import in_turn
from rankwise.errors import DataError
from rankwise.files.adapter import DEVICE
from rankwise.files.atomic import atomic_write, read_object
from rankwise.files.document import finished_lines
from rankwise.options.label import COCO_SPLITS

# The consortium publishes no checksums. Sizes and SHA-256 are those on which several independent public records of
# these files agree (their MD5 sums are 442b8da7639aecaf257c1dceb8ba8c80 and f4bbac642086de4f52a3fdda2de5fa2c).
IMAGES = Download(
    "http://images.cocodataset.org/zips/val2017.zip",
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    815_585_330,
)
ANNOTATIONS = Download(
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    252_907_541,
)
KINDS = ("instances", "person_keypoints")  # of annotation files that say what is where, the fuller one first
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif", ".mpo")
)
UNSAFE = re.compile(r"[^\w.-]+")
LONGEST_STEM = 100
MENTIONED = 3
TABLE, FOLDER = "labels.jsonl", "originals"
NAME = re.compile(r"\d{5,}_[\w.-]*")
ORIGINAL = re.compile(rf"{FOLDER}/{NAME.pattern}")
MOST = 32  # as many as the parity ladder asks about
MOST_BYTES = 64 * 2**20
AMONG = 200  # pictures that are looked at


@dataclass(frozen=True)
class Photo:
    """An image that may be labelled.

    index: its place among all images of the set, by name, so that an id means the same image whatever is selected.
    reference: its path below the set's folder. strata: from the general to the special one, (supercategory, category).
    """

    index: int
    reference: str
    strata: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """`{index:05d}_{stem}`, with what a file name should not hold replaced by `_`."""
        stem = UNSAFE.sub("_", PurePosixPath(self.reference).stem)[:LONGEST_STEM]
        return f"{self.index:05d}_{stem}"


@dataclass(frozen=True)
class ImageSet:
    """Images below one folder. annotations: the file that their strata come from. unlisted: images that it lacks."""

    folder: Path
    photos: tuple[Photo, ...] = field(repr=False)
    annotations: Path | None = None
    unlisted: int = 0


def find_images(path: str | Path, split: str | None = None) -> ImageSet:
    """COCO's images with their annotations where the folder has that layout, else all images below the folder.

    split: `val2017` or `train2017`; the default is the one that is there, val2017 first. DataError for a folder without
    images, a broken annotation file, and images that the annotations list and the folder lacks.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; pass the folder of the images, or one in COCO's layout")
    for name in (split,) if split else COCO_SPLITS:
        images = _image_folder(folder, name)
        if images is not None:
            files = [folder / "annotations" / f"{kind}_{name}.json" for kind in KINDS]
            annotations = next((file for file in files if file.is_file()), None)
            return images_below(images) if annotations is None else _annotated(images, annotations)
    if split:
        raise DataError(f"{folder} has no folder {split} or images/{split}")
    return images_below(folder)


def images_below(folder: Path) -> ImageSet:
    """All images below a folder, whatever folders they are in there, by their names; hidden ones are left out."""
    names = sorted(name for file in folder.rglob("*") if (name := _image_name(file, folder)))
    if not names:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return ImageSet(folder, tuple(Photo(index, name) for index, name in enumerate(names)))


def select(photos: Sequence[Photo], num: int | None, seed: int) -> tuple[Photo, ...]:
    """`num` of the images (all for None, or where there are fewer), in an order that the seed decides.

    Supercategories get their largest-remainder shares, then the categories of each. The result does not depend on the
    order of the images, and as it is mixed, each beginning of it is about as fair as the whole.
    """
    chosen = _drawn(photos, len(photos) if num is None else min(num, len(photos)), seed, 0)
    places = {photo.reference: photo for photo in chosen}
    return tuple(places[name] for name in drawn_order(places, seed))


def _drawn(photos: Sequence[Photo], num: int, seed: int, level: int) -> list[Photo]:
    strata: dict[str, list[Photo]] = {}
    for photo in photos:
        strata.setdefault(photo.strata[level] if level < len(photo.strata) else "", []).append(photo)
    if set(strata) <= {""}:
        by_name = {photo.reference: photo for photo in photos}
        return [by_name[name] for name in drawn_order(by_name, seed)[:num]]
    wanted = shares({name: len(members) for name, members in strata.items()}, num)
    return [photo for name, members in strata.items() for photo in _drawn(members, wanted[name], seed, level + 1)]


def shares(
    sizes: Mapping[str, int], total: int, *, least: Mapping[str, int] = {}, most: Mapping[str, int] = {}
) -> dict[str, int]:
    """Largest-remainder shares of `total` in proportion to the sizes; ties go to the earlier name.

    least, most: bounds of each share [0 and the size]. They stand over the total where both can't hold.
    """
    least, most = least or dict.fromkeys(sizes, 0), most or sizes
    whole, names = sum(sizes.values()) or 1, sorted(sizes)
    given = {name: min(max(total * sizes[name] // whole, least[name]), most[name]) for name in names}

    def owed(name: str) -> int:
        return total * sizes[name] - given[name] * whole

    while sum(given.values()) < total and (open_names := [name for name in names if given[name] < most[name]]):
        given[max(open_names, key=owed)] += 1
    while sum(given.values()) > total and (open_names := [name for name in names if given[name] > least[name]]):
        given[min(open_names, key=owed)] -= 1
    return given


def drawn_order(names: Iterable[str], seed: int) -> list[str]:
    """The names in a random order that the seed and the names decide."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())


def download_coco(folder: str | Path) -> Path:
    """COCO val2017 in its official layout, fetched from its official place (1 GB) as far as the folder lacks it.

    A cut transfer goes on where it stopped; both archives are checked and unpacked with care. Raises ServiceError where
    they can't be had, DataError for other bytes.
    """
    folder = Path(folder)
    annotations = folder / "annotations" / "instances_val2017.json"
    if not annotations.is_file():
        taken = unpacked(fetch(ANNOTATIONS, folder), [annotations.name]) / annotations.name
        with atomic_write(annotations) as temporary:
            temporary.write_bytes(taken.read_bytes())
    if _image_folder(folder, "val2017") is None:
        listed = [name for name, _ in _listed(annotations, read_object(annotations))]
        unpacked_into(fetch(IMAGES, folder), listed, folder / "val2017")
    return folder


# --- folders and annotation files ----------------------------------------------------------------------------------


def _image_folder(folder: Path, split: str) -> Path | None:
    return next((place for place in (folder / split, folder / "images" / split) if place.is_dir()), None)


def _image_name(file: Path, folder: Path) -> str:
    """The path below the folder of what looks like an image and is not hidden; else nothing."""
    relative = file.relative_to(folder)
    hidden = any(part.startswith(".") for part in relative.parts)
    return relative.as_posix() if file.suffix.lower() in SUFFIXES and not hidden and file.is_file() else ""


def _annotated(folder: Path, file: Path) -> ImageSet:
    content = read_object(file)
    listed = sorted(_listed(file, content))
    missing = [name for name, _ in listed if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{file} lists {len(listed):,} images, {len(missing):,} of them are not in {folder}: "
            f"{', '.join(missing[:MENTIONED])}{' …' if len(missing) > MENTIONED else ''}; complete the folder, or pass "
            f"{folder} itself to use what is there without annotations"
        )
    strata = _strata(file, content)
    photos = tuple(Photo(index, name, strata.get(key, ("", ""))) for index, (name, key) in enumerate(listed))
    present = sum(bool(_image_name(each, folder)) for each in folder.iterdir())
    return ImageSet(folder, photos, file, max(0, present - len(photos)))


def _listed(file: Path, content: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(file name, image id) of every image that the annotations list."""
    rows = [
        (_value(row, "file_name", str, where), _value(row, "id", int, where))
        for row, where in _rows(file, content, "images")
    ]
    if not rows:
        raise DataError(f"{file}: lists no images")
    for what, values in zip(("file_name", "id"), zip(*rows, strict=True), strict=True):
        [(value, count)] = Counter(values).most_common(1)
        if count > 1:
            raise DataError(f"{file}: images: {what} {value!r} appears twice")
    for name, _ in rows:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise DataError(f"{file}: images: the file_name {name!r} leads out of the image folder")
    return rows


def _strata(file: Path, content: Mapping[str, Any]) -> dict[int, tuple[str, str]]:
    """Of every annotated image (by id): the supercategory and category (their keys) with the largest area in it."""
    names = {}
    for row, where in _rows(file, content, "categories"):
        keys = (name_key(str(row.get("supercategory", ""))), name_key(_value(row, "name", str, where)))
        names[_value(row, "id", int, where)] = keys
    areas: dict[int, dict[tuple[str, str], float]] = {}
    for row, where in _rows(file, content, "annotations"):
        category = _value(row, "category_id", int, where)
        if category not in names:
            raise DataError(f"{where}: no category has the id {category}")
        of_image = areas.setdefault(_value(row, "image_id", int, where), {})
        of_image[names[category]] = of_image.get(names[category], 0.0) + _area(row, where)
    return {key: max(sorted(of_image), key=of_image.__getitem__) for key, of_image in areas.items()}


def _area(row: Mapping[str, Any], where: str) -> float:
    area = row.get("area")
    if area is None and isinstance(row.get("bbox"), list) and len(row["bbox"]) == 4:
        width, height = row["bbox"][2:]
        area = width * height
    if isinstance(area, bool) or not isinstance(area, int | float) or not area >= 0:
        raise DataError(f"{where}: area must be a number of square pixels, found {area!r:.40}")
    return float(area)


def _rows(file: Path, content: Mapping[str, Any], key: str) -> list[tuple[dict[str, Any], str]]:
    """The objects of a list of the file, each with how messages name it."""
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: {key}: expected a list of objects; is it a COCO annotation file?")
    return [(row, f"{file}: {key}[{place}]") for place, row in enumerate(rows)]


def _value(row: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise DataError(f"{where}: {key} must be a {'text' if kind is str else 'whole number'}, found {value!r:.40}")
    return value


class ImageIds:
    """The names of a data set. known: id → hash of the pixels; originals: paths below the data set; both of earlier
    runs. reserved: a new image does not get one of the known names."""

    def __init__(
        self, known: Iterable[tuple[str, str]] = (), originals: Iterable[str] = (), *, reserved: bool = True
    ) -> None:
        self.known, self.reserved = dict[str, str](), reserved
        self.originals = frozenset(path for path in originals if ORIGINAL.fullmatch(path))
        self._free: dict[str, list[str]] = {}
        self._claimed: dict[str, str] = {}
        for name, sha256 in known:
            if NAME.fullmatch(name) and name not in self.known:
                self.known[name] = sha256
                self._free.setdefault(sha256, []).append(name)

    @classmethod
    def of_folder(cls, folder: Path, target: DeviceTarget, asked: Iterable[tuple[str, str]] = ()) -> ImageIds:
        """Those of the table of an earlier run, and of answers that were paid for. Of a run for another device all
        pixels were others: its names are free."""
        table, same = folder / TABLE, not (folder / DEVICE).is_file() or read_target(folder) == target
        rows = list(_named_rows(table))
        named = [(str(row["image_id"]), str(row["image_sha256"])) for row in rows]
        originals = [str(row["source_path"]) for row in rows if row.get("source_path")]
        return cls([*named, *asked], originals, reserved=same)

    def claim(self, photo: Photo, sha256: str) -> str:
        """The id of an image; the same however often it is asked for."""
        if photo.reference not in self._claimed:
            self._claimed[photo.reference] = self._chosen(photo, sha256)
        return self._claimed[photo.reference]

    def _chosen(self, photo: Photo, sha256: str) -> str:
        names = self._free.get(sha256, [])
        if names:
            own = photo.id.split("_", 1)[1]
            name = next((name for name in names if name.split("_", 1)[1] == own), names[0])
            names.remove(name)
            return name
        return f"{photo.id}-{sha256[:8]}" if self.reserved and photo.id in self.known else photo.id


def _named_rows(table: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table that name an image; broken lines name none, since the table is about to be replaced."""
    for _, line in finished_lines(table):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"image_id", "image_sha256"} <= row.keys():
            yield row


@dataclass(frozen=True)
class Originals:
    """Where the pictures of a data set came from. references: by image id, as `reader` knows them."""

    reader: ImageReader
    references: Mapping[str, str]

    def keep(self, folder: Path, ids: Sequence[str], target: DeviceTarget) -> dict[str, str]:
        """Copy some, those that the device changes first, in turn of every kind (wide, tall; colour mode; turned).
        Returns image id → path below `folder`: at most MOST pictures, MOST_BYTES in all."""
        known = [one for one in ids[:AMONG] if one in self.references]
        passed = [one for one in known if not changes(self._content(one), target.image_size)]
        kept: dict[str, str] = {}
        room = MOST_BYTES
        for one in (*in_turn([one for one in known if one not in passed], self._kind), *passed):
            content = self._content(one)
            if len(kept) < MOST and len(content) <= room:
                kept[one] = f"{FOLDER}/{one}{suffix_of(content)}"
                room -= len(content)
                with atomic_write(folder / kept[one]) as temporary:
                    temporary.write_bytes(content)
        return kept

    def _content(self, one: str) -> bytes:
        return self.reader.content(self.references[one])

    def _kind(self, one: str) -> str:
        with Image.open(io.BytesIO(self._content(one))) as picture:
            return kind_of(picture)
