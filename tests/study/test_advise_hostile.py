"""`rankwise advise` on folders, rows and settings that somebody has damaged, mixed up or chosen badly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_advise import AREAS, NAMES, content, small
from tiny import tiny_llama

from rankwise import cli
from rankwise.data.split import Parts
from rankwise.errors import DataError, Interrupted, UsageError
from rankwise.files.ledger import Ledger
from rankwise.files.run_folder import RunFolder
from rankwise.models.load import load_structure
from rankwise.options.field import anywhere, options_of
from rankwise.study import advice_page, advise, trials
from rankwise.study.execution import finished_runs

Change = Callable[[list[str]], list[str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, rows.csv, run/ with the whole ladder."""
    folder = tmp_path_factory.mktemp("hostile")
    tiny_llama(folder / "base")
    rows = [f'"name[{name}], area[{area}]",{name} is in the {area}.' for name, area in product(NAMES, AREAS)]
    (folder / "rows.csv").write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    advise.run(config(folder, folder / "run"))
    return folder


def config(world: Path, out: Path, **changes: Any) -> Any:
    return small(world / "base", world / "rows.csv", out, **changes)


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    return shutil.copytree(world / "run", tmp_path / "run")


def parts_of(world: Path) -> Parts:
    return advise.parts_of(config(world, world), load_structure(config(world, world).model, str(world / "base")))[0]


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "fit", lambda *_, **__: pytest.fail("trained"))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs that are trained, batch by batch."""
    made, whole = list[int](), trials.fit

    def fit(*arguments: Any, **how: Any) -> Any:
        made.append(len(arguments[1]))
        return whole(*arguments, **how)

    monkeypatch.setattr(trials, "fit", fit)
    return made


def edited(**changes: Any) -> Change:
    return lambda lines: [json.dumps(json.loads(lines[0]) | changes), *lines[1:]]


def without(name: str) -> Change:
    return lambda lines: [json.dumps({key: value for key, value in json.loads(lines[0]).items() if key != name})]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: ["", *lines],
        lambda lines: ["{", *lines],
        lambda lines: ["[1]", *lines],
        edited(seconds="fast"),
        edited(seconds=float("nan")),
        edited(seconds=-3600.0),
        edited(batch=None),
        edited(key={"arm": "energy", "purpose": "tune", "recipe": "0"}),
        edited(key="rank 4"),
        edited(row="0"),
        without("tokens"),
        without("key"),
    ],
)
def test_a_ledger_that_is_none_of_short_runs_is_refused_by_its_line(
    change: Change, world: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a weight is loaded, in a dry run too; nothing is changed."""
    untrained(monkeypatch)
    file = copy / "runs.jsonl"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=r"runs\.jsonl, line 1: not an entry .* or choose another --output_dir"):
        advise.run(config(world, copy))
    with pytest.raises(DataError, match=r"runs\.jsonl, line 1: not an entry"):
        advise.describe(config(world, copy))
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_study_takes_no_short_runs_for_its_own(copy: Path) -> None:
    with pytest.raises(DataError, match=r"runs\.jsonl, line 1: not an entry of a finished run of this command"):
        finished_runs(copy)


