"""`rankwise run features`: from matrices to a page, every network and baseline on the way."""

from __future__ import annotations

import json
from pathlib import Path

import grimp
import pytest

from rankwise import cli
from rankwise.features.nets import ARCHITECTURES
from rankwise.files.run_folder import read_marks, write_mark
from rankwise.report import contents

SMALL = {
    "features.synthetic": 24,
    "features.tokens": 16,
    "features.channels": 48,
    "another_source.synthetic": 6,
    "another_source.tokens": 16,
    "another_source.channels": 48,
    "AdaLoRA.allocator_init_warmup": 1,
    "AdaLoRA.allocator_final_warmup": 1,
    "AdaLoRA.allocator_mask_interval": 1,
    "compare.sweep": "2,8",
    "compare.batch_size": 4,
    "compare.repeats": 1,
}


def test_nothing_but_the_report_and_the_documented_names_needs_this_room() -> None:
    graph = grimp.build_graph("rankwise", cache_dir=None)
    inside = {"rankwise.features", *graph.find_descendants("rankwise.features")}
    users = {user for module in inside for user in graph.find_modules_that_directly_import(module)} - inside
    assert {user.split(".")[1] for user in users} == {"scripts"}
    assert {place.partition(".")[0] for place, _ in contents.FINDINGS.values()} >= {"features"}, "the report, by name"


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FACTOR_RANK", "8")
    monkeypatch.setenv("EPOCHS", "2")
    run = tmp_path / "run"
    command = ["run", "features", "-o", str(run), *(f"--set={name}={value}" for name, value in SMALL.items())]
    assert cli.main(command) == 0
    rows = json.loads((run / "results" / "comparison.json").read_text())["sources"]
    told = (run / "results" / "comparison.md").read_text()
    assert len(rows) == 2, "the test images, and another source"
    assert all(name in told for name in (*ARCHITECTURES, "SVD", "Gram", "randomized SVD", "shared PCA"))
    ranks = [row["effective_rank"] for row in json.loads((run / "results" / "AdaLoRA" / "history.json").read_text())]
    assert ranks[-1] == 4, "half of eight"
    page = (run / "report.html").read_text()
    assert "features compare" in page and "Subspace" in page
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "train mse" not in capsys.readouterr().out, "what is done is not done again"

    write_mark(run, "MLP", {"started": read_marks(run)["MLP"]["done"]})  # as a stop in the middle leaves it
    assert cli.main([*command, "--only=MLP,AdaLoRA"]) == 0
    told = capsys.readouterr().out
    again = told[told.index("[5/9] MLP") : told.index("[6/9] AdaLoRA")]
    assert "train mse" not in again and "MLP at epoch 2" in again, "it goes on from its checkpoint: nothing is left"
    assert len(json.loads((run / "results" / "MLP" / "history.json").read_text())) == 2

    monkeypatch.setenv("EPOCHS", "1")
    assert cli.main([*command, "--only=MLP"]) == 0
    assert len(json.loads((run / "results" / "MLP" / "history.json").read_text())) == 1, "another run in its place"

    after = ",".join(["features", *ARCHITECTURES, "compare"])
    assert cli.main([*command, "--set=features.shared=0.3", f"--only={after}"]) == 0
    assert "shared 0.3" in (run / "results" / "comparison.md").read_text(), "other features, and all after them"
