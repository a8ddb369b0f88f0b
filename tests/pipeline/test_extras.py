"""What is not installed is found out before anything is read, by every command and every stage of a recipe."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import installs
import pytest
from installs import answer_needs, hide_modules
from tiny import tiny_llama
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from rankwise import cli
from rankwise.errors import RankwiseError, UsageError
from rankwise.pipeline.extras import EXTRAS, TRACKERS, require_extras
from rankwise.pipeline.idle import Told
from rankwise.pipeline.recipe import PIPELINES
from rankwise.pipeline.table import COMMANDS, stage_of


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *names: hide_modules(monkeypatch, names)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the paths of the lines below exist, with nothing in them: reading any would be exit 3."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned", "run", "other", "photos", "export", "cache", "packed", "saved"):
        (tmp_path / name).mkdir()
    files = "rows.csv rows.7z rows.parquet photos.parquet model.gguf base/config.json packed/corpus.7z"
    for name in (*files.split(), "saved/dataset_info.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "texts.csv").write_text("mr,ref\nname[A],A is here.\n")
    return tmp_path


TRAIN = "train --model_name base --task e2e_nlg --data_path rows.csv"
LINES = [
    ("ranks base tuned", "matplotlib", "plots"),
    ("compare run other", "matplotlib", "plots"),
    ("features compare", "matplotlib", "plots"),
    ("features show", "matplotlib", "plots"),
    ("features downstream base --data_path rows.csv", "matplotlib", "plots"),
    (f"{TRAIN} --report_to wandb", "wandb", "track"),
    (f"{TRAIN} --use_wandb", "wandb", "track"),
    ("finetune --model_name base --task e2e_nlg --data_path rows.csv --use_wandb", "wandb", "track"),
    (f"{TRAIN} --report_to tensorboard", "tensorboard", "track"),
    (f"{TRAIN} --report_to trackio", "trackio", "track"),
    (f"{TRAIN} --report_to tensorboard,trackio", "trackio", "track"),
    (f"{TRAIN} --report_to mlflow", "mlflow", "install mlflow"),
    (f"{TRAIN} --report_to swanlab", "swanlab", "install swanlab"),
    (f"{TRAIN} --use_liger_kernel", "liger_kernel", "install liger-kernel"),
    (f"{TRAIN} --optim galore_adamw", "galore_torch", "install galore-torch"),
    (f"{TRAIN} --optim paged_adamw_8bit", "bitsandbytes", "quant"),
    (f"{TRAIN} --optim schedule_free_adamw", "schedulefree", "install schedulefree"),
    (f"{TRAIN} --load_in_4bit", "bitsandbytes", "quant"),
    (f"{TRAIN} --load_in_8bit", "bitsandbytes", "quant"),
    (f"{TRAIN} --download", "pooch", "data"),
    ("train --model_name base --task samsum --data_path rows.7z", "py7zr", "data"),
    ("train --model_name base --task samsum --data_path packed", "py7zr", "data"),
    ("check --task samsum --data_path new --download", "py7zr", "data"),
    ("ranks base tuned --no_plots --gain rows.7z", "py7zr", "data"),
    ("check --task conversations --data_path rows.parquet", "pyarrow", "data"),
    ("evaluate base --task conversations --data_path rows.parquet", "pyarrow", "data"),
    ("label --labels_file rows.parquet", "pyarrow", "data"),
    ("check --task e2e_nlg --data_path rows.csv --model_name model.gguf", "gguf", "device"),
    ("ranks model.gguf tuned --no_plots", "gguf", "device"),
    ("merge run --base_model model.gguf", "gguf", "device"),
    ("evaluate base --task e2e_nlg --data_path rows.csv", "sacrebleu", "eval"),
    ("evaluate base --data_path texts.csv", "sacrebleu", "eval"),  # its header shows the task
    ("evaluate base --task lm_eval:arc", "lm_eval", "harness"),
    ("evaluate base --task e2e_nlg --data_path rows.csv --engine vllm", "vllm", "vllm"),
    ("export base", "gguf", "device"),
    ("validate export --task e2e_nlg --data_path rows.csv", "xllamacpp", "device"),
    ("bundle export", "xllamacpp", "device"),
    ("label photos", "openai", "label"),
    ("features capture photos.parquet --model base", "pyarrow", "data"),
    ("features capture saved --model base", "datasets", "data"),
    ("features capture org/name:train --model base", "datasets", "data"),
    ("features compare --no_plots", "scipy", "eval"),
    ("features downstream base --data_path rows.csv --no_plots", "scipy", "eval"),
    ("study --model_name base --task e2e_nlg --data_path rows.csv", "scipy", "eval"),
    ("advise base rows.csv --task e2e_nlg", "scipy", "eval"),
    ("advise base rows.7z --task samsum", "py7zr", "data"),
]


@pytest.mark.parametrize(("line", "module", "extra"), LINES)
def test_it_is_said_before_anything_is_read(
    line: str, module: str, extra: str, hide: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(module)
    before = sorted(here.rglob("*"))
    for more in ([], ["--dry-run"]):
        assert cli.main([*line.split(), *more]) == 2
        said = capsys.readouterr().err
        assert f"{module} is not installed" in said
        assert (f"rankwise[{extra}]" if " " not in extra else f"pip {extra}") in said
    assert sorted(here.rglob("*")) == before


def test_every_stage_of_a_recipe_is_asked_first(hide: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fourth stage's extra is missing: the first one does not begin."""
    stages = ["{command: report, run: run}"] * 3 + ["{command: ranks, base: base, tuned: tuned}"]
    names = [stage.replace("{", f"{{name: s{place}, ") for place, stage in enumerate(stages)]
    (here / "own.yaml").write_text(f"stages: [{', '.join(names)}]")
    hide("matplotlib")
    for command in ("run", "batch"):
        assert cli.main([command, "own.yaml", "-o", "out"]) == 2
        assert "stage s3 (rankwise ranks): the pictures: matplotlib is not installed" in capsys.readouterr().err
    assert not (here / "out").exists()
    assert cli.main(["run", "own.yaml", "-o", "out", "--only", "s0"]) == 3, "a stage that is not asked for needs none"


