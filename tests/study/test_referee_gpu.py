"""The referee on a GPU, in small on this CPU: interrupted, taken elsewhere in pieces, gone on with, checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise.study import execution

REFEREE = Path(__file__).parents[2] / "benchmarks" / "referee"
MODULES = ("gpu", "check", "folder", "intervals", "pieces", "arms", "workload")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script, which finds others in its folder and in the one above."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path[:0] = [str(REFEREE), str(REFEREE.parent)]
    import gpu

    yield gpu
    del sys.path[:2]
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def words(base: Path, data: Path, work: Path, *more: str) -> list[str]:
    return [str(base), "--data", str(data), "--work", str(work), "--tiny", "--counts", "1,2", "--minutes", "1", *more]


def test_a_study_is_gone_on_with_on_another_machine(
    gpu: Any,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, left = execution.Bench.make, [1]

    def interrupted(bench: execution.Bench, runs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        whole(bench, runs)

    work, small = tmp_path / "work", tmp_path / "model"
    gpu.pieces.split(base, small, size=20_000)
    assert len(list(small.glob("part.*"))) > 1
    with monkeypatch.context() as patch:
        patch.setattr(execution.Bench, "make", interrupted)
        assert gpu.main(words(small, data, work)) == 3
    told = capsys.readouterr().out
    assert "2 arms together: " in told and "× the Trainer" in told and "call again" in told
    assert "goal of 5 × the Trainer at 2 arms: " in told
    done, speed = ((work / name).read_text() for name in ("study/runs.jsonl", "speed.json"))
    assert done
    for path in work.iterdir():  # only the pieces travel
        if path.name != "pieces":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert gpu.main(words(small, data, work)) == 0
    told = capsys.readouterr().out
    assert "FAILED" not in told and told.count("\nok ") >= len(gpu.check.CHECKS) - 1
    assert (work / "study" / "runs.jsonl").read_text().startswith(done)
    assert (work / "speed.json").read_text() == speed
    study = json.loads((work / "study" / "study.json").read_text())
    assert {row["arm"] for row in study["arms"]} == {"uniform", "energy", "fisher", "inverted", "mlp", "attention"}
    assert study["seeds"]["reported"] == json.loads((work / "seeds.json").read_text())


@pytest.mark.parametrize(
    ("seconds", "minutes", "seeds"), [(0.1, 20, 8), (20.0, 24, 5), (60.0, 24, None), (-20.0, 24, 5)]
)
def test_seeds_are_cut_and_arms_never(
    gpu: Any, seconds: float, minutes: float, seeds: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = gpu.argparse.Namespace(counts=[1, 16], minutes=minutes)
    study = {"arms": list("abcdef"), "grid_points": 3, "tuning_seeds": 1, "steps": 40}
    found = {"1": seconds, "16": seconds / 2, "steps": 20}
    found = found if seconds > 0 else {"trainer": -seconds / 2, "steps": 20}  # no time to measure the others
    if seeds is None:
        with pytest.raises(SystemExit, match=r"0 seeds fit into 24 minutes, 2 are needed: --minutes 43"):
            gpu.affordable(options, study, found)
    else:
        assert gpu.affordable(options, study, found) == seeds


def test_a_piece_that_is_missing_or_another_is_named(gpu: Any, base: Path, tmp_path: Path) -> None:
    gpu.pieces.split(base, tmp_path / "pieces", size=20_000)
    gpu.pieces.join(tmp_path / "pieces", tmp_path / "again")
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert all(path.stat().st_size <= 20_000 for path in (tmp_path / "pieces").glob("part.*"))
    (tmp_path / "pieces" / "part.001").write_bytes(b"")
    with pytest.raises(ValueError, match=r"part\.001: missing, or not the piece"):
        gpu.pieces.join(tmp_path / "pieces", tmp_path / "third")
    assert gpu.pieces.SIZE <= 40_000_000


def test_an_error_of_the_study_does_not_say_call_again(
    gpu: Any, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rankwise` exits with 3 for its data, this script where it should be called once more."""
    monkeypatch.setattr(gpu, "speed", lambda *_: {"1": 0.01, "steps": 2})
    monkeypatch.setattr(gpu, "go_on", lambda *_: 3)
    (tmp_path / "study").mkdir()
    assert gpu.main(words(base, data, tmp_path)) == 2


@pytest.mark.slow
def test_the_script_runs_as_it_stands(base: Path, data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [REFEREE / "gpu.sh", *words(base, data, tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    without = [word for word in command if word != "--tiny"]
    refused = subprocess.run(without, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "--tiny" in refused.stderr
