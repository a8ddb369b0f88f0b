"""The GPU benchmark of experts runs as it stands, on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "experts_gpu.sh"


@pytest.mark.slow
def test_it_measures_both_models_and_finds_every_expert_saved(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [SCRIPT, "--tiny", "--out", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dense, mixture = json.loads((tmp_path / "experts_gpu.json").read_text())
    assert (dense["experts_met"], mixture["experts_met"]) == (0, 16)
    assert mixture["experts_learnt"] == mixture["experts_moved"] == 2 * 2 * 8
    for found in (dense, mixture):
        assert found["effect"] > 0
        assert found["difference"] <= 1e-4 * found["effect"]
        assert found["tokens_per_second"] > 0
    assert "| Qwen3-30B-A3B | 2 |" in (tmp_path / "experts_gpu.md").read_text()


def test_without_a_gpu_it_says_so() -> None:
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv = ['experts_gpu.py']; import experts_gpu"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(experts_gpu.main())"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--tiny" in done.stderr
