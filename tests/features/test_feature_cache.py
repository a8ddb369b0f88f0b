"""Laws of the feature cache: what is written is read, whole or not at all; splits keep a picture together; spectra that
are said to be known are those that are measured."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import DataError, UsageError
from rankwise.features import cache_writer
from rankwise.features.approximation import best_errors, normalised, shared_basis, singular_values
from rankwise.features.cache import FeatureCache, ModelOrigin, content_fingerprint, open_cache
from rankwise.features.cache_writer import CacheRecipe, CacheWriter, Matrices
from rankwise.features.dataset import SPLIT, FeatureRows, collate, read_split, split_of
from rankwise.features.synthetic import Synthetic, even_rows
from rankwise.files.atomic import read_object, write_json
from rankwise.options.features import CaptureConfig

TOKENS, CHANNELS = 4, 6
ORIGIN = ModelOrigin("some/model", "f" * 64)


def shard(number: int, rows: int = 3) -> Matrices:
    features = torch.randn(rows, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(number))
    names = tuple(f"{number}-{row}.jpg" for row in range(rows))
    return Matrices(features, names, tuple(f"picture of {name}" for name in names), (2, 2))


def recipe(**changes: Any) -> CacheRecipe:
    given = {"shards": 3, "dtype": "float32", "model": ORIGIN, "pictures": "abc", "settings": {"side": 448}}
    return CacheRecipe(**{**given, "source": "photos", **changes})


def written(folder: Path, **changes: Any) -> FeatureCache:
    made = recipe(**changes)
    return cache_writer.write_cache(folder, made, [shard(number) for number in range(made.shards)])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    cache = written(tmp_path / "cache", dtype=dtype)
    assert (cache.tokens, cache.channels, cache.grid) == (TOKENS, CHANNELS, (2, 2))
    assert (cache.model, cache.source, cache.spectrum) == (ORIGIN, "photos", None)
    assert len(cache) == 9 and cache.ids[4] == "1-1.jpg" and cache.groups[4] == "picture of 1-1.jpg"
    together = torch.cat([shard(number).features for number in range(3)])  # type: ignore[misc]
    for place in (8, 0, 4):
        assert cache[place].dtype == getattr(torch, dtype)
        assert torch.equal(cache[place], together[place].to(getattr(torch, dtype)))
    with pytest.raises(IndexError, match="no number 9"):
        cache[9]
    assert cache.ids.index("1-1.jpg") == 4


def test_a_cache_crosses_to_worker_processes(tmp_path: Path) -> None:
    cache = written(tmp_path / "cache")
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again[5], cache[5])


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, same = written(tmp_path / "one"), written(tmp_path / "other" / "place", source="elsewhere")
    assert one.fingerprint == same.fingerprint
    index = read_object(tmp_path / "one" / "index.json")
    for name, value in (("ids", index["ids"][::-1]), ("tokens", 5), ("groups", ["x"] * 9)):
        assert content_fingerprint({**index, name: value}) != one.fingerprint


@pytest.mark.parametrize("stopped_after", [0, 1, 2])
def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, stopped_after: int) -> None:
    straight = written(tmp_path / "straight")
    first = CacheWriter(tmp_path / "stopped", recipe())
    first.begin()
    for number in range(stopped_after):
        first.write(number, shard(number))
    with pytest.raises(DataError, match=r"has not finished \(index.json is missing\)"):
        open_cache(tmp_path / "stopped")
    again = CacheWriter(tmp_path / "stopped", recipe(source="moved"))
    again.begin()
    assert again.missing() == list(range(stopped_after, 3))
    for number in again.missing():
        again.write(number, shard(number))
    assert again.finish().fingerprint == straight.fingerprint
    told = {"capture.json", "index.json"}  # they name the source
    before, after = contents(tmp_path / "straight"), contents(tmp_path / "stopped")
    assert {name: before[name] for name in before if name not in told} == {
        name: after[name] for name in after if name not in told
    }


def test_a_shard_without_its_last_byte_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(tensors: dict[str, Tensor], path: str, **options: Any) -> None:
        save_file(tensors, path, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:-1])
        raise KeyboardInterrupt

    made = CacheWriter(tmp_path, recipe())
    made.begin()
    monkeypatch.setattr(cache_writer, "save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        made.write(0, shard(0))
    assert [file.name for file in tmp_path.iterdir()] == ["capture.json"]
    killed = tmp_path / ".features-00000.abcd.tmp.safetensors"  # what kill -9 leaves
    killed.write_bytes(b"half")
    CacheWriter(tmp_path, recipe()).begin()
    assert not killed.exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"settings": {"side": 224}}, "settings.side: 448 → 224"),
        ({"pictures": "other"}, "pictures"),
        ({"model": ModelOrigin("some/model", "0" * 64)}, "model.fingerprint"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_features_made_otherwise_are_not_mixed(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    made = CacheWriter(tmp_path, recipe())
    made.begin()
    CacheWriter(tmp_path, recipe(**changed)).begin()  # nothing is there yet
    made.begin()
    made.write(0, shard(0))
    with pytest.raises(UsageError, match=told):
        CacheWriter(tmp_path, recipe(**changed)).begin()


def test_a_shard_of_another_capture_is_named(tmp_path: Path) -> None:
    written(tmp_path / "one")
    made = CacheWriter(tmp_path / "two", recipe(pictures="other"))
    made.begin()
    (tmp_path / "one" / "features-00001.safetensors").rename(made.file(1))
    with pytest.raises(DataError, match=r"two/features-00001.safetensors: not a shard of this capture"):
        made.missing()


def test_only_our_own_files_are_replaced(tmp_path: Path) -> None:
    written(tmp_path / "cache")
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    earlier = cache_writer.replaceable(tmp_path / "cache")
    earlier.take()
    earlier.drop()
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["notes.txt"]
    (tmp_path / "cache" / "features-00000.safetensors").write_bytes(b"someone's")
    with pytest.raises(UsageError, match=r"there is no capture.json"):
        cache_writer.replaceable(tmp_path / "cache")
    with pytest.raises(UsageError, match="features of unknown origin"):
        CacheWriter(tmp_path / "cache", recipe()).begin()


def test_numbers_that_the_precision_on_disk_does_not_have_are_refused(tmp_path: Path) -> None:
    """float16 ends at 65,504: what is beyond would be written as infinity."""
    large = torch.ones(2, 4, 6)
    large[1, 2, 3] = 1e5
    for dtype, refused in (("float16", True), ("bfloat16", False)):
        made = CacheWriter(tmp_path / dtype, recipe(shards=1, dtype=dtype))
        made.begin()
        shard = Matrices(large, ("a.png", "b.png"), ("a", "b"))
        if refused:
            with pytest.raises(DataError, match=r"b\.png: features exceed the range of float16"):
                made.write(0, shard)
            assert not made.file(0).exists()
        else:
            made.write(0, shard)


def damage(folder: Path, how: str) -> Path:
    file = folder / "features-00001.safetensors"
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-5])
    else:
        content[-3] ^= 1
        file.write_bytes(content)
    return file


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_missing_or_cut_shard_is_named_at_once(tmp_path: Path, how: str) -> None:
    written(tmp_path / "cache")
    file = damage(tmp_path / "cache", how)
    with pytest.raises(DataError, match=file.name):
        open_cache(tmp_path / "cache")


def test_an_altered_shard_is_named_when_it_is_read(tmp_path: Path) -> None:
    written(tmp_path / "cache")
    damage(tmp_path / "cache", "altered")
    cache = open_cache(tmp_path / "cache")
    assert torch.equal(cache[0], shard(0).features[0])  # type: ignore[index]
    with pytest.raises(DataError, match=r"features-00001.safetensors: its content has changed"):
        cache[3]
    with pytest.raises(DataError, match=r"features-00001.safetensors: its content has changed"):
        CacheWriter(tmp_path / "cache", recipe()).missing()


def test_matrices_of_a_cache_have_one_shape(tmp_path: Path) -> None:
    wide = Matrices(torch.zeros(1, TOKENS + 1, CHANNELS), ("wide.jpg",), ("g",))
    with pytest.raises(DataError, match=r"\(5, 6\) \(wide.jpg\), \(4, 6\) \(0-0.jpg\)"):
        cache_writer.write_cache(tmp_path, recipe(shards=2), [shard(0), wide])


def test_a_shard_whose_pictures_were_all_left_out(tmp_path: Path) -> None:
    nothing = Matrices(None, (), (), left_out=(("broken.jpg", "is empty"),))
    cache = cache_writer.write_cache(tmp_path / "some", recipe(shards=2), [nothing, shard(1)])
    assert len(cache) == 3 and cache.left_out == (("broken.jpg", "is empty"),) and cache.grid == (2, 2)
    with pytest.raises(DataError, match="no usable image"):
        cache_writer.write_cache(tmp_path / "none", recipe(shards=1), [nothing])


SHARD = {"file": "features-00000.safetensors", "rows": 3, "sha256": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other/1"},
        {"ids": ["a"]},
        {"shards": 3},
        {"model": "x"},
        {"tokens": str(TOKENS)},
        {"tokens": 0},
        {"shards": [SHARD], "ids": ["a", "b", "c"], "groups": ["a", "b", "c"]},  # without its size
    ],
)
def test_an_index_that_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path)
    write_json(tmp_path / "index.json", {**read_object(tmp_path / "index.json"), **change})
    with pytest.raises(DataError, match=r"index\.json"):
        open_cache(tmp_path)


def test_an_index_with_more_rows_than_a_shard_has(tmp_path: Path) -> None:
    written(tmp_path)
    index = read_object(tmp_path / "index.json")
    index["shards"][-1]["rows"] += 1
    longer = {name: [*index[name], "more"] for name in ("ids", "groups")}
    write_json(tmp_path / "index.json", {**index, **longer})
    cache = open_cache(tmp_path)
    with pytest.raises(DataError, match=r"\.safetensors: cannot be read"):
        cache[len(cache) - 1]


def test_no_cache_says_how_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="rankwise features capture"):
            open_cache(folder)


class TestOlderFiles:
    """Folders of features_{i}.pt."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for number in (0, 2, 10):
            torch.save(torch.full((1, 4, 6), float(number)), tmp_path / f"features_{number}.pt")
        (tmp_path / "readme.txt").write_text("not one")
        return tmp_path

    def test_are_read_in_numeric_order(self, folder: Path) -> None:
        cache = open_cache(folder)
        assert cache.ids == ("features_0", "features_2", "features_10")
        assert [float(cache[place][0, 0]) for place in range(3)] == [0.0, 2.0, 10.0]
        assert (cache.tokens, cache.channels, cache.grid, cache.model) == (4, 6, (2, 2), None)

    def test_gaps_are_named(self, folder: Path) -> None:
        (note,) = open_cache(folder).notes()
        assert "3 matrices" in note and "features_1.pt: no such file; features_3.pt" in note
        assert "features_8.pt" in note and "features_0.pt" not in note and "features_10.pt" not in note
        for number in range(1, 10):
            torch.save(torch.full((1, 4, 6), float(number)), folder / f"features_{number}.pt")
        assert open_cache(folder).notes() == []

    def test_equal_features_are_one_group(self, folder: Path) -> None:
        torch.save(torch.full((1, 4, 6), 2.0), folder / "features_11.pt")
        groups = open_cache(folder).groups
        assert groups[1] == groups[3] and len(set(groups)) == 3

    def test_the_fingerprint_follows_the_content(self, folder: Path) -> None:
        before = open_cache(folder).fingerprint
        assert open_cache(folder).fingerprint == before
        torch.save(torch.full((1, 4, 6), 3.0), folder / "features_2.pt")
        assert open_cache(folder).fingerprint != before

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (torch.zeros(1, 5, 6), r"\(5, 6\), and features_0.pt is \(4, 6\)"),
            (torch.zeros(4), "floats"),
            (torch.zeros(1, 4, 6, dtype=torch.int64), "int64"),
            ({"features": torch.zeros(1, 4, 6)}, "expected one tensor, found a dict"),
        ],
    )
    def test_a_file_that_is_no_matrix_is_named(self, folder: Path, content: Any, told: str) -> None:
        torch.save(content, folder / "features_2.pt")
        with pytest.raises(DataError, match=rf"features_2.pt: .*{told}"):
            open_cache(folder)

    def test_a_cut_file_is_named(self, folder: Path) -> None:
        file = folder / "features_10.pt"
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(DataError, match=r"features_10.pt"):
            open_cache(folder)

    def test_code_in_a_file_is_never_run(self, folder: Path) -> None:
        class Harmful:
            def __reduce__(self) -> Any:
                return Path.touch, (folder / "ran",)

        torch.save(Harmful(), folder / "features_2.pt")
        with pytest.raises(DataError, match=r"features_2.pt: loading it would run code"):
            open_cache(folder)
        assert not (folder / "ran").exists()


