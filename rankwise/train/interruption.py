"""On a signal, end training with a checkpoint that resumes exactly.

signal ─▶ Interruption: a request ─▶ StopOnSignal: no further step, no (further) evaluation ─▶ checkpoint
resume ─▶ the evaluation that is owed, then on
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from rankwise.errors import Interrupted
from rankwise.files.processes import announce

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 2.0  # torchrun and a terminal may both deliver one and the same signal to each of its processes


class Interruption:
    """A context in which the two signals are requests. `requested` is the signal's number, or None.

    A repeated signal ends the process with 128 + its number, from wherever it is: checkpoints that bear a manifest
    are complete, and the one being written bears none. Handlers are set in the main thread only, and put back.
    """

    def __init__(self, processes: int = 1) -> None:
        self.requested: int | None = None
        self._echo = ECHO_SECONDS if processes > 1 else 0.0
        self._asked_at = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self.requested = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker, forked with this handler
            return
        if self.requested is None:
            self.requested, self._asked_at = number, time.monotonic()
            say("finishing this step or validation batch, then saving a checkpoint; a second signal stops at once")
        elif time.monotonic() - self._asked_at >= self._echo:
            say("stopped; the last complete checkpoint is intact")
            os._exit(128 + number)

    def raise_if_requested(self, folder: str) -> None:
        """Raise Interrupted where a signal came: training has stopped and its checkpoint is written."""
        if self.requested is not None:
            raise Interrupted(
                f"interrupted by {signal.Signals(self.requested).name}; the checkpoint is complete. To go on, run the "
                f"same command with --resume_from_checkpoint true (checkpoints in {folder})",
                self.requested,
            )


def say(text: str) -> None:
    """Write directly to standard error: the signal may have interrupted print."""
    os.write(2, f"\nrankwise: {text}\n".encode())


class EvaluationStopped(Exception):
    """A signal came while an evaluation ran; caught by the trainer, which saves. No figure of it is kept."""


@contextmanager
def stoppable(model: nn.Module, asked: Callable[[], bool]) -> Iterator[None]:
    """EvaluationStopped at the model's next forward pass, generation's included, once `asked` says so."""

    def look(*_: Any) -> None:
        if asked():
            raise EvaluationStopped

    handle = model.get_input_embeddings().register_forward_pre_hook(look)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


class StopOnSignal(TrainerCallback, ExportableState):
    """Ends training after the step or evaluation batch in which a signal came, with a checkpoint.

    done: training has been ended so. owed: the evaluation at this step is still to be made; it is saved with the
    checkpoint, and `make_up` makes it when training goes on from there, as it would have been made.

    Args:
        stop: whether a signal has come.
        make_up: evaluates, and chooses by the result.
    """

    def __init__(self, stop: Callable[[], bool], make_up: Callable[[], None]) -> None:
        self.stop, self.make_up = stop, make_up
        self.done = self.owed = False

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"owed": self.owed}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, self.state()) if state.global_step else self.state()
        self.done, self.owed = False, saved["attributes"]["owed"]
        if self.owed and args.eval_strategy != IntervalStrategy.NO:
            announce(f"validating at step {state.global_step:,}, which the stop has left out")
            self.make_up()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stop():
            self.end(control, owed=control.should_evaluate or ends_in_evaluation(args, state, control))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The Trainer ends the epoch of a stopped run as well; nothing more is to be done in it."""
        if self.done:
            control.should_evaluate = control.should_save = False

    def end(self, control: TrainerControl, *, owed: bool) -> None:
        """Nothing more after this step but its checkpoint."""
        self.done, self.owed = True, owed
        control.should_training_stop = control.should_save = control.should_log = True
        control.should_evaluate = False


def ends_in_evaluation(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
    """Whether this step is the last one of an epoch, or of training, that ends with an evaluation."""
    epoch = float(state.epoch or 0)
    by_epoch = args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= epoch
    return by_epoch and (epoch.is_integer() or control.should_training_stop)
