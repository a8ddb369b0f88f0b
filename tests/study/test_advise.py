"""`rankwise advise` at its smallest: the whole ladder, what it writes, what it refuses, what an interruption costs."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import processes
import pytest
import torch
import yaml
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from tiny import tiny_llama

from rankwise import cli
from rankwise.errors import DataError, DivergedError, Interrupted, UsageError
from rankwise.files.ledger import Ledger
from rankwise.options.advise import AdviseConfig
from rankwise.options.field import option
from rankwise.options.sections import DataSection, ModelSection
from rankwise.page.blocks import lines
from rankwise.report.report import build_report
from rankwise.study import advice_page, advise, climb, footprint, material, trials
from rankwise.study.advice import effect
from rankwise.study.advice_content import open_width

NAMES = ("The Vaults", "Alimentum", "Cotto", "Zizzi", "Aromi", "Fitzbillies", "Strada", "Giraffe", "Wildwood", "Clowns")
AREAS = (
    "riverside",
    "city centre",
    "north",
    "old town",
    "harbour",
    "market",
    "hill",
    "park",
    "station",
    "south",
    "mill",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 meaning representations."""
    rows = [f'"name[{name}], area[{area}]",{name} is in the {area}.' for name, area in product(NAMES, AREAS)]
    file = tmp_path_factory.mktemp("data") / "trainset.csv"
    file.write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    return file


def small(base: Path, data: Path, out: Path, **changes: Any) -> AdviseConfig:
    given = {"steps": 8, "batch_size": 4, "ranks": [4, 2, 1], "rates": [3e-3, 1e-2, 3e-2], "delta": 0.1}
    return AdviseConfig(
        model=ModelSection(model_name=str(base)),
        data=DataSection(task="e2e_nlg", data_path=str(data)),
        **given | {"output_dir": str(out), "no_plots": True, "device": "cpu"} | changes,
    )


@dataclass(frozen=True)
class NewerAdvise(AdviseConfig):
    """A command of a later version."""

    dummy: int = option(3, help="an option that is new")


def test_a_new_option_keeps_the_short_runs_of_before(base: Path, data: Path, tmp_path: Path) -> None:
    config = small(base, data, tmp_path)
    given = {each.name: getattr(config, each.name) for each in fields(config)}
    before, same, other = map(advise.trial_settings, (config, NewerAdvise(**given), NewerAdvise(**given, dummy=4)))
    assert same == before and set(before) == advise.FIRST_OPTIONS
    assert other == before | {"dummy": 4}


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("advise")
    advise.run(small(base, data, out))
    return out


def content(folder: Path) -> dict[str, Any]:
    """advice.json without times."""
    found = json.loads((folder / "advice.json").read_text())
    for row in (*found["trials"], *found["open"]):
        row.pop("seconds")
    for name in ("seconds_per_run", "cost"):
        found.pop(name)
    return found


def test_the_whole_ladder_is_climbed_and_written_down(finished: Path) -> None:
    advice = content(finished)
    assert (advice["rung"], advice["open"], advice["learnt"]) == ("E", [], True)
    assert {trial["rung"] for trial in advice["trials"]} == set("ABCDE")
    assert {trial["placement"] for trial in advice["trials"]} == {"uniform", "attention", "mlp", "energy"}
    assert advice["gain"]["estimate"] == pytest.approx(
        advice["base_loss"] - min(t["loss"] or math.inf for t in advice["trials"] if t["rung"] == "A")
    )
    text = (finished / "advice.md").read_text()
    assert all(subject in text for subject in ("learning rate", "rank", "placement", "loss expected"))


def test_items_kept_back_are_scored_for_the_last_comparison_alone(finished: Path) -> None:
    ledger = Ledger(finished)
    for row in ledger.rows.values():
        assert len(ledger.numbers(row["key"], "dev")) == 22
        if row["rung"] in "CE":
            assert len(ledger.numbers(row["key"], "test")) == 22
        else:
            with pytest.raises(DataError, match="cannot be read"):
                ledger.numbers(row["key"], "test")


def test_placements_spend_the_same_parameters(finished: Path) -> None:
    rows = Ledger(finished).rows.values()
    spent = {row["key"]["placement"]: row["parameters"] for row in rows if row["rung"] in "DE"}
    assert len(spent) == 4
    assert max(spent.values()) - min(spent.values()) <= 0.1 * max(spent.values())


