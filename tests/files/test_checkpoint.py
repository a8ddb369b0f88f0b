"""Laws of reading checkpoints: the same tensors from every form of file, lazily, and a named file for every fault."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankwise import cli
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import adapter_files
from rankwise.files.checkpoint import open_checkpoint, read_entries, resolve

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.weight": torch.ones(5, 2, dtype=torch.bfloat16),
    "b.bias": torch.arange(5, dtype=torch.int64),
    "c.empty": torch.zeros(0, 3),
}


def save_sharded(folder: Path, pickled: bool = False) -> Path:
    """Two shards and their index."""
    folder.mkdir()
    parts = [dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])]
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    places = {}
    for index, part in enumerate(parts, 1):
        name = f"{stem}-0000{index}-of-00002.{suffix}"
        torch.save(part, folder / name) if pickled else save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def save_form(form: str, folder: Path) -> Path:
    if form in ("sharded", "sharded .bin"):
        return save_sharded(folder, pickled=form == "sharded .bin")
    if form == "index":
        return save_sharded(folder) / "model.safetensors.index.json"
    folder.mkdir()
    if form in ("folder", "file", "odd name"):
        file = folder / ("weights.safetensors" if form == "odd name" else "model.safetensors")
        save_file(TENSORS, file)
        return file if form == "file" else folder
    wrapped = {
        "legacy": TENSORS,
        "state_dict": {"epoch": 3, "state_dict": TENSORS},
        "model": {"model": TENSORS},
    }
    file = folder / {"legacy": "x.pth", "state_dict": "x.tar", "model": "x.pt"}[form]
    torch.save(wrapped[form], file, _use_new_zipfile_serialization=form == "model")
    return file


FORMS = ("folder", "file", "odd name", "sharded", "index", "sharded .bin", "legacy", "state_dict", "model")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors(tmp_path: Path, form: str) -> None:
    checkpoint = open_checkpoint(save_form(form, tmp_path / "x"))
    assert set(checkpoint.keys()) == set(TENSORS) == set(checkpoint)
    assert len(checkpoint) == len(TENSORS)
    for key, expected in TENSORS.items():
        checkpoint.prefetch(key)
        assert checkpoint.shape(key) == tuple(expected.shape)
        assert checkpoint.dtype(key) == expected.dtype == checkpoint.tensor(key).dtype
        assert torch.equal(checkpoint.tensor(key), expected)
        assert checkpoint.file(key) in checkpoint.files


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert "a.weight" in open_checkpoint(tmp_path)


def test_config_is_read_where_there_is_one(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(tmp_path).config == {"model_type": "llama"}
    assert open_checkpoint(tmp_path / "model.safetensors").config == {"model_type": "llama"}


MEASURE = """
import sys
from rankwise.files.checkpoint import open_checkpoint

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def walk(key):
    checkpoint.prefetch(key)
    tensor = checkpoint.tensor(key)
    assert sum(float(block.sum()) for block in tensor.split(8)) == tensor.numel()
    return anonymous()

