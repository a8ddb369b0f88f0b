"""Where a run goes on: the newest sound checkpoint, complete in its state, of the very same run.

checkpoint = resume_point("true", output_dir, identity)     # None: start from the beginning
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import Aside, read_object
from rankwise.files.processes import announce
from rankwise.train.checkpoints import MANIFEST, checkpoints, unsound

MAY_RISE = ("num_train_epochs", "max_steps")
SHOWN = 20
NEWEST, NO = ("true", "yes", "last"), ("false", "no")  # what --resume_from_checkpoint takes beside a folder
ADDED = ("ignore_data_skip", "accelerator_config", "tf32", "use_liger_kernel")
NEWER = ("chat_template", "chat_template_kwargs", "rows", *ADDED)  # checkpoints of earlier versions do not say
# Every training argument that changes which weights come out; logging, saving and evaluation do not.
DECISIVE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"),
    *("num_train_epochs", "max_steps", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
    *("bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    *ADDED,
)


def identity_of(arguments: TrainingArguments, **facts: Any) -> dict[str, Any]:
    """What a run is: the decisive training arguments and the caller's facts (model, data, plan …), as plain JSON.

    A nested mapping becomes entries of its own (`ranks.model.layers.0…: 8`), so that a difference names its place.
    """
    settings = {name: getattr(arguments, name) for name in DECISIVE if hasattr(arguments, name)}
    whole = {**settings, "processes": arguments.world_size, **facts}
    plain: dict[str, Any] = json.loads(json.dumps(dict(leaves(whole)), default=str))
    return plain


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def state_files(processes: int) -> tuple[str, ...]:
    """What the Trainer needs beside the weights to go on exactly: optimizer, schedule, random state."""
    random = ["rng_state.pth"] if processes <= 1 else [f"rng_state_{index}.pth" for index in range(processes)]
    return ("optimizer.pt", "scheduler.pt", *random)


def goes_on_from(asked: str | None, output_dir: Path) -> Path | None:
    """The checkpoint folder that `resume_point` will look at first, not looked into yet; None for a fresh start."""
    if asked is None or asked.lower() in NO:
        return None
    if asked.lower() not in NEWEST:
        return Path(asked)
    return next((folder for folder in checkpoints(output_dir) if (folder / MANIFEST).is_file()), None)


def missing_state(folder: Path, processes: int) -> list[str]:
    """State files that an exact resume needs and this checkpoint lacks (sharded optimizers have their own names)."""
    sharded = any(folder.glob("optimizer*/")) or any(folder.glob("global_step*/"))
    wanted = [name for name in state_files(processes) if not (sharded and name == "optimizer.pt")]
    return [name for name in wanted if not (folder / name).is_file()]


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint that is as it was saved; each newer one that is not is named, with the reason.

    One that is sound but for a state file that is gone is returned as well: `missing_state` judges that.
    """
    for folder in checkpoints(output_dir):
        reasons = unsound(folder)
        if not reasons:
            return folder
        announce(f"warning: skipped {folder}: {'; '.join(reasons[:3])}")
    return None


def resume_point(
    asked: str | None, output_dir: Path, identity: Mapping[str, Any], *, allow_partial: bool = False, processes: int = 1
) -> Path | None:
    """The checkpoint to resume from, checked; None to start from the beginning.

    Args:
        asked: a checkpoint folder, or true for the newest complete one (none there: a fresh start, which is said).
        allow_partial: resume although optimizer or random state is gone.

    Raises:
        DataError: the named checkpoint is not as it was saved.
        UsageError: state is missing, or the run is not the one that was saved: the differences are listed.
    """
    if asked is None or asked.lower() in NO:
        return None
    folder = newest_complete(output_dir) if asked.lower() in NEWEST else named(Path(asked))
    if folder is None:
        announce(f"note: no complete checkpoint in {output_dir}; starting from the beginning")
        return None
    lacks = missing_state(folder, processes)
    if lacks and not allow_partial:
        raise UsageError(
            f"{folder} lacks {', '.join(lacks)}, so training cannot go on exactly as before; "
            "--allow_partial_resume goes on with fresh ones, an earlier checkpoint can be named with "
            "--resume_from_checkpoint"
        )
    if lacks:
        announce(f"warning: {', '.join(lacks)} missing in {folder}: what it held starts afresh")
    refuse_other_run(folder, identity)
    announce(f"resuming from {folder}")
    return folder


def named(folder: Path) -> Path:
    """A checkpoint that the user named, or what is wrong with it."""
    if not folder.is_dir():
        raise UsageError(f"--resume_from_checkpoint {folder}: no such folder")
    reasons = unsound(folder)
    if reasons:
        raise DataError(
            f"{folder} cannot be resumed from: {'; '.join(reasons[:5])}; "
            "--resume_from_checkpoint true takes the newest complete one"
        )
    return folder


def refuse_other_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise UsageError with the differences between the run that was saved and this one."""
    found = differences(read_object(folder / MANIFEST)["identity"], identity)
    if found:
        more = [f"… and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise UsageError(
            f"{folder} belongs to another run; what differs:\n  " + "\n  ".join(found[:SHOWN] + more) + "\nChange "
            "these back, or start over in another --output_dir (epochs and max_steps may be raised; logging, saving "
            "and evaluation may change)"
        )


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per entry that differs. Epochs and max_steps may rise."""
    return [
        f"{name}: {shortened(saved.get(name))} in the checkpoint, {shortened(now.get(name))} now"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
        and not (name in MAY_RISE and rises(saved.get(name), now.get(name)))
        and not unknown(name, saved)
    ]


def unknown(name: str, saved: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is of a version that did not record this."""
    first = name.partition(".")[0]
    return first in NEWER and all(one.partition(".")[0] != first for one in saved)


def rises(before: Any, after: Any) -> bool:
    numbers = isinstance(before, (int, float)) and isinstance(after, (int, float))
    return numbers and 0 < before <= after


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def refuse_earlier(output_dir: Path, overwrite: bool) -> None:
    """UsageError where a fresh run would mix its checkpoints with an earlier run's: where there are finished ones (with
    a manifest), sound or damaged, and `overwrite` is off."""
    finished = [folder for folder in checkpoints(output_dir) if (folder / MANIFEST).is_file()]
    if finished and not overwrite:
        raise UsageError(
            f"{output_dir} has {len(finished)} checkpoints of an earlier run (newest: {finished[0].name}); go on with "
            "--resume_from_checkpoint true, start over with --overwrite, or choose another --output_dir"
        )


class FirstStep(TrainerCallback):
    """Deletes what an earlier run has left once this one has taken a step: until then it can be put back."""

    def __init__(self, earlier: Aside) -> None:
        self.earlier = earlier

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.earlier.drop()
