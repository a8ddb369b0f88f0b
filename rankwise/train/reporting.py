"""What training says while it runs: steps and validation batches as `progress` shows them, and the Trainer's trackers.

A tracker (`--report_to`) gets beside what the Trainer logs: norms of the gradients by group of modules, the phase, and
as configuration the command's options and what is trained. A resumed run goes on in the tracker's run of its
checkpoint, whose `trackers.json` names it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from rankwise.errors import UsageError
from rankwise.files.atomic import read_if_there, write_json
from rankwise.files.run_folder import told_outside
from rankwise.page.progress import progress
from rankwise.train.gradient_table import GROUP_OF
from rankwise.train.gradients import GradientNorms
from rankwise.train.phases import PhaseKeeper

TRACKERS_STATE = "trackers.json"
TENSORBOARD_FOLDER = "tensorboard"
SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm")
# Tracker → environment variables of its project, and of its run's id, which mlflow gives itself.
PROJECT_OF = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "swanlab": "SWANLAB_PROJECT"}
RUN_OF = {"wandb": "WANDB_RUN_ID", "mlflow": "MLFLOW_RUN_ID", "swanlab": "SWANLAB_RUN_ID"}
RESUME_OF = {"wandb": "WANDB_RESUME", "swanlab": "SWANLAB_RESUME"}
INSTEAD = {
    "wandb": "WANDB_MODE=offline needs no key",
    "swanlab": "SWANLAB_MODE=offline needs no key",
    "tensorboard": "TENSORBOARD_LOGGING_DIR names another folder",
    "trackio": "TRACKIO_DIR names another folder",
}
UNFINISHED = ("wandb", "swanlab")
TEXTS = ("tensorboard", "trackio", "wandb")  # they take texts among the values


class TrainingProgress(TrainerCallback):
    """Steps of training, with the latest losses, and batches of validation within them."""

    def __init__(self) -> None:
        self.bars: list[Any] = []
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.close()
        total, done = state.max_steps, state.global_step
        self.bars = [progress(total=total, initial=done, desc="train", unit="step", leave=True)]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bars[0].update(state.global_step - self.bars[0].n)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        self.figures |= {name: logs[name] for name in SHOWN if name in (logs or {})}
        for bar in self.bars[:1]:
            bar.set_postfix(self.figures)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        if len(self.bars) == 1:
            self.bars.append(progress(total=len(eval_dataloader), desc="validate", unit="batch"))
        if self.bars:
            self.bars[-1].update()

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        for bar in self.bars[1:]:
            bar.close()
        self.bars = self.bars[:1]

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Also where an error ends training."""
        for bar in reversed(self.bars):
            bar.close()
        self.bars = []


class Trackers(TrainerCallback):
    """The trackers of a run: what they are told beside the Trainer's log, and which of their runs it is.

    Args:
        config: option → value, and figures of what is trained.
        gradients, phases: those of the run.
    """

    def __init__(self, config: Mapping[str, Any], gradients: GradientNorms | None, phases: PhaseKeeper | None) -> None:
        told = {name: value for name, value in told_outside(config).items() if value is not None}
        self.config = {f"rankwise/{name}": plain(value) for name, value in told.items()}
        self.gradients, self.phases = gradients, phases
        self.run = secrets.token_hex(4)
        self.ids: dict[str, str] = {}
        self.resumed = False
        self.logged = 0

    def take(self, handler: CallbackHandler) -> None:
        """Stand before each tracker in the Trainer's list, and do without its own progress bar."""
        for kind in (PrinterCallback, ProgressCallback):
            handler.remove_callback(kind)
        name_of = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
        handler.callbacks = [
            Tracked(name_of[type(one)], one, self) if type(one) in name_of else one for one in handler.callbacks
        ]

    def restore(self, checkpoint: Path) -> None:
        """Go on in the trackers' runs of a checkpoint; one that has none begins runs of its own."""
        content: Mapping[str, Any] = read_if_there(checkpoint / TRACKERS_STATE)
        if content:
            self.run, self.ids, self.resumed = content["run"], dict(content["ids"]), True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and args.report_to:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / TRACKERS_STATE, {"run": self.run, "ids": self.ids})

    def name(self, args: TrainingArguments) -> str:
        """As asked for, else the run folder's name and what tells it from others of that name."""
        return args.run_name or f"{Path(args.output_dir).resolve().name}-{self.run}"

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.logged = state.global_step

    def norms(self) -> dict[str, float]:
        """Norms of the gradients by group, of the latest step measured since the last log."""
        row = self.gradients.latest if self.gradients is not None else {}
        if not row or row["step"] <= self.logged:
            return {}
        return {f"grad_norm_{group}": row[column] for group, column in GROUP_OF.items() if column in row}

    def phase(self, step: int) -> dict[str, Any]:
        """The phase, where one has begun with this step."""
        row = self.phases.entered if self.phases is not None else {}
        if row.get("step") != step:
            return {}
        return {"phase": row["phase"], "phase_sites": row["sites"], "phase_parameters": row["parameters"]}


