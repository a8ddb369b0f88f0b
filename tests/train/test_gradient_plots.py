"""Pictures and words about gradient norms show the numbers of the tables, and leave blank what did not train."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import Image

from rankwise.errors import DataError
from rankwise.page import canvas
from rankwise.page.svg import LEFT, RIGHT, WIDE
from rankwise.report.report import build_report
from rankwise.scripts import gradients
from rankwise.train.gradient_plots import (
    draw_factors,
    plot_gradient_evolution,
    plot_gradient_norms,
    plot_gradients,
    plot_layer_comparison,
    plot_layer_heatmap,
)
from rankwise.train.gradient_summary import (
    JSON,
    TEXT,
    WINDOW,
    boundaries,
    by_factor_and_site,
    by_kind,
    generate_summary_report,
    gradient_summary,
    read_tables,
    series,
    smooth,
)
from rankwise.train.gradient_table import COLUMNS, GROUPS, LAYERS, NORMS, SiteNorm, StepTable, cells, views
from rankwise.train.loss_plots import plot_loss

NAMES = ["gradient_norms", "layer_heatmap", "layer_comparison", "gradient_evolution", "lora_factors"]
PHASES = (("both", ("attention", "mlp")), ("mlp", ("mlp",)), ("attention", ("attention",)))


def table(steps: int = 30, layers: int = 3, every: int = 1, phased: bool = True) -> list[SiteNorm]:
    """Norms of a run in three equal phases: attention is 1 + layer, MLP ten times that."""
    rows = []
    for step in range(every, steps + 1, every):
        name, kinds = PHASES[(step - 1) * 3 // steps] if phased else ("", PHASES[0][1])
        for layer in range(layers):
            for kind in kinds:
                norm = (1.0 + layer) * (10.0 if kind == "mlp" else 1.0)
                path = f"model.layers.{layer}.{kind}.proj"
                a = 0.0 if step == every else 0.6 * norm
                b = math.sqrt(norm**2 - a**2)
                rows.append(SiteNorm(step, path, "language", kind, layer, norm, a, b, norm / 7, 0.1 * (step - 1), name))
    return rows


def write(folder: Path, rows: list[SiteNorm]) -> Path:
    """The long table alone, as another program might have left it."""
    long = StepTable(folder / NORMS, COLUMNS)
    long.cut(0)
    long.extend(cells(row) for row in rows)
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, in order."""
    found: list[Any] = []
    save = canvas.save

    def keep(figure: Any, path: Path | str, dpi: int = canvas.DPI) -> Path:
        found.append(figure)
        return save(figure, path, dpi)

    monkeypatch.setattr(canvas, "save", keep)
    return found


def labelled(axis: Any, label: str) -> Any:
    return next(line for line in axis.lines if line.get_label() == label)


