"""Names of images are of their content: a folder that grows renames nothing, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rankwise.cli import main
from rankwise.data.device import DeviceTarget
from rankwise.labels.dataset import read_rows
from rankwise.labels.images import ImageIds, Photo

SHADES = {"b": 60, "d": 120, "f": 180}


def photo(folder: Path, name: str, blue: int) -> None:
    """A photo of one shade of water, below a class folder."""
    path = folder / "sea" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (20, 60, 100 + blue // 2)).save(path)


def land(folder: Path) -> None:
    path = folder / "shore" / "z.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (150, 115, 75)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, blue in SHADES.items():
        photo(folder, name, blue)
    land(folder)
    return folder


def labelled(photos: Path, out: Path, how: str, *more: str) -> dict[str, str]:
    """Id of each image by its hash, after the command."""
    assert main(["label", str(photos), how, "-o", str(out), "--image_size", "32", *more]) == 0
    rows = read_rows(out)
    stored = sorted(path.name for path in (out / "images").iterdir())
    assert stored == sorted(f"{row.image_id}.png" for row in rows), "every image has a row"
    kept = {row.source_path for row in rows if row.source_path}
    assert {f"originals/{path.name}" for path in (out / "originals").iterdir()} == kept
    return {row.image_sha256: row.image_id for row in rows}


@pytest.mark.parametrize("how", ["--loopback_teacher", "--from_folders"])
def test_a_folder_that_grows_renames_nothing_and_leaves_no_orphans(how: str, photos: Path, tmp_path: Path) -> None:
    before = labelled(photos, tmp_path / "d", how)
    assert sorted(before.values()) == ["00000_b", "00001_d", "00002_f", "00003_z"]
    photo(photos, "a", 20)  # the first of all
    photo(photos, "c", 90)
    (photos / "sea" / "f.png").rename(photos / "sea" / "e.png")
    after = labelled(photos, tmp_path / "d", how)
    assert {sha: after[sha] for sha in before} == before
    assert sorted(set(after.values()) - set(before.values())) == ["00000_a", "00002_c"]
    (photos / "sea" / "b.png").unlink()
    fewer = labelled(photos, tmp_path / "d", how)
    assert fewer.items() < after.items() and "00000_b" not in fewer.values()


def test_a_new_image_with_a_name_that_is_taken_gets_its_content_into_its_name(photos: Path, tmp_path: Path) -> None:
    before = labelled(photos, tmp_path / "d", "--loopback_teacher")
    Image.new("RGB", (32, 32), (20, 60, 240)).save(photos / "b.png")  # place 0, and the name b
    after = labelled(photos, tmp_path / "d", "--loopback_teacher")
    [new] = set(after) - set(before)
    assert after[new] == f"00000_b-{new[:8]}" and {sha: after[sha] for sha in before} == before


def test_another_photo_under_an_old_name_is_another_image(photos: Path, tmp_path: Path) -> None:
    before = labelled(photos, tmp_path / "d", "--loopback_teacher")
    photo(photos, "b", 255)
    after = labelled(photos, tmp_path / "d", "--loopback_teacher")
    [new], [gone] = set(after) - set(before), set(before) - set(after)
    assert before[gone] == "00000_b" and after[new] == f"00000_b-{new[:8]}"


def test_what_others_put_beside_the_images_is_not_deleted(photos: Path, tmp_path: Path) -> None:
    """Not even under the name of an image that is gone."""
    out = tmp_path / "d"
    labelled(photos, out, "--loopback_teacher")
    Image.new("RGB", (32, 32), "pink").save(out / "images" / "00000_b.png")
    Image.new("RGB", (32, 32), "pink").save(out / "images" / "mine.png")
    (photos / "sea" / "b.png").unlink()
    command = ["label", str(photos), "--loopback_teacher", "-o", str(out), "--image_size", "32"]
    assert main(command) == 0
    assert {"00000_b.png", "mine.png"} <= {path.name for path in (out / "images").iterdir()}


def test_another_size_renames_nothing(photos: Path, tmp_path: Path) -> None:
    """All pixels are others then, and the files are replaced."""
    before = labelled(photos, tmp_path / "d", "--loopback_teacher")
    after = labelled(photos, tmp_path / "d", "--loopback_teacher", "--image_size", "64")
    assert not set(before) & set(after) and sorted(before.values()) == sorted(after.values())
    assert labelled(photos, tmp_path / "d", "--loopback_teacher", "--image_size", "64") == after


def test_a_smaller_selection_leaves_no_images_of_the_larger_one(photos: Path, tmp_path: Path) -> None:
    labelled(photos, tmp_path / "d", "--loopback_teacher")
    assert len(labelled(photos, tmp_path / "d", "--loopback_teacher", "--num_images", "2")) == 2


def test_names_of_a_broken_table_lead_nowhere(tmp_path: Path) -> None:
    table = tmp_path / "labels.jsonl"
    rows = [{"image_id": name, "image_sha256": "x", "source_path": f"{name}.png"} for name in ("../../etc", "00001_ok")]
    table.write_bytes(b"\xff\n[]\n" + "".join(json.dumps(row) + "\n" for row in rows).encode())
    ids = ImageIds.of_folder(tmp_path, DeviceTarget())
    assert ids.known == {"00001_ok": "x"} and not ids.originals
    assert ids.claim(Photo(7, "a/b.png"), "x") == "00001_ok" == ids.claim(Photo(7, "a/b.png"), "x")
    assert ids.claim(Photo(8, "a/c.png"), "x") == "00008_c"
