"""Curves as SVG: no extreme is lost by thinning, gaps stay gaps, and text from files stays text."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.page.svg import MOST_BANDS, NARROW, WIDE, Curves, Line, Point, log_ticks, nice_ticks, thin

HOSTILE = '</text><script>alert(1)</script>"&'
VALUES = st.floats(-1e6, 1e6, allow_nan=False)


def curve(points: list[Point], **more: object) -> Curves:
    return Curves("loss", "Loss", [Line("training", points)], "step", "loss", **more)  # type: ignore[arg-type]


def drawn(curves: Curves, width: int = WIDE) -> ElementTree.Element:
    return ElementTree.fromstring(curves.markup(width))


@given(st.lists(VALUES, min_size=1, max_size=400), st.integers(1, 20))
def test_thinning_keeps_every_bucket_s_extremes_and_ends_in_order(values: list[float], buckets: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    high = float(len(values) - 1)
    kept = thin(points, 0.0, high, buckets)
    assert kept == sorted(kept, key=lambda point: point[0]) and set(kept) <= set(points)
    assert len(kept) <= max(4 * (buckets + 1), len(points) if len(points) <= 4 * buckets else 0)
    for bucket in range(buckets + 1) if high else ():
        inside = [point for point in points if int(point[0] / high * buckets) == bucket]
        shown = [point for point in kept if point in inside]
        for extreme in (min, max):
            assert extreme((y for _, y in inside), default=0) == extreme((y for _, y in shown), default=0)
        assert not inside or (inside[0] in kept and inside[-1] in kept)


def test_a_single_spike_among_a_hundred_thousand_steps_is_drawn() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    markup = curve(points).markup(WIDE)
    assert len(markup) < 60_000
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", markup)]
    assert min(heights) < 30 and heights.count(min(heights)) == 1


def test_a_nan_is_a_gap_and_no_positive_value_has_no_place_on_a_logarithmic_scale() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan), (4.0, 0.0), (5.0, 3.0), (6.0, 4.0)]
    root = drawn(curve(points, logarithmic=True))
    line = next(one.attrib["d"] for one in root.iter() if one.get("class") == "line s0" and one.attrib["d"].count("L"))
    assert line.count("M") == 2 and line.count("L") == 2
    assert len([one for one in root.iter() if one.tag.endswith("circle")]) == 4


@pytest.mark.parametrize("points", [[], [(3.0, 2.0)], [(1.0, math.nan)], [(1.0, 5.0), (2.0, 5.0)], [(0.0, 0.0)]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_few_or_equal_points_are_drawn_without_nan(points: list[Point], logarithmic: bool) -> None:
    for width in (WIDE, NARROW):
        markup = curve(points, logarithmic=logarithmic).markup(width)
        ElementTree.fromstring(markup)
        assert "nan" not in markup and "inf" not in markup


def test_names_from_files_stay_text() -> None:
    curves = Curves("x", HOSTILE, [Line(HOSTILE, [(1.0, 1.0), (9.0, 2.0)])], HOSTILE, HOSTILE, [(0.5, HOSTILE)])
    for width in (WIDE, NARROW):
        root = drawn(curves, width)
        assert not [one for one in root.iter() if one.tag.endswith("script")]
        assert HOSTILE in [one.text for one in root.iter() if one.tag.endswith("title")]


def test_phases_are_shaded_by_name_up_to_where_nobody_could_see_them() -> None:
    points = [(float(step), 1.0 + step) for step in range(1, 1001)]
    phases = [(0.5 + 100 * place, "ab"[place % 2]) for place in range(10)]
    bands = [one for one in drawn(curve(points, phases=phases)).iter() if one.find("{*}title") is not None]
    assert [one.attrib["class"] for one in bands] == ["p0", "p1"] * 5
    assert sum(float(one.attrib["width"]) for one in bands) == pytest.approx(WIDE - 12 - 54, abs=1)
    often = [(step + 0.5, "ab"[step % 2]) for step in range(MOST_BANDS + 1)]
    assert "<title>" not in curve(points, phases=often).markup(WIDE)


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 1.0, 4) == [0.0, 0.5, 1.0]
    assert nice_ticks(0.93, 0.97, 4) == [0.93, 0.94, 0.95, 0.96, 0.97]
    assert log_ticks(0.5, 40.0) == [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    assert log_ticks(1e-6, 1e3)[0] == 1e-6 and len(log_ticks(1e-6, 1e3)) <= 10
    assert len(log_ticks(1.1, 1.9)) > 1


def test_a_file_of_its_own_has_its_colours(tmp_path: Path) -> None:
    found = curve([(1.0, 1.0), (2.0, 2.0)]).drawn(tmp_path / "loss.svg")
    assert found.file == tmp_path / "loss.svg"
    text = found.file.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and ElementTree.fromstring(text).tag.endswith("svg")
