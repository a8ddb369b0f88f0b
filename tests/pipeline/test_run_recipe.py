"""Laws of `rankwise run`: recipes are checked whole before they start; what changed runs again, the rest does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from rankwise import cli
from rankwise.errors import UsageError
from rankwise.files.plan import PLAN_FILE
from rankwise.files.run_folder import CONFIG, RunFolder
from rankwise.options.field import flatten, options_of
from rankwise.pipeline import preflight
from rankwise.pipeline.recipe import PACKAGED, Stage, find_recipe, load_recipe, read_content
from rankwise.pipeline.run import STATE, fingerprint_of
from rankwise.pipeline.table import COMMANDS, configured

RECIPE = """
name: pair
variables:
  BASE: {base}
  TUNED: {tuned}
  BUDGET: uniform:2
stages:
  - command: ranks
    base: ${{BASE}}
    tuned: ${{TUNED}}
    budget: ${{BUDGET}}
    min_rank: 1
    no_plots: true
    out: ${{run}}/ranks
  - {{name: page, command: report, run: "${{run}}"}}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two cheap stages on a base and a nudged copy of it."""
    base = tiny_llama(tmp_path / "base", num_hidden_layers=1)
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    nudge(tuned, 0)
    path = tmp_path / "pair.yaml"
    path.write_text(RECIPE.format(base=base, tuned=tuned), encoding="utf-8")
    return path


def nudge(folder: Path, seed: int) -> None:
    """Every matrix moved a little in a few directions of its own."""
    draw = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if value.ndim == 2:
            move = torch.randn(len(value), 3, generator=draw) @ torch.randn(3, value.shape[1], generator=draw)
            weights[name] = value + 0.01 * move
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def run(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the recipe; returns the exit code, what it printed and what went wrong."""

    def once(*flags: str, file: Path | str = recipe) -> tuple[int, str, str]:
        code = cli.main(["run", str(file), "-o", str(tmp_path / "out"), *flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return once


def ran(output: str) -> list[str]:
    """Names of the stages that ran, from the lines `[1/2] ranks: rankwise ranks`."""
    return [
        line.split("] ")[1].split(":")[0] for line in output.splitlines() if line.startswith("[") and ": rank" in line
    ]


def edited(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    other = recipe.with_name("edited.yaml")
    other.write_text(text.replace(old, new), encoding="utf-8")
    return other


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("budget:", "budgte:", ("stage ranks", "'budgte'", "did you mean budget")),
        ("command: report", "command: raport", ("command 'raport'", "did you mean report")),
        ("${BASE}", "${BSE}", ("stage ranks: base", "${BSE}", "BASE, TUNED")),
        ("min_rank: 1", "min_rank: one", ("stage ranks", "min_rank", "'one'")),
        ("name: page", "name: ranks", ("duplicate stage name", "ranks, ranks")),
        ("name: pair", "nmae: pair", ("'nmae'", "did you mean name")),
        ("min_rank: 1", "nproc: few", ("stage ranks", "nproc", "'few'")),
        ("min_rank: 1", "config: [a, b]", ("stage ranks", "config must be the path of a file", "['a', 'b']")),
        ("stages:\n", "stages: []\nrest:\n", ("'rest'",)),
        ("  BUDGET: uniform:2", "  run: elsewhere", ("variables", "run folder")),
        ("command: report, run", "run", ("`command:`",)),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(
    run: Run, recipe: Path, tmp_path: Path, old: str, new: str, said: tuple[str, ...]
) -> None:
    file = edited(recipe, old, new)
    code, output, error = run(file=file)
    assert code == 2
    assert "edited.yaml" in error
    assert not [part for part in said if part not in error], error
    assert not ran(output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--set", "rank.budget=uniform:1"), "did you mean ranks"),
        (("--set", "ranks.budgte=uniform:1"), "did you mean budget"),
        (("--set", "ranks.budget"), "STAGE.OPTION=VALUE"),
        (("--set", "ranks.min_rank=many"), "'many'"),
        (("--only", "pgae"), "did you mean page"),
        (("--from", "rnaks"), "did you mean ranks"),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(
    run: Run, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    code, _, error = run(*flags)
    assert (code, said in error) == (2, True), error
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_skipped_and_what_changed_runs_with_all_after_it(run: Run, tmp_path: Path) -> None:
    code, output, error = run()
    assert code == 0, error
    assert ran(output) == ["ranks", "page"]
    assert str(tmp_path / "out") in output.splitlines()[-1]
    assert (tmp_path / "out" / "ranks" / PLAN_FILE).is_file()
    assert (tmp_path / "out" / "report.html").is_file()
    assert ran(run()[1]) == []
    assert ran(run("--set", "page.title=Another")[1]) == ["page"], "what comes before a change stays"
    assert ran(run("--set", "page.title=Another", "--set", "ranks.budget=uniform:3")[1]) == ["ranks", "page"]
    assert ran(run("--set", "page.title=Another", "--set", "ranks.budget=uniform:3")[1]) == []
    nudge(tmp_path / "tuned", 1)
    again = ("--set", "page.title=Another", "--set", "ranks.budget=uniform:3")
    assert ran(run(*again)[1]) == ["ranks", "page"], "another content under the same name is another input"
    (tmp_path / "out" / "report.html").rename(tmp_path / "elsewhere.html")
    (tmp_path / "out" / "ranks").rename(tmp_path / "taken away")
    assert ran(run(*again)[1]) == ["ranks", "page"], "an output that is gone is made again"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_current_folder_is_no_input_of_a_stage(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what happens to be called like a choice; `.` is one (`train --adapter_folder`)."""
    monkeypatch.chdir(tmp_path)
    stage, config = Stage(command, command, {}), configured(command, {}, "defaults")
    before = fingerprint_of(stage, config, None)
    texts = [item for item in options_of(config) if isinstance(item.default, str)]
    chosen, free = ({item.default for item in texts if bool(item.choices) is choice} for choice in (True, False))
    for name in {"notes"} | chosen - free:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "page.txt").write_text("written later", encoding="utf-8")
    assert fingerprint_of(stage, config, None) == before


def test_parts_can_be_asked_for(run: Run) -> None:
    assert ran(run("--only", "ranks")[1]) == ["ranks"]
    assert ran(run()[1]) == ["page"]
    assert ran(run("--from", "page")[1]) == ["page"]
    assert ran(run("--force")[1]) == ["ranks", "page"]
    assert ran(run("--only", "ranks", "--set", "ranks.budget=uniform:1")[1]) == ["ranks"]
    assert ran(run("--set", "ranks.budget=uniform:1")[1]) == ["page"], "what stands after a stage that ran is old"


def test_a_stage_that_failed_is_not_done(run: Run, tmp_path: Path) -> None:
    weights = tmp_path / "tuned" / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[: len(sound) // 2])
    code, output, _ = run()
    assert (code, ran(output)) == (3, ["ranks"])
    weights.write_bytes(sound)
    assert ran(run()[1]) == ["ranks", "page"]


def test_the_environment_overrides_variables_and_set_overrides_both(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def budget(*changes: str) -> str:
        return str(load_recipe(recipe, tmp_path / "out", changes).stages[0].options["budget"])

    assert budget() == "uniform:2"
    monkeypatch.setenv("BUDGET", "uniform:5")
    assert budget() == "uniform:5"
    assert budget("ranks.budget=uniform:7") == "uniform:7"
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    with pytest.raises(UsageError, match="SOMETHING_ELSE"):
        load_recipe(edited(recipe, "${BUDGET}", "${SOMETHING_ELSE}"), tmp_path / "out")


def test_set_replaces_an_option_under_whatever_name(recipe: Path, tmp_path: Path) -> None:
    for name in ("pretrained", "base"):
        options = load_recipe(recipe, tmp_path, [f"ranks.{name}=elsewhere"]).stages[0].options
        assert [options.get(key) for key in ("base", "pretrained") if key in options] == ["elsewhere"]


def test_a_command_by_its_other_name_is_that_command(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: one\nstages:\n  - name: seen\n    command: features extract\n    synthetic: 3\n")
    assert load_recipe(path, tmp_path).stages[0].command == "features capture"


def test_a_dry_run_shows_every_stage_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    code, output, error = run("--dry-run")
    assert code == 0, error
    assert f"--base {tmp_path / 'base'}" in output
    assert "--svd_threshold 0.9" in output, "defaults are part of a resolved config"
    assert "page: rankwise report" in output
    assert not (tmp_path / "out").exists()


def test_recipes_are_found_by_path_and_by_name(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(str(recipe)) == recipe
    for name in ("svd_ranks", "svd_ranks.yaml", "recipes/svd_ranks.yaml"):
        assert find_recipe(name) == PACKAGED / "svd_ranks.yaml"
    (tmp_path / "recipes").mkdir()
    own = Path(shutil.copy(recipe, tmp_path / "recipes" / "svd_ranks.yaml"))
    assert find_recipe("recipes/svd_ranks.yaml") == Path("recipes") / own.name, "a file of one's own comes first"
    with pytest.raises(UsageError, match="svd_ranks"):
        find_recipe("svd_rank")


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_recipes_are_sound(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "require_inputs", lambda *_: None)  # their data are not here
    assert cli.main(["run", str(path), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["name"] == path.stem and content["description"]
    assert "would run" in capsys.readouterr().out


# Options that decide nothing beside another one: a variable that reaches only these would be one for nothing.
IDLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "svd_threshold": lambda options: options.get("budget"),
    "smoothing_factor": lambda options: options.get("budget"),
    "teacher_model": lambda options: options.get("loopback_teacher"),
    "base_url": lambda options: options.get("loopback_teacher"),
    "budget_usd": lambda options: options.get("loopback_teacher"),
    "num_images": lambda options: options.get("from_folders") or options.get("labels_file"),
}
OTHER = {"TASK": "samsum", "BUDGET_USD": "3", "MIN_ACCURACY": "0.4", "DOWNLOAD": ("true", "false")}


def deciding(path: Path) -> list[dict[str, Any]]:
    """The options of every stage that decide something, resolved."""
    found = []
    for stage in load_recipe(path, Path("runs/one")).stages:
        options = flatten(configured(stage.command, stage.options, str(path)))
        idle = {name for name, beside in IDLE.items() if beside(options)}
        found.append({name: value for name, value in options.items() if name not in idle})
    return found


def another(name: str, value: Any) -> str:
    """A value of the same kind."""
    given = OTHER.get(name)
    if isinstance(given, tuple):
        return given[str(value).lower() == given[0]]
    text = str(value)
    if given is None and re.fullmatch(r"[\d.]+(e-?\d+)?", text):
        return str(float(text) / 2) if not text.isdigit() else str(int(text) + 1)
    return given or ("uniform:3" if name == "BUDGET" else f"another_{Path(text).name}")


VARIABLES = [
    pytest.param(path, name, value, id=f"{path.stem}-{name}")
    for path in sorted(PACKAGED.glob("*.yaml"))
    for name, value in (read_content(path).get("variables") or {}).items()
    if value is not None
]


def test_a_recipe_goes_on_where_a_command_asks_and_permits_nothing_else() -> None:
    """`train --yes` quantizes a base of which most stays in 16 bits; nothing asks for that at a terminal."""
    assert flatten(configured("label", {}, "recipe"))["yes"]
    assert not configured("train", {"model_name": "base"}, "recipe").yes


@pytest.mark.parametrize(("path", "name", "value"), VARIABLES)
def test_every_variable_of_a_packaged_recipe_decides_something(
    path: Path, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = deciding(path)
    monkeypatch.setenv(name, another(name, value))
    assert deciding(path) != before


def test_a_variable_may_name_those_above_it_and_an_inherited_one_can_be_taken_out(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: pair\nvariables: {BUDGET: null, WHERE: '${BASE}/x'}\nstages: [{name: ranks, budget: 5}]")
    monkeypatch.setenv("BUDGET", "uniform:9")
    options = load_recipe(child, tmp_path).stages[0].options
    assert (options["budget"], options["base"]) == (5, str(tmp_path / "base"))
    child.write_text("extends: pair\nvariables: {BUDGET: null}\nstages: []")
    with pytest.raises(UsageError, match=r"budget: \$\{BUDGET\} is not among the recipe's variables"):
        load_recipe(child, tmp_path)
    child.write_text("extends: pair\nvariables: {BASE: '${TUNED}'}\nstages: []")
    with pytest.raises(UsageError, match=r"variables: BASE: \$\{TUNED\} is not among"):
        load_recipe(child, tmp_path)


def test_the_documented_variables_reach_their_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"MODEL_NAME": "org/model", "DATA_PATH": "rows", "SUBSET_RATIO": "0.03", "SVD_THRESHOLD": "0.8"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    stages = {stage.name: stage.options for stage in load_recipe(find_recipe("svd_ranks"), tmp_path).stages}
    finetune, ranks, train = stages["finetune"], stages["ranks"], stages["train"]
    assert [finetune["model_name"], finetune["data_path"], finetune["subset_ratio"]] == ["org/model", "rows", "0.03"]
    assert (ranks["svd_threshold"], ranks["budget"]) == ("0.8", "none"), "the threshold decides"
    assert stages["after"]["data_path"] == ranks["gain"] == "rows"
    assert train["model_name"] == "org/model"


def chain(recipe: Path, file: str, *more: str) -> Path:
    """The recipe with a second `ranks`, whose options come from a file."""
    stage = ["  - name: again", "    command: ranks", f"    config: {file}", '    out: "${run}/again"', *more]
    return edited(recipe, "  - {name: page", "\n".join([*stage, "  - {name: page"]))


MADE = "${run}/ranks/" + CONFIG


def settings(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "again" / CONFIG).read_text(encoding="utf-8"))
    return found


def test_a_stage_takes_its_options_from_a_file_that_an_earlier_one_makes(
    run: Run, recipe: Path, tmp_path: Path
) -> None:
    file = chain(recipe, MADE, "    min_rank: 2")
    code, output, error = run(file=file)
    assert (code, ran(output)) == (0, ["ranks", "again", "page"]), error
    found = settings(tmp_path)
    assert (found["budget"], found["min_rank"]) == ("uniform:2", 2), "the stage's own options win"
    assert found["output_dir"] == str(tmp_path / "out" / "again")
    assert ran(run(file=file)[1]) == []
    assert ran(run("--set", "ranks.budget=uniform:3", file=file)[1]) == ["ranks", "again", "page"]
    assert settings(tmp_path)["budget"] == "uniform:3"
    three = ("--set", "ranks.budget=uniform:3")
    assert ran(run(*three, "--set", "again.budget=uniform:4", file=file)[1]) == ["again", "page"]
    assert settings(tmp_path)["budget"] == "uniform:4"


def test_another_file_makes_another_stage(run: Run, recipe: Path, tmp_path: Path) -> None:
    """Its values count, not its bytes."""
    file = chain(recipe, MADE)
    assert run(file=file)[0] == 0
    made = tmp_path / "out" / "ranks" / CONFIG
    content = made.read_text()
    made.write_text(content + "\n")
    assert ran(run(file=file)[1]) == []
    made.write_text(content.replace("uniform:2", "uniform:1"))
    assert ran(run(file=file)[1]) == ["again", "page"]
    assert settings(tmp_path)["budget"] == "uniform:1"


def test_a_dry_run_says_which_file_is_read_later(run: Run, recipe: Path, tmp_path: Path) -> None:
    code, output, error = run("--dry-run", file=chain(recipe, MADE))
    made, again = (tmp_path / "out" / name for name in (f"ranks/{CONFIG}", "again"))
    assert code == 0, error
    assert f"again: rankwise ranks {made} --out {again}" in output
    assert f"{made} is read when this stage's turn comes" in output
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_file_of_options_is_said_with_the_stage(run: Run, recipe: Path, tmp_path: Path) -> None:
    """At once where nothing makes the file, at the stage's turn where an earlier one does."""
    own = tmp_path / "own.yaml"
    own.write_text("budgte: uniform:1")
    code, output, error = run(file=chain(recipe, str(own)))
    assert (code, ran(output)) == (2, []), error
    assert f"stage again: {own}: unknown option 'budgte'; did you mean budget" in error
    code, output, error = run(file=chain(recipe, str(tmp_path / "none.yaml")))
    assert (code, ran(output)) == (3, []), error
    assert f"stage again: config: {tmp_path / 'none.yaml'} does not exist" in error
    assert not (tmp_path / "out").exists()
    code, output, error = run(file=chain(recipe, "${run}/ranks/none.yaml"))
    assert (code, ran(output)) == (3, ["ranks"]), error
    assert "stage again: config:" in error and "no stage before has made it" in error
    code, output, error = run(file=chain(recipe, "${run}/ranks/" + PLAN_FILE.as_posix()))
    assert (code, ran(output)) == (2, []), error
    assert f"stage again: {tmp_path / 'out' / 'ranks' / PLAN_FILE}: unknown option" in error


def test_a_stage_without_the_one_that_makes_its_file_reads_it_at_once(run: Run, recipe: Path, tmp_path: Path) -> None:
    file = chain(recipe, MADE)
    code, output, error = run("--only", "again", file=file)
    assert (code, ran(output)) == (3, []), error
    assert run("--only", "ranks", file=file)[0] == 0, "a stage that is not asked for needs no file"
    assert "--budget uniform:2" in run("--only", "again", "--dry-run", file=file)[1]
    assert ran(run("--only", "again", file=file)[1]) == ["again"]


def test_options_of_a_file_that_are_idle_give_way_to_set(run: Run, recipe: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"{{base: {tmp_path / 'base'}, tuned: {tmp_path / 'tuned'}, round: power-of-two, no_plots: true}}")
    file = chain(recipe, str(own))
    code, _, error = run("--set", "again.signal=uniform", "--set", "again.budget=uniform:1", "--dry-run", file=file)
    assert code == 0, error
    assert "again.round acts only" in error


def test_a_child_inherits_the_file_or_takes_it_out(recipe: Path, tmp_path: Path) -> None:
    chain(recipe, MADE)
    child = tmp_path / "child.yaml"
    for row, wanted in (("base: x", tmp_path / "ranks" / CONFIG), ("config: null", None), ("config: y", Path("y"))):
        child.write_text(f"extends: edited\nstages: [{{name: again, {row}}}]")
        assert load_recipe(child, tmp_path).stages[1].config == wanted


def test_the_command_alone_reads_the_file_of_its_stage(recipe: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("{budget: uniform:3, min_rank: 2, max_rank: 3}")
    file = edited(recipe, "    min_rank: 1", f"    min_rank: 1\n    config: {own}")
    config, _ = cli.resolve("ranks", [str(file)])
    found = flatten(config)
    assert [found[name] for name in ("budget", "min_rank", "max_rank")] == ["uniform:2", 1, 3]


def test_two_runs_of_one_folder_exclude_each_other(tmp_path: Path, run: Run) -> None:
    with RunFolder(tmp_path / "out" / STATE).lock():
        code, _, error = run()
    assert (code, "in use by process" in error) == (2, True)
