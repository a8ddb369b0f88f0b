"""Laws of the command line: strict names, one meaning per value, file and flags, exit codes, answers at once."""

from __future__ import annotations

import ast
import gc
import json
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankwise import cli
from rankwise.errors import DataError, DivergedError, Interrupted, RankwiseError, ServiceError, VerificationError
from rankwise.options import field
from rankwise.options.commands import RanksConfig, TrainConfig
from rankwise.pipeline import table

LIGHT = [name for name, command in cli.COMMANDS.items() if not command.trainer]


def resolved(*argv: str) -> Any:
    """The config that a command line gives."""
    return cli.resolve(argv[0], argv[1:])[0]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command line that must exit with 2."""
    assert cli.main(argv) == 2
    return capsys.readouterr().err


def python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


HELP = """
import contextlib, io, sys
from rankwise import cli
for name in ["", *sys.argv[1:]]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main([*name.split(), "--help"]) == 0
    assert "usage: rankwise" in shown.getvalue(), name
    assert not {"torch", "transformers", "numpy", "peft", "yaml"} & set(sys.modules), (name, "loads what is heavy")
print("answered")
"""


def test_help_imports_nothing_heavy() -> None:
    result = python(HELP, *cli.COMMANDS)
    assert result.stdout == "answered\n", result.stderr


@pytest.mark.parametrize("collecting", [True, False])
def test_importing_a_command_leaves_garbage_collection_as_it_was(collecting: bool) -> None:
    (gc.enable if collecting else gc.disable)()
    try:
        table.stage_of("report")
        assert gc.isenabled() is collecting
        with pytest.raises(ModuleNotFoundError):
            table.imported("rankwise.nothing")
        assert gc.isenabled() is collecting
    finally:
        gc.enable()


def test_overview_names_every_command_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert {command.group for command in cli.COMMANDS.values()} == set(cli.GROUPS)


def test_the_first_word_of_two_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["features", "--help"]) == 0
    told = capsys.readouterr().out
    assert "features capture" in told and "features downstream" in told and "  ranks " not in told


@pytest.mark.parametrize("module", ["rankwise", "rankwise.cli"])
def test_the_module_is_the_command(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.split()[0]) == (0, "rankwise")


@pytest.mark.parametrize("name", LIGHT)
def test_no_name_means_two_options_and_every_option_has_help(name: str) -> None:
    rows = [*field.options_of(cli.COMMANDS[name].config), cli.DRY_RUN]
    names = [word for row in rows for word in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    assert all(row.help for row in rows)
    assert all(row.default in row.choices for row in rows if row.choices and isinstance(row.default, str))


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (("rank", "a", "b"), "ranks"),
        (("ranks", "a", "b", "--budgett", "1"), "did you mean budget?"),
        (("ranks", "a", "b", "--svd_thresh", "1"), "did you mean svd_threshold?"),
        (("ranks", "a", "b", "--svd", "1"), "svd_threshold"),
        (("ranks", "a", "b", "--min-ran=1"), "min_rank"),
        (("ranks", "a", "b", "--per", "sites"), "did you mean site?"),
        (("ranks", "a", "b", "--emit", "pefft"), "did you mean peft?"),
        (("ranks", "a", "b", "--towers", "vison"), "did you mean vision?"),
    ],
)
def test_unknown_and_abbreviated_names_are_refused_with_a_suggestion(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], suggestion: str
) -> None:
    assert suggestion in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ranks", "a", "b", "--max_rank", "many"), "expected a whole number, got 'many'"),
        (("ranks", "a", "b", "--max_rank", "2.5"), "expected a whole number"),
        (("ranks", "a", "b", "--svd_threshold", "high"), "expected a number"),
        (("ranks", "a", "b", "--exact=maybe"), "expected true or false"),
        (("ranks", "a", "b", "--max_rank", "none"), "max_rank needs a value"),
        (("ranks", "a", "b", "--max_rank"), "expected one argument"),
        (("ranks", "a", "b", "c"), "too many arguments"),
        (("ranks", "a", "b", "--base", "c"), "given twice"),
        (("ranks", "no/such.yaml"), "no/such.yaml: cannot be read"),
        (("ranks", "--svd_threshold", "1.5", "a", "b"), "--svd_threshold"),
        (("ranks", "a"), "two checkpoints"),
    ],
)
def test_wrong_values_are_usage_errors(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str) -> None:
    assert message in refused(capsys, *argv, "--dry-run")


def test_a_missing_config_file_names_its_neighbours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "ranks.yaml").write_text("max_rank: 8\n")
    assert "did you mean ranks.yaml?" in refused(capsys, "ranks", str(tmp_path / "rank.yaml"))


def test_both_spellings_and_aliases_are_one_option() -> None:
    for words in (["--svd-threshold", "0.5"], ["--svd_threshold=0.5"], ["--energy", "0.5"]):
        assert resolved("ranks", *words).spectrum.svd_threshold == 0.5
    assert resolved("ranks", "--pretrained", "x", "--finetuned", "y") == resolved("ranks", "x", "y")
    assert resolved("ranks", "-o", "x").output_dir == resolved("ranks", "--out", "x").output_dir == "x"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--exact"], True),
        (["--exact", "True"], True),
        (["--exact", "false"], False),
        (["--exact=False"], False),
        (["--exact", "--no-plots"], True),
        ([], False),
    ],
)
def test_booleans_work_bare_and_with_a_value(words: list[str], value: bool) -> None:
    config = resolved("ranks", *words, "base", "tuned")
    assert config.spectrum.exact is value
    assert (config.base, config.tuned) == ("base", "tuned"), "a bare flag takes no path"


def test_lists_take_commas_and_repetition_but_regexes_keep_their_commas() -> None:
    config = resolved("ranks", "--towers", "language,vision", "--towers", "projector", "--rename", "a{1,2}=b,c")
    assert config.sites.towers == ["language", "vision", "projector"]
    assert config.sites.rename == ["a{1,2}=b,c"]


def test_none_is_a_choice_where_it_is_one_and_no_value_elsewhere() -> None:
    config = resolved("ranks", "--noise_floor", "none", "--round", "none", "--budget", "none")
    assert (config.spectrum.noise_floor, config.spectrum.round, config.spectrum.budget) == ("none", "none", None)


def save(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("content", ["learning-rate: 2e-4\n", "lr: 2.0E-4\n", '{"learning_rate": 2e-4}'])
def test_numbers_in_files_are_numbers(tmp_path: Path, content: str) -> None:
    """YAML 1.1 reads 2e-4 as text."""
    file = save(tmp_path / ("c.json" if content.startswith("{") else "c.yml"), content)
    rate = resolved("finetune", file).learning_rate
    assert isinstance(rate, float)
    assert math.isclose(rate, 2e-4)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell has not replaced it in a file, in quotes or behind a comma."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    file = tmp_path / "study.yaml"
    file.write_text("model_name: ~/base\noutput_dir: ~/out\ndeltas: [~/a, b]\nquestion: ~/what\n")
    config = resolved("study", str(file), "--data_path", "~/rows.csv", "--chat_template", "{{ x ~ '~/y' }}")
    assert (config.model.model_name, config.output_dir) == (str(tmp_path / "base"), str(tmp_path / "out"))
    assert (config.data.data_path, config.probe.deltas) == (str(tmp_path / "rows.csv"), [str(tmp_path / "a"), "b"])
    assert (config.question, config.data.chat_template) == ("~/what", "{{ x ~ '~/y' }}")


PLACES = re.compile(r"(?:.+_)?(?:path|dir|folder|file|cache|recipes?|validation)")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_of_a_place_says_so(name: str) -> None:
    """So that its `~` is replaced, in one place for all."""
    texts = [
        item for item in table.command_options(cli.COMMANDS[name]) if "str" in str(item.annotation) and not item.choices
    ]
    assert [item.name for item in texts if PLACES.fullmatch(item.name) and not item.path] in ([], ["logging_dir"])


def test_an_empty_place_to_write_is_not_this_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--output_dir is empty; give a path" in refused(capsys, "ranks", "a", "b", "-o", "")
    (tmp_path / "a.yaml").write_text("output_dir: ''\n")
    assert "a.yaml: output_dir is empty" in refused(capsys, "ranks", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("name", [name for name, row in cli.COMMANDS.items() if hasattr(row.config, "seed")])
def test_seeds_are_those_that_every_generator_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("-1", str(2**32)):
        said = refused(capsys, *name.split(), "--seed", seed)
        assert f"seed is {seed}; give a number of at least 0 and below 4294967296" in said


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = save(tmp_path / "c.yaml", "max_rank: 32\nmin-rank: 2\npretrained: x\n")
    config = resolved("ranks", file, "--max_rank", "64")
    assert (config.spectrum.max_rank, config.spectrum.min_rank, config.base) == (64, 2, "x")
    assert config.spectrum.svd_threshold == RanksConfig().spectrum.svd_threshold
    assert resolved("ranks", file, "y", "z").base == "y"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", "energy: 0.8\nsvd-threshold: 0.9\n", "svd_threshold is set twice"),
        ("c.yaml", "max_rank: 8\nmax_rank: 9\n", "max_rank is set twice"),
        ("c.json", '{"max_rank": 8, "max_rank": 9}', "max_rank is set twice"),
        ("c.yaml", "stages:\n- {command: ranks, seed: 1, seed: 2}\n", "seed is set twice"),
        ("c.yaml", "max_rnk: 8\n", "did you mean max_rank"),
        ("c.yaml", "spectrum: {max_rank: 8}\n", "unknown option 'spectrum'"),
        ("c.yaml", "max_rank: [8]\n", "expected a whole number"),
        ("c.yaml", "max_rank: true\n", "expected a number"),
        ("c.yaml", "base: [a, b]\n", "expected text"),
        ("c.yaml", "towers: [{a: b}]\n", "expected a list of texts"),
        ("c.yaml", "max_rank: 8\n  min_rank: 3\n", "c.yaml, line 2: not YAML"),
        ("c.json", '{"max_rank": 8,\n}', "c.json, line 2: not JSON"),
        ("c.yaml", "- max_rank\n", "expected option names with values"),
        ("c.yaml", "", "expected option names with values"),
    ],
)
def test_bad_config_files_are_usage_errors_that_name_the_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str, message: str
) -> None:
    error = refused(capsys, "ranks", save(tmp_path / name, content))
    assert message in error
    assert name in error


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.YAML", "max_rank: 8\n"),
        ("c.toml", "max_rank = 8\n"),
        ("c.TOML", "max-rank = 8"),
        ("c.JSON", '{"max_rank": 8}'),
    ],
)
def test_a_config_file_is_read_by_its_suffix(tmp_path: Path, name: str, content: str) -> None:
    assert resolved("ranks", save(tmp_path / name, content)).spectrum.max_rank == 8


def test_a_config_file_that_cannot_be_told_as_one_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("conf", "conf.txt", "conf.ini"):
        assert "the name of a config file ends in .yaml" in refused(
            capsys, "ranks", save(tmp_path / name, "max_rank: 8")
        )
    assert "not TOML" in refused(capsys, "ranks", save(tmp_path / "c.toml", "max_rank: 8"))


def test_which_recipe_is_taken_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare name is the package's, a name with its suffix the file here, if there is one."""
    monkeypatch.chdir(tmp_path)
    assert resolved("features compare", "features.yaml").results_dir.startswith("runs")
    assert "taking the package's recipe" in capsys.readouterr().err
    save(tmp_path / "features.yaml", "stages: [{command: report, run: mine}]")
    (tmp_path / "mine").mkdir()
    assert cli.main(["run", "features", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "rankwise run features.yaml" in said.err and "rankwise features capture" in said.out
    assert cli.main(["run", "features.yaml", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "rankwise report --run mine" in said.out


@pytest.mark.parametrize("command", ["run", "batch"])
def test_the_packages_recipes_are_listed(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert cli.main([command, "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {path.stem} " in said for path in (cli.RECIPES).glob("*.yaml"))


def test_bytes_that_are_no_text_are_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"base: \xff\xfe\n")
    assert "not UTF-8" in refused(capsys, "ranks", str(tmp_path / "c.yaml"))


def test_yaml_takes_a_bare_no_for_false_where_no_is_the_word(tmp_path: Path) -> None:
    config = resolved("train", save(tmp_path / "c.yaml", "eval_strategy: no\nsave_strategy: steps\n"))
    assert config.training == {"eval_strategy": "no", "save_strategy": "steps"}


def test_what_is_not_ours_goes_to_the_trainer_and_not_elsewhere() -> None:
    config = resolved("train", "--lr", "1e-4", "--lora-r", "8", "--max_steps", "3")
    assert isinstance(config, TrainConfig)
    assert config.training == {"learning_rate": 1e-4, "max_steps": 3}
    assert config.lora.lora_r == 8


def dry_run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main([*argv, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_a_config_and_does_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file({"layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, tmp_path / name / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    shown = dry_run(capsys, "ranks", "base", "tuned", "--max-rank", "8", "--rename", "a=b")
    assert "# would measure the spectra of base and tuned" in shown
    assert "# would read --base base, --tuned tuned" in shown and "# would write --output_dir ." in shown
    assert sorted(tmp_path.rglob("*")) == before
    config = resolved("ranks", save(tmp_path / "c.yaml", shown))
    assert config == resolved("ranks", "base", "tuned", "--max-rank", "8", "--rename", "a=b")


def values_of(row: field.Option) -> st.SearchStrategy[Any]:
    """Values that an option may have once it is resolved."""
    text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
        lambda word: word.lower() not in ("none", "null")
    )
    if row.address:
        text = st.sampled_from(["http://localhost:8080/v1", "https://example.org"])
    if row.choices:
        one: st.SearchStrategy[Any] = st.sampled_from(list(row.choices))
    else:
        kind = field.plain_types(row.annotation)[0]
        kind = next(iter(typing.get_args(kind)), str) if row.is_list else kind
        kind = typing.get_origin(kind) or kind
        bounds = row.range
        low = bounds.above if bounds.least is None else bounds.least
        high = bounds.below if bounds.most is None else bounds.most
        within = {"min_value": low, "max_value": high}
        whole_numbers = st.integers(low, high)
        numbers = st.floats(allow_nan=False, allow_infinity=False if row.range else None, **within)
        plain_kinds = {bool: st.booleans(), int: whole_numbers, float: numbers}
        one = {**plain_kinds, dict: st.dictionaries(text, text, max_size=2)}.get(kind, text)
        one = one.filter(lambda value: value in row.range) if row.range else one
        one = one.map(os.path.expanduser) if row.path else one  # as an option holds them
    if row.is_list:
        whole = row.choices or not row.commas or kind in (int, float)
        plain = one if whole else one.map(lambda s: s.replace(",", "").strip()).filter(bool)
        return st.lists(plain, max_size=3)
    return one | st.none() if row.nullable else one


@pytest.mark.parametrize("name", LIGHT)
@settings(max_examples=20)
@given(data=st.data())
def test_a_printed_config_read_back_is_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    command = cli.COMMANDS[name]
    rows = list(field.options_of(command.config))
    places = data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=6))
    chosen = [rows[place] for place in places]
    config = field.build(command.config, {row.name: data.draw(values_of(row), label=row.name) for row in chosen})
    shown = field.flatten(config)
    folder = tmp_path_factory.mktemp("config")
    for file, text in (
        (folder / "c.yaml", yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)),
        (folder / "c.json", json.dumps(shown)),
    ):
        file.write_text(text, encoding="utf-8")
        assert field.build(command.config, field.typed_values(field.load_file(file), rows, str(file))) == config


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), 3),
        (DivergedError("x"), 4),
        (ServiceError("x"), 5),
        (VerificationError("x"), 6),
        (Interrupted("x", 2), 130),
        (Interrupted("x", 15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_kind_of_failure_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(argv: object) -> None:
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main(["ranks"]) == code
    message = capsys.readouterr().err
    assert message.startswith("rankwise: ")
    assert "Traceback" not in message


def test_every_error_of_ours_has_a_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in RankwiseError.__subclasses__() if kind is not Interrupted]
    assert sorted(codes) == [2, 3, 4, 5, 6, 7]


def test_a_missing_checkpoint_is_bad_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["ranks", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 3
    assert "no such file or folder" in capsys.readouterr().err


# --- flags in messages ---------------------------------------------------------------------------------------------

ELSEWHERE = {  # of other programs: pip, torchrun, accelerate, llama.cpp and its converter
    *("no_deps no_binary no_build_isolation require_hashes no_input hash force_reinstall".split()),
    *("nproc_per_node standalone use_fsdp outfile model_name ctx_size parallel override_kv in_file".split()),
    *("reinstall upgrade torch_backend verbose".split()),
    *("version option help help_all dry_run depth_ lora_scaled merge".split()),
}


def written_flags() -> dict[str, set[str]]:
    """Flag → where it stands, in every text of the package that is no docstring."""
    found: dict[str, set[str]] = {}
    for path in (cli.RECIPES.parent).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, kinds) and is_doc(node.body)}  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                for flag in re.findall(r"(?<![\w-])--([a-z][a-zA-Z0-9_-]*)(?![\w{])", node.value):
                    found.setdefault(flag.replace("-", "_"), set()).add(f"{path.name}:{node.lineno}")
    return found


def is_doc(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_every_flag_that_is_written_exists() -> None:
    known = {one for name in cli.COMMANDS for one in cli.option_names(name)} | ELSEWHERE
    assert {flag: places for flag, places in written_flags().items() if flag not in known} == {}


@pytest.mark.parametrize(
    ("line", "message", "said"),
    [
        ("features show", "x.png: leads out; pass --allow-outside", "pass allow-outside (no option here)"),
        ("features train", "lower --lr or --max_grad_norm", "lower --lr or max_grad_norm (no option here)"),
        ("features train", "`rankwise train --max_grad_norm 1` does", "`rankwise train --max_grad_norm 1` does"),
        ("check", "pip install --force-reinstall torch", "pip install --force-reinstall torch"),
        ("train", "pass --allow-outside", "pass --allow-outside"),
        ("run demo", "stage x (rankwise ranks): --metric", "stage x (rankwise ranks): --metric"),
    ],
)
def test_a_message_names_only_flags_that_the_command_has(
    line: str, message: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: object) -> None:
        raise DataError(message)

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.main(line.split()) == 3
    assert capsys.readouterr().err.endswith(f" {said}\n")


def test_one_name_for_one_thing() -> None:
    """A folder to write to is --output_dir, a model --model_name, leave to replace --overwrite, in every command; older
    names are aliases. A page or a card is a file: --out."""
    for name, command in cli.COMMANDS.items():
        rows = list(field.options_of(command.config))
        made = [row for row in rows if row.short == "-o"]
        assert all({"output_dir"} & {row.name, *row.aliases} for row in made if row.name != "out"), name
        assert all(row.name == "no_plots" for row in rows if "plots" in row.name), name
        assert all(row.name == "overwrite" for row in rows if "overwrite" in row.name), name
    assert resolved("ranks", "--out", "x") == resolved("ranks", "--output_dir", "x")
    assert resolved("evaluate", "--model_path", "x") == resolved("evaluate", "--model_name", "x")
    assert resolved("train", "--overwrite_output_dir").training == {"overwrite": True}
    assert (
        resolved("merge", "a", "--model_name", "x").base_model == resolved("export", "--model_name", "x").model == "x"
    )
    assert resolved("features train", "--output_dir", "x").results_dir == "x"