class Tracked:
    """A tracker of the Trainer's that is told more. Events that are not here go to it as they are."""

    def __init__(self, name: str, tracker: TrainerCallback, trackers: Trackers) -> None:
        self.name, self.tracker, self.trackers = name, tracker, trackers

    def __getattr__(self, event: str) -> Any:
        return getattr(self.tracker, event)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **rest: Any) -> None:
        told = Arguments(args, self.trackers)
        with environment(self.settings(args)):
            try:
                if self.name == "tensorboard" and state.is_world_process_zero:
                    self.open_tensorboard(args, state)
                if self.name == "swanlab" and state.is_world_process_zero:
                    self.open_swanlab(told)
                self.tracker.on_train_begin(told, state, control, **rest)
            except Exception as error:  # each tracker has its own for no key, no server, no folder to write into
                first = told_outside(next(iter(str(error).splitlines()), "")) or type(error).__name__
                remedies = [INSTEAD[self.name]] if self.name in INSTEAD else []
                remedies.append("or leave it out: --report_to none")
                raise UsageError("; ".join([f"--report_to {self.name}: {first}", *remedies])) from error
        if self.name == "mlflow" and state.is_world_process_zero:
            self.trackers.ids["mlflow"] = self.tracker._ml_flow.active_run().info.run_id

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **rest: Any) -> None:
        phase = self.trackers.phase(state.global_step)
        if phase:
            self.tell(args, state, control, phase, rest)
        self.tracker.on_step_end(args, state, control, **rest)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **rest: Any) -> None:
        """The end of the run, which the Trainer leaves to the end of the process; another stage may train in it."""
        self.tracker.on_train_end(args, state, control, **rest)
        if self.name in UNFINISHED and state.is_world_process_zero:
            getattr(self.tracker, f"_{self.name}").finish()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **rest: Any) -> None:
        self.tell(args, state, control, {**(logs or {}), **self.trackers.norms()}, rest)

    def tell(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], rest: dict[str, Any]) -> None:
        if self.name not in TEXTS:
            logs = {name: value for name, value in logs.items() if not isinstance(value, str)}
        self.tracker.on_log(Arguments(args, self.trackers), state, control, **{**rest, "logs": logs})

    def settings(self, args: TrainingArguments) -> dict[str, str]:
        """Environment variables by which the tracker takes its project and its run; the user's own go before."""
        found = {PROJECT_OF[self.name]: args.project} if self.name in PROJECT_OF else {}
        if self.name == "swanlab" and "SWANLAB_PROJ_NAME" in os.environ:
            found = {PROJECT_OF["swanlab"]: os.environ["SWANLAB_PROJ_NAME"]}
        if self.name in RESUME_OF:
            found |= {RUN_OF[self.name]: self.own_id(), RESUME_OF[self.name]: "allow"}
        elif self.name == "mlflow" and self.name in self.trackers.ids:
            found[RUN_OF[self.name]] = self.trackers.ids[self.name]
        return found

    def own_id(self) -> str:
        ids = self.trackers.ids
        ids[self.name] = os.environ.get(RUN_OF[self.name]) or ids.get(self.name) or secrets.token_hex(8)
        return ids[self.name]

    def open_tensorboard(self, args: TrainingArguments, state: TrainerState) -> None:
        """A folder per run; of an earlier one of this name only what came before the checkpoint is shown."""
        folder = self.tracker.logging_dir or Path(args.output_dir) / TENSORBOARD_FOLDER
        purge = state.global_step + 1 if self.trackers.resumed else 0
        self.tracker.tb_writer = self.tracker._SummaryWriter(
            log_dir=str(Path(folder) / self.trackers.name(args)), purge_step=purge
        )

    def open_swanlab(self, args: Arguments) -> None:
        """The Trainer's own asks for a run before there is one, which newer versions of swanlab refuse."""
        swanlab = self.tracker._swanlab
        try:
            there = swanlab.get_run() is not None
        except RuntimeError:
            there = False
        if not there:
            asked = args.arguments.run_name or os.environ.get("SWANLAB_EXP_NAME") or args.run_name
            project, run, resume = (os.environ[of["swanlab"]] for of in (PROJECT_OF, RUN_OF, RESUME_OF))
            swanlab.init(project=project, experiment_name=asked, id=run, resume=resume)


class Arguments:
    """Training arguments as a tracker sees them: with a run's name, and the options of the command among them."""

    def __init__(self, arguments: TrainingArguments, trackers: Trackers) -> None:
        self.arguments, self.trackers = arguments, trackers
        self.run_name = trackers.name(arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.arguments, name)

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = told_outside({**self.arguments.to_dict(), "run_name": self.run_name})
        return {**told, **self.trackers.config}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def plain(value: Any) -> Any:
    """As a tracker's table of options takes it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; those that are set already stay."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
