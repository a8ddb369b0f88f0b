"""Our pixels are Skia's, which are the phone's: over shapes, EXIF notes, transparency and colour modes.

Skia's pixels are committed (`benchmarks/skia_pixels.py` makes them), so that the law runs everywhere; where Skia
imports it is asked itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rankwise.data.device import DeviceReader, DeviceTarget, changes, encoded, resize_for_device
from rankwise.data.images import ImageReader
from rankwise.data.pixels import BLACK
from rankwise.device.parity import pixels as side
from rankwise.device.parity.pixels import canvas_pixels, letterboxed, sha256_rgb, skia_pixels, unavailable
from rankwise.errors import DataError, UsageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DATA = Path(__file__).parents[1] / "data"
LIBWEBP = "rgba-soft.webp"  # libwebp multiplies colours by alpha itself, and rounds otherwise
PLAIN = ("255 × 256", "1 × 1", "3 × 500")  # shapes on which hardly any filter differs


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import skia_pixels as bench

    yield bench
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def pictures(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every picture as a file."""
    folder = tmp_path_factory.mktemp("pictures")
    found = {}
    for number, (name, content) in enumerate(bench.pictures()):
        found[name] = folder / f"{number:02d}"
        found[name].write_bytes(content)
    return found


@pytest.fixture(scope="module")
def committed() -> dict[str, np.ndarray]:
    with np.load(DATA / "skia_pixels.npz") as stored:
        return dict(stored)


def most(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_every_picture_is_within_a_grey_level_of_skias(
    bench: Any, pictures: dict[str, Path], committed: dict[str, np.ndarray]
) -> None:
    """By the reader of labels, training and evaluation, and by the function that is public."""
    assert set(pictures) == set(committed)
    assert len(pictures) >= 40
    folder = next(iter(pictures.values())).parent
    reader = DeviceReader(ImageReader(folder), DeviceTarget(image_size=bench.SMALL))
    found = {name: most(np.asarray(reader.open(path.name)), committed[name]) for name, path in pictures.items()}
    assert max(found.values()) <= 1, found
    for name, path in pictures.items():
        with Image.open(path) as picture:
            assert most(np.asarray(resize_for_device(picture, bench.SMALL)), committed[name]) <= 1, name


def test_the_law_tells_other_filters_notes_and_backgrounds(
    bench: Any, pictures: dict[str, Path], committed: dict[str, np.ndarray]
) -> None:
    """What a trainer without the contract does is off by much more: a law that nothing breaks says nothing."""
    for name, path in pictures.items():
        if name not in PLAIN:
            for resample in bench.OTHERS.values():
                found = most(bench.otherwise(path.read_bytes(), bench.SMALL, resample), committed[name])
                assert found > 1 or resample == Image.Resampling.BILINEAR, name
    reader = ImageReader(pictures["la.png"].parent)
    for name in ("rgba-soft.png", "rgba-hard.png", "rgba-soft.webp", "la.png", "palette-transparent.png"):
        white = resize_for_device(reader.open(pictures[name].name), bench.SMALL)
        assert most(np.asarray(white), committed[name]) > 200, name


def test_androids_canvas_is_reproduced_bit_by_bit(bench: Any, pictures: dict[str, Path]) -> None:
    known = json.loads((DATA / "skia_canvas.json").read_text())
    exact = {name: hashes for name, hashes in known["sha256_rgb"].items() if name != LIBWEBP}
    for name, hashes in exact.items():
        folder = pictures[name].parent
        picture = ImageReader(folder, background=BLACK).open(pictures[name].name)
        assert [sha256_rgb(canvas_pixels(picture, size)) for size in known["sizes"]] == hashes, name


def test_skia_itself_says_what_is_committed(
    bench: Any, pictures: dict[str, Path], committed: dict[str, np.ndarray]
) -> None:
    if unavailable():
        pytest.skip(unavailable())
    known = json.loads((DATA / "skia_canvas.json").read_text())
    for name, path in pictures.items():
        live = skia_pixels(path.read_bytes(), bench.SMALL)
        native = skia_pixels(path.read_bytes(), bench.SMALL, canvas=True)
        assert live is not None and native is not None
        assert most(live, committed[name]) <= 1, name
        assert sha256_rgb(native) == known["sha256_rgb"][name][0], name
        own = skia_pixels(path.read_bytes(), None)
        assert own is not None
        assert most(np.asarray(ImageReader(path.parent).open(path.name)), own) <= 1, f"{name} in its own size"


def test_what_skia_does_not_read_is_no_picture() -> None:
    if unavailable():
        pytest.skip(unavailable())
    assert skia_pixels(b"II*\0 not a picture", 64) is None


def test_where_skia_is_missing_its_system_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str) -> None:
        raise UsageError(f"{module} is not installed (libGL.so.1: cannot open shared object file)")

    monkeypatch.setattr(side, "need", missing)
    unavailable.cache_clear()
    try:
        assert "libGL.so.1" in unavailable() and "libgl1 libegl1" in unavailable()
    finally:
        unavailable.cache_clear()


def test_the_longest_side_is_set_and_not_computed() -> None:
    """Truncation alone gives 255 for one length in seven; Kotlin's Float computes as numpy's float32 does."""
    lengths = np.arange(1, 4097, dtype=np.float32)
    computed = (lengths * (np.float32(256) / lengths)).astype(int)
    assert 0.13 < (computed == 255).mean() < 0.15
    assert all(letterboxed(int(length), 1, 256)[2] == 256 for length in lengths[::97])
    assert letterboxed(3270, 1635, 256)[3] == 128  # 127 in double precision


def test_a_picture_that_the_device_passes_on_is_known(pictures: dict[str, Path]) -> None:
    assert not changes(_square("RGB"), 64)
    assert changes(_square("RGB"), 65) and changes(_square("RGBA"), 64)
    assert changes(pictures["exif-3.jpeg"].read_bytes(), 64)


def _square(mode: str) -> bytes:
    return encoded(Image.new(mode, (64, 64)), "PNG")


def test_pixels_without_a_known_white_are_refused() -> None:
    with pytest.raises(DataError, match="float pixels"):
        resize_for_device(Image.new("F", (9, 9)))


def test_the_table_is_that_of_the_rows(bench: Any) -> None:
    rows = json.loads((BENCHMARKS / "results" / "skia_pixels.json").read_text())["rows"]
    assert bench.table(rows) in (BENCHMARKS / "results" / "skia_pixels.md").read_text()
    assert max(row["ours"]["max"] for row in rows) <= 1