def with_groups(groups: list[int]) -> FeatureCache:
    names = tuple(str(place) for place in range(len(groups)))
    groups_ = tuple(f"g{group}" for group in groups)
    return FeatureCache(Path("c"), 4, 6, None, names, groups_, None, "s", "print", files=None)  # type: ignore[arg-type]


@given(groups=st.lists(st.integers(0, 40), min_size=3, max_size=90), seed=st.integers(0, 5))
def test_a_picture_is_in_one_part(groups: list[int], seed: int) -> None:
    cache = with_groups(groups)
    pictures = len(set(groups))
    if pictures < 3:
        with pytest.raises(DataError, match=f"{pictures} different pictures"):
            split_of(cache, seed)
        return
    split = split_of(cache, seed)
    parts = (split.train, split.val, split.test)
    assert sorted(place for part in parts for place in part) == list(range(len(groups)))
    inside = [{groups[place] for place in part} for part in parts]
    assert sum(map(len, inside)) == pictures
    assert len(inside[1]) == len(inside[2]) == max(1, round(pictures / 10))


def test_a_split_follows_its_seed_and_comes_back(tmp_path: Path) -> None:
    cache = with_groups(list(range(100)))
    split = split_of(cache, 1)
    assert Counter(map(len, (split.train, split.val, split.test))) == Counter([80, 10, 10])
    assert split == split_of(cache, 1) != split_of(cache, 2)
    file = SPLIT.write(tmp_path, split)
    assert read_split(file, cache) == read_split(tmp_path, cache) == split


