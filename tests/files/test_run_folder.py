"""Laws of run folders: one process at a time, and a manifest that is written last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_monitor import fresh_pages

from rankwise.cli import resolve
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import fingerprint, write_text
from rankwise.files.monitor import MEMORY_SECONDS, MIB
from rankwise.files.run_folder import HOLDER, LOCK, RunFolder
from rankwise.pipeline.table import COMMANDS

HOLD = """
import sys
from rankwise.files.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(folder: Path) -> None:
    with RunFolder(folder).lock():
        assert json.loads((folder / HOLDER).read_text())["pid"] == os.getpid()


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(UsageError, match=rf"in use by process {process.pid} on ") as caught:
            take(tmp_path)
        assert caught.value.exit_code == 2
    finally:
        process.kill()
        process.communicate()
    take(tmp_path)


def fail_while_held(folder: Path, other: Path) -> None:
    with RunFolder(folder).lock():
        take(other)
        raise KeyError


def test_the_lock_is_free_after_an_error_and_other_folders_are_not_held(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError):
            fail_while_held(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a" / HOLDER).exists()


def test_the_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither its own files nor folders made for it; a folder that was there, or that holds something, stays."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError):
        fail_while_held(tmp_path / "a" / "b", tmp_path / "c")
    with RunFolder(tmp_path / "a").lock():
        assert {path.name for path in (tmp_path / "a").iterdir()} == {LOCK, HOLDER}
    with RunFolder(tmp_path / "mine").lock():
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with RunFolder(tmp_path / "run").lock() as run:
        write_text(run / "plan.json", "{}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "plan.json", "run"]


def test_no_lock_file_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert not [name for name in listed.stdout.split() if ".lock" in name]


def finish(run: RunFolder, base: Path) -> None:
    with run.recording("ranks", {"base": base, "hub": "org/model"}) as record:
        record.outputs["plan"] = write_text(run / "plan.json", "{}")
        record.facts["sites"] = 7


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="cannot be a run folder"), RunFolder(place).lock():
            pass


def test_the_manifest_says_what_was_made_from_what(tmp_path: Path) -> None:
    run, base = RunFolder(tmp_path / "run"), write_text(tmp_path / "base.bin", "weights")
    finish(run, base)
    entry = run.stages()["ranks"]
    assert entry["inputs"]["base"]["path"] == str(base)
    assert entry["inputs"]["hub"] == {"name": "org/model"}
    assert entry["outputs"]["plan"]["path"] == "plan.json"
    assert entry["versions"]["torch"] is not None
    assert entry["started"] <= entry["finished"]
    assert entry["seconds"] >= 0
    assert entry["peak_resident_bytes"] > 2**20
    assert entry["sites"] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell the two apart")
def test_pages_of_mapped_files_are_no_memory_that_a_stage_takes(tmp_path: Path) -> None:
    """As weights are read: through the page cache, whose pages the system takes back."""
    (tmp_path / "weights").write_bytes(b"1" * 256 * MIB)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with run.recording("ranks", {}) as record:
        before = record.memory.bytes
        mapped = np.memmap(tmp_path / "weights", mode="r")
        assert int(mapped[::4096].sum(dtype=np.int64)) == 49 * 256 * MIB // 4096
        resident = psutil.Process().memory_info().rss
        held = fresh_pages(64 * MIB)
        time.sleep(3 * MEMORY_SECONDS)
        held.close()
    entry = run.stages()["ranks"]
    assert resident > 256 * MIB
    assert 60 * MIB < entry["peak_memory_bytes"] - before < 120 * MIB, "what was held for a moment counts"
    del mapped


def test_stages_in_one_folder_keep_their_entries(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record("train", {}, {"adapter": write_text(run / "a", "x")}, seconds=2.5, steps=10)
    run.record("evaluate", {}, {}, seconds=1.0)
    assert list(run.stages()) == ["train", "evaluate"]
    assert (run.stages()["train"]["seconds"], run.stages()["train"]["steps"]) == (2.5, 10)


def test_a_failed_stage_is_not_in_the_manifest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(KeyError), run.recording("ranks", {}):
        raise KeyError
    assert run.stages() == {}


def test_inputs_and_outputs_are_told_by_their_content_and_outputs_by_their_place_in_the_folder(tmp_path: Path) -> None:
    run, base = RunFolder(tmp_path / "run"), write_text(tmp_path / "base.bin", "weights")
    finish(run, base)
    (tmp_path / "run").rename(tmp_path / "moved")
    entry = RunFolder(tmp_path / "moved").stages()["ranks"]
    assert entry["inputs"] == {
        "base": {"path": str(base), "fingerprint": fingerprint(base)},
        "hub": {"name": "org/model"},
    }
    plan = tmp_path / "moved" / "plan.json"
    assert entry["outputs"] == {"plan": {"path": "plan.json", "fingerprint": fingerprint(plan)}}
    before = entry["inputs"]["base"]["fingerprint"]
    assert fingerprint(write_text(base, "other weights")) != before


def test_an_output_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such"):
        RunFolder(tmp_path).record("train", {}, {"adapter": tmp_path / "absent"}, seconds=1.0)


@dataclass(frozen=True)
class Settings:
    rank: int
    output: Path


@pytest.mark.parametrize("config", [Settings(4, Path("out")), {"rank": 4, "output": Path("out")}])
def test_the_config_is_saved_as_json(tmp_path: Path, config: object) -> None:
    saved = RunFolder(tmp_path).save_config(config)
    assert saved.parent == tmp_path
    assert json.loads(saved.read_text()) == {"rank": 4, "output": "out"}


@pytest.mark.parametrize("name", [name for name, row in COMMANDS.items() if row.takes_file])
def test_a_saved_config_given_back_as_the_file_is_the_same_config(tmp_path: Path, name: str) -> None:
    config = COMMANDS[name].config
    saved = RunFolder(tmp_path).save_config(config)
    again, _ = resolve(name, [str(saved)])
    assert again == config
