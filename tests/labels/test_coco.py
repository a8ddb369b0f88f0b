"""COCO's layout and any folder are found, selections are fair and depend on the seed alone, downloads are checked."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rankwise.data.images import ImageReader
from rankwise.data.sources import official as archives
from rankwise.data.sources import official as download
from rankwise.data.sources.official import Download
from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.labels import images as coco
from rankwise.labels.dataset import held_out_groups
from rankwise.labels.images import Photo, download_coco, drawn_order, find_images, select, shares
from rankwise.options.label import LabelConfig

CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 9, "name": "boat", "supercategory": "vehicle"},
    {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
]


def annotation(image: int, category: int, area: float | None, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, **({} if area is None else {"area": area}), **more}


def content(count: int = 4) -> dict[str, Any]:
    """Image 1: a person larger than the boat; 2: two boats larger together than the person; 3: by bbox; 4: nothing."""
    return {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "width": 8, "height": 8} for n in range(count, 0, -1)],
        "annotations": [
            *(annotation(1, 1, 30.0), annotation(1, 9, 20)),
            *(annotation(2, 9, 20.5), annotation(2, 1, 30), annotation(2, 9, 20.5, iscrowd=1)),
            annotation(3, 90, None, bbox=[1.0, 1.0, 4.0, 2.5]),
        ],
        "categories": [dict(row) for row in CATEGORIES],
    }


def official(folder: Path, listed: dict[str, Any], *, images: str = "val2017", kind: str = "instances") -> Path:
    """A folder in the official layout, with a picture for every image that is listed."""
    for row in listed["images"]:
        file = folder / images / row["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (row["id"], 0, 0)).save(file)
    file = folder / "annotations" / f"{kind}_{Path(images).name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(listed))
    return file


# --- what is there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "kind"),
    [("val2017", "instances"), ("images/val2017", "person_keypoints"), ("train2017", "instances")],
)
def test_the_official_layouts(tmp_path: Path, images: str, kind: str) -> None:
    file = official(tmp_path, content(), images=images, kind=kind)
    found = find_images(tmp_path)
    assert (found.folder, found.annotations, found.unlisted) == (tmp_path / images, file, 0)
    assert [photo.id for photo in found.photos] == [f"{n - 1:05d}_{n:012d}" for n in (1, 2, 3, 4)]
    assert [photo.strata for photo in found.photos] == [
        ("person", "person"),
        ("vehicle", "boat"),
        ("indoor", "toothbrush"),
        ("", ""),
    ]
    assert ImageReader(found.folder).size(found.photos[1].reference) == (8, 8)


def test_the_split_can_be_chosen_and_val_comes_first(tmp_path: Path) -> None:
    official(tmp_path, content(3), images="train2017")
    official(tmp_path, content(4))
    assert len(find_images(tmp_path).photos) == 4
    assert len(find_images(tmp_path, "train2017").photos) == 3
    with pytest.raises(DataError, match="no folder test2017"):
        find_images(tmp_path, "test2017")


def test_images_beside_the_listed_ones_are_counted(tmp_path: Path) -> None:
    official(tmp_path, content())
    Image.new("RGB", (8, 8)).save(tmp_path / "val2017" / "extra.png")
    (tmp_path / "val2017" / "notes.txt").write_text("x")
    assert find_images(tmp_path).unlisted == 1


def test_any_folder_of_images(tmp_path: Path) -> None:
    for name in ("b/two words.JPG", "a.png", "b/c/ü.webp", ".hidden/x.png", ".y.png", "notes.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    found = find_images(tmp_path)
    assert [photo.reference for photo in found.photos] == ["a.png", "b/c/ü.webp", "b/two words.JPG"]
    assert [photo.id for photo in found.photos] == ["00000_a", "00001_ü", "00002_two_words"]
    assert found.annotations is None and {photo.strata for photo in found.photos} == {()}


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        find_images(tmp_path / "nowhere")


# --- broken annotations ---------------------------------------------------------------------------------------------


def images(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda whole: change(whole["images"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda whole: whole.pop("images"), "images: expected a list of objects"),
        (lambda whole: whole.update(images=[]), "lists no images"),
        (lambda whole: whole.update(annotations=[3]), "annotations: expected a list of objects"),
        (lambda whole: whole["annotations"][1].update(category_id=8), r"annotations\[1\]: no category has the id 8"),
        (lambda whole: whole["annotations"][1].update(area="big"), r"annotations\[1\]: area must be a number"),
        (lambda whole: whole["annotations"][5].pop("bbox"), r"annotations\[5\]: area must be a number"),
        (lambda whole: whole["annotations"][0].pop("image_id"), r"annotations\[0\]: image_id must be a whole number"),
        (lambda whole: whole["categories"][2].pop("name"), r"categories\[2\]: name must be a text"),
        (images(lambda rows: rows[0].update(file_name="")), r"images\[0\]: file_name must be a text"),
        (images(lambda rows: rows[0].update(id="1")), r"images\[0\]: id must be a whole number"),
        (images(lambda rows: rows[0].update(id=2)), "images: id 2 appears twice"),
        (
            images(lambda rows: rows.append({**rows[1], "id": 9})),
            r"images: file_name '000000000003\.jpg' appears twice",
        ),
        (images(lambda rows: rows[0].update(file_name="../x.jpg")), r"file_name '\.\./x\.jpg' leads out"),
        (images(lambda rows: rows[0].update(file_name="/etc/x.jpg")), "leads out of the image folder"),
    ],
)
def test_a_broken_annotation_file_is_named_with_the_place(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    whole = content()
    file = official(tmp_path, whole)
    spoil(whole)
    file.write_text(json.dumps(whole))
    with pytest.raises(DataError, match=message) as error:
        find_images(tmp_path)
    assert str(file) in str(error.value) and error.value.exit_code == 3


def test_annotations_that_are_not_json(tmp_path: Path) -> None:
    file = official(tmp_path, content())
    file.write_text(file.read_text()[:-20])
    with pytest.raises(DataError, match=r"instances_val2017\.json, line 1, column \d+: not JSON"):
        find_images(tmp_path)


def test_images_that_are_listed_but_missing_are_named(tmp_path: Path) -> None:
    official(tmp_path, content())
    for n in (2, 4):
        (tmp_path / "val2017" / f"{n:012d}.jpg").unlink()
    with pytest.raises(
        DataError, match=r"lists 4 images, 2 of them are not in .*: 000000000002\.jpg, 000000000004\.jpg;"
    ):
        find_images(tmp_path)
    assert len(find_images(tmp_path / "val2017").photos) == 2, "the folder itself is used as it is"


# --- selection ----------------------------------------------------------------------------------------------------

PHOTOS = [
    Photo(
        n, f"{n}.jpg", ("vehicle", "car" if n % 3 else "bus") if n < 60 else ("animal", "cat") if n < 99 else ("", "")
    )
    for n in range(100)
]


def test_strata_get_their_shares() -> None:
    chosen = select(PHOTOS, 20, seed=1)
    assert Counter(photo.strata[0] for photo in chosen) == {"vehicle": 12, "animal": 8}
    assert Counter(photo.strata[1] for photo in chosen) == {"car": 8, "bus": 4, "cat": 8}
    assert len({photo.id for photo in chosen}) == 20


def test_the_selection_depends_on_the_seed_and_on_no_order() -> None:
    shuffled = random.Random(0).sample(PHOTOS, 100)
    assert select(PHOTOS, 30, seed=7) == select(shuffled, 30, seed=7)
    assert select(PHOTOS, 30, seed=7) != select(PHOTOS, 30, seed=8)
    assert [photo.strata for photo in select(PHOTOS, 30, seed=7)] != sorted(p.strata for p in select(PHOTOS, 30, 7))


def test_a_larger_selection_keeps_nearly_all_of_a_smaller_one() -> None:
    """Ids, and what has been paid for, stay of use when somebody asks for more images."""
    small, large = set(select(PHOTOS, 30, seed=3)), set(select(PHOTOS, 60, seed=3))
    assert len(small & large) >= 28


def test_all_are_selected_where_there_are_fewer() -> None:
    assert set(select(PHOTOS, 1000, 1)) == set(select(PHOTOS, None, 1)) == set(PHOTOS)
    with pytest.raises(UsageError, match="--num_images is 0; give a number of at least 1"):
        LabelConfig(num_images=0)


names = st.text("abcdefgh", min_size=1, max_size=2)


@given(st.dictionaries(names, st.integers(1, 50), min_size=1), st.data())
def test_shares_are_the_largest_remainders(sizes: dict[str, int], data: st.DataObject) -> None:
    whole = sum(sizes.values())
    total = data.draw(st.integers(0, whole))
    given_out = shares(sizes, total)
    assert sum(given_out.values()) == total
    exact = {name: total * size / whole for name, size in sizes.items()}
    assert all(abs(given_out[name] - exact[name]) < 1 and given_out[name] <= sizes[name] for name in sizes)
    rounded_up = [exact[name] % 1 for name in sizes if given_out[name] > exact[name]]
    rounded_down = [exact[name] % 1 for name in sizes if given_out[name] < exact[name]]
    assert not rounded_up or not rounded_down or min(rounded_up) >= max(rounded_down) - 1e-9


@given(st.dictionaries(st.text(min_size=1), st.sampled_from("abc"), min_size=1), st.floats(0.01, 0.99), st.integers())
def test_every_stratum_with_two_groups_is_on_both_sides(strata: dict[str, str], fraction: float, seed: int) -> None:
    held_out = held_out_groups(strata, fraction, seed)
    for stratum, size in Counter(strata.values()).items():
        inside = sum(strata[group] == stratum for group in held_out)
        assert (0 < inside < size) if size > 1 else inside == 0
    assert held_out == held_out_groups(dict(reversed(strata.items())), fraction, seed)
    assert held_out_groups(strata, 0, seed) == set()


def test_a_draw_does_not_depend_on_what_else_is_there() -> None:
    many = drawn_order([str(n) for n in range(100)], 5)
    assert drawn_order([str(n) for n in range(50)], 5) == [name for name in many if int(name) < 50]


# --- download -----------------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Site:
    folder: Path
    url: str


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder that a server on this machine shows as COCO's site."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "WAIT", 0.0)
    yield Site(folder, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    thread.join()


def publish(site: Site, monkeypatch: pytest.MonkeyPatch, name: str, attribute: str, members: dict[str, bytes]) -> None:
    """Put a zip onto the site and let it be the official one."""
    with zipfile.ZipFile(site.folder / name, "w") as file:
        for member, body in members.items():
            file.writestr(member, body)
    body = (site.folder / name).read_bytes()
    monkeypatch.setattr(coco, attribute, Download(f"{site.url}/{name}", hashlib.sha256(body).hexdigest(), len(body)))


def publish_all(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **extra: bytes) -> None:
    listed = official(tmp_path / "source", content())
    pictures = {f"val2017/{file.name}": file.read_bytes() for file in (tmp_path / "source" / "val2017").iterdir()}
    captions = {"annotations/captions_val2017.json": b"{}"}
    publish(
        *(site, monkeypatch, "annotations_trainval2017.zip", "ANNOTATIONS"),
        {"annotations/instances_val2017.json": listed.read_bytes(), **captions},
    )
    publish(site, monkeypatch, "val2017.zip", "IMAGES", {"val2017/": b"", **pictures, **extra})


def test_a_download_gives_the_official_layout(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish_all(site, monkeypatch, tmp_path)
    data = tmp_path / "data"
    found = find_images(download_coco(data))
    assert found.annotations == data / "annotations" / "instances_val2017.json"
    assert [photo.reference for photo in found.photos] == [f"{n:012d}.jpg" for n in (1, 2, 3, 4)]
    assert sorted(file.name for file in (data / "val2017").iterdir()) == [photo.reference for photo in found.photos]
    for file in site.folder.iterdir():
        file.unlink()
    for file in data.glob("*.zip"):
        file.unlink()
    assert download_coco(data) == data, "what is there is not fetched again"


def test_a_cut_download_is_finished_by_the_next_run(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish_all(site, monkeypatch, tmp_path)
    whole = (site.folder / "val2017.zip").read_bytes()
    (site.folder / "val2017.zip").write_bytes(whole[:400])
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    data = tmp_path / "data"
    with pytest.raises(ServiceError, match=r"val2017\.zip could not be fetched .*400 of"):
        download_coco(data)
    assert not (data / "val2017").exists() and (data / "annotations" / "instances_val2017.json").is_file()
    (site.folder / "val2017.zip").write_bytes(whole)
    (site.folder / "annotations_trainval2017.zip").unlink()
    assert len(find_images(download_coco(data)).photos) == 4


def test_other_bytes_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish_all(site, monkeypatch, tmp_path)
    body = bytearray((site.folder / "val2017.zip").read_bytes())
    body[60] ^= 1
    (site.folder / "val2017.zip").write_bytes(body)
    with pytest.raises(DataError, match=r"has not the checksum of the official val2017\.zip"):
        download_coco(tmp_path / "data")
    left = [file.name for file in (tmp_path / "data").iterdir() if file.suffix != ".lock"]
    assert sorted(left) == ["annotations", "annotations_trainval2017.zip"]


def test_an_archive_that_leads_outside_is_refused_whole(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish_all(site, monkeypatch, tmp_path, **{"../evil.jpg": b"x"})
    with pytest.raises(DataError, match=r"'\.\./evil\.jpg' leads outside"):
        download_coco(tmp_path / "data")
    assert not (tmp_path / "evil.jpg").exists() and not (tmp_path / "data" / "val2017").exists()


def test_a_bomb_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish_all(site, monkeypatch, tmp_path)
    monkeypatch.setattr(archives, "LARGEST", 100)
    with pytest.raises(DataError, match="would unpack to more than"):
        download_coco(tmp_path / "data")
    assert not (tmp_path / "data" / "annotations").exists()


def test_the_official_files_fit_the_limits_of_unpacking() -> None:
    assert coco.IMAGES.name == "val2017.zip" and coco.ANNOTATIONS.name == "annotations_trainval2017.zip"
    assert all(len(each.sha256) == 64 and each.size * 4 < archives.LARGEST for each in (coco.IMAGES, coco.ANNOTATIONS))
    assert archives.MOST_MEMBERS > 5001, "val2017.zip holds 5,000 images and their folder"


# --- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "count", "without"),
    [
        ("tiny_coco", None, 50, 1),
        ("pose_minicoco", None, 30, 10),
        ("pose_minicoco", "train2017", 30, 11),
    ],
)
def test_real_coco(shared_data: Path, name: str, split: str | None, count: int, without: int) -> None:
    found = find_images(shared_data / "coco" / name, split)
    assert (len(found.photos), found.unlisted) == (count, 0)
    assert sum(photo.strata == ("", "") for photo in found.photos) == without
    chosen = select(found.photos, 12, seed=42)
    assert chosen == select(tuple(reversed(found.photos)), 12, seed=42)
    reader = ImageReader(found.folder)
    assert all(min(reader.open(photo.reference).size) > 100 for photo in chosen)


def test_real_strata_are_what_fills_the_picture(shared_data: Path) -> None:
    """The largest category, counted in another way, of every image of tiny_coco."""
    found = find_images(shared_data / "coco" / "tiny_coco")
    assert found.annotations is not None
    whole = json.loads(found.annotations.read_text())
    names = {row["id"]: row["name"] for row in whole["categories"]}
    keys = {row["file_name"]: row["id"] for row in whole["images"]}
    for photo in found.photos:
        own = [row for row in whole["annotations"] if row["image_id"] == keys[photo.reference]]
        totals = {name: sum(row["area"] for row in own if names[row["category_id"]] == name) for name in names.values()}
        assert photo.strata[1] == (max(totals, key=totals.__getitem__) if own else "")