def test_lines_twice_and_one_that_was_cut(world: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands twice counts once; what was cut is trained again; copies by another name are nobody's."""
    lines = (copy / "runs.jsonl").read_text().splitlines()
    (copy / "runs.jsonl").write_text("\n".join([*lines[:-1], *lines[:-1], lines[-1][:50]]))
    (copy / "runs.bak.jsonl").write_text("not ours\n")
    made = counted(monkeypatch)
    advise.run(config(world, copy))
    assert sum(made) == 1
    assert content(copy)["advised"] == content(world / "run")["advised"]


def test_without_the_line_of_the_run_that_trained_alone(world: Path, copy: Path) -> None:
    lines = (copy / "runs.jsonl").read_text().splitlines()
    (copy / "runs.jsonl").write_text("\n".join(json.dumps(json.loads(line) | {"batch": 2}) for line in lines) + "\n")
    advise.run(config(world, copy))
    assert content(copy)["learnt"] and json.loads((copy / "advice.json").read_text())["cost"]["peak_bytes"] > 0


def test_numbers_that_are_gone_say_how_to_repeat_their_runs(world: Path, copy: Path) -> None:
    (file,) = {json.loads(line)["file"] for line in (copy / "runs.jsonl").read_text().splitlines()[:1]}
    (copy / file).unlink()
    with pytest.raises(DataError, match=r"cannot be read .* cut .*runs\*\.jsonl off before the lines that name it"):
        advise.run(config(world, copy))
    lines = (copy / "runs.jsonl").read_text().splitlines(keepends=True)
    (copy / "runs.jsonl").write_text("".join(line for line in lines if file not in line))
    advise.run(config(world, copy))
    assert content(copy)["advised"] == content(world / "run")["advised"]


def test_a_row_beyond_its_file(copy: Path) -> None:
    lines = (copy / "runs.jsonl").read_text().splitlines()
    (copy / "runs.jsonl").write_text("\n".join(edited(row=99)(lines)) + "\n")
    with pytest.raises(DataError, match="has no row 99 for a finished run"):
        Ledger(copy).numbers(json.loads(lines[0])["key"], "dev")


def test_factors_that_are_gone_are_trained_again_where_a_placement_is_made_of_them(
    world: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    shutil.rmtree(copy / "factors")
    advise.run(config(world, copy, placements=["mlp"]))
    assert made == []
    advise.run(config(world, copy))
    assert sum(made) == len(
        [trial for trial in content(world / "run")["trials"] if trial["rung"] == "A" and trial["loss"]]
    )
    assert content(copy)["advised"] == content(world / "run")["advised"]


def test_another_largest_rank_in_the_same_folder(world: Path, copy: Path) -> None:
    """Its runs are there, as those of a smaller rank, whose factors were not kept."""
    advise.run(config(world, copy, ranks=[2, 1]))
    assert (content(copy)["rung"], set(content(copy)["placements"])) >= ("E", {"energy"})


def test_factors_of_something_else_are_named(world: Path, copy: Path) -> None:
    for file in (copy / "factors").rglob("*.safetensors"):
        save_file({"weight": torch.zeros(2)}, file)
    lines = (copy / "runs.jsonl").read_text().splitlines(keepends=True)
    (copy / "runs.jsonl").write_text("".join(line for line in lines if json.loads(line)["rung"] < "D"))
    with pytest.raises(DataError, match=r"rank4-.*safetensors: no factors of a finished run .* delete it"):
        advise.run(config(world, copy))
    shutil.rmtree(copy / "factors")
    advise.run(config(world, copy))
    assert all(len(load_file(file)) > 2 for file in (copy / "factors").rglob("*.safetensors"))


def test_a_dry_run_counts_the_runs_of_these_settings_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "\n".join(advise.describe(config(world, world / "run", steps=9)))
    assert "how long that takes is not known before the first run" in told
    assert "minutes reach rung E" in "\n".join(advise.describe(config(world, world / "run")))
    assert not capsys.readouterr().out


def test_items_that_are_not_there_are_named_with_file_and_option(world: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"choose_size": 100, "confirm_size": 20}, "--choose_size 100: 90 different prompts are there for it"),
        ({"choose_size": 20, "confirm_size": 200}, "--confirm_size 200: 110 different prompts are there for it"),
        (
            {"choose_size": 53, "confirm_size": 55},
            "2 rows are left to train on, 4 are needed; lower --batch_size, --choose_size or --confirm_size",
        ),
    ):
        with pytest.raises(DataError) as stop:
            advise.run(config(world, tmp_path / "out", **changes))
        assert str(stop.value).startswith(f"{world / 'rows.csv'}: {said}")
    assert not (tmp_path / "out").exists()


