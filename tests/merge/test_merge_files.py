"""What bad files, full disks and quantized training do to a merge: the file is named, nothing half-written is left."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_merge import adapter_on, weights
from tiny import tiny_llama

from rankwise.cli import main
from rankwise.merge import write
from rankwise.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several shards."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder)
    model = load_model(str(folder), torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(base, tmp_path_factory.mktemp("adapter"))


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("harm"),)  # type: ignore[return-value]


def gone(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def scrambled(file: Path) -> None:
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def with_code(file: Path) -> None:
    file.unlink()
    file.with_suffix(".bin").write_bytes(pickle.dumps({"weight": Harmful()}))


@pytest.mark.parametrize("damage", [gone, cut, scrambled])
def test_a_broken_shard_is_named(
    damage: Callable[[Path], None], base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    damage(shard)
    assert main(["merge", str(adapter), "--base_model", str(copy), "-o", str(tmp_path / "out")]) == 3
    assert shard.name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [gone, cut, scrambled, with_code])
def test_a_broken_adapter_is_named(
    damage: Callable[[Path], None],
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    damage(copy / "adapter_model.safetensors")
    assert main(["merge", str(copy), "-o", str(tmp_path / "out")]) == 3
    assert "adapter_model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "harm").exists()


def test_a_full_disk_leaves_the_earlier_merge(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "-o", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}
    whole = write.write_file

    def full(path: Path, entries: object, tensor: object) -> None:
        whole(path, entries, tensor)  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(write, "write_file", full)
    assert main(["merge", str(adapter), "-o", str(out), "--dtype", "float16"]) == 3
    assert "no space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no temporary folder is left"


def test_too_small_a_disk_is_seen_before_anything_is_written(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out")]) == 3
    assert "are free" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_documented_flags_and_a_run_folder_work(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "lora_adapter")
    flags = ["--lora_path", str(tmp_path / "run"), "--output_path", str(tmp_path / "merged")]
    assert main(["merge", *flags]) == 0
    again = ["--lora-path", str(tmp_path / "run" / "lora_adapter"), "--base_model", str(base)]
    assert main(["merge", *again, "--output-path", str(tmp_path / "again"), "--dtype", "float32"]) == 0
    first, second = weights(tmp_path / "merged"), weights(tmp_path / "again")
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_what_was_trained_on_four_bits_is_merged_in_full_precision(base: Path, tmp_path: Path) -> None:
    """The adapter of a quantized training records the base in full precision, and that is what it is merged into."""
    pytest.importorskip("bitsandbytes")
    turns = [{"from": "human", "value": "near?"}, {"from": "gpt", "value": "Café Adriatic"}]
    rows = [{"id": str(number), "conversations": turns} for number in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["train", "--model_name", str(base), "--data_path", str(tmp_path / "rows.json"), "--load_in_4bit"]
    words += ["-o", str(tmp_path / "run"), "--max_steps", "3", "--learning_rate", "0.1", "--val_fraction", "0"]
    assert main([*words, "--no_plots", "--save_strategy", "no"]) == 0
    assert main(["merge", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--max_shard_size", "1GB"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    proof = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["merge"]["verification"]
    assert proof["error"] < 1e-5 < proof["effect"]
