"""The preset recipes say what the documents say, batches of them go on after a failure, and a run leaves its files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_llama

from rankwise import cli
from rankwise.core.schedule import parse_schedule
from rankwise.errors import UsageError
from rankwise.pipeline import preflight
from rankwise.pipeline.recipe import PACKAGED, find_recipe, load_recipe
from rankwise.pipeline.table import configured
from rankwise.scripts import PRESETS, experiment_command
from rankwise.scripts.running import NAMES, train_config
from rankwise.train.phases import schedule_of

BASE = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
DOCUMENTED = {
    "e2e_attention": ("e2e_nlg", "attention_only", 4, 1000),
    "e2e_mlp": ("e2e_nlg", "mlp_only", 4, 1000),
    "samsum_attention": ("samsum", "attention_only", 8, 1000),
    "samsum_mlp": ("samsum", "mlp_only", 8, 1000),
    "samsum_phased": ("samsum", "both", 8, 1500),
}
SHARED = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 32,
    "warmup_steps": 10,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
}


def preset_train(name: str) -> Any:
    stage = load_recipe(find_recipe(name), Path("results") / name).stages[0]
    return configured(stage.command, stage.options, name)


@pytest.fixture
def no_data_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of the package ask for data that are not here."""
    monkeypatch.setattr(preflight, "require_inputs", lambda *_: None)


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.usefixtures("no_data_here")
def test_a_preset_says_what_the_documents_say(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, target, rank, steps = DOCUMENTED[name]
    train = preset_train(name)
    assert (train.data.task, train.lora.target, train.lora.lora_r) == (task, target, rank)
    assert (train.lora.lora_alpha, train.lora.lora_dropout, train.model.model_name) == (32, 0.1, BASE)
    assert {key: train.training[key] for key in SHARED} == SHARED
    assert train.training["max_steps"] == steps
    phases = parse_schedule("both:300 > mlp:300 > attention") if name == "samsum_phased" else None
    assert schedule_of(train.phases) == phases
    assert cli.main(["run", name, "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "evaluation_results.json" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_preset_and_recipe_are_one_run(name: str) -> None:
    config = PRESETS[name]()
    wanted, built = preset_train(name), train_config(config)
    assert schedule_of(built.phases) == schedule_of(wanted.phases)
    assert built.training == wanted.training | {"gradient_accumulation_steps": 1}, "1 is what it is without"
    for part in ("model", "data", "lora", "val_fraction", "max_samples", "seed", "output_dir", "adapter_folder"):
        assert getattr(built, part) == getattr(wanted, part), part
    resolved, _ = cli.resolve("train", experiment_command(config)[2:])
    assert resolved == built


def test_names_of_presets_and_of_the_files_agree() -> None:
    assert set(NAMES) == set(DOCUMENTED) == set(PRESETS)
    extending = {path.stem for path in PACKAGED.glob("*.yaml") if "extends" in yaml.safe_load(path.read_text())}
    assert extending & set(NAMES) == set(NAMES) - {"e2e_attention"}


# --- extends -------------------------------------------------------------------------------------------------------


PARENT = """
name: parent
variables: {ONE: 1, TWO: 2}
stages:
  - {name: probe, command: report, run: "${run}/${ONE}", title: "${TWO}"}
  - {command: merge, adapter: a}
"""


def recipe_of(folder: Path, child: str) -> Any:
    (folder / "parent.yaml").write_text(PARENT)
    (folder / "child.yaml").write_text(child)
    return load_recipe(folder / "child.yaml", Path("out"))


def test_a_recipe_changes_what_it_extends_and_adds_to_it(tmp_path: Path) -> None:
    child = (
        "extends: parent\nvariables: {ONE: 5}\nstages:\n  - {name: probe, title: t}\n  - {name: last, command: merge}"
    )
    recipe = recipe_of(tmp_path, child)
    assert [(stage.name, stage.command) for stage in recipe.stages] == [
        ("probe", "report"),
        ("merge", "merge"),
        ("last", "merge"),
    ]
    assert recipe.stages[0].options == {"run": "out/5", "title": "t"}
    assert recipe.stages[1].options == {"adapter": "a"}
    assert (recipe.name, recipe.path.name) == ("child", "child.yaml"), "a name is the file's own"
    assert recipe_of(tmp_path, "extends: parent\nstages:\n").stages[0].options == {"run": "out/1", "title": "2"}


@pytest.mark.usefixtures("no_data_here")
def test_the_documented_extension_is_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (PACKAGED.parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    file = tmp_path / "samsum_lisa.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert cli.main(["run", str(file), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "train in phases: lisa:2@20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("extends: child", "extends itself"),
        ("extends: parnet", "no such recipe"),
        ("extends: parent\nstages:\n  - {name: prob, title: t}", "a stage must be a mapping with `command:`"),
        ("extends: parent\nstages:\n  - {name: probe}\n  - {name: probe}", "duplicate stage name"),
        ("extends: parent\nstgaes: []", "did you mean stages"),
    ],
)
def test_a_wrong_extension_is_refused(child: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        recipe_of(tmp_path, child)


# --- batch ---------------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def once(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return once


def report_recipe(folder: Path, name: str, run: Path) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"stages:\n  - {{command: report, run: {run}}}\n")
    return path


def test_a_batch_goes_on_and_ends_with_the_first_failure_s_code(tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_log.csv").write_text("step,loss,eval_loss\n1,2.0,\n2,1.0,\n")
    (tmp_path / "no").mkdir()
    recipes = [report_recipe(tmp_path, name, place) for name, place in (("bad", tmp_path / "no"), ("good", run))]
    code, output, error = call("batch", *recipes, "-o", tmp_path / "out")
    assert (code, "1 of 2 recipes failed: bad" in error) == (3, True), error
    assert (run / "report.html").is_file()
    assert f"bad: failed with exit code 3: stage report (rankwise report): {tmp_path / 'no'}: " in output
    assert "good: done" in output
    assert (tmp_path / "out" / "good" / ".stages").is_dir()
    code, output, _ = call("batch", recipes[1], "-o", tmp_path / "out")
    assert (code, "skipped" in output) == (0, True)


@pytest.mark.usefixtures("no_data_here")
def test_a_batch_is_checked_whole_before_it_starts(tmp_path: Path, call: Call) -> None:
    good = report_recipe(tmp_path, "good", tmp_path)
    for words, said in (
        ((good, "e2e_atention"), "e2e_attention"),
        ((good, good), "duplicate recipe name: good, good"),
        ((good, "--set", "report.titel=x"), "did you mean title"),
        ((), "needs recipes"),
    ):
        code, _, error = call("batch", *words, "-o", tmp_path / "out")
        assert (code, said in error) == (2, True), error
    assert not (tmp_path / "out").exists()
    code, output, _ = call("batch", "e2e_attention", "e2e_mlp", "-o", tmp_path / "out", "--dry-run")
    assert code == 0
    assert [line for line in output.splitlines() if line.startswith("# would run")] == [
        f"# would run {PACKAGED / f'{name}.yaml'} in {tmp_path / 'out' / name}" for name in ("e2e_attention", "e2e_mlp")
    ]
    assert not (tmp_path / "out").exists()


# --- a whole run ---------------------------------------------------------------------------------------------------

MEALS = ("Italian", "Thai", "French", "Indian")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows in the official form of E2E NLG."""
    folder = tmp_path_factory.mktemp("e2e")
    for file, names in (("trainset.csv", "ABCDEFGHIJ"), ("devset.csv", "XY")):
        rows = [(f"name[{name}], food[{meal}]", f"{name} serves {meal} food.") for name in names for meal in MEALS]
        with open(folder / file, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("mr", "ref"), *rows])
    return folder


@pytest.mark.slow
def test_presets_run_at_tiny_size_and_are_compared(
    task: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two presets in a batch leave the documented files; again they are skipped; changed they run again."""
    base = tiny_llama(tmp_path / "base")
    for name, value in (("MODEL_NAME", base), ("DATA_PATH", task), ("MAX_STEPS", 6)):
        monkeypatch.setenv(name, str(value))
    small = [
        f"train.{text}" for text in ("batch_size=4", "eval_steps=3", "save_steps=3", "gradient_checkpointing=false")
    ]
    small += [
        "evaluate.num_samples=4",
        "evaluate.max_new_tokens=4",
        "evaluate.batch_size=4",
        "train.learning_rate=1e-2",
    ]
    words = ["batch", "e2e_attention", "e2e_mlp", "-o", tmp_path / "out"]
    words += [word for change in small for word in ("--set", change)]
    code, output, error = call(*words)
    assert code == 0, error
    for name, absent in (("e2e_attention", "mlp"), ("e2e_mlp", "attention")):
        run = tmp_path / "out" / name
        summary = json.loads((run / "results_summary.json").read_text())
        assert set(summary) == {"config", "train_loss", "gradient_stats"}
        assert summary["config"]["lora_r"] == 4
        assert summary["train_loss"] > 0
        assert absent not in summary["gradient_stats"]
        config = json.loads((run / "resolved_config.json").read_text())
        assert config == summary["config"], "the run's config is the training's"
        scores = json.loads((run / "evaluation_results.json").read_text())
        assert scores["n"] == 4
        assert (run / "final_model" / "adapter_model.safetensors").is_file()
        assert (run / "report.html").is_file()
    assert "next: rankwise compare" in output
    code, output, _ = call(*words)
    assert (code, output.count("skipped")) == (0, 6)
    runs = [tmp_path / "out" / name for name in ("e2e_attention", "e2e_mlp")]
    code, output, error = call("compare", *runs, "-o", tmp_path / "comparison")
    assert code == 0, error
    rows = list(csv.DictReader((tmp_path / "comparison" / "comparison.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["e2e_attention", "e2e_mlp"]
    assert [bool(row["attention_mean"]) for row in rows] == [True, False]
    assert [bool(row["mlp_mean"]) for row in rows] == [False, True]
    assert all(float(row["e2e_nlg.bleu"]) >= 0 and float(row["train_loss"]) > 0 for row in rows)
    code, output, error = call(*words, "--set", "train.max_steps=4")
    assert code == 0, error
    assert output.count("skipped") == 0, "scores of an older adapter are not kept"
