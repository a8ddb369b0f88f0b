"""Checkpoints that say of themselves that they are complete, and what run they belong to.

    Trainer saves ──▶ files flushed ──▶ rankwise_manifest.json (last) ──▶ older complete checkpoints rotated out

A folder without a manifest was being written when the process ended. `resume.py` reads what is written here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import DataError
from rankwise.files.atomic import flush, read_object, sha256, write_json

MANIFEST = "rankwise_manifest.json"
FORMAT = "rankwise-checkpoint/1"
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
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "step": step_of(folder),
            "files": {file.relative_to(folder).as_posix(): described(file) for file in files},
            "identity": dict(identity),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
        },
    )


def described(file: Path) -> dict[str, Any]:
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


def unsound(folder: Path) -> list[str]:
    """Why a checkpoint is not as it was saved; empty for a sound one.

    A state file that is gone altogether is no reason here: whether to go on without it is the user's choice.
    """
    if not (folder / MANIFEST).is_file():
        return ["it has no manifest: saving it was interrupted"]
    try:
        files: Mapping[str, Mapping[str, Any]] = read_object(folder / MANIFEST)["files"]
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
