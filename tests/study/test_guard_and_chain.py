"""A new option orphans no study of before, and a ledger shows what was altered, taken out or put in."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_study import small

from rankwise import cli
from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import digest
from rankwise.files.ledger import Ledger
from rankwise.options.field import flatten, option
from rankwise.options.study import StudyConfig
from rankwise.study import command as stage
from rankwise.study import execution
from rankwise.study.design import FIRST_OPTIONS, Run, design_study, run_counts
from rankwise.study.execution import finished_runs
from rankwise.study.predictions import power, predicted
from rankwise.study.registration import FILE, ITEMS, TEST_READ, Registration, declared_changes

STUDY = Path(__file__).parent / "data" / "first"  # written before there were chains; never made anew


@dataclass(frozen=True)
class Newer(StudyConfig):
    """A study of a later version."""

    dummy: int = option(3, help="an option that is new")


def newer(config: StudyConfig, **changes: Any) -> Newer:
    return Newer(**{each.name: getattr(config, each.name) for each in fields(config)}, **changes)


@pytest.fixture(scope="module")
def done(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    stage.run(own(base, data, out))
    return out


def own(base: Path, data: Path, out: Path, **changes: Any) -> StudyConfig:
    """Tiny, with predictions and an assumed spread."""
    given = {
        "arms": ["uniform", "energy", "inverted"],
        "most_seeds": 2,
        "predictions": ["energy vs uniform: not worse: a guess", "inverted vs uniform: worse"],
        "assumed_seed_sd": 0.03,
        "assumed_item_sd": 0.1,
        "smallest_effect": 0.02,
    }
    return small(base, data, out, **given | changes)


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


# --- options ---------------------------------------------------------------------------------------------------------


def frozen() -> tuple[StudyConfig, dict[str, Any]]:
    config, _ = cli.resolve("study", [str(STUDY / "resolved_config.json")])
    assert isinstance(config, StudyConfig)
    return config, Registration(STUDY).first["content"]


@pytest.mark.parametrize("later", [lambda config: config, newer], ids=["now", "with a new option"])
def test_a_frozen_registration_and_its_ledger_are_accepted(later: Callable[[StudyConfig], StudyConfig]) -> None:
    config, content = frozen()
    design = design_study(later(config))
    assert declared_changes_of(design.content | {"inputs": content["inputs"]}) == {}
    recipe = digest([design.recipe, content["inputs"]])[:16]
    assert {row["key"]["recipe"] for row in finished_runs(STUDY).rows.values()} == {recipe}


def declared_changes_of(content: dict[str, Any]) -> dict[str, Any]:
    """Without the versions of libraries, which are not those of then."""
    try:
        found = declared_changes(STUDY, content, "libraries")
    except UsageError as error:
        pytest.fail(str(error))
    return {name: change for name, change in found.items() if not name.startswith("version of")}


def test_a_new_option_changes_hashes_only_where_it_is_not_at_its_default() -> None:
    config, _ = frozen()
    before, same, other = (design_study(each) for each in (config, newer(config), newer(config, dummy=4)))
    assert (same.content, same.recipe) == (before.content, before.recipe)
    assert other.content == {**before.content, "dummy": 4} and other.recipe != before.recipe


def test_the_first_options_are_in_every_hash() -> None:
    assert set(frozen()[1]) - {"inputs"} == FIRST_OPTIONS
    assert set(flatten(StudyConfig())) >= FIRST_OPTIONS
    assert set(design_study(frozen()[0]).content) == FIRST_OPTIONS


def test_a_finished_study_goes_on_under_a_version_with_more_options(
    copy: Path,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution.Bench, "make", lambda *_: pytest.fail("a run was repeated"))
    stage.run(newer(own(base, data, copy)))
    with pytest.raises(UsageError, match=r"registered otherwise:\n  dummy: None → 4"):
        stage.run(newer(own(base, data, copy), dummy=4))


def test_the_arm_that_was_called_eva_keeps_its_registration_and_runs(base: Path, data: Path, tmp_path: Path) -> None:
    """`eva` was ranks and start; today that is `eva+start`, and `eva` are ranks only."""
    started, ranks = (design_study(small(base, data, tmp_path, arms=["uniform", arm])) for arm in ("eva+start", "eva"))
    assert started.content["arms"] == ["uniform", "eva"] and started.content["primary"] == ["eva vs uniform"]
    assert ranks.content["arms"] == ["uniform", "eva-ranks"]
    assert [Run(design.contenders[1], "", 0.1, 1, "", "").key["arm"] for design in (started, ranks)] == [
        "eva",
        "eva-ranks",
    ]


# --- the chain -------------------------------------------------------------------------------------------------------


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def canonical(content: Any) -> str:
    return sha(json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


def test_every_line_has_the_hash_of_the_one_before_its_items_and_its_ranks(done: Path) -> None:
    """By nothing but the files: what a checker that shares no code can do."""
    registration = json.loads((done / FILE).read_text())
    items = json.loads((done / ITEMS.name).read_text())
    items.pop("format")
    start = {"registration": registration["sha256"], "items": canonical(items)}
    previous = canonical({"file": "runs.jsonl", "start": start})
    lines = (done / "runs.jsonl").read_bytes().split(b"\n")[:-1]
    for line in lines:
        row = json.loads(line)
        assert row["previous"] == previous
        previous = sha(line)
        content = (done / row["file"]).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        for name, expected in row["items"].items():
            first, last = header[name]["data_offsets"]
            matrix = np.frombuffer(content[8 + length + first : 8 + length + last], "<f8").reshape(
                header[name]["shape"]
            )
            assert sha(matrix[row["row"]].tobytes()) == expected
            assert matrix.shape[1] == len(items[name]["tokens"]) == len(set(items[name]["ids"]))
        ranks = json.loads((done / "ranks" / f"{row['ranks'][:16]}.json").read_text())
        assert canonical(ranks) == row["ranks"]
        assert sum(rank * sum(items["sites"][path][:2]) for path, rank in ranks.items()) == row["parameters"]
    head = {"file": "runs.jsonl", "lines": len(lines), "sha256": previous}
    assert json.loads((done / "runs.head.json").read_text()) == {"format": "rankwise-ledger-head/1", **head}
    assert json.loads((done / TEST_READ).read_text())["heads"] == {
        "runs.jsonl": {"lines": len(lines), "sha256": previous}
    }
    assert {len(items[part]["groups"]) for part in ("dev", "test")} == {5, 6} and items["test"]["groups"][0] == 0


def altered(line: str) -> str:
    row = json.loads(line)
    row["parameters"] += 1
    return json.dumps(row, ensure_ascii=False)


@pytest.mark.parametrize(
    "doctored",
    [
        lambda lines: [altered(lines[0]), *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[0]],
        lambda lines: [*lines, json.dumps({n: v for n, v in json.loads(lines[0]).items() if n != "previous"})],
    ],
    ids=["altered", "first out", "one out", "two swapped", "one twice", "one unchained"],
)
def test_a_line_that_does_not_follow(copy: Path, base: Path, data: Path, doctored: Any) -> None:
    file = copy / "runs.jsonl"
    file.write_text("\n".join(doctored(file.read_text().splitlines())) + "\n")
    with pytest.raises(VerificationError, match=r"runs\.jsonl, line \d+: does not follow from what is before it"):
        stage.run(own(base, data, copy))


def test_a_chain_goes_on_where_it_was_cut_off(copy: Path, base: Path, data: Path) -> None:
    file = copy / "runs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:40])
    stage.run(own(base, data, copy))
    again = file.read_text().splitlines(keepends=True)
    assert len(again) == len(lines) and again[:-2] == lines[:-2]
    assert Registration(copy).test_read is not None


def test_a_ledger_of_before_is_read_and_chained_on(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STUDY, tmp_path / "study"))
    old = finished_runs(folder, {"registration": "r", "items": "i"})
    count, last = len(old), (folder / "runs.jsonl").read_bytes().splitlines()[-1]
    assert count == len(finished_runs(folder))
    key = {**next(iter(old.rows.values()))["key"], "seed": 7}
    old.add([{"key": key, "seconds": 1.0}], {"dev": torch.zeros(1, 4, dtype=torch.float64)})
    assert old[key]["previous"] == sha(last)
    assert len(finished_runs(folder, {"registration": "r", "items": "i"})) == count + 1


def test_a_ledger_without_a_start_has_no_chain(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add([{"key": {"arm": "a"}, "seconds": 1.0}], {"dev": torch.zeros(1, 2)})
    assert "previous" not in ledger[{"arm": "a"}] and not list(tmp_path.glob("*.head.json"))


REFEREE = Path(__file__).parents[2] / "benchmarks" / "referee"


@pytest.mark.parametrize(("name", "runs"), [("smollm2", 66), ("stories260k_e2e", 936), ("stories260k_samsum", 936)])
def test_the_referees_studies_are_designs_with_power_and_predictions(name: str, runs: int) -> None:
    config, _ = cli.resolve("study", [str(REFEREE / f"{name}.yaml"), "--model_name", "model", "--data_path", "data"])
    assert isinstance(config, StudyConfig)
    design = design_study(config)
    counts = run_counts(design)
    assert counts["least"] == counts["most"] == runs and len(design.pairs()) == 3
    named = predicted(config, design.arms, design.contrasts)
    assert set(design.contrasts) | {("inverted", "uniform")} == set(named)
    assert named["fisher", "uniform"].word == "equivalent" and named["inverted", "uniform"].word == "worse"
    assert [row["true"] for row in power(config, 3)[:2]] == [0.0, -config.smallest_effect]


def test_the_packaged_referee_is_the_design_of_smollm2() -> None:
    """But for what belongs to a model: its rates, spreads, words; every primary contrast is predicted in both."""
    files = ("referee", str(REFEREE / "smollm2.yaml"))
    found = [cli.resolve("study", [file, "--model_name", "m", "--data_path", "d"])[0] for file in files]
    one, other = (design_study(config) for config in found if isinstance(config, StudyConfig))
    own = {"question", "predictions", "grid_low", "grid_growth", "assumed_seed_sd", "assumed_item_sd", "seed"}
    differing = {name for name in one.content | other.content if one.content.get(name) != other.content.get(name)}
    assert differing == own
    assert (
        predicted(one.config, one.arms, one.contrasts).keys() == predicted(other.config, one.arms, one.contrasts).keys()
    )


# --- predictions and power -------------------------------------------------------------------------------------------


def test_predictions_are_registered_and_shown_beside_the_verdicts(done: Path) -> None:
    content = Registration(done).first["content"]
    assert content["predictions"][0] == "energy vs uniform: not worse: a guess"
    study, page = json.loads((done / "study.json").read_text()), (done / "study.md").read_text()
    (verdict,) = study["verdicts"]
    assert verdict["prediction"] == "not worse" and verdict["predicted_because"] == "a guess"
    expected = {"better": True, "equivalent": True, "worse": False, "undecided": None}
    assert verdict["as_predicted"] is expected[verdict["verdict"]]
    assert study["assay"][0]["predictions"]["uniform"]["prediction"] == "worse"
    assert page.count("Predicted beforehand: ") == 2 and "not worse (a guess)" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictions": ["energy vs uniform"]}, "ARM vs ARM: OUTCOME"),
        ({"predictions": ["energy vs uniform: good"]}, "outcomes are better"),
        ({"predictions": ["energy vs other: better"]}, "unknown arm"),
        ({"predictions": ["uniform vs energy: better"]}, "no verdict is given on it"),
        ({"predictions": ["energy vs uniform: better", "energy vs uniform: worse"]}, "there twice"),
        ({"primary_budgets": ["uniform:4"]}, "--primary_budgets"),
        ({"assumed_item_sd": None}, "needs both"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    base: Path,
    data: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        design_study(own(base, data, tmp_path, **changes))


def test_the_power_is_kept_in_the_registration_and_printed_before(done: Path, base: Path, data: Path) -> None:
    config = own(base, data, done)
    rows = Registration(done).first["power"]
    assert rows == power(config, 1) and [row["true"] for row in rows] == [0.0, -0.02]
    assert any(
        line.startswith("power: at 2 seeds, a true difference of 0.02 comes out") for line in stage.describe(config)
    )


def test_the_power_grows_with_seeds_and_is_that_of_the_tests(base: Path, data: Path, tmp_path: Path) -> None:
    """One contrast, hardly any spread between items: Student's t with a known non-centrality."""
    config = own(base, data, tmp_path, first_seeds=8, most_seeds=16, assumed_seed_sd=0.02, assumed_item_sd=1e-9)
    rows = {(row["true"], row["seeds"]): row for row in power(config, 1)}
    for seeds in (8, 16):
        shift = 0.02 / (0.02 / seeds**0.5)
        critical = stats.t.ppf(0.975, seeds - 1)
        assert rows[-0.02, seeds]["better"] == pytest.approx(stats.nct.sf(critical, seeds - 1, shift), abs=0.05)
        null = rows[0.0, seeds]
        assert null["better"] + null["worse"] <= 0.07
    assert rows[0.0, 16]["equivalent"] > rows[0.0, 8]["equivalent"] > 0.3
    assert all(
        sum(row[word] for word in ("better", "worse", "equivalent", "undecided")) == pytest.approx(1)
        for row in rows.values()
    )


def test_secondary_budgets_have_differences_and_no_verdict(base: Path, data: Path, tmp_path: Path) -> None:
    budgets, primary = ["uniform:3", "uniform:2"], ["energy vs uniform", "inverted vs energy"]
    arms = ["uniform", "energy", "inverted"]
    config = own(base, data, tmp_path, budgets=budgets, primary_budgets=["uniform:3"], primary=primary, arms=arms)
    design = design_study(config)
    assert [(one.arm, two.arm, one.budget) for one, two in design.pairs()] == [
        ("energy", "uniform", "uniform:3"),
        ("inverted", "energy", "uniform:3"),
    ]
    stage.run(config)
    study = json.loads((tmp_path / "study.json").read_text())
    assert {row["budget"] for row in study["verdicts"]} == {"uniform:3"}
    told = {(row["first"], row["second"], row["budget"]): row["primary"] for row in study["differences"]}
    assert told["energy", "uniform", "uniform:2"] is False and told["energy", "uniform", "uniform:3"] is True
    assert ("inverted", "energy", "uniform:2") in told and ("inverted", "energy", "uniform:3") not in told