@pytest.mark.usefixtures("drawn_pictures")
def test_everything_is_drawn_into_the_run_folder(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    written = plot_gradients(write(tmp_path, table()))
    assert [path.name for path in written] == [TEXT, JSON, *(f"{name}.png" for name in NAMES)]
    for path in written[2:]:
        assert path.parent == tmp_path / "plots"
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 400
    assert dict(matplotlib.rcParams) == before
    assert plot_gradients(tmp_path / "plots") == [], "nothing was measured here"


@pytest.mark.usefixtures("drawn_pictures")
@pytest.mark.parametrize(("steps", "layers", "phased"), [(1, 1, False), (2, 1, False), (8, 2, True), (1500, 22, True)])
def test_long_and_short_runs_can_be_drawn(tmp_path: Path, steps: int, layers: int, phased: bool) -> None:
    found = views(table(steps, layers, every=1 if steps < 100 else 10, phased=phased))
    plot_gradient_norms(found.groups, tmp_path / "groups.png")
    plot_layer_heatmap(found.layers, tmp_path / "heat.png")
    plot_layer_comparison(found.layers, tmp_path / "bars.png")
    plot_gradient_evolution(found.layers, tmp_path / "moments.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_groups_are_drawn_on_both_scales_with_their_phases(tmp_path: Path, figures: list[Any]) -> None:
    plot_gradient_norms(views(table()).groups, tmp_path / "groups.png")
    log, linear = figures[0].axes
    assert (log.get_yscale(), linear.get_yscale()) == ("log", "linear")
    expected = 10 * math.sqrt(1 + 4 + 9)
    for axis in (log, linear):
        drawn = labelled(axis, "MLP").get_ydata()
        assert list(drawn[:20]) == pytest.approx([expected] * 20)
        assert all(math.isnan(value) for value in drawn[20:]), "blank where it did not train"
        dotted = [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 2]
        assert dotted == [10.5, 20.5]
    assert [text.get_text().strip() for text in log.texts] == ["both", "mlp", "attention"]
    assert not linear.texts
    with pytest.raises(DataError, match="no norm"):
        plot_gradient_norms([{"step": "1", "total_norm": "", "phase": ""}], tmp_path / "no.png")


def test_the_total_of_one_group_alone_is_not_drawn_over_it(tmp_path: Path, figures: list[Any]) -> None:
    rows = [row for row in table() if row.kind == "mlp"]
    plot_gradient_norms(views(rows).groups, tmp_path / "groups.png")
    labels = {line.get_label() for line in figures[0].axes[0].lines}
    assert "MLP" in labels and "all" not in labels


def test_the_heatmap_has_a_cell_per_step_and_layer_and_white_ones(tmp_path: Path, figures: list[Any]) -> None:
    plot_layer_heatmap(views(table()).layers, tmp_path / "heat.png")
    for axis, kind, blank in zip(figures[0].axes, ("attention", "mlp"), (range(10, 20), range(20, 30)), strict=False):
        cells = axis.collections[0].get_array()
        assert cells.shape == (3, 30)
        for step in range(30):
            for layer in range(3):
                expected = (1 + layer) * (10 if kind == "mlp" else 1)
                assert cells.mask[layer, step] == (step in blank)
                assert step in blank or cells[layer, step] == pytest.approx(expected)
    assert figures[0].axes[0].collections[0].cmap.get_bad().tolist() == [1, 1, 1, 1]


def test_a_long_heatmap_averages_steps_instead_of_dropping_them(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"step": step, "layer_0_mlp": 3.0 if step % 2 else 1.0} for step in range(1, 1601)]
    plot_layer_heatmap(rows, tmp_path / "heat.png")
    cells = figures[0].axes[0].collections[0].get_array()
    assert cells.shape == (1, 400)
    assert set(cells[0].tolist()) == {2.0}


def test_bars_are_means_over_the_steps_at_which_a_layer_trained(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"step": 1, "layer_0_mlp": 1.0, "layer_1_mlp": ""}, {"step": 2, "layer_0_mlp": 3.0, "layer_1_mlp": 5.0}]
    plot_layer_comparison(rows, tmp_path / "bars.png")
    assert [bar.get_height() for bar in figures[0].axes[0].patches] == [2.0, 5.0]


def test_evolution_shows_seven_moments_from_first_to_last(tmp_path: Path, figures: list[Any]) -> None:
    plot_gradient_evolution(views(table(60, phased=False)).layers, tmp_path / "moments.png")
    attention, mlp = figures[0].axes
    labels = [line.get_label() for line in attention.lines]
    assert len(labels) == 7 and labels[0] == "step 1" and labels[-1] == "step 60"
    assert list(mlp.lines[3].get_ydata()) == pytest.approx([10, 20, 30])


