"""Laws of writing and reading files: whole or not at all, strict, and named in every complaint."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rankwise.errors import DataError, RankwiseError
from rankwise.files.atomic import (
    SAMPLE_BYTES,
    WHOLE,
    atomic_files,
    atomic_folder,
    atomic_write,
    fingerprint,
    read_json,
    read_object,
    sha256,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def interrupted(path: Path, error: BaseException) -> None:
    """A write that has begun when the error comes."""
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error


def interrupted_folder(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt


def write_to_a_full_disk(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"x" * 100)


def test_nothing_bears_the_final_name_before_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "table.csv"
    with atomic_write(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
    assert target.read_text() == "whole"
    assert names(target.parent) == ["table.csv"]


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    target = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyError):
        interrupted(target, KeyError())
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_files_that_belong_together_change_together(tmp_path: Path) -> None:
    weights, config = tmp_path / "weights", tmp_path / "config"
    weights.write_text("old"), config.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_files(weights, config) as (new_weights, _):
        new_weights.write_text("new")  # the other one is never written
    assert (weights.read_text(), config.read_text()) == ("old", "old")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_disk_full_says_what_to_do_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    with atomic_write(target) as temporary:
        save_file({"w": torch.ones(3)}, temporary)
    with pytest.raises(RankwiseError, match=r"model\.safetensors: no space left .* MiB free") as caught:
        write_to_a_full_disk(target)
    assert caught.value.exit_code == 3
    assert torch.equal(load_file(target)["w"], torch.ones(3))
    assert names(tmp_path) == ["model.safetensors"]


def test_disk_full_as_safetensors_words_it(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="no space left"):
        interrupted(tmp_path / "a", SafetensorError("I/O error: No space left on device (os error 28)"))


def test_other_write_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        interrupted(tmp_path / "a", PermissionError(errno.EACCES, "denied"))


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "a").write_text(content)
            (temporary / content).touch()
    assert names(target) == ["deep", "second"]
    assert (target / "deep" / "a").read_text() == "second"
    assert names(tmp_path) == ["model"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_folder(target)
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("old")
    replace, calls = os.replace, []

    def second_fails(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="input/output"), atomic_folder(target) as temporary:
        (temporary / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"é": True}}
    assert read_object(write_json(tmp_path / "x.json", content)) == content
    assert list(read_object(tmp_path / "x.json")) == ["b", "a"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": math.nan})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', "line 2"),
        (b"", "line 1"),
        (b'{"a": 1,\n\n "a": 2}', "line 3: the key 'a' appears twice"),
        (b'{"a":\n "\xff"}', "line 2: not UTF-8"),
        (b"[" * 100_000, r"nested|not JSON"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_json(file)
    assert "bad.json" in str(caught.value)


def test_unreadable_and_wrong_type_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(DataError, match="expected an object"):
        read_object(write_json(tmp_path / "list.json", [1]))


def test_fingerprints_tell_content_and_not_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_text(tmp_path / folder / "sub" / "a.txt", "same")
        write_text(tmp_path / folder / ".cache" / "x", folder)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert fingerprint(tmp_path / "one/sub/a.txt") == sha256(tmp_path / "two/sub/a.txt")
    before = fingerprint(tmp_path / "two")
    (tmp_path / "two/sub/a.txt").rename(tmp_path / "two/sub/b.txt")
    assert fingerprint(tmp_path / "two") != before
    with pytest.raises(DataError, match="no such"):
        fingerprint(tmp_path / "three")


def test_a_large_file_is_sampled_over_its_whole_length(tmp_path: Path) -> None:
    """Ends and a block in the middle count; sparse files keep this cheap."""
    file, size = tmp_path / "large", WHOLE + 12_345
    with open(file, "wb") as stream:
        stream.truncate(size)
    seen = {fingerprint(file)}
    for place in (0, (size - SAMPLE_BYTES) * 100 // 255 + 7, size - 1):
        with open(file, "r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        seen.add(fingerprint(file))
    assert len(seen) == 4