def test_what_can_be_left_out_is_said_and_can_be(hide: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hide("matplotlib")
    assert cli.main(["ranks", "base", "tuned", "--dry-run"]) == 2
    assert "leave it out: --no_plots" in capsys.readouterr().err
    assert cli.main(["ranks", "base", "tuned", "--no_plots", "--dry-run"]) == 3
    assert "base: which weights are meant?" in capsys.readouterr().err, "it goes on to read"


def test_every_optimizer_of_the_trainer_that_needs_a_package_is_in_the_table() -> None:
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    for name in {each.value for each in OptimizerNames} - own:
        told = Told(optim=name)
        assert any("--optim" in extra.flag and extra.asked(told) for extra in EXTRAS), name
    assert not any("--optim" in extra.flag and extra.asked(Told(optim=name)) for extra in EXTRAS for name in own)


def test_every_tracker_and_optional_package_of_the_trainer_is_known() -> None:
    """A new transformers may bring more: each needs its row in the table, or its place below."""
    assert set(INTEGRATION_TO_CALLBACK) == {*TRACKERS, "kubeflow"}, "kubeflow has an address, and no package"
    ours = "bitsandbytes galore_torch apollo_torch lomo grokadamw torchao schedulefree torch_optimi deepspeed".split()
    required = "torch accelerate peft datasets psutil".split()
    searches = "optuna ray_tune wandb".split()  # hyperparameter_search, which no command calls
    hardware = "xla npu hpu mlu musa mps xpu neuron neuroncore tpu cuda bf16_gpu tf32".split()
    machines = "optimum_neuron kubeflow".split()
    known = {*ours, *required, *searches, *machines, *(f"torch_{kind}" for kind in hardware)}
    found: set[str] = set()
    for name in ("trainer", "trainer_optimizer", "trainer_utils", "trainer_pt_utils", "training_args"):
        spec = importlib.util.find_spec(f"transformers.{name}")
        assert spec is not None and spec.origin is not None
        found |= set(re.findall(r"\bis_(\w+)_available\b", Path(spec.origin).read_text(encoding="utf-8")))
    assert found <= known, f"not known: {sorted(found - known)}"
    assert set(ours) <= found


@pytest.mark.parametrize("command", ["study", "advise", "features train"])
def test_commands_without_the_trainer_refuse_trackers_in_a_sentence(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--report_to", "trackio"]) == 2
    assert "`rankwise train` and `rankwise finetune` report to trackers" in capsys.readouterr().err


def test_the_table_names_commands_that_exist_and_extras_that_bring_the_module() -> None:
    for extra in EXTRAS:
        assert set(extra.commands) <= set(COMMANDS)
        if extra.brings.startswith("["):
            assert extra.module.split(".")[0] in installs.modules(frozenset({extra.brings[1:-1]})), extra
            assert extra.module.split(".")[0] in installs.missing(), f"{extra.module} is in the base install"


def test_every_optional_import_is_brought_by_what_it_names_and_asked_for_first() -> None:
    """Or is one that commands do without, and say so."""
    found = list(installs.needs())
    asked = {extra.module.split(".")[0] for extra in EXTRAS}
    asked |= {module.split(".")[0] for _, function, module, _ in found if function.startswith("check")}
    assert len(found) > 50
    for place, _, module, brings in found:
        top = module.split(".")[0]
        extra = brings in installs.EXTRAS
        assert not extra or top in installs.modules(frozenset({brings})), f"{place}: [{brings}] has no {top}"
        assert top not in installs.modules(), f"{place}: {top} is in the base install"
        assert top in asked | installs.DONE_WITHOUT, f"{place}: nothing asks for {top} before it is needed"


PLAIN = """
compress run --energy 0.9
merge run --base_model base
extract base tuned --rank 2
features train --features cache --arch MLP --rank 2
card run
demo
demo --vision
demo --experts
ranks diff rows.csv rows.csv
report run
tiny
run quickstart
batch quickstart demo
label photos --loopback_teacher --votes 3
evaluate base --forget rows.csv
validate --reference base --task labels --data_path rows.csv --write_cases out
bundle --replay export
""".strip().splitlines()
PLAIN += [f"evaluate base --data_path rows.csv --task {task}" for task in ("samsum", "wikisql", "labels", "cota")]
PLAIN += [f"validate export --data_path rows.csv --task {task}" for task in ("samsum", "wikisql", "labels")]
READY = [*PLAIN, *(line for line, _, brings in LINES if " " not in brings)]


def lacking(command: str, config: Any, extras: set[str]) -> str:
    """The extra that the command asks for on an install with these ones; "" where it is ready to read."""
    with pytest.MonkeyPatch.context() as patch:
        answer_needs(patch, extras)
        try:
            require_extras(command, config)
            for check in ("check", "check_installed", "ready"):
                getattr(stage_of(command), check, lambda _: None)(config)
        except UsageError as error:
            named = re.search(r"it comes with: pip install 'rankwise\[(\w+)\]'", str(error))
            return named[1] if named else ""
        except RankwiseError:  # of what is to be read
            return ""
    return ""


@pytest.mark.parametrize("line", READY)
def test_on_every_set_of_extras_a_command_is_ready_or_names_what_makes_it_so(line: str, here: Path) -> None:
    """{base, base + each extra}: what is named is not there yet, and with all that is named the command is ready."""
    command, rest = cli.split_command(line.split())
    config, _ = cli.resolve(command, rest)
    ready: dict[str, set[str]] = {}
    for start in ("", *installs.EXTRAS) if command not in PIPELINES else ("",):
        extras = {start} - {""}
        while extra := lacking(command, config, extras):
            assert extra not in extras, f"{extra} is named on an install that has it"
            extras.add(extra)
        ready[start] = extras - {start}
        assert ready[start] <= ready[""], f"with [{start}] more is asked for than without"


def test_a_plain_line_needs_nothing(hide: Any, here: Path) -> None:
    hide("wandb", "tensorboard", "bitsandbytes", "matplotlib", "openai", "gguf", "xllamacpp", "scipy", "sacrebleu")
    config, _ = cli.resolve("train", TRAIN.split()[1:])
    require_extras("train", config)


def test_pictures_that_are_left_out_are_said_and_their_numbers_are_kept(
    hide: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of a run are worth no refusal: they can be drawn later from its tables, and the summary is none."""
    hide("matplotlib")
    base, rows = tiny_llama(tmp_path / "base"), tmp_path / "trainset.csv"
    rows.write_text("mr,ref\n" + "".join(f"name[{name}],{name} is here.\n" for name in "ABCD"))
    line = f"train --model_name {base} --task e2e_nlg --data_path {rows} --max_steps 2 --val_fraction 0"
    for more in ([], ["--no_plots"]):
        out = tmp_path / f"run{len(more)}"
        assert cli.main([*line.split(), "--use_cpu", "--save_strategy", "no", "-o", str(out), *more]) == 0
        said = "pictures of gradient norms are left out: matplotlib is not installed" in capsys.readouterr().out
        assert said == (not more), "what was switched off is no news"
        assert (out / "gradient_summary.txt").is_file() and not (out / "plots").exists()
