"""Trackers get losses, norms, phases and the run's configuration, offline; a resumed run goes on in the same one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sqlite3
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from tiny import tiny_llama

from rankwise import cli
from rankwise.errors import UsageError
from rankwise.train.arguments import check_trackers
from rankwise.train.gradient_table import StepTable
from rankwise.train.reporting import Tracked, Trackers

HAS_TRACKIO = importlib.util.find_spec("trackio") is not None
WHY = "trackio 0.43 needs pillow below 13, which constraints.txt goes beyond"
STATE = SimpleNamespace(is_world_process_zero=True, global_step=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of four steps that ended at a checkpoint after two of them and was resumed, without any network."""
    folder = tmp_path_factory.mktemp("tracked")
    base, rows = tiny_llama(folder / "base"), folder / "trainset.csv"
    rows.write_text("mr,ref\n" + "".join(f"name[{name}],{name} is here.\n" for name in "ABCDEFGHIJ"))
    line = (
        f"train --model_name {base} --task e2e_nlg --data_path {rows} --val_fraction 0.2 --lora_r 2 --logging_steps 1"
    )
    line += f" --save_strategy steps --save_steps 2 --max_steps 4 --eval_strategy steps --eval_steps 2 -o {folder}/run"
    trackers = "tensorboard,trackio" if HAS_TRACKIO else "tensorboard"
    words = [*line.split(), "--use_cpu", "--no_plots", "--report_to", trackers, "--schedule", "mlp:2 > attn"]

    def refused(*_: Any) -> NoReturn:
        raise AssertionError("a tracker opened a connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        for call in ("connect", "connect_ex", "bind"):
            patch.setattr(socket.socket, call, refused)
        assert cli.main(words) == 0
        shutil.rmtree(folder / "run" / "checkpoint-4")
        assert cli.main([*words, "--resume_from_checkpoint", "true"]) == 0
    return folder


def logged(folder: Path) -> dict[int, float]:
    table = StepTable(folder / "run" / "training_log.csv", ())
    return {int(row["step"]): float(row["loss"]) for row in table.read() if row["loss"]}


def test_tensorboard_has_one_run_with_every_step_once(run: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = (run / "run" / "tensorboard").iterdir()
    found = events.EventAccumulator(str(folder)).Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx(logged(run)) and len(found.Scalars("train/loss")) == 4
    assert [event.step for event in found.Scalars("train/grad_norm_mlp")] == [1, 2]
    assert [event.step for event in found.Scalars("train/grad_norm_attention")] == [3, 4]
    assert [event.step for event in found.Scalars("eval/loss")] == [2, 4]
    assert len(found.Scalars("train/learning_rate")) == 4
    assert [(event.step, event.value) for event in found.Scalars("train/phase_sites")] == [(1, 6), (3, 8)]
    text = found.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"rankwise/schedule": "mlp:2 > attn"' in text and '"rankwise/trained_parameters": 1856' in text
    assert '"rankwise/rank_max": 2' in text and f'"run_name": "{folder.name}"' in text


@pytest.mark.skipif(not HAS_TRACKIO, reason=WHY)
def test_trackio_has_one_run(run: Path) -> None:
    with sqlite3.connect(run / "trackio" / "rankwise.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    import orjson

    assert len({name for name, _ in rows}) == 1
    metrics = [orjson.loads(text) for _, text in rows]
    losses = {row["train/global_step"]: row["train/loss"] for row in metrics if "train/loss" in row}
    assert losses == pytest.approx(logged(run))
    assert Counter(row["train/phase"] for row in metrics if "train/phase" in row) == {"mlp": 1, "attn": 2}
    assert {row["train/global_step"] for row in metrics if "train/grad_norm_attention" in row} == {3, 4}
    assert orjson.loads(config)["rankwise/schedule"] == "mlp:2 > attn"


class Fake:
    """A tracker that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        run = SimpleNamespace(info=SimpleNamespace(run_id="given"))
        self._ml_flow = SimpleNamespace(active_run=lambda: run, MlflowException=KeyError)
        self._wandb = SimpleNamespace(finish=lambda: self.told.append("finish"), Error=KeyError)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        names = ("WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID")
        self.told.append((args.to_dict(), {name: os.environ[name] for name in names if name in os.environ}))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.told.append(logs)

    def on_step_end(self, *_: Any, **__: Any) -> None: ...

    def on_train_end(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_is_the_same_one_and_secrets_stay_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_PROJECT", "WANDB_RUN_ID", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    own = {"output_dir": str(tmp_path), "project": "mine", "run_name": None, "report_to": [name]}
    arguments: Any = SimpleNamespace(**own, to_dict=lambda: dict(own))
    phases: Any = SimpleNamespace(entered={"step": 3, "phase": "mlp", "sites": 6, "parameters": 96})
    gradients: Any = SimpleNamespace(latest={"step": 3, "mlp_norm": 0.5})
    first = Trackers({"api_key": "hidden", "hub_token": "hidden", "max_tokens": 3, "none": None}, gradients, phases)
    tracker: Any = Fake()
    tracked = Tracked(name, tracker, first)
    tracked.on_train_begin(arguments, STATE, None)
    (config, environment) = tracker.told.pop()
    assert config == own | {"run_name": f"{tmp_path.name}-{first.run}", "rankwise/max_tokens": 3}
    assert "mine" in environment.values() and not {"WANDB_RUN_ID", "WANDB_PROJECT"} & set(os.environ)
    tracked.on_step_end(arguments, STATE, None)
    tracked.on_log(arguments, STATE, None, logs={"loss": 1.0})
    words = {"phase": "mlp"} if name == "wandb" else {}
    assert tracker.told == [words | {"phase_sites": 6, "phase_parameters": 96}, {"loss": 1.0, "grad_norm_mlp": 0.5}]
    first.on_log(None, STATE, None)
    assert first.norms() == {}, "a norm is logged once"
    tracked.on_train_end(arguments, STATE, None)
    assert tracker.told[2:] == ["finish"] * (name == "wandb")

    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    first.on_save(arguments, STATE, None)
    again, second = Fake(), Trackers({}, None, None)
    second.restore(checkpoint)
    Tracked(name, again, second).on_train_begin(arguments, STATE, None)  # type: ignore[arg-type]
    (config, environment) = again.told.pop()
    assert config["run_name"] == f"{tmp_path.name}-{first.run}"
    assert (
        environment[f"{name.upper()}_RUN_ID"] == first.ids[name] == ("given" if name == "mlflow" else first.ids[name])
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandb", "no key.*WANDB_MODE=offline"),
        ("mlflow", "no key"),
        ("swanlab", "no key.*SWANLAB_MODE=offline"),
        ("trackio", "no key.*TRACKIO_DIR"),
    ],
)
def test_a_tracker_that_cannot_begin_is_an_error_in_a_sentence(name: str, said: str, tmp_path: Path) -> None:
    class Keyless(Fake):
        _swanlab = SimpleNamespace(get_run=lambda: True)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise KeyError("no key")

    tracked = Tracked(name, Keyless(), Trackers({}, None, None))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"--report_to {name}: .*{said}"):
        tracked.on_train_begin(SimpleNamespace(output_dir=str(tmp_path), run_name=None, project="p"), STATE, None)  # type: ignore[arg-type]


def test_a_folder_that_tensorboard_cannot_write_is_a_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    out = run / "in_the_way"
    out.mkdir()
    (out / "tensorboard").write_text("a file")
    line = f"train --model_name {run}/base --task e2e_nlg --data_path {run}/trainset.csv --max_steps 1 -o {out}"
    assert cli.main([*line.split(), "--use_cpu", "--no_plots", "--report_to", "tensorboard"]) == 2
    said = capsys.readouterr().err
    assert "--report_to tensorboard: " in said and f"{out}/tensorboard" in said and "TENSORBOARD_LOGGING_DIR" in said
    assert "Traceback" not in said and (out / "tensorboard").read_text() == "a file"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("mine", "run", None, "allow")),
        (
            {"SWANLAB_PROJECT": "p", "SWANLAB_RUN_ID": "r", "SWANLAB_EXP_NAME": "e", "SWANLAB_RESUME": "must"},
            ("p", "e", "r", "must"),
        ),
        ({"SWANLAB_PROJ_NAME": "q"}, ("q", "run", None, "allow")),
    ],
)
def test_variables_of_swanlab_go_before_ours(
    variables: dict[str, str], expected: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROJECT", "PROJ_NAME", "RUN_ID", "EXP_NAME", "RESUME"):
        monkeypatch.delenv(f"SWANLAB_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begun: list[dict[str, Any]] = []

    def no_run() -> NoReturn:
        raise RuntimeError("no run has been initialized")

    fake: Any = Fake()
    fake._swanlab = SimpleNamespace(get_run=no_run, init=lambda **rest: begun.append(rest))
    trackers = Trackers({}, None, None)
    arguments: Any = SimpleNamespace(output_dir=str(tmp_path / "run"), run_name=None, project="mine", to_dict=dict)
    Tracked("swanlab", fake, trackers).on_train_begin(arguments, STATE, None)
    project, name, run, resume = expected
    assert begun[0]["project"] == project and begun[0]["resume"] == resume
    assert begun[0]["experiment_name"] == (name if name == "e" else f"run-{trackers.run}")
    assert begun[0]["id"] == trackers.ids["swanlab"] and run in (None, begun[0]["id"])
    assert {name: os.environ[name] for name in os.environ if name.startswith("SWANLAB_")} == variables


def test_secrets_and_addresses_with_passwords_reach_no_tracker(tmp_path: Path) -> None:
    hidden = dict.fromkeys(("API_KEY", "api_key_file", "HF_TOKEN", "hub_token", "dbPassword", "MYTOKEN"), "5ecret")
    shown = {"max_tokens": "3", "tokenizer_name": "t", "pad_token": "<pad>", "path": "C:/data", "at": "hf://d/a@main/x"}
    data = "https://me:5ecret@host/rows.csv?sig=5ecret#5ecret"
    texts = {
        "data_path": data,
        "odd": "s3://5ecret@bucket/x ftp://u:5e/c?r#e@5ecret@host/y",
        "server": "me:5ecret@host:80/v1",
        "bare": "me:5ecret@host",
        "signed": "host/rows.csv?sig=5ecret",
        "several": [data, {"deep": data, "token": "5ecret"}],
    }
    arguments: Any = SimpleNamespace(output_dir=str(tmp_path), run_name=None, project="p")
    arguments.to_dict = lambda: {**hidden, **texts, **shown}
    fake: Any = Fake()
    Tracked("wandb", fake, Trackers({**hidden, **texts, **shown}, None, None)).on_train_begin(arguments, STATE, None)
    (config, _) = fake.told.pop()
    assert "5ecret" not in str(config) and "me:" not in str(config)
    for prefix in ("", "rankwise/"):
        assert config[f"{prefix}data_path"] == "https://host/rows.csv" and config[f"{prefix}server"] == "host:80/v1"
        assert config[f"{prefix}odd"] == "s3://bucket/x ftp://host/y"
        assert {name: config[prefix + name] for name in shown} == shown
        assert not {prefix + name for name in hidden} & config.keys()


def test_names_of_trackers() -> None:
    assert check_trackers("none") == ["none"] and check_trackers(["all"]) == ["all"]
    with pytest.raises(UsageError, match=r"--report_to: unknown tracker 'trakio'.*trackio|trakio"):
        check_trackers("trakio")
    with pytest.raises(UsageError, match=r"--report_to kubeflow: .*or leave it out: --report_to none"):
        check_trackers(["kubeflow"])
