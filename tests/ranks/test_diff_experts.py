"""`ranks diff` of plans with experts: a rank is each expert's, and the experts that moved otherwise are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import describe
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.options.commands import DiffConfig
from rankwise.ranks import diff
from rankwise.ranks.expert_map import CHANGES, PER_EXPERT

SITES = [
    describe("model.layers.0.self_attn.q_proj", (8, 8), "language", peft="path"),
    *(
        describe(f"model.layers.{layer}.mlp.experts.down_proj", (8, 6), "language", experts=4, peft="parameter")
        for layer in (0, 1)
    ),
]


def analysed(folder: Path, ranks: list[int], energies: list[list[float]] | None) -> Path:
    """A folder as `ranks` leaves it; energies: of each expert, by layer."""
    planned = tuple(PlannedSite(site, rank) for site, rank in zip(SITES, ranks, strict=True))
    write_plan(folder / PLAN_FILE, RankPlan(planned))
    if energies:
        rows = [
            site.as_dict() | dict.fromkeys(PER_EXPERT, [0.0] * 4) | {"energy": energy}
            for site, energy in zip(SITES[1:], energies, strict=True)
        ]
        CHANGES.write(folder / diff.RAW_DATA, {"svd_threshold": 0.9, "parameters": rows})
    return folder


def test_ranks_and_movers_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = analysed(tmp_path / "one", [2, 3, 4], [[4, 2, 1, 1], [8, 0, 0, 0]])
    other = analysed(tmp_path / "other", [2, 3, 5], [[4, 2, 1, 1], [0, 8, 0, 0]])
    found = diff.run(DiffConfig(str(one), str(other)))
    said = capsys.readouterr().out
    assert "model.layers.1.mlp.experts.down_proj: 4 → 5, of each of 4 experts" in said
    assert found["experts"] == {"layer 1, expert 0": (0.5, 0.0), "layer 1, expert 1": (0.0, 0.5)}
    assert "layer 1, expert 0: 50 % → 0 %" in said.replace("50.0", "50").replace("0.0", "0")
    assert found["parameters"] == (2 * 16 + 4 * 14 * (3 + 4), 2 * 16 + 4 * 14 * (3 + 5))


def test_without_a_measurement_there_are_no_movers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = analysed(tmp_path / "one", [2, 3, 4], [[4, 2, 1, 1], [8, 0, 0, 0]])
    other = analysed(tmp_path / "other", [2, 3, 4], None)
    assert diff.run(DiffConfig(str(one), str(other)))["experts"] == {}
    assert "share" not in capsys.readouterr().out