def test_a_split_is_not_used_with_another_cache(tmp_path: Path) -> None:
    cache = written(tmp_path / "cache")
    file = SPLIT.write(tmp_path, split_of(with_groups(list(range(9))), 1))
    with pytest.raises(DataError, match="divides another feature cache"):
        read_split(file, cache)
    own = read_object(SPLIT.write(tmp_path, split_of(cache, 1)))
    words = [str(place) for place in own["test"]]
    broken: list[dict[str, Any]] = [{"format": "x"}, {"test": []}, {"train": [*own["train"], 0]}, {"val": None}]
    for change in [*broken, {"test": words}, {"seed": None}]:
        write_json(file, {**own, **change})
        with pytest.raises(DataError, match=r"split.json"):
            read_split(file, cache)


def test_rows_are_normalised_and_named(tmp_path: Path) -> None:
    cache = written(tmp_path, dtype="float16")
    rows = FeatureRows(cache, (7, 2))
    assert len(rows) == 2
    batch = collate([rows[0], rows[1]])
    assert batch["sample_index"].tolist() == [7, 2] and rows.sample_id(7) == "2-1.jpg"
    assert batch["features"].shape == (2, TOKENS, CHANNELS) and batch["features"].dtype == torch.float32
    raw = cache[7].double()
    wanted = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(batch["features"][0].double(), wanted, atol=1e-5)