def lengthened(world: Path, tmp_path: Path, part: str, count: int) -> Path:
    """The rows, with long answers for the first of a part's items; the split stays as it is."""
    text = (world / "rows.csv").read_text()
    for item in getattr(parts_of(world), part)[:count]:
        text = text.replace(item.answer, item.answer + " So it is." * 60)
    (tmp_path / "rows.csv").write_text(text)
    return tmp_path / "rows.csv"


def limited(world: Path, rows: Path, out: Path, overlong: str, **changes: Any) -> Any:
    given = config(world, out, minutes=1e-6, **changes)
    return replace(given, data=replace(given.data, data_path=str(rows), max_seq_length=120, overlong=overlong))


@pytest.mark.parametrize("part", ["dev", "test"])
def test_held_out_rows_over_the_limit_are_told_before_anything_is_trained(
    part: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained(monkeypatch)
    rows = lengthened(world, tmp_path, part, 3)
    with pytest.raises(
        DataError, match=r"^held-out items: 3 of 22 samples are longer than 120 tokens.*--overlong drop"
    ):
        advise.run(limited(world, rows, tmp_path / "out", "error"))
    with pytest.raises(DataError, match=r"^held-out items: 3 of 22 samples are longer than 120 tokens without"):
        advise.run(limited(world, rows, tmp_path / "out", "truncate_source"))
    monkeypatch.setattr(advise, "ShortRuns", lambda *_, **__: pytest.fail("prepared"))
    rows = lengthened(world, tmp_path, part, 22)
    with pytest.raises(DataError, match=r"^held-out items: none of 22 samples can be used: 22 longer"):
        advise.run(limited(world, rows, tmp_path / "out", "drop"))
    rows = lengthened(world, tmp_path, part, 21)
    with pytest.raises(DataError, match=r"^held-out items: 1 can be used, of 1 group; at least two"):
        advise.run(limited(world, rows, tmp_path / "out", "drop"))


def test_rows_that_are_dropped_are_counted_in_every_part(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the real run's time is that of the rows it will train on."""
    rows = lengthened(world, tmp_path, "dev", 5)
    advise.run(limited(world, rows, tmp_path / "out", "drop"))
    told = capsys.readouterr().out
    assert told.count("held-out items: warning: 5 samples dropped, longer than the limit") == 1
    assert content(tmp_path / "out")["data"]["choose"] == 22 - 5 and "compared on 17 items" in told
    (tmp_path / "half").mkdir()
    rows = lengthened(world, tmp_path / "half", "train", 16)
    advise.run(limited(world, rows, tmp_path / "half" / "out", "drop"))
    assert "warning: 16 samples dropped" in capsys.readouterr().out
    cost = json.loads((tmp_path / "half" / "out" / "advice.json").read_text())["cost"]
    assert cost["rows"] == round(110 * 16 / 32 * 0.95)


def test_items_of_one_group_carry_no_interval(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 questions about one picture, say."""
    untrained(monkeypatch)
    whole = advise.parts_of

    def grouped(*arguments: Any) -> Any:
        parts, files, count = whole(*arguments)
        return replace(parts, dev=tuple(replace(item, group="one") for item in parts.dev)), files, count

    monkeypatch.setattr(advise, "parts_of", grouped)
    with pytest.raises(DataError, match="held-out items: 22 can be used, of 1 group"):
        advise.run(config(world, tmp_path / "out"))


def test_the_advice_is_trained_from_any_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, rows and plan as given are relative to where `advise` was started; emitted configs, too."""
    monkeypatch.chdir(world)
    out = Path(os.path.relpath(tmp_path / "out"))
    relative = config(Path(), out, minutes=1e-6, emit=["axolotl"])
    advise.run(relative)
    options = yaml.safe_load((tmp_path / "out" / "advice.yaml").read_text())
    assert options["model_name"] == str(world / "base") and options["data_path"] == str(world / "rows.csv")
    item = next(item for item in options_of(relative) if item.name == "device_target")
    assert [anywhere(item, value) for value in ("off", "base", None)] == ["off", str(world / "base"), None]
    assert yaml.safe_load((tmp_path / "out/configs/axolotl.yaml").read_text())["base_model"] == str(world / "base")
    with_plan = advice_page.train_options(relative, content(tmp_path / "out"), out / "advice_plan.json")
    assert with_plan["lora_config"] == str(tmp_path / "out" / "advice_plan.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["train", str(tmp_path / "out" / "advice.yaml"), "-o", "run", "--num_epochs", "0.2"]
    assert cli.main(words) == 0
    assert (tmp_path / "elsewhere/run/adapter_model.safetensors").is_file()


def test_what_train_would_refuse_of_the_advice_is_refused_before(world: Path, tmp_path: Path) -> None:
    """It would stand in advice.yaml."""
    given = config(world, tmp_path / "out")
    for name in ("image_folder", "device_target"):
        with pytest.raises(UsageError, match=f"--{name} acts only on rows that may have images"):
            advise.run(replace(given, data=replace(given.data, **{name: str(world)})))


def test_an_earlier_advice_goes_where_nothing_was_learnt(world: Path, copy: Path) -> None:
    assert (copy / "advice.yaml").is_file()
    advise.run(config(world, copy, rates=[1e-12, 2e-12, 4e-12], minutes=1e-6, steps=9))
    assert not content(copy)["learnt"] and not (copy / "advice.yaml").exists()


def test_the_config_of_another_command_in_the_folder_keeps_its_name(world: Path, tmp_path: Path) -> None:
    """As beside a training run; `go on with` names the file of this command."""
    folder = RunFolder(tmp_path)
    folder.save_config({"learning_rate": 1e-4})
    folder.record("train", {}, {}, 1.0)
    advise.run(config(world, tmp_path, minutes=1e-6))
    assert json.loads((tmp_path / "resolved_config.json").read_text()) == {"learning_rate": 1e-4}
    assert json.loads((tmp_path / "resolved_config.advise.json").read_text())["ranks"] == [4, 2, 1]
    bench, _, _ = advise.prepare(config(world, tmp_path), tmp_path)
    with (
        pytest.raises(Interrupted, match=r"go on with: .*resolved_config\.advise\.json"),
        advise.kept_when_interrupted(config(world, tmp_path), bench),
    ):
        raise KeyboardInterrupt


def test_a_run_of_the_advised_rate_that_diverged_is_told(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no lower rate was tried. Here a fresh seed did diverge, and a lower one is advised."""
    advice = json.loads((world / "run" / "advice.json").read_text())
    assert not any("diverged at this rate" in line for line in advice_page.rate_words(advice))
    lost = [trial for trial in advice["trials"] if trial["loss"] is None and trial["rank"] == advice["advised"]["rank"]]
    assert {trial["rung"] for trial in lost} >= {"E"}
    assert advice["advised"]["learning_rate"] < min(trial["learning_rate"] for trial in lost)
    trial = {**lost[0], "placement": "uniform", "learning_rate": advice["advised"]["learning_rate"]}
    lost = [trial, {**trial, "learning_rate": 1e9}]
    more = advice | {"trials": [*advice["trials"], *lost]}
    figures: list[Any] = []
    monkeypatch.setattr(advice_page, "save", lambda figure, path: figures.append(figure))
    advice_page.plot_advice_rates(more, world / "rates.png")
    crosses = next(line for line in figures[0].axes[0].lines if line.get_label() == "diverged").get_xdata()
    assert {trial["learning_rate"] for trial in lost} <= set(crosses), "the plot shows what the words count"
    told = advice_page.rate_words(more)
    assert "1 run with another seed diverged at this rate or below it: give lower --rates" in told
    assert not any("every rate diverged" in line for line in advice_page.rank_words(advice))
    rates = {rank: found for rank, found in advice["rates"].items() if rank != "2"}
    assert advice_page.rank_words(advice | {"rates": rates})[-1] == "rank 2: every rate diverged, not compared"
