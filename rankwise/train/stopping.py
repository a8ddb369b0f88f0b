"""Early stopping that a resumed run goes on with: transformers' callback, with its count taken from the checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.store.processes import announce


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
