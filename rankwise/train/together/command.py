"""`rankwise train --arms FILE`: many adapters over one frozen base, trained in the same batches, a folder for each.

    run/r8/       adapter (plain PEFT), sites.json, training_log.csv, resolved_config.json, manifest.json, arm.json
    run/r16/      …
    run/arms.json what came of each arm

Each arm is what `rankwise train --lora_dropout 0` makes of its `resolved_config.json`, up to rounding. An arm's folder
appears when its batch is done; `arm.json` in it says what the arm was asked for, so that it is not trained again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rankwise.errors import DivergedError
from rankwise.files.atomic import about_to_write
from rankwise.files.document import Document
from rankwise.files.processes import announce, gathered, own_share, process_index
from rankwise.files.processes import finish as leave_group
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.load import load_readable_structure
from rankwise.models.sites import fused_experts
from rankwise.options.commands import TrainConfig
from rankwise.page.text import amount, plural
from rankwise.train.arguments import frozen_dtype
from rankwise.train.experts import report_unquantized, settle_dropout
from rankwise.train.job import prepare
from rankwise.train.results import next_command
from rankwise.train.together.arm_batch import ArmBatch
from rankwise.train.together.arm_folder import ARM, ArmFolders
from rankwise.train.together.requested import PlannedArm, plan_arm, read_arms, refuse, refuse_model

ARMS = Document("arms.json", "rankwise-arms/1", "the arms of a run", "rankwise train --arms")


def run_arms(config: TrainConfig, name: str, arguments: TrainingArguments, inputs: Mapping[str, str | None]) -> Path:
    """Train the arms of the file. Returns the run folder, which has a folder for each."""
    arms, folder = read_arms(config), RunFolder(config.output_dir)
    try:
        with held(folder, "train", {**inputs, "arms": str(config.arms)}) as record:
            # what trains, on what: before a weight is loaded
            skeleton = load_readable_structure(config.model, name)
            in_turn = bool(fused_experts(skeleton))
            config = without_dropout(config) if in_turn else config
            refuse(config, arguments)
            refuse_model(skeleton)
            planned = [plan_arm(config, arm, skeleton, name, arguments.learning_rate) for arm in arms]
            report_unquantized(config, skeleton, frozen_dtype(config.model.dtype, arguments))
            for each in planned:
                settle_dropout(each.config, each.plan)
            split, job = prepare(config, name, arguments, planned[0].plan, skeleton)
            if in_turn:
                announce("the base has fused experts: its arms train one after the other, without dropout")
            batch = ArmBatch(config, job, in_turn)
            batch.check(planned)
            folders = ArmFolders(batch, split, inputs, sum(each.numel() for each in skeleton.parameters()))
            left = folders.unfinished(planned)
            # train: processes share the arms, once all of them have seen which are left
            about_to_write()
            gathered({})
            if process_index()[0] == 0:
                folder.save_config(config)
            for arm, result, times in batch.trained(own_share(left, [1.0] * len(left))):
                folders.write(arm, result, times)
            gathered({})  # all have finished theirs
            # what came of them
            rows = [ARM.read(arm.folder)["result"] for arm in planned]
            if process_index()[0] == 0:
                content = {"steps": arguments.max_steps, "arms": rows}
                record.outputs |= {"arms": ARMS.write(folder, content)}
                record.facts |= {"arms": len(rows), "left": sum(bool(row["left"]) for row in rows)}
                tell(planned, rows)
    finally:
        leave_group()
    return folder.path


def without_dropout(config: TrainConfig) -> TrainConfig:
    """With none where nothing is said: arms train without."""
    return replace(config, lora=replace(config.lora, lora_dropout=config.lora.lora_dropout or 0.0))


def tell(planned: Sequence[PlannedArm], rows: Sequence[Mapping[str, Any]]) -> None:
    """The results and the next command. DivergedError where no arm has come to its end."""
    for row in rows:
        print(f"{row['name']}: " + (f"left: {row['left']}" if row["left"] else row["losses"]))
    whole = [(arm, row) for arm, row in zip(planned, rows, strict=True) if not row["left"]]
    if not whole:
        raise DivergedError(
            f"all {len(rows)} arms diverged; their logs are in {planned[0].folder.parent}. Lower their learning rates"
        )
    print(f"train: {plural(len(whole), 'adapter')}, each in its folder in {planned[0].folder.parent}")
    best = min(whole, key=lambda pair: pair[1]["eval_loss"] if pair[1]["eval_loss"] is not None else math.inf)[0]
    print(f"next: {next_command(best.config)}")


def describe_arms(config: TrainConfig) -> list[str]:
    """For --dry-run."""
    arms = read_arms(config)
    names = ", ".join(arm.name for arm in arms[:6]) + (f" and {amount(len(arms) - 6)} more" if len(arms) > 6 else "")
    return [f"train {plural(len(arms), 'adapter')} in one batch: {names}", f"write each to {config.output_dir}/NAME"]
