"""The depth evidence's scenes say nothing about depth by themselves, their maps tell the truth, and the study runs."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rankwise.data.depth.prepare import GATE_RATE, gate_rate
from rankwise.errors import UsageError
from rankwise.options.sections import DepthSection

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCENES = 1200
CHANCE = 4 / SCENES**0.5  # four standard errors of a correlation of SCENES independent pairs


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    """Benchmarks are scripts: they find each other in their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    from depth_scenes import draw

    state = random.Random(3)
    return [draw(state, turn) for turn in range(SCENES)]


def rank_correlation(one: list[float], other: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_no_cue_goes_with_depth(scenes: list[Any]) -> None:
    """One pair of each scene: differences of every cue against differences of depth."""
    pairs = [scene.things[:2] for scene in scenes]
    farther = [second.distance - first.distance for first, second in pairs]
    for cue in ("x", "y", "width", "brightness"):
        found = [getattr(second, cue) - getattr(first, cue) for first, second in pairs]
        assert abs(rank_correlation(found, farther)) < CHANCE, cue
    covering = np.mean([value > 0 for value in farther])
    assert abs(covering - 0.5) < CHANCE, "who is painted last"
    greys = [float(scene.grey) for scene in scenes]
    assert abs(rank_correlation(greys, [scene.distance for scene in scenes])) < CHANCE
    colours = {thing.colour for scene in scenes for thing in scene.things}
    for colour in colours:
        near = [first.distance < second.distance for first, second in pairs if first.colour == colour]
        assert abs(np.mean(near) - 0.5) < 4 / len(near) ** 0.5, colour


def test_height_is_balanced(scenes: list[Any]) -> None:
    """Orders of depth are dealt in turn: half of all pairs, for two things and for three."""
    for count in (2, 3):
        higher_is_nearer = [
            first.distance < second.distance
            for scene in scenes
            if len(scene.things) == count
            for first, second in [sorted(scene.things, key=lambda thing: thing.y)[:2]]
        ]
        assert abs(np.mean(higher_is_nearer) - 0.5) < 0.05


def test_answers_are_balanced(scenes: list[Any]) -> None:
    from depth_scenes import nearer, pairs

    state = random.Random(4)
    asked = [nearer(*pair) for scene in scenes for pair in pairs(scene, state)]
    first = [question.text.index(question.answer) < question.text.index(" or ") for question in asked]
    assert abs(np.mean(first) - 0.5) < CHANCE
    counts = [sum(question.answer == colour for question in asked) for colour in ("red", "green", "blue", "yellow")]
    assert max(counts) / min(counts) < 1.25


def test_maps_say_what_was_drawn(scenes: list[Any], tmp_path: Path) -> None:
    """The topmost thing has its distance at its centre, after a round trip through the PNG; tokens move whole."""
    from depth_base import mixed
    from depth_scenes import distances, picture

    from rankwise.data.depth.maps import inverse_depth

    for scene in scenes[:40]:
        Image.fromarray(distances(scene)).save(tmp_path / "map.png")
        found = 1 / inverse_depth(tmp_path / "map.png").numpy()
        top = scene.things[-1]
        assert found[int(top.y), int(top.x)] == pytest.approx(top.distance, abs=0.6)
        known = {round(scene.distance), *(round(thing.distance) for thing in scene.things)}
        assert set(np.unique(distances(scene))) == known
        assert picture(scene).size == found.shape[::-1]
    moved = mixed(distances(scene), random.Random(0))
    assert not np.array_equal(moved, distances(scene))
    assert np.array_equal(np.sort(moved, axis=None), np.sort(distances(scene), axis=None))
    blocks = [{part.tobytes() for part in tokens(values)} for values in (moved, distances(scene))]
    assert blocks[0] == blocks[1], "whole tokens move"


def tokens(values: Any) -> list[Any]:
    return [values[row : row + 16, column : column + 16] for row in range(0, 64, 16) for column in range(0, 64, 16)]


def test_intervals_and_verdicts() -> None:
    from depth_table import against_chance, contrast, interval, resampled

    scenes = np.repeat(np.arange(100), 3)
    fair = np.random.default_rng(1).random((3, 300)) < 0.5
    alike = np.repeat(np.random.default_rng(1).random((3, 100)) < 0.5, 3, axis=1)
    low, high = interval(resampled(fair, scenes))
    assert low < 50 < high
    wide = interval(resampled(alike, scenes))
    assert wide[1] - wide[0] > 1.3 * (high - low), "three answers about one scene are not three scenes"
    assert interval(resampled(np.ones((2, 300), bool), scenes)) == (100, 100)
    assert [against_chance(*found) for found in ((46, 54), (51, 60), (40, 49), (44, 56))] == [
        "chance (within 5 points)",
        "above chance",
        "below chance",
        "not told from chance",
    ]
    assert contrast(1, 2) == "depth helps" and contrast(-1, 2) == "no difference shown"


def test_the_gates_own_rate() -> None:
    assert gate_rate(DepthSection(use_depth=True), {}) == {"depth": GATE_RATE}
    assert gate_rate(DepthSection(use_depth=True), {"deepspeed": "zero.json"}) == {}
    assert gate_rate(DepthSection(use_depth=True, depth_gate="none"), {}) == gate_rate(DepthSection(), {}) == {}
    assert gate_rate(DepthSection(use_depth=True, depth_lr=0.1), {}) == {"depth": 0.1}
    for wrong in ({"depth_lr": 0.1, "depth_gate": "none"}, {"depth_lr": -0.1}, {"depth_lr": float("nan")}):
        with pytest.raises(UsageError, match="--depth_lr"):
            gate_rate(DepthSection(use_depth=True, **wrong), {})


def test_a_miniature_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import depth_evidence as study

    jobs = [study.Job(study.TRUTH, 1, (study.TRUTH, "shuffled")), study.Job(study.BLIND, 1, (study.BLIND,))]
    monkeypatch.setattr(study, "arms", lambda seeds: jobs)
    monkeypatch.setattr(study, "settings_tried", lambda: [study.Job(study.TRUTH, 0, (study.TRUTH,), study.COMMON)])
    monkeypatch.setattr(sys, "argv", ["benchmarks/depth_evidence.py", "--quick"])
    options = argparse.Namespace(seeds=1, workers=1, frames=None, out=tmp_path / "out", picture=tmp_path / "tokens.png")
    study.measure(options, tmp_path / "work", study.QUICK)
    text = (tmp_path / "out" / "depth_evidence.md").read_text()
    assert "| ground truth | shuffled |" in text and "| blind text |" in text and "gate at the common rate" in text
    runs = json.loads((tmp_path / "out" / "depth_evidence.json").read_text())["runs"]
    assert [run["gate"] is None for run in runs] == [False, True, False]
    assert abs(runs[0]["gate"]) > abs(runs[2]["gate"]) > 0, "the gate has its own rate"
    with Image.open(tmp_path / "tokens.png") as drawn:
        assert drawn.size[0] > 100