def test_factors_are_drawn_apart(tmp_path: Path, figures: list[Any]) -> None:
    rows = table(30, phased=False)
    draw_factors(by_factor_and_site(rows)[0], tmp_path / "factors.png")
    attention, _, delta = figures[0].axes
    norm = math.sqrt(1 + 4 + 9)
    drawn = labelled(attention, "A").get_ydata()
    assert math.isnan(drawn[0]), "a gradient of exactly 0 has no place on a logarithmic axis"
    assert drawn[-1] == pytest.approx(0.6 * norm)
    assert labelled(attention, "B").get_ydata()[-1] == pytest.approx(0.8 * norm)
    assert labelled(delta, "MLP").get_ydata()[10] == pytest.approx(math.sqrt(3) * 1.0)
    with pytest.raises(DataError, match="no LoRA site"):
        draw_factors(
            by_factor_and_site([SiteNorm(1, "lm_head", "language", "head", None, 1.0)])[0], tmp_path / "no.png"
        )
    assert by_factor_and_site(rows)[0].steps == list(range(1, 31))


def test_phases_are_marked_in_the_loss_too(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"step": step, "loss": 1.0, "eval_loss": ""} for step in range(1, 9)]
    plot_loss(rows, tmp_path / "loss.png", boundaries([(1, "both"), (5, "mlp")]))
    axis = figures[0].axes[0]
    assert [text.get_text().strip() for text in axis.texts] == ["both", "mlp"]
    assert any(list(line.get_xdata()) == [4.5, 4.5] for line in axis.lines)


def test_the_moving_average_never_bridges_a_gap() -> None:
    nan = float("nan")
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, nan, 100.0, nan]
    found = smooth(values)
    assert found[:6] == [2.0, 2.5, 3.0, 4.0, 4.5, 5.0]
    assert math.isnan(found[6]) and found[7] == 100.0 and math.isnan(found[8])
    constant = [7.0] * 40
    assert smooth(constant) == constant
    noise = [random.Random(i).random() for i in range(50)]
    assert smooth(noise)[20] == pytest.approx(sum(noise[18:23]) / WINDOW)


def test_it_never_bridges_phases_either() -> None:
    rows = [{"step": i, "total_norm": 1.0 if i <= 15 else 9.0, "phase": "a" if i <= 15 else "b"} for i in range(1, 31)]
    table = series(rows)
    assert table.changes() == [(1, "a"), (16, "b")]
    assert table.boundaries() == [(0.5, "a"), (15.5, "b")]
    assert table.smoothed(table.columns["total_norm"]) == [1.0] * 15 + [9.0] * 15


def test_boundaries_lie_between_the_steps_that_were_measured() -> None:
    table = series({"step": step, "total_norm": 1.0, "phase": "a" if step <= 20 else "b"} for step in (10, 20, 30))
    assert table.boundaries() == [(9.5, "a"), (25.0, "b")]


def test_phases_lie_at_one_place_in_all_pictures_of_a_run(tmp_path: Path, figures: list[Any]) -> None:
    """Also where the norms were measured at every fifth step only: `phases.csv` knows when a phase began."""
    write(tmp_path, table(every=5))
    (tmp_path / "training_log.csv").write_text("step,loss,eval_loss\n1,2.0,\n30,1.0,1.5\n")
    (tmp_path / "phases.csv").write_text("step,phase,sites,parameters\n1,both,6,1\n11,mlp,3,1\n21,attention,3,1\n")
    build_report(tmp_path)
    gradients.plot_training_loss(tmp_path)
    gradients.plot_gradient_norms(tmp_path)
    gradients.plot_layer_heatmap(tmp_path)
    marked = [vertical_lines(figure.axes[0]) for figure in figures]
    drawn = [lines for lines in marked if lines]
    assert len(drawn) == 2 + 3, "heatmap and factors in the report; the scripts' three"
    assert all(lines == [10.5, 20.5] for lines in drawn)
    for name, first in (("00_training_loss.svg", 1), ("01_gradient_norms.svg", 5)):
        assert shaded(tmp_path / "report_files" / name, first, 30) == pytest.approx([first, 10.5, 20.5], abs=0.01)