KNOWN = [
    Synthetic(16, 48, "power:0.7", smooth=True),
    Synthetic(64, 300, "exp:0.1", 0.3),
    Synthetic(20, 41, "flat", 1.0),
    Synthetic(48, 32, "flat", 1.0),
    Synthetic(36, 64, "rank:5", 0.0),
]


@pytest.mark.parametrize("settings", KNOWN, ids=lambda settings: settings.spectrum)
def test_the_known_spectrum_is_the_one_measured(settings: Synthetic) -> None:
    known = torch.tensor(settings.normalised_values, dtype=torch.float64)
    for number in (0, 7):
        features = normalised(settings.matrix(number))
        measured = torch.linalg.svdvals(features.double())
        assert measured.shape == known.shape
        assert torch.allclose(measured, known, atol=1e-6 * float(known[0]))
        assert torch.allclose(singular_values(features), known, atol=1e-5 * float(known[0]))
    assert not torch.allclose(settings.matrix(0), settings.matrix(7))
    assert torch.equal(settings.matrix(7), Synthetic(**vars_of(settings)).matrix(7))


def vars_of(settings: Synthetic) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in Synthetic.__dataclass_fields__}


def test_spectra_are_as_asked() -> None:
    places = torch.arange(1, 17, dtype=torch.float64)
    for spectrum, wanted in (("power:0.7", places**-0.7), ("exp:0.2", (-0.2 * (places - 1)).exp())):
        values = Synthetic(16, 48, spectrum).values
        assert torch.allclose(values / values[0], wanted / wanted[0])
    assert Synthetic(36, 64, "rank:5", 0.0).rank == 5
    assert float(best_errors(Synthetic(36, 64, "rank:5", 0.0).values)[4]) == 0.0


