"""What ends training before its last step, and can go on: a signal, and evaluations that do not improve.

    signal ─▶ StopOnSignal: no further step, no (further) evaluation ─▶ checkpoint that says which evaluation it owes
    resume ─▶ the evaluation that is owed, then as if no signal had come

Patience is transformers' early stopping, with its count taken from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from rankwise.files.processes import announce


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


class Patience(EarlyStoppingCallback):
    """Ends training after so many evaluations without a better one.

    The Trainer saves a callback's count with each checkpoint, and takes it back only where all callbacks are made anew
    from there (which would lose those of ours): a resumed run would wait longer than an uninterrupted one. A run that
    was stopped early and is asked to go on nevertheless starts counting anew.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        super().on_train_begin(args, state, control, **rest)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # the Trainer saves those it finds there
        counted = saved["attributes"]["early_stopping_patience_counter"] if saved else 0
        self.early_stopping_patience_counter = counted if counted < self.early_stopping_patience else 0

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **rest: Any
    ) -> None:
        before = control.should_training_stop
        super().on_evaluate(args, state, control, metrics, **rest)
        if control.should_training_stop and not before:
            evaluations = self.early_stopping_patience_counter
            announce(
                f"early stopping at step {state.global_step:,}: {evaluations} evaluations without a better "
                f"{args.metric_for_best_model} than {state.best_metric:.4g}"
            )
