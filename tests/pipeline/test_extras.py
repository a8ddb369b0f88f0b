"""What is not installed is found out before anything is read, by every command and every stage of a recipe."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

import rankwise
from rankwise import cli
from rankwise.pipeline.extras import EXTRAS, TRACKERS, require_extras
from rankwise.pipeline.idle import Told
from rankwise.pipeline.table import COMMANDS


def hide_modules(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
    """Makes modules unimportable, as on an install without them."""

    class Without(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return None if name.split(".")[0] in names else super().find_spec(name, path, target)

    for loaded in [name for name in sys.modules if name.split(".")[0] in names]:
        monkeypatch.delitem(sys.modules, loaded)
    finders = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    monkeypatch.setattr(sys, "meta_path", finders)


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *names: hide_modules(monkeypatch, names)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the paths of the lines below exist, with nothing in them: reading any would be exit 3."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned", "run", "other", "photos", "export", "cache"):
        (tmp_path / name).mkdir()
    for name in ("rows.csv", "rows.7z", "photos.parquet", "base/config.json"):
        (tmp_path / name).write_text("")
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
    ("evaluate base --task e2e_nlg --data_path rows.csv", "sacrebleu", "eval"),
    ("evaluate base --task lm_eval:arc", "lm_eval", "harness"),
    ("evaluate base --task e2e_nlg --data_path rows.csv --engine vllm", "vllm", "vllm"),
    ("export base", "gguf", "device"),
    ("validate export --task e2e_nlg --data_path rows.csv", "xllamacpp", "device"),
    ("bundle export", "xllamacpp", "device"),
    ("label photos", "openai", "label"),
    ("features capture photos.parquet --model base", "pyarrow", "data"),
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


def test_the_table_names_commands_and_extras_that_exist() -> None:
    text = (Path(rankwise.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for extra in EXTRAS:
        assert set(extra.commands) <= set(COMMANDS)
        assert not extra.brings.startswith("[") or f"\n{extra.brings[1:-1]} = [" in text


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