def shaded(svg: Path, first: float, last: float) -> list[float]:
    """Steps at which the bands of phases begin, in curves from one step to another."""
    bands = [one for one in ElementTree.parse(svg).iter() if one.find("{*}title") is not None]
    share = [(float(one.attrib["x"]) - LEFT) / (WIDE - RIGHT - LEFT) for one in bands]
    return [first + part * (last - first) for part in share]


def vertical_lines(axis: Any) -> list[float]:
    places = [list(line.get_xdata()) for line in axis.lines]
    return [place[0] for place in places if len(place) == 2 and place[0] == place[1]]


def test_layers_of_other_towers_follow_those_of_the_language_model() -> None:
    table = series([{"step": 1, "vision_layer_0_mlp": 1.0, "layer_10_mlp": 2.0, "layer_9_mlp": 3.0}])
    assert by_kind(table)["mlp"].names == ["9", "10", "vision 0"]
    assert by_kind(table)["mlp"].curves == [[3.0], [2.0], [1.0]]


def test_the_summary_has_numbers_and_words(tmp_path: Path) -> None:
    write(tmp_path, table())
    text, numbers = generate_summary_report(tmp_path)
    found = json.loads(numbers.read_text())
    assert found["attention_to_mlp_ratio"] == pytest.approx(0.1)
    assert found["groups"]["mlp"]["mean"] == pytest.approx(10 * math.sqrt(14))
    assert [(row["phase"], row["first_step"], row["last_step"]) for row in found["phases"]] == [
        ("both", 1, 10),
        ("mlp", 11, 20),
        ("attention", 21, 30),
    ]
    assert set(found["phases"][1]["means"]) == {"mlp", "total"}
    assert found["layers"]["attention"] == {"0": 1.0, "1": 2.0, "2": 3.0}
    said = text.read_text()
    for words in ("Attention to MLP: 0.1 ", "layer 2 (3)", "steps 11 to 20, mlp  ", "  MLP 37.42", "30 steps"):
        assert words in said
    with pytest.raises(DataError, match="log_frequency"):
        generate_summary_report(tmp_path / "plots")


def test_without_common_steps_there_is_no_ratio_and_skipped_steps_are_counted() -> None:
    rows = [
        {"step": 1, "attention_norm": 2.0, "total_norm": 2.0, "clipped_total_norm": 1.0},
        {"step": 2, "mlp_norm": 0.5, "total_norm": 0.5, "clipped_total_norm": 0.5},
        {"step": 3},
    ]
    found = gradient_summary(rows, [])
    assert found["attention_to_mlp_ratio"] is None
    assert found["clipped_steps"] == 0.5
    assert found["skipped_steps"] == 1


def test_the_report_shows_tables_that_another_program_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, table())
    (run / "training_log.csv").write_text("step,loss,eval_loss\n1,2.0,\n30,1.0,1.5\n")
    (run / "phases.csv").write_text("step,phase,sites,parameters\n1,both,6,1\n11,mlp,3,1\n21,attention,3,1\n")
    page = build_report(run).with_suffix(".md").read_text()
    for name in NAMES:
        assert page.count(f"{name}.svg" if name == "gradient_norms" else f"{name}.png") == 1
    assert "| MLP | 37.42 |" in page
    assert "Attention to MLP: 0.1 " in page
    plot_gradients(run)
    assert build_report(run).with_suffix(".md").read_text().count("layer_heatmap.png") == 1, "shown once"


def test_a_broken_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="numbers"):
        series([{"step": "1", "mlp_norm": "much"}])
    (tmp_path / NORMS).write_text("step,site\n1,q\n")
    with pytest.raises(DataError, match=NORMS):
        read_tables(tmp_path)
    (tmp_path / NORMS).unlink()
    (tmp_path / GROUPS).write_text("step,mlp_norm\n1,much\n")
    (tmp_path / LAYERS).write_text("step\n1\n")
    with pytest.raises(DataError, match=GROUPS):
        read_tables(tmp_path)
