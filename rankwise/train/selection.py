"""Checkpoint selection, early stopping and class balancing of `train`.

--select, --early_stopping ── arguments_for ──▶ training arguments (evaluate, save, load the best), Patience
validation rows ── accuracy_of ──▶ LabelAccuracy ──┐
--balance ── sampler_of ──▶ Balanced ──────────────┴─▶ the Trainer
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerState

from rankwise.data.dataset import RenderedDataset
from rankwise.data.label_task import read_task
from rankwise.errors import UsageError
from rankwise.evaluate.classify import LabelAccuracy, label_set
from rankwise.evaluate.tasks import TASKS
from rankwise.files.processes import announce, process_index
from rankwise.options.sections import DataSection, SelectionSection
from rankwise.train.arguments import TRAIN_DEFAULTS
from rankwise.train.job import Job
from rankwise.train.rows import Seeded

RULES = ("oversample", "sqrt")


class Balanced(Seeded):
    """Positions of the rows in random order, each at least once, rows of rarer classes several times.

    Repetition is as even as it can be: a row occurs ⌊target/count⌋ times or once more, and which ones get one more is
    drawn anew in each epoch.

    Args:
        labels: the class of every row.
        rule: `oversample`: target = count of the largest class. `sqrt`: √(count · that of the largest), between the
            counts as they are and equal ones: where equal counts would teach the few rows of a class by heart.
    """

    def __init__(self, labels: Sequence[str], rule: str, seed: int) -> None:
        super().__init__(seed)
        assert rule in RULES, rule
        self.places: dict[str, list[int]] = {}
        for place, label in enumerate(labels):
            self.places.setdefault(label, []).append(place)
        self.before: Mapping[str, int] = Counter(labels)
        most = max(self.before.values())
        between = {label: round(math.sqrt(count * most)) for label, count in self.before.items()}
        self.after = dict.fromkeys(between, most) if rule == "oversample" else between

    def __len__(self) -> int:
        return sum(self.after.values())

    def __iter__(self) -> Iterator[int]:
        generator, rows = self.generator(), list[int]()
        for label, places in self.places.items():
            whole, more = divmod(self.after[label], len(places))
            drawn = torch.randperm(len(places), generator=generator)[:more].tolist()
            rows += places * whole + [places[place] for place in drawn]
        return iter([rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()])


RARE = 10  # rows of a class; below it, repetition teaches the rows rather than the class


def check_selection(selection: SelectionSection, task: str | None, given: Mapping[str, Any], *, packing: bool) -> None:
    """Refuse invalid combinations of options before anything is read."""
    classifies = task in TASKS and TASKS[task].classifies
    named = ", ".join(name for name, each in TASKS.items() if each.classifies)
    by_class = {"--select accuracy": selection.select == "accuracy", "--balance": selection.balance != "none"}
    for option, asked in by_class.items():
        if asked and task is not None and not classifies:
            raise UsageError(f"{option} needs rows with a class: --task {named}; {task} has none")
    if selection.balance != "none" and packing:
        raise UsageError("--balance repeats single samples, --packing puts several into one row; leave one of them out")
    grouped = given.get("group_by_length") or given.get("train_sampling_strategy") == "group_by_length"
    if selection.balance != "none" and grouped:
        raise UsageError("--balance and --group_by_length both decide the order of the rows; leave one of them out")


def arguments_for(selection: SelectionSection, given: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments that choosing a checkpoint needs, where they are not given.

    Saved is when evaluated is, and the best checkpoint is loaded at the end. UsageError where what was given leaves
    nothing to choose by, or nothing to choose from.
    """
    asked = "--select" if selection.select else "--early_stopping" if selection.early_stopping else None
    if asked is None:
        if "accuracy" in str(given.get("metric_for_best_model")):
            raise UsageError("--metric_for_best_model accuracy is measured with --select accuracy: add it")
        return dict(given)
    _refuse_nothing_to_choose(asked, given)
    strategy = given.get("eval_strategy") or TRAIN_DEFAULTS["eval_strategy"]
    metric = selection.select or "loss"
    wanted = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": metric != "loss"}
    wanted["save_strategy"] = strategy
    if strategy == "steps":
        wanted["save_steps"] = given.get("eval_steps") or given.get("logging_steps") or TRAIN_DEFAULTS["logging_steps"]
    return wanted | {name: value for name, value in given.items() if value is not None}


