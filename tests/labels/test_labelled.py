"""A labelled data set is written whole, splits part no twins, what training reads is what was labelled."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rankwise.data.device import DeviceTarget, read_target
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.label_task import LabelTask, load_task, read_task, task_from
from rankwise.data.sources.load import load
from rankwise.errors import DataError, UsageError
from rankwise.labels.dataset import (
    LabelledRow,
    StoredImage,
    WrittenDataset,
    pixel_hash,
    read_rows,
    store_image,
    write_dataset,
)
from rankwise.labels.existing import Existing, label_rows, read_existing, task_for
from rankwise.labels.images import find_images, select
from rankwise.options.label import LabelConfig

TARGET = DeviceTarget(image_size=16)
TABLES = ("labels.jsonl", "train.jsonl", "val.jsonl", "conversations/train.json", "conversations/val.json")
PETS = task_from({"name": "pets", "field": "pet", "classes": ["cat", "dog", "bird"]}, "here")


def picture(number: int) -> Image.Image:
    """A picture of its own for every number, not of the device's size."""
    image = Image.new("RGB", (24, 12), (number % 256, number // 256, 99))
    image.putpixel((0, 0), (255, 255, 255))
    return image


def row(folder: Path, number: int, label: str, shows: int | None = None, **said: Any) -> LabelledRow:
    identity = f"{number:05d}_photo"
    stored = store_image(folder, identity, picture(number if shows is None else shows), TARGET)
    return LabelledRow(identity, stored.path, stored.sha256, label, **said)


def pets(folder: Path, sizes: dict[str, int], twins: int = 0) -> list[LabelledRow]:
    labels = [label for label, size in sizes.items() for _ in range(size)]
    rows = [row(folder, number, label) for number, label in enumerate(labels)]
    again = [row(folder, 1000 + number, labels[number], shows=number) for number in range(twins)]
    return rows + again


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- images -------------------------------------------------------------------------------------------------------


def test_a_stored_image_has_exactly_the_devices_pixels(tmp_path: Path) -> None:
    stored = store_image(tmp_path, "00003_x", picture(3), TARGET)
    seen = ImageReader(tmp_path).open(stored.path)
    assert stored.path == "images/00003_x.png" and seen.size == (16, 16)
    assert seen.tobytes() == TARGET.resize(picture(3)).tobytes()
    assert stored.sha256 == pixel_hash(seen), "the hash is that of the stored pixels"
    assert TARGET.resize(seen).tobytes() == seen.tobytes(), "the device changes them no more"


def test_twins_have_one_hash_and_an_image_is_written_once(tmp_path: Path) -> None:
    first = store_image(tmp_path, "a", picture(3), TARGET)
    written = os.stat(tmp_path / first.path).st_mtime_ns, os.stat(tmp_path / first.path).st_ino
    assert store_image(tmp_path, "a", picture(3), TARGET) == first
    assert written == (os.stat(tmp_path / first.path).st_mtime_ns, os.stat(tmp_path / first.path).st_ino)
    assert store_image(tmp_path, "b", picture(3), TARGET).sha256 == first.sha256
    assert store_image(tmp_path, "c", picture(4), TARGET).sha256 != first.sha256
    tall, wide = Image.new("RGB", (2, 8)), Image.new("RGB", (8, 2))
    assert tall.tobytes() == wide.tobytes() and pixel_hash(tall) != pixel_hash(wide)


# --- writing ------------------------------------------------------------------------------------------------------


def test_the_folder_has_every_documented_file_and_what_else_was_there(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"paid": true}\n')
    rows = pets(tmp_path, {"cat": 20, "dog": 10, "bird": 2})
    written = write_dataset(tmp_path, rows, PETS, TARGET, 0.1, 42)
    files = {name for name in content_of(tmp_path) if not name.startswith("images/")}
    assert files == {*TABLES, "task.json", "device.json", "ledger.jsonl"}
    assert (tmp_path / "ledger.jsonl").read_text() == '{"paid": true}\n'
    assert read_task(tmp_path) == PETS and read_target(tmp_path) == TARGET
    assert read_rows(tmp_path) == tuple(rows)
    assert read_rows(tmp_path / "train.jsonl") == written.train and read_rows(tmp_path / "val.jsonl") == written.val
    assert sorted(written.rows, key=lambda each: each.image_id) == rows


def test_rows_have_the_documented_columns(tmp_path: Path) -> None:
    task = load_task("elements")
    answer = {
        "visual_features": ["waves"],
        "color_breakdown": "blue",
        "texture": "ripples",
        "reason": "Sea – überall.",
        "element": "water",
        "confidence": 0.9,
        "alternative_element": "land",
        "ambiguity_note": None,
    }
    stored = store_image(tmp_path, "00000_a", picture(0), TARGET)
    of_answer = LabelledRow.of_answer("00000_a", stored, task.validate_answer(json.dumps(answer)), task)
    write_dataset(tmp_path, [of_answer], task, TARGET)
    [line] = (tmp_path / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        **answer,
        "image_id": "00000_a",
        "image_path": "images/00000_a.png",
        "image_sha256": stored.sha256,
    }
    assert list(json.loads(line))[:4] == ["image_id", "image_path", "element", "reason"]
    assert read_rows(tmp_path) == (of_answer,)


def test_the_conversations_are_read_by_train_and_say_the_same(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, pets(tmp_path, {"cat": 12, "dog": 12}), PETS, TARGET)
    reader = ImageReader(tmp_path)
    for name, rows in (("train", written.train), ("val", written.val)):
        examples = load("conversations", tmp_path / "conversations" / f"{name}.json")
        assert [(each.id, each.answer, each.stratum) for each in examples] == [
            (each.image_id, each.label, each.label) for each in rows
        ]
        for example in examples:
            assert example.turns[0].text == f"<image>\n{PETS.student_prompt}"
            assert example.references == (example.answer,)
            assert [reader.size(image) for image in example.images] == [(16, 16)]


def test_training_reads_the_folder_itself(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, pets(tmp_path, {"cat": 12, "dog": 12}, twins=3), PETS, TARGET)
    for split, rows in (("train", written.train), ("val", written.val)):
        examples = load("labels", tmp_path, split)
        assert [(each.id, each.answer, each.images) for each in examples] == [
            (each.image_id, each.label, (each.image_path,)) for each in rows
        ]


def test_the_teachers_reason_is_in_no_conversation(tmp_path: Path) -> None:
    rows = [row(tmp_path, n, "cat", reason="WHISKERS", texture="FUR", ambiguity_note="NOTE") for n in range(4)]
    write_dataset(tmp_path, rows, PETS, TARGET, 0.5)
    for name in ("train", "val"):
        text = (tmp_path / "conversations" / f"{name}.json").read_text()
        assert "cat" in text and not any(word in text for word in ("WHISKERS", "FUR", "NOTE"))


def test_what_is_written_does_not_depend_on_the_order_of_answers(tmp_path: Path) -> None:
    rows = pets(tmp_path, {"cat": 20, "dog": 10}, twins=5)
    write_dataset(tmp_path, rows, PETS, TARGET)
    before = content_of(tmp_path)
    write_dataset(tmp_path, reversed(rows), PETS, TARGET)
    assert content_of(tmp_path) == before
    write_dataset(tmp_path, rows, PETS, TARGET, seed=43)
    assert content_of(tmp_path) != before


# --- the split ----------------------------------------------------------------------------------------------------


def hashes(rows: tuple[LabelledRow, ...]) -> set[str]:
    return {each.image_sha256 for each in rows}


def test_ninety_ten_by_class_and_no_twin_crosses(tmp_path: Path) -> None:
    sizes = {"cat": 60, "dog": 38, "bird": 2}
    written = write_dataset(tmp_path, pets(tmp_path, sizes, twins=40), PETS, TARGET, 0.1)
    assert not hashes(written.train) & hashes(written.val)
    assert len(hashes(written.val)) == 10 and written.twins == 40
    different = Counter({each.image_sha256: each.label for each in written.val}.values())
    assert different == {"cat": 6, "dog": 3, "bird": 1}
    counts = written.counts(PETS)
    assert {name: sum(part.values()) for name, part in counts.items()} == {"cat": 100, "dog": 38, "bird": 2}
    assert counts["bird"] == {"train": 1, "val": 1}


def test_a_class_with_one_image_trains(tmp_path: Path) -> None:
    rows = [*pets(tmp_path, {"cat": 10}), row(tmp_path, 500, "dog"), row(tmp_path, 501, "dog", shows=500)]
    written = write_dataset(tmp_path, rows, PETS, TARGET, 0.9)
    assert written.counts(PETS) == {
        "cat": {"train": 1, "val": 9},
        "dog": {"train": 2, "val": 0},
        "bird": {"train": 0, "val": 0},
    }


def test_a_fraction_of_nothing_and_of_too_much(tmp_path: Path) -> None:
    rows = pets(tmp_path, {"cat": 3, "dog": 3})
    assert write_dataset(tmp_path, rows, PETS, TARGET, 0).val == ()
    assert read_rows(tmp_path / "val.jsonl") == ()
    for fraction in (1, -0.1):
        with pytest.raises(UsageError, match=f"--val_fraction is {fraction}; give a number of at least 0 and below 1"):
            LabelConfig(val_fraction=fraction)


def test_twins_with_two_labels_stay_together_and_are_named(tmp_path: Path) -> None:
    rows = [*pets(tmp_path, {"cat": 10, "dog": 10}), row(tmp_path, 500, "dog", shows=0)]
    written = write_dataset(tmp_path, rows, PETS, TARGET, 0.5)
    assert written.disputed == ("00000_photo", "00500_photo")
    assert not hashes(written.train) & hashes(written.val)


# --- nothing half-written -------------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_write_nothing(tmp_path: Path) -> None:
    good = row(tmp_path, 1, "cat")
    lost = StoredImage("images/lost.png", "0" * 64)
    for rows, message in (
        ([], "no image has a label that was kept"),
        ([good, good], "the image id 00001_photo is used twice"),
        ([good, row(tmp_path, 2, "fish")], "00002_photo: 'fish' is not among cat, dog, bird"),
        ([good, LabelledRow("x", lost.path, lost.sha256, "cat")], "x: the image .*lost.png was not stored"),
    ):
        with pytest.raises(DataError, match=message):
            write_dataset(tmp_path, rows, PETS, TARGET)
    assert all(name.startswith("images/") for name in content_of(tmp_path))


def test_a_failing_write_leaves_the_old_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pets(tmp_path, {"cat": 4, "dog": 4})
    write_dataset(tmp_path, rows[:6], PETS, TARGET)
    before = content_of(tmp_path)
    writes = iter(range(100))
    write_text = Path.write_text

    def failing(path: Path, text: str, **options: Any) -> int:
        if "val" in path.name and next(writes) == 1:
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(DataError, match="no space left"):
        write_dataset(tmp_path, rows, PETS, TARGET)
    assert content_of(tmp_path) == before


# --- reading ------------------------------------------------------------------------------------------------------


def spoilt(folder: Path, change: dict[str, Any] | str) -> Path:
    """A data set of three rows whose second one is changed."""
    write_dataset(folder, pets(folder, {"cat": 3}), PETS, TARGET)
    file = folder / "labels.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = change if isinstance(change, str) else json.dumps({**json.loads(lines[1]), **change})
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a sample must be a JSON object"),
        ({"pet": "fish"}, "pet must be one of cat, dog, bird; found 'fish'"),
        ({"pet": None}, "pet is missing; the task pets calls the label so"),
        ({"confidence": 7}, "confidence must be from 0 to 1"),
        ({"alternative_pet": "fish"}, "alternative_pet must be one of"),
        ({"visual_features": "fur"}, "visual_features must be a list"),
        ({"image_path": ""}, "image_path must be a text"),
        ({"image_sha256": 5}, "image_sha256 must be a text"),
        ({"image_id": "00000_photo"}, "the image_id 00000_photo occurred before"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, change: dict[str, Any] | str, message: str) -> None:
    file = spoilt(tmp_path, change)
    with pytest.raises(DataError, match=message) as error:
        read_rows(tmp_path)
    assert f"{file}, line 2: " in str(error.value) and error.value.exit_code == 3


def test_only_id_path_hash_and_label_are_needed(tmp_path: Path) -> None:
    bare = {"reason": None, "visual_features": None, "color_breakdown": None, "texture": None, "remark": "mine"}
    spoilt(tmp_path, bare)
    found = read_rows(tmp_path)[1]
    assert (found.label, found.reason, found.visual_features, found.confidence) == ("cat", "", (), None)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.jsonl does not exist"):
        read_rows(tmp_path)
    (tmp_path / "labels.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"task\.json is missing"):
        read_rows(tmp_path)


# --- labels that exist already --------------------------------------------------------------------------------------


def saved(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    return folder


def labels_of(existing: Existing) -> dict[str, str]:
    return {each.photo.reference: each.label for each in existing.given}


def built(existing: Existing, out: Path, task: LabelTask | None = None, **options: Any) -> WrittenDataset:
    chosen = task_for(existing, task)
    return write_dataset(out, label_rows(existing, chosen, TARGET, out, **options).rows, chosen, TARGET)


NAMES = ["dog/b.png", "cat/a.png", "cat/deep/a.png", "dog/c.png"]
LABELS = {"cat/a.png": "cat", "cat/deep/a.png": "cat", "dog/b.png": "dog", "dog/c.png": "dog"}


def test_folders_csv_and_jsonl_give_the_same_data_set(tmp_path: Path) -> None:
    photos = saved(tmp_path / "photos", NAMES)
    table = tmp_path / "labels.csv"
    table.write_text("file_name,class,by\n" + "".join(f"{name},{label},me\n" for name, label in LABELS.items()))
    lines = tmp_path / "labels.jsonl"
    lines.write_text("".join(json.dumps({"image": n, "label": label}) + "\n" for n, label in LABELS.items()))
    sources = [
        read_existing(photos),
        read_existing(table, image_folder=photos),
        read_existing(lines, image_folder=photos),
    ]
    assert [labels_of(source) for source in sources] == [LABELS] * 3
    contents = []
    for number, source in enumerate(sources):
        written = built(source, tmp_path / str(number))
        assert [each.image_id for each in read_rows(tmp_path / str(number))] == [
            *("00000_a", "00001_a", "00002_b", "00003_c")
        ]
        assert written.counts(read_task(tmp_path / str(number))) == {
            "cat": {"train": 1, "val": 1},
            "dog": {"train": 1, "val": 1},
        }
        contents.append(content_of(tmp_path / str(number)))
    assert contents[0] == contents[1] == contents[2]
    task = read_task(tmp_path / "0")
    assert (task.labels, task.student_prompt.splitlines()[-1]) == (("cat", "dog"), "Label:")
    assert read_rows(tmp_path / "0")[0].confidence is None, "nobody has stated one"


def test_a_given_task_is_kept_to(tmp_path: Path) -> None:
    existing = read_existing(saved(tmp_path, NAMES))
    assert task_for(existing, PETS) is PETS
    other = task_from({"classes": ["dogs", "cats"], "name": "other"}, "here")
    with pytest.raises(DataError, match=r"cat/a\.png: unknown class of the task other 'cat'; did you mean cats.* dogs"):
        task_for(existing, other)


def test_labels_that_make_no_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the labels found cannot be the classes of a task: .*a choice needs two"):
        task_for(read_existing(saved(tmp_path, ["cat/a.png"])), None)


def test_an_image_with_two_labels_is_refused_by_name(tmp_path: Path) -> None:
    photos = saved(tmp_path / "photos", NAMES)
    picture(0).save(photos / "cat" / "z.png")  # the pixels of dog/b.png
    existing = read_existing(photos)
    with pytest.raises(DataError, match=r"dog/b\.png is 'dog' .*, and cat/z\.png, the same image, is 'cat'"):
        built(existing, tmp_path / "out")
    table = tmp_path / "labels.csv"
    table.write_text("image,label\na.png,cat\nb.png,cat\na.png,dog\n")
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=r"a\.png is 'dog' \(.*line 4\), and a\.png, .*'cat' \(.*line 2\)"):
            read_existing(table, skip_bad=skip_bad)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            "image,file,label\na,b,c\n",
            {},
            r"which column is the image\? several may be it \(image, file\); say --image_",
        ),
        ("image,what\na,b\n", {}, r"which column is the label\? none is called label, class, category"),
        ("image,what\na,b\n", {"label_column": "wat"}, "unknown column 'wat'; did you mean what"),
        ("image,label\na.png,\n", {}, "line 2: label must be a text"),
        ("image,label\na.png\n", {}, "line 2: 1 fields, the header has 2"),
        ("image,label\na.png,x\na.png,x\n", {}, r"line 3: a\.png stands before \(.*line 2\)"),
        ("image,label\n", {}, "no labels found"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(
    tmp_path: Path, content: str, options: dict[str, str], message: str
) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(content)
    with pytest.raises((UsageError, DataError), match=message) as error:
        read_existing(table, **options)  # type: ignore[arg-type]
    assert str(table) in str(error.value)


def test_columns_can_be_named_and_bad_rows_left_out(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("image,what,label\na.png,x,1\nb.png,,2\nc.png,y,3\n")
    existing = read_existing(table, label_column="what", skip_bad=True)
    assert labels_of(existing) == {"a.png": "x", "c.png": "y"}
    [skipped] = existing.skipped
    assert "line 3: what must be a text" in skipped
    assert labels_of(read_existing(table)) == {"a.png": "1", "b.png": "2", "c.png": "3"}


def test_a_path_that_is_nothing_of_this(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path / "x.txt", "read from .csv, .jsonl")):
        with pytest.raises(DataError, match=message):
            read_existing(path)
    saved(tmp_path, ["loose.png", *NAMES])
    with pytest.raises(DataError, match=r"1 images are in no class folder \(loose\.png\)"):
        read_existing(tmp_path)
    with pytest.raises(UsageError, match="is a folder, whose classes are its subfolders"):
        read_existing(tmp_path, label_column="x")


def test_images_that_cannot_be_decoded_are_named_or_counted(tmp_path: Path) -> None:
    photos = saved(tmp_path / "photos", NAMES)
    (photos / "cat" / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    (photos / "dog" / "empty.jpg").write_bytes(b"")
    existing = read_existing(photos)
    with pytest.raises(BadImage, match=r"cat/bad\.jpg.* is not a picture .*--skip-bad"):
        built(existing, tmp_path / "out")
    found = label_rows(existing, task_for(existing, None), TARGET, tmp_path / "out", skip_bad=True)
    assert len(found.rows) == 4
    assert [name in reason for name, reason in zip(("bad.jpg", "empty.jpg"), found.skipped, strict=True)] == [True] * 2


def test_paths_lead_nowhere_else(tmp_path: Path) -> None:
    saved(tmp_path, ["out.png", "photos/a.png"])
    table = tmp_path / "photos" / "labels.csv"
    table.write_text("image,label\na.png,x\n../out.png,y\n")
    existing = read_existing(table)
    with pytest.raises(BadImage, match=r"line 3: .*leads out of the image folder"):
        label_rows(existing, task_for(existing, None), TARGET, tmp_path / "data")
    allowed = read_existing(table, allow_outside=True)
    assert len(label_rows(allowed, task_for(allowed, None), TARGET, tmp_path / "data").rows) == 2


# --- real data ----------------------------------------------------------------------------------------------------


def test_real_photos_become_a_data_set(shared_data: Path, tmp_path: Path) -> None:
    """COCO's largest supercategory stands for a label: selection, the device's pixels, split and conversations."""
    found = find_images(shared_data / "coco" / "tiny_coco")
    reader, target = ImageReader(found.folder), DeviceTarget()
    task = task_from({"classes": ["person", "furniture", "appliance", "vehicle", "animal"]}, "here")
    rows = []
    for photo in select([each for each in found.photos if each.strata[0] in task.labels], 20, seed=42):
        stored = store_image(tmp_path, photo.id, reader.open(photo.reference), target)
        rows.append(LabelledRow(photo.id, stored.path, stored.sha256, photo.strata[0]))
    written = write_dataset(tmp_path, rows, task, target, 0.3)
    assert (len(written.rows), written.twins, len(written.val)) == (20, 0, 6)
    examples = load("conversations", tmp_path / "conversations" / "val.json")
    stored_reader = ImageReader(tmp_path)
    for example, each in zip(examples, written.val, strict=True):
        assert example.id == each.image_id and pixel_hash(stored_reader.open(example.images[0])) == each.image_sha256
        assert stored_reader.size(example.images[0]) == (256, 256)
