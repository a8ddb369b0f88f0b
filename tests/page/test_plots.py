"""Plots draw the numbers they are given, without touching the user's matplotlib."""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.font_manager
import matplotlib.pyplot
import pytest
import torch
from PIL import Image

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import describe
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.classify import plot_confusion
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.page import canvas
from rankwise.page.canvas import BLUE, GREY, YELLOW, readable_on
from rankwise.ranks import plots
from rankwise.ranks.plots import plot_decay, plot_energy_heatmap, plot_gain, plot_ranks_heatmap
from rankwise.train.loss_plots import plot_loss, plot_scores

pytestmark = pytest.mark.usefixtures("drawn_pictures")
SHAPE = (24, 40)


def spectrum(**changes: Any) -> Spectrum:
    values = torch.arange(1, 25, dtype=torch.float64) ** -0.7
    return Spectrum(**{"values": values, "energy_total": float(values.square().sum()), "shape": SHAPE} | changes)


def planned(path: str = "model.layers.0.self_attn.q_proj", rank: int = 5, energy: float | None = 0.8) -> PlannedSite:
    return PlannedSite(describe(path, SHAPE, "language"), rank, energy_retained=energy)


def ragged_plan() -> RankPlan:
    """Layer 1 has no down_proj, and one site lies in no layer."""
    ranks = {"layers.0.attn.q_proj": 4, "layers.0.mlp.down_proj": 16, "layers.1.attn.q_proj": 8, "connector.proj": 2}
    return RankPlan(tuple(planned(path, rank, rank / 16) for path, rank in ranks.items()))


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


def line(axis: Any, label: str) -> Any:
    return next(one for one in axis.lines if str(one.get_label()).startswith(label))


def draw_everything(folder: Path) -> list[Path]:
    results = {
        name: EvaluationResult("t", {"bleu": 3.0, "x": 0.5}, {"bleu": (2.0, 4.0)}, 9) for name in ("a", "b", "c")
    }
    return [
        plot_decay(spectrum(complete=True), planned(), 0.9, folder / "decay.png", null_edge=0.3),
        plot_ranks_heatmap(ragged_plan(), folder / "ranks.png"),
        plot_energy_heatmap(ragged_plan(), folder / "energy.png"),
        plot_loss([{"step": "1", "loss": "2.0", "eval_loss": ""}], folder / "loss.png"),
        plot_scores(results, folder / "scores.png"),
        plot_gain({"arms": [{"name": "plan", "kept": 0.6, "low": 0.5, "high": 0.7}]}, folder / "gain.png"),
    ]


def test_every_plot_is_a_png_and_the_users_matplotlib_stays_as_it_was(tmp_path: Path) -> None:
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    for path in draw_everything(tmp_path / "new" / "folder"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 400
            assert len(image.convert("L").getcolors()) > 5, "the picture is blank"
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    assert matplotlib.pyplot.get_fignums() == []


def test_decay_draws_the_spectrum_the_rank_and_the_threshold(tmp_path: Path, figures: list[Any]) -> None:
    plot_decay(spectrum(complete=True), planned(rank=5), 0.9, tmp_path / "x.png", null_edge=0.3)
    decay, energy = figures[0].axes
    assert decay.get_yscale() == "log"
    assert torch.tensor(decay.lines[0].get_ydata()).equal(spectrum().values)
    assert torch.tensor(energy.lines[0].get_ydata())[1:].equal(spectrum().cumulative())
    assert line(decay, "largest of permuted").get_ydata()[0] == 0.3
    assert line(energy, "threshold 0.9").get_ydata()[0] == 0.9
    for axis in (decay, energy):
        assert line(axis, "rank 5").get_xdata()[0] == 5
    assert len({one.get_linestyle() for one in energy.lines}) == 3, "lines are told apart by style, not by colour alone"


def test_truncated_spectrum_says_so_and_shows_what_the_sketch_leaves_open(tmp_path: Path, figures: list[Any]) -> None:
    short = spectrum(values=spectrum().values[:8], residual=0.2)
    plot_decay(short, planned(), 0.9, tmp_path / "x.png")
    decay, energy = figures[0].axes
    assert "first 8 of 24 values" in decay.get_xlabel()
    assert len(energy.collections) == 1
    plot_decay(spectrum(complete=True), planned(), 0.9, tmp_path / "x.png")
    assert "first" not in figures[1].axes[0].get_xlabel() and not figures[1].axes[1].collections


def test_zero_delta_and_zero_tail_are_drawn_without_a_logarithm_of_zero(tmp_path: Path) -> None:
    zero = Spectrum(torch.zeros(4, dtype=torch.float64), 0.0, SHAPE, complete=True)
    tail = spectrum(values=torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64), energy_total=1.25, complete=True)
    for found in (zero, tail):
        assert plot_decay(found, planned(), 0.9, tmp_path / "x.png").is_file()