def _refuse_nothing_to_choose(asked: str, given: Mapping[str, Any]) -> None:
    none = {name for name in ("eval_strategy", "save_strategy") if given.get(name, "some") in (None, "no")}
    if "eval_strategy" in none:
        raise UsageError(
            f"{asked} needs evaluations to compare: give validation rows (--val_path, or a "
            "--val_fraction above 0) and --eval_strategy epoch or steps"
        )
    if "save_strategy" in none or given.get("load_best_model_at_end") is False:
        raise UsageError(f"{asked} keeps the best checkpoint: leave out --save_strategy and --load_best_model_at_end")


def accuracy_of(selection: SelectionSection, job: Job) -> LabelAccuracy | None:
    """The accuracy metric on the validation rows, for --select accuracy."""
    if selection.select != "accuracy":
        return None
    assert job.validation is not None
    batch = job.arguments.per_device_eval_batch_size
    return LabelAccuracy.of(job.validation.examples, job.renderer, selection.select_by, batch)


def sampler_of(selection: SelectionSection, job: Job) -> Balanced | None:
    """The balanced order of the training rows, with a printed summary; validation rows stay as they are."""
    if selection.balance == "none":
        return None
    assert isinstance(job.rows, RenderedDataset)
    arguments = job.arguments
    sampler = balanced(selection, job.rows, arguments.seed if arguments.data_seed is None else arguments.data_seed)
    for line in describe_balance(sampler, label_set(job.rows.examples)):
        announce(line)
    return sampler


def balanced(selection: SelectionSection, rows: RenderedDataset, seed: int) -> Balanced:
    return Balanced([str(example.facts["label"]) for example in rows.examples], selection.balance, seed)


def describe_balance(sampler: Balanced, labels: tuple[str, ...]) -> list[str]:
    """Rows of each class, as they are and as an epoch has them; a warning for what repetition cannot mend."""
    before, after = sampler.before, sampler.after
    counts = ", ".join(f"{label} {before[label]:,} → {after[label]:,}" for label in labels if label in after)
    lines = [f"balance: {counts}; {len(sampler):,} rows an epoch instead of {sum(before.values()):,}"]
    rare = [label for label in labels if 0 < sampler.before.get(label, 0) < RARE]
    if rare:
        lines.append(f"warning: fewer than {RARE} rows of {', '.join(rare)}: repeated, they are learnt by heart")
    absent = [label for label in labels if label not in sampler.before]
    if absent:
        lines.append(f"warning: no training row is of {', '.join(absent)}: the model cannot learn it")
    return lines


def selection_lines(selection: SelectionSection) -> list[str]:
    """For --dry-run."""
    lines = [f"repeat rows of rarer classes ({selection.balance})"] if selection.balance != "none" else []
    if selection.select or selection.early_stopping:
        how = f"accuracy by {selection.select_by}" if selection.select == "accuracy" else "validation loss"
        lines.append(f"keep the checkpoint with the best {how}")
    if selection.early_stopping:
        lines.append(f"stop after {selection.early_stopping} evaluations without a better one")
    return lines


def save_task(data: DataSection, folder: Path, *, everywhere: bool = False) -> dict[str, Path]:
    """task.json beside an adapter that was trained on a labelled data set, by the first process, or any."""
    if data.task != "labels" or (process_index()[0] != 0 and not everywhere):
        return {}
    assert data.data_path is not None
    path = Path(data.data_path)
    return {"task": read_task(path if path.is_dir() else path.parent).save(folder)}


class Patience(EarlyStoppingCallback):
    """Ends training after so many evaluations without a better one.

    The Trainer saves a callback's count with each checkpoint, and takes it back only where all callbacks are made anew
    from there (which would lose those of ours): a resumed run would wait longer than an uninterrupted one. A run that
    was stopped early and is asked to go on nevertheless starts counting anew.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        super().on_train_begin(args, state, control, **rest)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # the Trainer saves those it finds there
        counted = saved["attributes"]["early_stopping_patience_counter"] if saved else 0
        self.early_stopping_patience_counter = counted if counted < self.early_stopping_patience else 0

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **rest: Any) -> None:
        before = control.should_training_stop
        super().on_evaluate(args, state, control, metrics, **rest)
        if control.should_training_stop and not before:
            count = self.early_stopping_patience_counter
            announce(
                f"early stopping at step {state.global_step:,}: {count} evaluations without a better "
                f"{args.metric_for_best_model} than {state.best_metric:.4g}"
            )