@pytest.mark.parametrize("shared", [0.3, 0.9])
def test_the_share_of_energy_in_shared_directions_is_exact(shared: float) -> None:
    settings = Synthetic(16, 80, "power:0.5", shared)
    for number in range(3):
        features = settings.matrix(number).double()
        inside = (features @ settings.common).square().sum() / features.square().sum()
        assert float(inside) == pytest.approx(shared, abs=1e-6)
    basis = shared_basis([torch.stack([settings.matrix(number) for number in range(200)])], 4)
    fresh = torch.stack([settings.matrix(number) for number in range(200, 210)])
    kept = float((fresh @ basis.mT).square().sum() / fresh.square().sum())
    best = 1 - float(best_errors(settings.values)[3]) ** 2
    assert shared * best * 0.97 < kept < shared * best + 0.1 * (1 - shared)


def test_smooth_tokens_vary_less_between_neighbours() -> None:
    def roughness(smooth: bool) -> float:
        image = Synthetic(64, 200, "power:1", smooth=smooth).matrix(0).view(8, 8, -1)
        return float((image.diff(dim=0).square().mean() + image.diff(dim=1).square().mean()) / image.square().mean())

    assert roughness(True) < 0.6 * roughness(False)


@given(rows=st.integers(2, 12), columns=st.integers(1, 8), seed=st.integers(0, 1000))
def test_even_rows_turn_and_do_not_stretch(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    even = even_rows(matrix)
    assert torch.allclose(even.norm(dim=1), even.norm(dim=1).mean().expand(rows))
    assert torch.allclose(even.mT @ even, matrix.mT @ matrix)


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"tokens": 16, "channels": 20}, "needs 33 channels"),
        ({"spectrum": "steps"}, "power:A, exp:A, flat, rank:R"),
        ({"spectrum": "power:x"}, "power:A, exp:A, flat, rank:R"),
        ({"spectrum": "power:-1"}, "above 0"),
        ({"spectrum": "rank:0"}, "above 0"),
    ],
)
def test_matrices_that_do_not_exist_are_refused(given_: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Synthetic(**given_)


@pytest.mark.parametrize(("given_", "told"), [({"shared": 1.5}, "from 0 to 1"), ({"tokens": 1}, "of at least 2")])
def test_numbers_that_no_matrices_have_are_refused(given_: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        CaptureConfig(synthetic=1, **given_)