def test_ranks_by_eva_are_of_training_rows_alone_without_their_padding(base: Path, data: Path, tmp_path: Path) -> None:
    """Every row by itself, unpadded, its inputs centred over all of them; no row that decides or confirms is read."""
    config = small(base, data, tmp_path)
    bench, _, _ = advise.prepare(config, tmp_path)
    material, found = bench.material, bench.eva_gains
    rows = [row["input_ids"] for row in material.rows]
    seen: dict[str, list[torch.Tensor]] = {site.path: [] for site in material.sites}
    for path, inputs in seen.items():
        material.model.get_submodule(path).register_forward_pre_hook(
            lambda _, x, to=inputs: to.append(x[0][0].double())
        )
    with torch.no_grad():
        for ids in rows:
            material.model(input_ids=torch.tensor([ids]))
    assert len({len(ids) for ids in rows}) > 1 and len(rows) <= trials.EVA_ROWS
    for site, gains in found.items():
        inputs = torch.cat(seen[site.path])
        shares = torch.linalg.svdvals(inputs - inputs.mean(0)).square()
        torch.testing.assert_close(gains, (shares / shares.sum())[: len(gains)], atol=1e-5, rtol=0)


def test_train_runs_the_advice_unchanged(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    advice, options = content(finished)["advised"], yaml.safe_load((finished / "advice.yaml").read_text())
    whole = json.loads((finished / "advice.json").read_text())
    real = whole["real_run"]
    assert real["steps"] == whole["cost"]["steps"] > whole["steps"]
    assert options["learning_rate"] == real["learning_rate"] < advice["learning_rate"]
    assert options["lora_dropout"] == 0
    program, *words = shlex.split(advise.next_command(small(base, data, finished)))
    assert program == "rankwise"
    assert cli.main([*words, "-o", str(tmp_path), "--num_epochs", "0.2"]) == 0
    assert PeftConfig.from_pretrained(tmp_path).r == advice["rank"] == options["lora_r"]


def test_another_placement_is_advised_as_a_plan(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the verdict says better: forced here by taking a constant off the losses of MLP-only adapters."""
    whole = trials.fit

    def flattered(model: Any, arms: Sequence[Any], *rest: Any, **how: Any) -> Any:
        found = whole(model, arms, *rest, **how)
        bonus = torch.tensor([50.0 * all("mlp" in path for path in arm.start) for arm in arms])
        return replace(found, losses={name: matrix - bonus[:, None] for name, matrix in found.losses.items()})

    monkeypatch.setattr(trials, "fit", flattered)
    advise.run(small(base, data, tmp_path / "advise", ranks=[4, 2], delta=None))
    advice = content(tmp_path / "advise")
    assert (advice["placement"]["verdict"], advice["advised"]["placement"]) == ("better", "mlp")
    config = str(tmp_path / "advise" / "advice.yaml")
    assert cli.main(["train", config, "-o", str(tmp_path / "train"), "--num_epochs", "0.2"]) == 0
    adapted = load_file(tmp_path / "train" / "adapter_model.safetensors")
    assert adapted and all(".mlp." in name for name in adapted)


def test_what_is_finished_is_not_trained_again(
    finished: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(finished)
    monkeypatch.setattr(trials, "fit", lambda *_, **__: pytest.fail("trained again"))
    advise.run(small(base, data, finished))
    assert content(finished) == before
    assert "next: rankwise train" in capsys.readouterr().out


@pytest.mark.parametrize("after", [1, 3])
def test_an_interruption_costs_one_batch_and_changes_nothing(
    after: int, finished: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, made = trials.fit, []

    def cut(*arguments: Any, **how: Any) -> Any:
        made.append(len(arguments[1]))
        if len(made) > after:
            raise KeyboardInterrupt
        return whole(*arguments, **how)

    monkeypatch.setattr(trials, "fit", cut)
    with pytest.raises(Interrupted, match=r"interrupted: \d+ finished short runs? kept in") as stop:
        advise.run(small(base, data, tmp_path))
    assert stop.value.exit_code == 130
    assert len(Ledger(tmp_path)) == sum(made[:after])
    assert not (tmp_path / "advice.json").exists()
    monkeypatch.setattr(trials, "fit", whole)
    _, *words = shlex.split(str(stop.value).partition("go on with: ")[2])
    assert cli.main(words) == 0
    assert content(tmp_path) == content(finished)


def test_trials_of_other_settings_are_not_taken_over(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    keys = {row["key"]["recipe"] for row in Ledger(finished).rows.values()}
    for changes in ({"steps": 9}, {"lr_scheduler_type": "cosine"}, {"choose_size": 21}, {"target": "mlp_only"}):
        config = small(base, data, tmp_path, **changes)
        assert advise.trial_settings(config) != advise.trial_settings(small(base, data, finished))
    longer = small(base, data, tmp_path, minutes=90, delta=0.5, placements=["mlp"], emit=["peft"], batch_arms=2)
    assert advise.trial_settings(longer) == advise.trial_settings(small(base, data, finished))
    assert len(keys) == 1


def test_the_kind_of_rows_is_seen_in_the_rows(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    config = replace(small(base, data, tmp_path, minutes=1e-6), data=DataSection(data_path=str(data)))
    advise.check(config)  # before anything else, by the command line
    advise.run(config)
    keys, asked = Ledger(tmp_path).rows, Ledger(finished).rows
    assert keys and set(keys) < set(asked)  # recognised and given are the same runs
    assert yaml.safe_load((tmp_path / "advice.yaml").read_text())["task"] == "e2e_nlg"


def test_factors_of_other_settings_are_not_taken_over(base: Path, data: Path, tmp_path: Path) -> None:
    """Ranks by energy come from the factors of the best run: another length in that folder must not replace them."""
    for steps in (8, 9):
        advise.run(small(base, data, tmp_path, steps=steps, minutes=1e-6))
    kept = {file: file.read_bytes() for file in (tmp_path / "factors").rglob("*.safetensors")}
    trained = [row for row in Ledger(tmp_path).rows.values() if not row["diverged"]]
    assert len(kept) == len(trained)
    assert len(set(kept.values())) == len(kept)


def test_the_time_limit_ends_the_climb_and_more_time_goes_on(base: Path, data: Path, tmp_path: Path) -> None:
    advise.run(small(base, data, tmp_path, minutes=1e-6))
    advice = content(tmp_path)
    assert (advice["rung"], advice["rank"], advice["loss"]) == ("A", None, None)
    assert [row["rung"] for row in advice["open"]] == ["B", "C", "D", "E"]
    assert yaml.safe_load((tmp_path / "advice.yaml").read_text())["lora_r"] == 4
    first = {tuple(trial.values()) for trial in advice["trials"]}
    advise.run(small(base, data, tmp_path, minutes=30))
    assert content(tmp_path)["rung"] == "E"
    assert first < {tuple(trial.values()) for trial in content(tmp_path)["trials"]}


def test_where_nothing_is_learnt_nothing_is_advised(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advise.run(small(base, data, tmp_path, rates=[1e-12, 2e-12, 4e-12]))
    assert "nothing was learnt" in capsys.readouterr().out
    assert (tmp_path / "advice.json").is_file() and not (tmp_path / "advice.yaml").exists()


def test_where_every_rate_diverges_the_runs_are_kept(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="every learning rate diverged"):
        advise.run(small(base, data, tmp_path, rates=[1e20, 1e21, 1e22]))
    assert len(Ledger(tmp_path)) == 6
    assert all(row["diverged"] for row in Ledger(tmp_path).rows.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": [4]}, "at least two different ranks"),
        ({"ranks": [4, 4]}, "at least two different ranks"),
        ({"ranks": [4096, 1]}, "above ⌊mn/"),
        ({"rates": [1e-3, 1e-2]}, "at least three"),
        ({"rates": [1e-3, 1e-3, 1e-2]}, "at least three"),
        ({"target": "attention_only", "placements": ["mlp"]}, "--placements mlp"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(
    changes: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UsageError, match=message):
        advise.run(small(base, data, tmp_path, **changes))


def test_without_ranks_they_end_where_the_matrices_do(base: Path, data: Path, tmp_path: Path) -> None:
    told = "\n".join(advise.describe(small(base, data, tmp_path, ranks=[])))
    assert "at rank 10, then" in told and "B 10, C 13" in told


def test_too_few_rows_are_refused_with_the_number_that_is_needed(base: Path, data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:60]))
    with pytest.raises(DataError, match=r"59 different prompts are too few .* needs 100"):
        advise.run(small(base, few, tmp_path / "out"))
    assert not (tmp_path / "out" / "runs.jsonl").exists()


def test_a_dry_run_names_the_runs_and_guesses_no_time(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    told = "\n".join(advise.describe(small(base, data, tmp_path)))
    assert "A 4, B 10, C 13, D 16, E 20" in told and "not known before the first run" in told
    told = "\n".join(advise.describe(small(base, data, finished, minutes=1000)))
    assert "1000 minutes reach rung E" in told


def test_two_processes_share_the_runs_and_advise_what_one_does(
    finished: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    config = replace(small(base, data, tmp_path / "two"), batch_arms=2)
    advise.RunFolder(tmp_path / "two").save_config(config, "advise.json")
    result = processes.run("-m", "rankwise.cli", "advise", tmp_path / "two" / "advise.json", count=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("next: rankwise train") == 1
    shares = [len((tmp_path / "two" / name).read_text().splitlines()) for name in ("runs.jsonl", "runs.1.jsonl")]
    assert min(shares) > 0 and sum(shares) == len(Ledger(finished))
    one, two = content(finished), content(tmp_path / "two")
    assert two["advised"] == one["advised"]
    losses = [[trial["loss"] or math.nan for trial in each["trials"]] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5, nan_ok=True)


def test_the_report_shows_the_advice(finished: Path, tmp_path: Path) -> None:
    page = build_report(finished, tmp_path / "report.html").read_text()
    assert "loss expected" in page and "rank 2 loses" in page


def test_the_advice_as_configs_of_other_trainers(
    finished: Path, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has no place in a file is said; rank, alpha and rate are those of advice.yaml."""
    every = ["peft", "axolotl", "swift", "unsloth", "llamafactory"]
    out = shutil.copytree(finished, tmp_path / "advise")
    advise.run(small(base, data, out, emit=every, num_epochs=2))
    told, advised, configs = capsys.readouterr().out, content(out)["advised"], out / "configs"
    rate = content(out)["real_run"]["learning_rate"]
    peft = json.loads((configs / "peft.json").read_text())
    assert (peft["r"], peft["lora_alpha"], peft["lora_dropout"]) == (advised["rank"], 2 * advised["rank"], 0)
    assert LoraConfig(**peft).r == advised["rank"]
    axolotl = yaml.safe_load((configs / "axolotl.yaml").read_text())
    assert (axolotl["learning_rate"], axolotl["lr_scheduler"]) == (rate, "linear")
    assert (axolotl["micro_batch_size"], axolotl["num_epochs"], axolotl["lora_dropout"]) == (4, 2, 0)
    for name in ("swift", "llamafactory"):
        options = yaml.safe_load((configs / f"{name}.yaml").read_text())
        assert (options["learning_rate"], options["lr_scheduler_type"]) == (rate, "linear")
        assert (options["per_device_train_batch_size"], options["num_train_epochs"]) == (4, 2)
        assert (options["lora_rank"], options["warmup_ratio"]) == (advised["rank"], 0)
    for name in ("peft", "unsloth"):
        assert f"{name} takes the adapter only; set in your training script: learning_rate" in told
    assert "axolotl takes" not in told


def test_a_trainer_that_cannot_take_the_advice_is_named_when_all_is_written(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that differ by matrix: where a matrix is too small for the largest."""
    monkeypatch.setattr(trials.ShortRuns, "ranks", unequal)
    with pytest.raises(UsageError, match=r"--emit swift: it takes one rank for all .* everything else is written"):
        advise.run(small(base, data, tmp_path, minutes=1e-6, emit=["swift", "peft"]))
    assert (tmp_path / "configs" / "peft.json").is_file() and (tmp_path / "advice.yaml").is_file()
    assert not (tmp_path / "configs" / "swift.yaml").exists()


def unequal(bench: trials.ShortRuns, trial: Any) -> dict[Any, int]:
    return {site: 2 + place % 2 for place, site in enumerate(bench.material.sites)}


def test_what_does_not_fit_into_memory_is_refused_with_its_size(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "fit", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(material, "load_weights", lambda *_: pytest.fail("loaded"))
    config = small(base, data, tmp_path)
    monkeypatch.setattr(footprint, "memory_available", lambda device: 1000)
    with pytest.raises(UsageError, match=r"the base does not fit: its weights take 0 MiB, and 0 MiB are free on this"):
        advise.run(config)
    monkeypatch.setattr(footprint, "memory_available", lambda device: 10**6)
    with pytest.raises(UsageError, match=r"not even one short run fits: .* lower --batch_size"):
        advise.run(replace(config, batch_size=32))
    assert not (tmp_path / "runs.jsonl").exists()


def test_batches_are_cut_to_the_memory_that_is_free(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, made = trials.fit, []

    def counted(*arguments: Any, **how: Any) -> Any:
        made.append((len(arguments[1]), how["at_once"]))
        return whole(*arguments, **how)

    monkeypatch.setattr(trials, "fit", counted)
    bench, _, _ = advise.prepare(small(base, data, tmp_path / "asked"), tmp_path)
    assert bench.needs is not None
    free = int((2 * bench.needs.arm + bench.needs.activations) / 0.8 + 1000)
    monkeypatch.setattr(footprint, "memory_available", lambda device: free)
    advise.run(small(base, data, tmp_path, minutes=1e-6))
    assert made[0] == (1, 1) and max(count for count, _ in made) == 2 and {at_once for _, at_once in made} == {1}
    assert "memory: batches of 2 runs instead of 16" in capsys.readouterr().out


def test_the_real_run_takes_its_rows_and_epochs_at_the_measured_seconds(finished: Path, base: Path) -> None:
    found = json.loads((finished / "advice.json").read_text())["cost"]
    assert found["rows"] == round(0.95 * 110)
    assert found["steps"] == 3 * math.ceil(found["rows"] / 4)
    alone = [row for row in Ledger(finished).rows.values() if row["batch"] == 1]
    per_token = median(row["training_seconds"] / row["tokens"] for row in alone)
    assert found["seconds"] == pytest.approx(3 * found["rows"] * found["tokens_per_row"] * per_token)
    assert found["peak_bytes"] > 2**20


def test_rows_that_are_learnt_by_heart_are_too_few(finished: Path, base: Path, data: Path, tmp_path: Path) -> None:
    told = advise.run(small(base, data, tmp_path, steps=32, train_size=4, minutes=1e-6))
    found = content(told)["too_few"]["overfit"]
    assert (found["rows"], found["seen"]) == (4, 32) and found["above"] > found["margin"] >= 0.1
    assert "4 rows were seen 32.0 times; held-out loss is" in (told / "advice.md").read_text()
    assert "overfit" not in content(finished)["too_few"]


def test_items_whose_interval_is_wider_than_delta_are_too_few() -> None:
    def found(estimate: float, spread: float) -> Any:
        sums = 10 * (estimate + spread * torch.linspace(-1, 1, 25).double().numpy())[None]
        return effect(sums, 10 * torch.ones(25).double().numpy(), None)

    both = (0.02, -0.02)
    assert open_width(found(0.0, 0.01), 0.02, both) == 0, "narrow"
    wide = open_width(found(0.0, 0.2), 0.02, both)
    assert wide == pytest.approx(found(0.0, 0.2).half_width()) and wide > 0.02
    assert open_width(found(0.9, 0.2), 0.02, both) == 0, "decided all the same"
    assert open_width(found(-0.04, 0.1), 0.02, both) > 0 == open_width(found(-0.04, 0.1), 0.02, (0.02,))


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Interrupted("at once", signal.SIGTERM), 143)])
def test_a_signal_says_what_is_kept_and_how_to_go_on(
    stop: BaseException, code: int, finished: Path, base: Path, data: Path
) -> None:
    config = small(base, data, finished)
    bench, _, _ = advise.prepare(config, finished)
    kept = rf"{len(bench.ledger)} finished short runs kept in .*go on with: "
    with pytest.raises(Interrupted, match=kept) as told, advise.kept_when_interrupted(config, bench):
        raise stop
    assert told.value.exit_code == code


def test_a_dry_run_says_what_the_next_rung_costs_and_that_the_time_is_too_short(base: Path, data: Path) -> None:
    rungs = climb.Rungs((1e-4, 1e-3, 1e-2), 2.5, (16, 4), ("mlp",), (0, 1, 2, 3), None)
    (_, line) = advise.rung_lines(rungs, 60.0, 8)
    assert line.startswith("8 minutes reach rung B (A 4 min") and line.endswith("; rung C takes 2 min 00 s more")
    assert "reach rung E" in advise.rung_lines(rungs, 1.0, 8)[1] and "more" not in advise.rung_lines(rungs, 1.0, 8)[1]
    assert "too short for rung A, which is climbed all the same" in advise.rung_lines(rungs, 60.0, 3)[1]


def test_a_slow_first_run_does_not_decide_how_far_the_time_reaches(finished: Path, base: Path, data: Path) -> None:
    rows = [{"seconds": seconds} for seconds in (300.0, 2.0, 3.0, 2.0)]
    assert trials.median_seconds(rows) == 2.5
    assert trials.median_seconds([]) == 0


def test_how_far_the_time_reaches_is_said_again_where_that_has_changed(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rungs = climb.Rungs((1e-4, 1e-3, 1e-2), 2.5, (16, 4), ("mlp",), (0, 1, 2, 3), None)
    told = advise.Reach(small(base, data, tmp_path, minutes=8), rungs)
    for seconds in (300.0, 290.0, 60.0, 61.0, 62.0):
        told(seconds)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("a short run takes 5 min 00 s: 8 minutes are too short for rung A")
    assert second.startswith("a short run takes 1 min 00 s: 8 minutes reach rung B")


def test_how_far_the_time_reaches_is_said_once_a_run_is_measured(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        advise.run(small(base, data, tmp_path, minutes=1e-6))
        told = capsys.readouterr().out
        assert told.count("minutes are too short for rung A") == 1
        assert told.index("too short for rung A") < told.index("learning rate")


def test_the_screen_fits_a_terminal(finished: Path) -> None:
    """Every subject at its longest: 25 lines, and none wider than 130 columns."""
    advice = json.loads((finished / "advice.json").read_text())
    effect = {"estimate": -0.123, "low": -0.223, "high": 0.123}
    step = {"excess": effect, "bound": 0.123, "verdict": "undecided", "more_seeds": 1234}
    ranks = [{"rank": rank, **step} for rank in (64, 32, 16, 8, 4, 2, 1)]
    rates = {"within": [0.00012, 0.0012], "vertex": None, "why": "the losses around the best rate are not convex"}
    rates |= {"best": 0.0012, "cliff": 0.1, "at_edge": True}
    longest = advice | {
        "in_turn": "rows have pictures",
        "frozen": ["vision", "projector"],
        "rank": {"by_bound": 128, "by_estimate": 8, "steps": ranks},
        "advised": advice["advised"] | {"rank": 128},
        "rates": {"128": rates},
        "prior": {"learning_rate": 0.00123, "calibrated": False},
        "seed_deviation": 0.123,
        "placement": None,
        "placements": dict.fromkeys(["attention", "mlp", "energy"], effect),
        "too_small": ["eva"],
        "too_few": {
            "items": 12345,
            "half_width": 0.1,
            "overfit": dict.fromkeys(["rows", "seen", "above", "margin"], 9),
        },
        "open": [{"rung": "E", "runs": 4, "seconds": 999}],
    }
    for each in (advice, longest):
        shown = lines([advice_page.screen_table(each)])
        assert len(shown) <= 25 and max(map(len, shown)) <= 130, "\n".join(shown)
    text = "\n".join(shown)
    assert "rank 8 loses" in text and "another seed moves a loss by ±0.123" in text


def test_a_rate_below_the_best_that_was_tried_says_why(finished: Path) -> None:
    advice = json.loads((finished / "advice.json").read_text())
    rank = str(advice["advised"]["rank"])
    rates = advice["rates"][rank] | {"best": 0.05, "within": [0.05], "cliff": 0.12}
    words = advice_page.rate_words(advice | {"rates": advice["rates"] | {rank: rates}})
    assert any("0.05 was better, but is the last rate before training fails" in line for line in words)
    assert not any("every other rate" in line for line in words)