def test_names_from_files_are_not_read_as_mathematics(tmp_path: Path) -> None:
    """Matplotlib would fail on these as formulas: the files exist because it drew them as text."""
    assert plot_decay(spectrum(), planned("model.layers.0.$\\frac{.q_proj"), 0.9, tmp_path / "x.png").is_file()
    odd = EvaluationResult("t", {"$\\oops{": 1.0}, {}, 3)
    assert plot_scores({"$\\oops{": odd}, tmp_path / "y.png").is_file()


NAMES = ("🔥 fire", "水", "पानी", "ti\N{TAG LATIN SMALL LETTER G}ger")
COUNTS = [[3, 1, 0, 0, 1], [0, 4, 0, 1, 0], [1, 0, 2, 0, 0], [0, 0, 0, 5, 0]]


def confusion_labels(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Label → fonts, of the y axis of a confusion matrix with class names of the world, as it was written to `path`."""
    saved: list[Any] = []
    save = canvas.save
    monkeypatch.setattr(canvas, "save", lambda figure, to: saved.append(figure) or save(figure, to))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(NAMES, COUNTS, path, "🔥水")
    (axis,) = saved[0].axes
    assert axis.get_title(loc="left").endswith(": items") and path.stat().st_size > 10_000
    return {label.get_text(): label.get_fontfamily() for label in axis.get_yticklabels()}


def test_characters_that_no_font_has_are_written_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    monkeypatch.setattr(canvas, "installed", lambda: [("DejaVu Sans", str(own))])
    labels = confusion_labels(tmp_path / "a.png", monkeypatch)
    assert list(labels) == ["U+1F525 fire", "U+6C34", "U+092A U+093E U+0928 U+0940", "tiger"]


def test_characters_of_another_installed_font_are_drawn_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders, pens = pytest.importorskip("fontTools.fontBuilder"), pytest.importorskip("fontTools.pens.ttGlyphPen")
    builder, pen = builders.FontBuilder(1000, isTTF=True), pens.TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyphOrder([".notdef", "water"])
    builder.setupCharacterMap({ord("水"): "water"})
    builder.setupGlyf({".notdef": square, "water": square})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "water": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Rankwise Water", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "water.ttf")
    manager = matplotlib.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    monkeypatch.setattr(canvas, "PREFERRED", ("Rankwise",))
    manager.addfont(tmp_path / "water.ttf")
    labels = confusion_labels(tmp_path / "a.png", monkeypatch)
    assert "Rankwise Water" in labels["水"]


def test_heatmap_shows_every_rank_in_its_cell_and_nothing_where_there_is_no_site(
    tmp_path: Path, figures: list[Any]
) -> None:
    plot_ranks_heatmap(ragged_plan(), tmp_path / "x.png")
    axis = figures[0].axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    layers = [label.get_text() for label in axis.get_xticklabels()]
    assert names == ["q_proj", "down_proj", "proj"] and layers == ["0", "1", "none"]
    cells = {(names[round(t.get_position()[1])], layers[round(t.get_position()[0])]): t.get_text() for t in axis.texts}
    assert cells == {("q_proj", "0"): "4", ("q_proj", "1"): "8", ("down_proj", "0"): "16", ("proj", "none"): "2"}
    assert int(axis.images[0].get_array().mask.sum()) == 9 - 4


def test_nearly_uniform_ranks_look_nearly_uniform(tmp_path: Path, figures: list[Any]) -> None:
    plot_ranks_heatmap(RankPlan((planned("layers.0.q_proj", 16), planned("layers.1.q_proj", 18))), tmp_path / "x.png")
    image = figures[0].axes[0].images[0]
    assert image.norm(18) - image.norm(16) < 0.1
    plot_ranks_heatmap(ragged_plan(), tmp_path / "x.png")
    image = figures[1].axes[0].images[0]
    assert (image.norm(2), image.norm(16)) == (0.0, 1.0)


def test_energy_heatmap_leaves_unknown_energy_blank(tmp_path: Path, figures: list[Any]) -> None:
    rows = (
        planned("layers.0.q_proj", energy=0.123),
        planned("layers.1.q_proj", energy=None),
        planned("layers.2.q_proj", energy=1.0),
    )
    plot_energy_heatmap(RankPlan(rows), tmp_path / "x.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == [".12", "1.0"]


def test_many_layers_lose_their_numbers_not_their_picture(tmp_path: Path, figures: list[Any]) -> None:
    rows = tuple(planned(f"layers.{layer}.{name}", 1 + layer) for layer in range(80) for name in ("q_proj", "k_proj"))
    plot_ranks_heatmap(RankPlan(rows), tmp_path / "x.png")
    axis = figures[0].axes[0]
    assert not axis.texts and axis.images[0].get_array().shape == (2, 80)
    assert figures[0].get_figwidth() <= plots.MOST_WIDTH


def test_sites_that_share_a_cell_give_their_median_and_towers_stay_apart(tmp_path: Path, figures: list[Any]) -> None:
    experts = [planned(f"layers.0.experts.{i}.down_proj", rank) for i, rank in enumerate((2, 4, 30))]
    vision = PlannedSite(describe("visual.blocks.0.down_proj", SHAPE, "vision"), 7)
    plot_ranks_heatmap(RankPlan((*experts, vision)), tmp_path / "x.png")
    axis = figures[0].axes[0]
    assert [text.get_text() for text in axis.texts] == ["4", "7"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["language · down_proj", "vision · down_proj"]


def test_loss_marks_both_minima_and_skips_what_was_not_measured(tmp_path: Path, figures: list[Any]) -> None:
    rows = [
        {"step": "10", "loss": "2.5", "eval_loss": ""},
        {"step": "20", "loss": "1.5", "eval_loss": "1.9"},
        {"step": "30", "loss": "nan", "eval_loss": "1.7"},
        {"step": "40", "loss": "1.6", "eval_loss": "1.8"},
    ]
    plot_loss(rows, tmp_path / "x.png")
    axis = figures[0].axes[0]
    assert list(line(axis, "training, least 1.500 at step 20").get_xdata()) == [20.0]
    assert list(line(axis, "validation, least 1.700 at step 30").get_xdata()) == [30.0]
    assert list(axis.lines[0].get_xdata()) == [10.0, 20.0, 40.0]


@pytest.mark.parametrize("rows", [[], [{"step": "1", "loss": ""}], [{"step": "1", "loss": "high"}]])
def test_a_log_without_losses_is_bad_data(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    with pytest.raises(DataError):
        plot_loss(rows, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_scores_are_bars_of_their_height_with_their_intervals(tmp_path: Path, figures: list[Any]) -> None:
    before = EvaluationResult("t", {"rouge_1": 10.0, "bleu": 3.0, "only": 1.0}, {"bleu": (2.0, 5.0)}, 9)
    after = EvaluationResult("t", {"rouge_1": 50.0, "bleu": 60.0}, {"bleu": (58.0, 61.0)}, 9)
    plot_scores({"before": before, "after": after}, tmp_path / "x.png")
    bleu, rouge = figures[0].axes
    assert bleu.get_title(loc="left") == "BLEU" and rouge.get_title(loc="left") == "ROUGE-1"
    assert [bar.get_height() for bar in bleu.patches] == [3.0, 60.0]
    ends = [sorted(float(y) for y in segment[:, 1]) for bars in bleu.collections for segment in bars.get_segments()]
    assert ends == [[2.0, 5.0], [58.0, 61.0]]
    assert not rouge.collections, "no interval was measured, none is drawn"
    with pytest.raises(DataError, match="share no metric"):
        plot_scores({"a": after, "b": EvaluationResult("t", {"other": 1.0}, {}, 9)}, tmp_path / "y.png")


def test_gain_shows_every_arm_and_the_shuffles_in_one_row(tmp_path: Path, figures: list[Any]) -> None:
    arms = [("plan", 0.64), ("uniform", 0.6), ("shuffled 1", 0.58), ("shuffled 2", 0.61)]
    content = {"arms": [{"name": name, "kept": kept, "low": kept - 0.02, "high": kept + 0.02} for name, kept in arms]}
    plot_gain(content, tmp_path / "x.png")
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["plan", "uniform", "2 shuffles"]
    assert [
        float(one.get_xdata()[0]) for one in axis.lines if one.get_marker() == "|" and one.get_markersize() == 13
    ] == [0.58, 0.61]


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"rankwise\[plots\]"):
        plot_ranks_heatmap(ragged_plan(), tmp_path / "x.png")


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_differ_in_lightness_so_that_grey_print_keeps_them_apart() -> None:
    to_rgb = matplotlib.colors.to_rgb
    lightness = sorted(luminance(to_rgb(colour)) ** (1 / 2.2) for colour in (BLUE, GREY, YELLOW))
    assert min(b - a for a, b in itertools.pairwise(lightness)) > 0.15
    shades = [luminance(canvas.colormap()(i / 20)) for i in range(21)]
    assert shades == sorted(shades)


@pytest.mark.parametrize("step", range(11))
def test_numbers_in_cells_are_readable_on_every_shade(step: int) -> None:
    """Contrast of at least 4.5 : 1 (WCAG 2, AA)."""
    shade = luminance(canvas.colormap()(step / 10))
    ink = 0.0 if readable_on(canvas.colormap()(step / 10)) == "black" else 1.0
    assert (max(shade, ink) + 0.05) / (min(shade, ink) + 0.05) >= 4.5
