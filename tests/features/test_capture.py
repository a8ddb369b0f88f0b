"""`rankwise features capture`: every picture's features, in order, resumable, and never of another picture."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from PIL import Image
from tiny import tiny_llama
from tiny_vision import drawn_image, tiny_qwen25vl, tiny_smolvlm
from torch import Tensor
from transformers import AutoImageProcessor

from rankwise import cli
from rankwise.data.depth.maps import image_grids
from rankwise.data.device import DeviceTarget, device_processor
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError
from rankwise.features import encoder
from rankwise.features.approximation import normalised, singular_values
from rankwise.features.cache import FeatureCache, open_cache
from rankwise.features.cache_writer import CacheWriter
from rankwise.features.dataset import split_of
from rankwise.features.pictures import open_pictures
from rankwise.files.atomic import read_object
from rankwise.models.depth.encoder import DepthSettings, write_depth
from rankwise.models.load import load_model, load_processor
from rankwise.models.vision_features import image_features

SIZES = [(64, 48), (40, 80), (56, 56), (90, 30), (64, 64), (33, 47), (70, 70)]
TOLD = {"capture.json", "index.json", "manifest.json", "resolved_config.json", ".rankwise.lock"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen25vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures of seven shapes, some in a folder below, and files that are no pictures."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        place = folder / "more" if number % 3 == 0 else folder
        drawn_image(number, size).save(place / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".thumbnail.png").write_bytes(b"hidden")
    return folder


NAMES = ("1.png", "2.png", "4.png", "5.png", "more/0.png", "more/3.png", "more/6.png")


def capture(images: Path | str, model: Path, out: Path, *more: str, code: int = 0) -> FeatureCache | None:
    words = ["features", "capture", str(images), "--model", str(model), "-o", str(out), "--device", "cpu", *more]
    assert cli.main(words) == code
    return open_cache(out) if code == 0 else None


def alone(
    model: Path, picture: Image.Image, prepare: Callable[[Any], Any] = lambda processor: processor
) -> list[Tensor]:
    """The features of one prepared picture, by the whole model."""
    sight = Sight(prepare(load_processor(str(model))), None)  # type: ignore[arg-type]
    with torch.no_grad():
        return image_features(load_model(str(model), torch.float32).eval(), sight.pixels([[picture]]))


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name not in TOLD}


def test_every_picture_in_name_order(qwen: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    cache = capture(photos, qwen, tmp_path / "c", "--image_size", "56", "--batch_size", "3", "--shard_size", "4")
    assert cache and cache.ids == NAMES and cache.grid == (2, 2) and (cache.tokens, cache.channels) == (4, 32)
    for place, name in enumerate(NAMES):
        (wanted,) = alone(qwen, Image.open(photos / name).resize((56, 56), Image.Resampling.BICUBIC))
        assert torch.allclose(cache[place], wanted, atol=1e-5)
    assert cache.model and cache.model.name == str(qwen) and cache.source == str(photos)
    index = read_object(tmp_path / "c" / "index.json")
    assert [row["rows"] for row in index["shards"]] == [4, 3]
    assert index["settings"]["stretched_to"] == 56 and index["settings"]["model_dtype"] == "float32"
    assert "features capture" in read_object(tmp_path / "c" / "manifest.json")["stages"]
    said = capsys.readouterr().out
    assert "captured 7 pictures: 7 matrices of 4 tokens (2 × 2 grid) × 32 channels" in said
    assert f"next: rankwise features train --features {tmp_path / 'c'}" in said


def test_tiles_are_matrices_of_their_picture(smolvlm: Path, photos: Path, tmp_path: Path) -> None:
    cache = capture(photos, smolvlm, tmp_path / "c", "--num_images", "2", "--cache_dtype", "float16")
    assert cache and cache.ids == tuple(f"{name}#{tile}" for name in NAMES[:2] for tile in range(5))
    assert cache.groups == tuple(group for group in cache.groups[::5] for _ in range(5)) and len(set(cache.groups)) == 2
    wanted = alone(smolvlm, Image.open(photos / NAMES[1]).resize((448, 448), Image.Resampling.BICUBIC))
    for tile in range(5):
        assert torch.allclose(cache[5 + tile].float(), wanted[tile], rtol=2e-3, atol=1e-3)


def test_a_model_for_a_device_sees_what_the_device_shows(smolvlm: Path, photos: Path, tmp_path: Path) -> None:
    model, target = tmp_path / "model", DeviceTarget(image_size=32)
    shutil.copytree(smolvlm, model)
    target.save(model)
    cache = capture(photos, model, tmp_path / "c")
    assert cache and len(cache) == 14  # a tile and the whole picture, as the runtime does it
    wanted = alone(model, target.resize(Image.open(photos / NAMES[3])), lambda one: device_processor(one, target))
    assert all(torch.allclose(cache[6 + tile], wanted[tile], atol=1e-5) for tile in range(2))
    stretched = capture(photos, model, tmp_path / "s", "--image_size", "32")
    assert stretched and len(stretched) == 5 * 7  # as asked, by the model's own processor


@pytest.mark.parametrize("edge", [32, 64])
def test_grids_count_the_tokens_of_a_device(smolvlm: Path, edge: int) -> None:
    processor = device_processor(load_processor(str(smolvlm)), DeviceTarget(image_size=64, longest_edge=edge))
    sight = Sight(processor, None)  # type: ignore[arg-type]
    for size in [(64, 64), (32, 32), (64, 20), (17, 60)]:
        pixels = sight.pixels([[drawn_image(0, size)]])["pixel_values"]
        laid = image_grids(processor, *size)
        assert len(laid) == pixels.shape[1] and laid[-1].box == (0.0, 0.0, 1.0, 1.0)
        assert len(laid) >= 2, "a tile at least, and the whole picture"


def test_native_pictures_must_give_equal_matrices(qwen: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    capture(photos, qwen, tmp_path / "c", "--native", code=3)
    assert "2.png gives 4 tokens, 1.png 3" in capsys.readouterr().err
    same = tmp_path / "same"
    same.mkdir()
    for number in range(3):
        drawn_image(number, (84, 56)).save(same / f"{number}.png")
    cache = capture(same, qwen, tmp_path / "n", "--native")
    assert cache and cache.grid == (2, 3)
    assert torch.allclose(cache[2], alone(qwen, drawn_image(2, (84, 56)))[0], atol=1e-5)


def test_equal_pictures_are_one_group_and_in_one_part(qwen: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "2.png", photos / "more" / "again.png")
    Image.open(photos / "2.png").save(photos / "2 as.bmp")
    cache = capture(photos, qwen, tmp_path / "c")
    assert cache
    equal = {cache.ids.index(name) for name in ("2.png", "more/again.png", "2 as.bmp")}
    assert len({cache.groups[place] for place in equal}) == 1 and len(set(cache.groups)) == 7
    for seed in range(8):
        split = split_of(cache, seed)
        assert sum(equal <= set(part) for part in (split.train, split.val, split.test)) == 1


def test_what_was_killed_between_shards_goes_on(
    qwen: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ("--shard_size", "2", "--image_size", "56")
    capture(photos, qwen, tmp_path / "straight", *options)
    write, calls = CacheWriter.write, []

    def killed(self: CacheWriter, shard: int, matrices: Any) -> Path:
        if calls:
            raise KeyboardInterrupt
        calls.append(shard)
        return write(self, shard, matrices)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", killed)
        capture(photos, qwen, tmp_path / "c", *options, code=130)
    assert list(shard_bytes(tmp_path / "c")) == ["features-00000.safetensors"]
    first = (tmp_path / "c" / "features-00000.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    capture(photos, qwen, tmp_path / "c", *options)
    assert "1 shard of 4 were there already" in capsys.readouterr().out
    assert (tmp_path / "c" / "features-00000.safetensors").stat().st_mtime_ns == first, "not made again"
    assert shard_bytes(tmp_path / "c") == shard_bytes(tmp_path / "straight")
    indices = [(tmp_path / name / "index.json").read_bytes() for name in ("c", "straight")]
    assert indices[0] == indices[1]

    def not_needed(*_: Any) -> None:
        raise AssertionError("a complete capture needs no model")

    monkeypatch.setattr(encoder, "load_vision_side", not_needed)
    capture(photos, qwen, tmp_path / "c", *options)


def test_a_damaged_shard_is_named_and_made_again(qwen: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("--shard_size", "2", "--image_size", "56")
    capture(photos, qwen, tmp_path / "c", *options)
    before = shard_bytes(tmp_path / "c")
    file = tmp_path / "c" / "features-00002.safetensors"
    for content in (file.read_bytes()[:-9], b"\0" * 40, file.read_bytes()[:-1] + b"?"):
        file.write_bytes(content)
        capsys.readouterr()
        capture(photos, qwen, tmp_path / "c", *options, code=3)
        assert "features-00002.safetensors" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(DataError, match=r"features-00002.safetensors is missing"):
        open_cache(tmp_path / "c")
    capture(photos, qwen, tmp_path / "c", *options)
    assert shard_bytes(tmp_path / "c") == before


def test_another_capture_does_not_mix_in(qwen: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    capture(photos, qwen, tmp_path / "c", "--image_size", "56")
    for more, told in (
        (["--image_size", "28"], "stretched_to: 56 → 28"),
        (["--image_size", "56", "--num_images", "3"], "pictures"),
    ):
        capture(photos, qwen, tmp_path / "c", *more, code=2)
        assert told in capsys.readouterr().err
    drawn_image(50, (64, 48)).save(photos / "1.png")
    capture(photos, qwen, tmp_path / "c", "--image_size", "56", code=2)
    assert "pictures" in capsys.readouterr().err
    cache = capture(photos, qwen, tmp_path / "c", "--image_size", "28", "--overwrite")
    assert cache and cache.tokens == 1
    same = capture(photos, qwen, tmp_path / "c", "--image_size", "28", "--batch_size", "1")  # memory, not content
    assert same and same.fingerprint == cache.fingerprint


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_picture_that_cannot_be_read(
    qwen: Path, photos: Path, tmp_path: Path, capsys: Any, content: bytes | None
) -> None:
    whole = (photos / "4.png").read_bytes()
    (photos / "4.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    capture(photos, qwen, tmp_path / "c", code=3)
    said = capsys.readouterr().err
    assert "4.png" in said and "--skip_bad" in said
    assert not (tmp_path / "c" / "index.json").exists()
    cache = capture(photos, qwen, tmp_path / "c", "--skip_bad")
    assert cache and cache.ids == tuple(name for name in NAMES if name != "4.png")
    assert [name for name, _ in cache.left_out] == ["4.png"]
    assert "left out: 4.png: " in capsys.readouterr().out


def test_a_picture_outside_the_folder_is_refused(qwen: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    drawn_image(9).save(tmp_path / "secret.png")
    (photos / "link.png").symlink_to(tmp_path / "secret.png")
    capture(photos, qwen, tmp_path / "c", code=3)
    assert "link.png leads out of the image folder" in capsys.readouterr().err


def png(number: int) -> bytes:
    stream = io.BytesIO()
    drawn_image(number, (64, 48)).save(stream, "PNG")
    return stream.getvalue()


def test_pictures_of_a_parquet_file(qwen: Path, tmp_path: Path, capsys: Any) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": png(number), "path": f"{min(number, 2)}.png"} for number in range(4)]
    table = arrow.table({"text": ["a", "b", "c", "d"], "image": rows})
    parquet.write_table(table, tmp_path / "some.parquet", row_group_size=3)
    cache = capture(tmp_path / "some.parquet", qwen, tmp_path / "c", "--batch_size", "1", "--image_size", "56")
    assert cache and cache.ids == ("0.png", "1.png", "some-000002", "some-000003")
    (wanted,) = alone(qwen, drawn_image(3, (64, 48)).resize((56, 56), Image.Resampling.BICUBIC))
    assert torch.allclose(cache[3], wanted, atol=1e-5)
    bad = arrow.table({"picture": [png(0), b"none", None]})
    parquet.write_table(bad, tmp_path / "bad.parquet")
    capture(tmp_path / "bad.parquet", qwen, tmp_path / "b", code=3)
    assert "row 1 of" in capsys.readouterr().err
    left = capture(tmp_path / "bad.parquet", qwen, tmp_path / "b", "--skip_bad")
    assert left and left.ids == ("bad-000000",) and len(left.left_out) == 2
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "some.parquet").read_bytes()[:-30])
    for name, told in (("text", "no column of images; it has text"), ("cut", "not a sound parquet file")):
        capture(tmp_path / f"{name}.parquet", qwen, tmp_path / name, code=3)
        assert told in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pictures_of_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(3)], "label": [0, 1, 2]}
    one = datasets.Dataset.from_dict(rows, features=features)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(str(tmp_path / "two"))
    found = open_pictures(str(tmp_path / "one"))
    assert list(found.names) == ["one-000000", "one-000001", "one-000002"]
    assert found.open(2).tobytes() == drawn_image(2, (64, 48)).tobytes()
    assert found.digest(3) == open_pictures(str(tmp_path / "one")).digest(3) != found.digest(2)
    with pytest.raises(DataError, match=r"which split\? .*two:train, .*two:test"):
        open_pictures(str(tmp_path / "two"))
    test = open_pictures(f"{tmp_path / 'two'}:test")
    assert len(test.names) == 1 and test.open(0).tobytes() == drawn_image(2, (64, 48)).tobytes()


def test_matrices_with_a_known_spectrum(tmp_path: Path, capsys: Any) -> None:
    words = ["--tokens", "16", "--channels", "48", "--spectrum", "exp:0.2", "--shard_size", "3"]
    assert cli.main(["features", "extract", "--synthetic", "7", *words, "-o", str(tmp_path / "c")]) == 0
    assert "next: rankwise features train" in capsys.readouterr().out
    cache = open_cache(tmp_path / "c")
    assert len(cache) == 7 and cache.model is None and cache.grid == (4, 4) and cache.spectrum
    known = torch.tensor(cache.spectrum, dtype=torch.float64)
    for place in (0, 6):
        assert torch.allclose(singular_values(normalised(cache[place])), known, atol=1e-5 * float(known[0]))
    split_of(cache, 0)
    assert cli.main(["features", "capture", "--synthetic", "8", *words, "-o", str(tmp_path / "c")]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needs IMAGES and --model, or --synthetic"),
        (["photos"], "needs IMAGES and --model"),
        (["photos", "--synthetic", "3"], "needs no model"),
        (["photos", "--model", "m", "--native", "--image_size", "56"], "give one of them"),
        (["photos", "--model", "m", "--shard_size", "0"], "--shard_size is 0; give a number of at least 1"),
        (["--synthetic", "2", "--channels", "20"], "needs 39 channels"),
    ],
)
def test_combinations_that_cannot_work(words: list[str], told: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["features", "capture", *words, "-o", str(tmp_path / "c")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "c" / "capture.json").exists()


def test_models_and_folders_that_are_none(qwen: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    adapter, text, deep = tmp_path / "adapter", tiny_llama(tmp_path / "text"), tmp_path / "deep"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text("{}")
    shutil.copytree(qwen, deep)
    write_depth(deep, DepthSettings())
    for images, model, code, told in (
        (empty, qwen, 3, "no images in it"),
        (photos / "1.png", qwen, 3, "a folder of images, a parquet file or a data set is expected"),
        (photos, empty, 3, "no config.json"),
        (photos, adapter, 2, "is an adapter"),
        (photos, text, 2, "is a text model"),
        (photos, deep, 2, "adds depth"),
    ):
        capture(images, model, tmp_path / "c", code=code)
        assert told in capsys.readouterr().err


def test_what_a_dry_run_says(qwen: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["features", "capture", str(photos), "--model", str(qwen), "--dry-run"]) == 0
    assert f"show all pictures in {photos} to {qwen}, stretched to 448 × 448" in capsys.readouterr().out
    assert cli.main(["features", "capture", "--synthetic", "4", "--dry-run"]) == 0
    assert "make 4 matrices of 256 × 2048 with spectrum power:0.7" in capsys.readouterr().out


def test_real_photos_and_the_real_processor(shared_data: Path, tmp_path: Path) -> None:
    """448 pixels → 32 × 32 patches → 16 × 16 tokens, with the released model's processor and a tiny tower."""
    model = tiny_qwen25vl(tmp_path / "model")
    processor = load_processor(str(model))
    real = shared_data / "model_configs" / "Qwen2.5-VL-3B-Instruct"
    processor.image_processor = AutoImageProcessor.from_pretrained(real)
    processor.save_pretrained(model)
    folder = shared_data / "coco" / "tiny_coco"
    cache = capture(folder, model, tmp_path / "c", "--num_images", "4")
    assert cache and (cache.tokens, cache.channels, cache.grid) == (256, 32, (16, 16)) and len(set(cache.groups)) == 4
    photo = Image.open(folder / cache.ids[2]).convert("RGB").resize((448, 448), Image.Resampling.BICUBIC)
    assert torch.allclose(cache[2], alone(model, photo)[0], atol=1e-4)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(qwen: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--shard_size", "2", "--image_size", "56"]
    words = ["-m", "rankwise.cli", "features", "capture", str(photos), "--model", str(qwen), "--device", "cpu"]
    capture(photos, qwen, tmp_path / "one", *options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = processes.run(*torchrun, *words, *options, "-o", tmp_path / "two", env={"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout.count("captured 7 pictures") == 1, "one process speaks"
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert (tmp_path / "one" / "index.json").read_bytes() == (tmp_path / "two" / "index.json").read_bytes()
    (photos / "more" / "6.png").write_bytes(b"")  # in the last shard: one process fails, and all of them end
    failed = processes.run(*words, *options, "-o", tmp_path / "three", count=2)
    assert failed.returncode != 0 and "more/6.png" in failed.stderr
    assert not (tmp_path / "three" / "index.json").exists()
