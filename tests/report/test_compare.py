"""A comparison says what the runs' own files say, and leaves blank what they do not."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rankwise import cli
from rankwise.core.site import describe
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.atomic import write_json
from rankwise.page.template import markdown_table
from rankwise.ranks.expert_map import CHANGES, PER_EXPERT
from rankwise.report.compare import SUMMARY, Row, comparison_table, plot_comparison, read_rows, table_text
from rankwise.train.expert_record import EXPERT_COLUMNS, EXPERT_NORMS
from rankwise.train.gradient_table import SiteNorm, views
from rankwise.train.results import RESULTS_SUMMARY

LOSSES = "step,loss,eval_loss\n1,2.0,\n2,1.5,1.75\n3,1.25,1.5\n4,1.0,1.625\n"


def finished_run(folder: Path, kinds: tuple[str, ...], bleu: float | None = None, task: str = "e2e_nlg") -> Path:
    """What `rankwise train` and `evaluate` leave: at step s the norm of attention is s, that of the MLP 4·s."""
    entry = {"stage": "train", "started": "2026-01-01T00:00:00", "seconds": 9.0, "outputs": {}, "inputs": {}}
    entry |= {"trainable_parameters": 1234, "steps": 4, "training_seconds": 8.5}
    write_json(folder / "manifest.json", {"format": "rankwise-manifest/1", "stages": {"train": entry}})
    (folder / "training_log.csv").write_text(LOSSES)
    write_json(folder / "results_summary.json", {"config": {}, "train_loss": 1.4375, "gradient_stats": {}})
    scale = {"attention": 1.0, "mlp": 4.0}
    norms = [
        SiteNorm(step, f"layers.0.{kind}", "language", kind, 0, scale[kind] * step)
        for step in (1, 2, 3)
        for kind in kinds
        if not (kind == "mlp" and step == 3)  # out of phase
    ]
    tables = views(norms)
    for name, rows in (("group", tables.groups), ("layer", tables.layers)):
        with open(folder / f"gradient_analysis.{name}_norms.csv", "w", newline="", encoding="utf-8") as file:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    if bleu is not None:
        scored(folder, bleu, task)
    return folder


def scored(folder: Path, bleu: float, task: str = "e2e_nlg") -> None:
    EvaluationResult(task, {"bleu": bleu, "other": 0.5}, {"bleu": (bleu - 1, bleu + 1)}, 7).save(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    places = [tmp_path / name for name in ("both", "attention", "mlp")]
    for place in places:
        place.mkdir()
    return [
        finished_run(places[0], ("attention", "mlp"), 30.0),
        finished_run(places[1], ("attention",), 20.0),
        finished_run(places[2], ("mlp",)),
    ]


def test_the_numbers_are_those_of_the_runs(runs: list[Path]) -> None:
    assert SUMMARY == RESULTS_SUMMARY
    both, attention, mlp = read_rows(runs)
    for row in (both, attention, mlp):
        assert row.trained == {
            "trainable_parameters": 1234,
            "steps": 4,
            "seconds": 8.5,
            "train_loss": 1.4375,
            "eval_loss": 1.5,
        }
    assert both.gradients == {"attention_mean": 2.0, "mlp_mean": 6.0, "attention_to_mlp_ratio": 0.25}, "1+2 over 4+8"
    assert attention.gradients == {"attention_mean": 2.0, "mlp_mean": None, "attention_to_mlp_ratio": None}
    assert mlp.gradients == {"attention_mean": None, "mlp_mean": 6.0, "attention_to_mlp_ratio": None}
    assert (both.scores["e2e_nlg"]["bleu"], both.scores["e2e_nlg"].intervals["bleu"]) == (30.0, (29.0, 31.0))
    assert mlp.scores == {}


def test_scores_from_before_training_are_left_out(runs: list[Path]) -> None:
    for name, bleu in (("evaluate_before", 1.0), ("after", 40.0)):
        (runs[0] / name).mkdir()
        scored(runs[0] / name, bleu)
    (runs[0] / "evaluation_results.json").unlink()
    assert read_rows(runs[:1])[0].scores["e2e_nlg"]["bleu"] == 40.0


def test_labels_by_likelihood_and_by_generation_are_never_in_one_row(runs: list[Path], tmp_path: Path) -> None:
    """Of one model they may be 100 % and 0 %."""
    for folder, asked, value in ((runs[0], {"classify": "likelihood"}, 100.0), (runs[1], {}, 0.0)):
        settings = asked | {"scoring": {"classify": "how, in words"}}
        EvaluationResult("labels", {"accuracy": value}, {}, 5, settings).save(folder)
    assert cli.main(["compare", *map(str, runs[:2]), "-o", str(tmp_path / "out"), "--no_plots"]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| labels by likelihood: accuracy | 100.00 |  |" in text
    assert "| labels by generation: accuracy |  | 0.000 |" in text


@pytest.mark.usefixtures("drawn_pictures")
def test_the_command_writes_tables_and_a_picture(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, runs), "-o", str(out)]) == 0
    rows: list[dict[str, Any]] = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["both", "attention", "mlp"]
    assert [row["mlp_mean"] for row in rows] == ["6.0", "", "6.0"], "what did not train is blank, not 0"
    assert [row["e2e_nlg.bleu"] for row in rows] == ["30.0", "20.0", ""]
    assert [row["e2e_nlg.bleu.low"] for row in rows] == ["29.0", "19.0", ""]
    content = json.loads((out / "comparison.json").read_text())
    assert [run["attention_mean"] for run in content["runs"]] == [2.0, 2.0, None]
    assert content["runs"][0]["scores"]["e2e_nlg"]["intervals_95"]["bleu"] == [29.0, 31.0]
    text = (out / "comparison.md").read_text()
    assert "| e2e_nlg: BLEU | 30.00 \\[29.00, 31.00\\] | 20.00 \\[19.00, 21.00\\] |  |" in text
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "comparison.png").stat().st_size > 5000
    assert cli.main(["compare", *map(str, runs), "-o", str(tmp_path / "bare"), "--no_plots"]) == 0
    assert not (tmp_path / "bare" / "comparison.png").exists()


def test_a_panel_for_everything_that_there_is(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("rankwise.page.canvas.save", lambda figure, path: drawn.append(figure) or path)
    plot_comparison(read_rows(runs), tmp_path / "picture.png")
    panels = drawn[0].axes
    assert [axis.get_xlabel() for axis in panels] == [
        "gradient norm, mean over steps",
        "loss (nats per token)",
        "e2e_nlg: BLEU",
        "e2e_nlg: other",
    ]
    attention, mlp = panels[0].lines
    assert (list(attention.get_xdata()), list(attention.get_ydata())) == ([2.0, 2.0], [0, 1])
    assert (list(mlp.get_xdata()), list(mlp.get_ydata())) == ([6.0, 6.0], [0, 2])
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["both", "attention", "mlp"]
    assert len(panels[2].containers) == 2, "the run without scores has no mark"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("both",), 2, "two run folders"),
        (("both", "both"), 2, "named twice"),
        (("both", "none"), 3, "no such file or folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: tuple[str, ...], code: int, said: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(tmp_path / word) for word in words]
    assert cli.main(["compare", *folders, "-o", str(tmp_path / "out")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_one_name_are_told_apart_and_names_cannot_break_the_table(tmp_path: Path) -> None:
    places = [tmp_path / one / "same" for one in ("a", "b")]
    for place in places:
        place.mkdir(parents=True)
        finished_run(place, ("mlp",))
    assert [row.name for row in read_rows(places)] == ["a/same", "b/same"]
    trained = {"train_loss": 0.5, "eval_loss": math.pi}
    text = markdown_table(comparison_table([Row("a|b", "x", trained), Row("c", "y", trained)]))
    assert text[:3] == ["|  | a\\|b | c |", "|---|---:|---:|", "| train loss | 0.5 | 0.5 |"]


def with_experts(folder: Path, scale: float) -> Path:
    """A run whose adapter changes two layers of two experts, as `train --log_frequency 1` leaves its table."""
    lines = [",".join(EXPERT_COLUMNS)]
    for step in (1, 2):
        for layer, deltas in ((0, "1 0"), (1, f"{scale} 2")):
            place = f"model.layers.{layer}.mlp.experts.down_proj"
            lines.append(f"{step},{place},{layer},2,2,,{3 * step} {4 * step},{deltas}")
    (folder / EXPERT_NORMS).write_text("\n".join(lines) + "\n")
    return folder


def test_runs_of_mixtures_are_compared_by_parameter_and_by_expert(runs: list[Path], tmp_path: Path) -> None:
    with_experts(runs[0], 2.0)
    with_experts(runs[1], 0.0)
    one, other, none = read_rows(runs)
    assert one.experts["norms"] == {"down_proj": 7.5}, "5 and 10, all experts together, over two steps"
    assert one.experts["changes"] == {"down_proj": 9.0}
    assert one.experts["movers"] == {
        "layer 1, expert 0": 4 / 9,
        "layer 1, expert 1": 4 / 9,
        "layer 0, expert 0": 1 / 9,
        "layer 0, expert 1": 0.0,
    }
    assert other.experts["movers"]["layer 1, expert 1"] == 0.8
    assert none.experts == {}
    assert "experts" not in none.record()
    lines = {line[0]: line[1:] for line in comparison_table([one, other, none]).rows}
    assert lines["down_proj of all experts, squared change"] == ["9", "5", ""]
    assert lines["most moved expert, 1"][2] == ""
    assert lines["most moved expert, 1"][1].startswith("layer 1, expert 1 (80")
    (table,) = csv.DictReader(table_text([one]).splitlines())
    assert float(table["experts.norms.down_proj"]) == 7.5


def test_runs_of_ranks_are_compared_by_what_moved(runs: list[Path]) -> None:
    row = describe("model.layers.3.mlp.experts.down_proj", (8, 6), experts=2).as_dict()
    row |= {name: [0.0, 0.0] for name in PER_EXPERT} | {"energy": [1.0, 3.0]}
    CHANGES.write(runs[2], {"svd_threshold": 0.9, "parameters": [row]})
    found = read_rows(runs)[2].experts
    assert found == {
        "norms": {},
        "changes": {"down_proj": 4.0},
        "movers": {"layer 3, expert 1": 0.75, "layer 3, expert 0": 0.25},
    }