checkpoint = open_checkpoint(sys.argv[1])
before = walk("small")
print(walk("large") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_large_tensor_costs_no_anonymous_memory(tmp_path: Path) -> None:
    """192 MiB, summed in blocks of 1.5 MiB, in a process of its own: the views are file-backed."""
    save_file({"small": torch.ones(64, 64), "large": torch.ones(1024, 49152)}, tmp_path / "model.safetensors")
    out = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 8 * 1024, "KiB of anonymous memory for a 192 MiB tensor"


def test_header_offsets_are_those_of_the_bytes(tmp_path: Path) -> None:
    """What prefetch asks for is what the tensor occupies."""
    save_file(TENSORS, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    entry = read_entries(tmp_path / "x.safetensors")["a.weight"]
    assert content[entry.start : entry.end] == TENSORS["a.weight"].numpy().tobytes()


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_cut_shard_is_named_before_any_work(tmp_path: Path, keep: int) -> None:
    folder = save_sharded(tmp_path / "x")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    told = r"model-00002-of-00002\.safetensors: .*truncated (within its header|or altered)"
    with pytest.raises(DataError, match=told) as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 3


def test_an_altered_header_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    content = file.read_bytes()
    for old, new in ((b'"F32"', b'"F64"'), (b"[3,4]", b"[3,5]"), (b"{", b"x"), (b'"dtype"', b'"dtypo"')):
        file.write_bytes(content.replace(old, new, 1))
        with pytest.raises(DataError, match=r"model\.safetensors"):
            open_checkpoint(file)


def test_a_git_lfs_pointer_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        open_checkpoint(tmp_path)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "x")
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards are missing: model-00001-of-00002"):
        open_checkpoint(folder)


@pytest.mark.parametrize("pickled", [False, True])
def test_keys_that_the_shard_lacks_are_listed(tmp_path: Path, pickled: bool) -> None:
    folder = save_sharded(tmp_path / "x", pickled)
    (index,) = folder.glob("*.index.json")
    index.write_text(index.read_text().replace("a.weight", "z.weight"))
    with pytest.raises(DataError, match=r"index\.json: 1 tensors .*z\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(DataError, match="outside its folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "x.pt"
    torch.save({"state_dict": TENSORS, "args": argparse.Namespace(lr=1)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"x\.pt: .*run code .*argparse\.Namespace"):
        open_checkpoint(file)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_pickle_is_a_data_error(tmp_path: Path, zipped: bool, part: float) -> None:
    file = tmp_path / "x.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match=r"x\.bin"):
        open_checkpoint(file)


def test_a_legacy_pickle_says_that_it_loads_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for zipped in (True, False):
        torch.save(TENSORS, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        open_checkpoint(tmp_path / "x.pth")
        assert ("loaded into memory as a whole" in caplog.text) is not zipped


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"no tensors .*epoch"):
        open_checkpoint(tmp_path / "x.pt")


def test_unclear_folders_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="weight files there: none"):
        open_checkpoint(tmp_path)
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match="LoRA adapter"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(DataError, match=r"x\.gguf"):
        open_checkpoint(tmp_path / "x.gguf")
    with pytest.raises(DataError, match="no such file"):
        open_checkpoint(tmp_path / "absent")


def test_a_link_to_nothing_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").symlink_to(tmp_path / "moved" / "tiny.gguf")
    with pytest.raises(DataError, match=r"models/tiny\.gguf: a link to .*moved/tiny\.gguf, which is not there"):
        resolve("models/tiny.gguf")
    assert cli.main(["ranks", str(tmp_path / "models" / "tiny.gguf"), "org/tuned"]) == 3
    assert "a link to" in capsys.readouterr().err


def test_a_model_is_not_read_in_place_on_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="as ORG/NAME it is downloaded"):
        resolve("hf://org/name")
    assert cli.main(["ranks", "hf://org/base", "hf://org/tuned"]) == 2
    assert "as ORG/NAME it is downloaded" in capsys.readouterr().err


def test_a_gguf_is_no_adapter_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lora.gguf").touch()
    with pytest.raises(DataError, match=r"lora\.gguf: a GGUF file; adapters are read as PEFT saves them"):
        adapter_files(tmp_path / "lora.gguf")
    for words in (["merge"], ["ranks", "--adapter"]):
        assert cli.main([*words, str(tmp_path / "lora.gguf")]) == 3
        assert "a GGUF file; adapters are read as PEFT saves them" in capsys.readouterr().err


def test_an_unknown_key_names_near_ones(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"a\.weigth.*a\.weight"):
        open_checkpoint(tmp_path).tensor("a.weigth")


def test_resolve_takes_local_paths_as_they_are(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path == resolve(str(tmp_path))
    with pytest.raises(UsageError, match="revision"):
        resolve(tmp_path, revision="main")
    with pytest.raises(DataError, match="no such file or folder"):
        resolve(tmp_path / "absent")


def test_resolve_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"nobody/nothing: no such local path, and not available .* downloaded"):
        resolve("nobody/nothing")


def test_resolve_fetches_weights_and_never_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pickles only where the repository has no safetensors."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[list[str]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert resolve("org/model", revision="abc") == tmp_path
    assert ["*.bin" in patterns for patterns in asked] == [False, True]
    save_file(TENSORS, tmp_path / "model.safetensors")
    resolve("org/model")
    assert ["*.bin" in patterns for patterns in asked] == [False, True, False]
    assert not any("py" in pattern for patterns in asked for pattern in patterns)


def test_the_real_pairs_open(shared_data: Path) -> None:
    """Legacy pickles with `module.` prefixes, a `state_dict` wrapper, and a .tar that is none."""
    pairs = shared_data / "checkpoint_pairs" / "retinaface_mobilenet025"
    sizes = {file.name: open_checkpoint(file) for file in (pairs / "m2man").iterdir()}
    assert len(sizes) == 4
    backbone = sizes["mobilenetV1X0.25_pretrain.tar"]
    final = sizes["mobilenet0.25_Final.pth"]
    shared = {f"body.{name}" for name in backbone} & set(final)
    assert len(shared) > 100
    plate = open_checkpoint(pairs / "license_plate" / "mobilenet0.25_Final.pth")
    assert all(key == f"module.{name}" for name, key in plate.stored.items()), "DataParallel's wrapper is off"
    assert open_checkpoint(pairs / "license_plate" / "mobilenet0.25_epoch_20_ccpd.pth").keys() == plate.keys()


def test_the_real_tiny_model_opens(shared_data: Path) -> None:
    checkpoint = open_checkpoint(shared_data / "tiny_weights" / "stories260K" / "hf_converted")
    assert checkpoint.config is not None
    assert checkpoint.shape("model.layers.0.self_attn.k_proj.weight") == (32, 64)
    assert sum(checkpoint.tensor(key).numel() for key in checkpoint) == 260_032
    with pytest.raises(DataError, match="not a valid PyTorch"):
        open_checkpoint(shared_data / "tiny_weights" / "stories260K" / "stories260K.bin")
