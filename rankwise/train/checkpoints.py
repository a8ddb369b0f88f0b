"""Checkpoints with a manifest that marks them complete and identifies their run.

    Trainer saves ──▶ files flushed ──▶ rankwise_manifest.json (last) ──▶ older complete checkpoints rotated out

A folder without a manifest was being written when the process ended.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import Aside, flush, sha256
from rankwise.files.document import Document, as_plain
from rankwise.files.processes import announce

MANIFEST = "rankwise_manifest.json"
SEAL = Document(MANIFEST, "rankwise-checkpoint/1", "a checkpoint's manifest", parts=("files", "identity"))
HASHED_BYTES = 2**30  # larger files are checked by size alone: hashing 16 GB takes longer than saving them
FOLDER = re.compile(r"checkpoint-(\d+)")
STATE = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")


class CheckpointKeeper(TrainerCallback):
    """Seals every checkpoint that the Trainer has written, then rotates the complete ones."""

    def __init__(self, identity: Mapping[str, Any], keep: int | None) -> None:
        self.identity = dict(identity)
        self.keep = keep

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state holds the old logging and saving steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            output_dir = Path(args.output_dir)
            seal(output_dir / f"checkpoint-{state.global_step}", self.identity)
            rotate(output_dir, self.keep, state.best_model_checkpoint)


def seal(folder: Path, identity: Mapping[str, Any]) -> None:
    """Flush a checkpoint's files to the disk and write its manifest, which makes it complete."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    for file in files:
        flush(file)
    for inner in {file.parent for file in files}:
        flush(inner)
    SEAL.write(
        folder,
        {
            "step": step_of(folder),
            "files": {file.relative_to(folder).as_posix(): file_entry(file) for file in files},
            "identity": dict(identity),
            "versions": {each.__name__: each.__version__ for each in (torch, transformers, peft)},
        },
    )


def file_entry(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    return {"size": size, "sha256": sha256(file) if size <= HASHED_BYTES else None}


def step_of(folder: Path) -> int:
    match = FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest (highest step) first, complete or not."""
    if not output_dir.is_dir():
        return []
    found = [folder for folder in output_dir.iterdir() if folder.is_dir() and step_of(folder) >= 0]
    return sorted(found, key=step_of, reverse=True)


def find_damage(folder: Path) -> list[str]:
    """Reasons why a checkpoint differs from what was saved; empty for an intact one.

    A state file that is gone altogether is no reason here: whether to go on without it is the user's choice.
    """
    if not (folder / MANIFEST).is_file():
        return ["it has no manifest: saving it was interrupted"]
    try:
        files: Mapping[str, Mapping[str, Any]] = SEAL.read(folder)["files"]
        return [reason for name, row in files.items() if (reason := difference(folder / name, row))]
    except (DataError, KeyError, TypeError, AttributeError):
        return [f"its {MANIFEST} is damaged"]


def difference(file: Path, row: Mapping[str, Any]) -> str | None:
    """How a file differs from the manifest's row about it."""
    if not file.is_file():
        return None if STATE.fullmatch(file.name) else f"{file.name} is missing"
    size = file.stat().st_size
    if size != row["size"]:
        return f"{file.name} has {size:,} bytes instead of {row['size']:,}"
    if row["sha256"] is not None and sha256(file) != row["sha256"]:
        return f"{file.name} was altered"
    return None


def rotate(output_dir: Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints over the limit.

    The newest and the best are the first two that count, so a limit of 1 leaves both where they differ: training
    goes on from the one, and ends with the other. Incomplete ones stay, uncounted.
    """
    if not keep or keep < 0:
        return
    complete = [folder for folder in checkpoints(output_dir) if (folder / MANIFEST).is_file()]
    chosen = [folder for folder in complete[1:] if best is not None and folder.resolve() == Path(best).resolve()]
    others = [folder for folder in complete[1:] if folder not in chosen]
    for folder in others[max(0, keep - 1 - len(chosen)) :]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint: its manifest first, so that what a crash leaves of it counts as incomplete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def discard_unsealed(output_dir: Path, step: int) -> None:
    """Remove the checkpoint that was being written when training failed, to give its space back."""
    folder = output_dir / f"checkpoint-{step}"
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder)


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
    """Identity of a run: the decisive training arguments and the caller's facts (model, data, plan …), as plain JSON.

    A nested mapping becomes entries of its own (`ranks.model.layers.0…: 8`), so that a difference names its place.
    """
    settings = {name: getattr(arguments, name) for name in DECISIVE if hasattr(arguments, name)}
    whole = {**settings, "processes": arguments.world_size, **facts}
    plain: dict[str, Any] = as_plain(dict(leaves(whole)), default=str)
    return plain


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def goes_on_from(asked: str | None, output_dir: Path) -> Path | None:
    """The checkpoint folder that `resume_point` will look at first, not looked into yet; None for a fresh start."""
    if asked is None or asked.lower() in NO:
        return None
    if asked.lower() not in NEWEST:
        return Path(asked)
    return next((folder for folder in checkpoints(output_dir) if (folder / MANIFEST).is_file()), None)


def missing_state(folder: Path, processes: int) -> list[str]:
    """State needed for an exact resume that this checkpoint lacks: optimizer, schedule, random state."""
    sharded = any(folder.glob("optimizer*/")) or any(folder.glob("global_step*/"))  # they have names of their own
    random = ["rng_state.pth"] if processes <= 1 else [f"rng_state_{index}.pth" for index in range(processes)]
    wanted = [*([] if sharded else ["optimizer.pt"]), "scheduler.pt", *random]
    return [name for name in wanted if not (folder / name).is_file()]


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint that is as it was saved; each newer one that is not is named, with the reason.

    One that is sound but for a state file that is gone is returned as well: `missing_state` judges that.
    """
    for folder in checkpoints(output_dir):
        reasons = find_damage(folder)
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
    folder = newest_complete(output_dir) if asked.lower() in NEWEST else named_checkpoint(Path(asked))
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


def named_checkpoint(folder: Path) -> Path:
    """The checkpoint that the user named; an error if it is missing or damaged."""
    if not folder.is_dir():
        raise UsageError(f"--resume_from_checkpoint {folder}: no such folder")
    reasons = find_damage(folder)
    if reasons:
        raise DataError(
            f"{folder} cannot be resumed from: {'; '.join(reasons[:5])}; "
            "--resume_from_checkpoint true takes the newest complete one"
        )
    return folder


def refuse_other_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise UsageError with the differences between the run that was saved and this one."""
    found = differences(SEAL.read(folder)["identity"], identity)
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
        f"{name}: {shorten(saved.get(name))} in the checkpoint, {shorten(now.get(name))} now"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
        and not (name in MAY_RISE and rises(saved.get(name), now.get(name)))
        and not unrecorded(name, saved)
    ]


def unrecorded(name: str, saved: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is of a version that did not record this."""
    first = name.partition(".")[0]
    return first in NEWER and all(one.partition(".")[0] != first for one in saved)


def rises(before: Any, after: Any) -> bool:
    numbers = isinstance(before, (int, float)) and isinstance(after, (int, float))
    return numbers and 0 < before <= after


def shorten(value: Any) -> str:
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
