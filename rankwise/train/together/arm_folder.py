"""An arm's folder: that of a single run, written whole, and `arm.json`, which says what the arm was asked for.

folders = ArmFolders(batch, split, inputs, total)
folders.write(arm, result, times)
folders.unfinished(planned)          # the arms that are not there yet, as they were written
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor
from transformers import TrainerState

from rankwise.core.phase import boundaries
from rankwise.core.site import Site
from rankwise.data.input_record import save_input
from rankwise.data.split import SPLIT, Split
from rankwise.errors import UsageError
from rankwise.files.adapter import LoraAdapter, LoraPair, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.files.atomic import atomic_folder, sha256
from rankwise.files.document import Document
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.files.processes import announce
from rankwise.files.run_folder import SITES, RunFolder
from rankwise.models.adapters import write_sites
from rankwise.models.targets import scales
from rankwise.page.text import plural
from rankwise.train.checkpoints import differences
from rankwise.train.gradient_table import LOG_COLUMNS, PHASES_TABLE, TRAINING_LOG, StepTable
from rankwise.train.phases import COLUMNS
from rankwise.train.results import ADAPTER_FILES, RESULTS_SUMMARY, describe_losses, write_results_summary
from rankwise.train.selection import save_task
from rankwise.train.together.arm_batch import ArmBatch
from rankwise.train.together.optimizer import learning_rates
from rankwise.train.together.requested import PlannedArm
from rankwise.train.together.train import TrainedArm

ARM = Document("arm.json", "rankwise-arm/1", "an arm", "rankwise train --arms", ("identity", "files", "result"))
NOT_FINITE = "a loss or gradient was not finite"


@dataclass(frozen=True)
class ArmFolders:
    """The folders of the arms of a batch. total: parameters of the base."""

    batch: ArmBatch
    split: Split
    inputs: Mapping[str, str | None]
    total: int

    def unfinished(self, planned: Sequence[PlannedArm]) -> list[PlannedArm]:
        """The arms that are not there yet.

        UsageError where some are, and neither --resume_from_checkpoint true nor --overwrite says what to do with them,
        or where one is of another run.
        """
        there = [arm for arm in planned if (arm.folder / ARM.name).is_file()]
        for arm in planned:
            if arm not in there and arm.folder.exists() and (arm.folder.is_file() or any(arm.folder.iterdir())):
                raise UsageError(f"{arm.folder} is in the way: it is no arm's folder; give the arm another name")
        config = self.batch.config
        if not there or config.training.get("overwrite"):
            return list(planned)
        if str(config.resume_from_checkpoint).lower() in ("none", "false", "no"):
            raise UsageError(
                f"{config.output_dir} has {plural(len(there), 'finished arm')} ({there[0].arm.name} …); keep them with "
                "--resume_from_checkpoint true, train all anew with --overwrite, or choose another --output_dir"
            )
        kept = [arm for arm in there if self.is_whole(arm)]
        announce(f"kept: {len(kept)} of {plural(len(planned), 'arm')}, finished earlier")
        return [arm for arm in planned if arm not in kept]

    def is_whole(self, arm: PlannedArm) -> bool:
        """Whether the arm is as it was written; where its files have changed, it is trained anew."""
        content = ARM.read(arm.folder)
        found = differences(content["identity"], self.batch.identity(arm))
        if found:
            raise UsageError(
                "\n  ".join([f"{arm.folder} is an arm of another run; what differs:", *found[:20]])
                + "\nChange these back, choose another --output_dir, or train all anew with --overwrite"
            )
        for name, digest in content["files"].items():
            if not (arm.folder / name).is_file() or sha256(arm.folder / name) != digest:
                announce(f"warning: {arm.folder / name} is not what was written; the arm is trained anew")
                return False
        return True

    def history(self, arm: PlannedArm, result: TrainedArm, times: Sequence[float]) -> list[dict[str, Any]]:
        """What the Trainer would have logged, with the seconds since the batch began."""
        rows, last, rates = list[dict[str, Any]](), 0, learning_rates(self.batch.settings, arm.learning_rate).tolist()
        done = sum(math.isfinite(loss) for loss in result.losses)
        for step in range(1, done + 1):
            at = {"step": step, "epoch": step / self.batch.per_epoch, "seconds": times[step - 1]}
            if step in self.batch.moments["log"]:
                own = {"grad_norm": result.norms[step - 1], "learning_rate": rates[step - 1]}
                rows.append({**at, "loss": fmean(result.losses[last:step]), **own})
                last = step
            if step in result.validated:
                rows.append({**at, "eval_loss": result.validated[step]})
        if done:
            rows.append({"step": done, "train_loss": fmean(result.losses[:done])})
        return rows

    def write(self, arm: PlannedArm, result: TrainedArm, times: Sequence[float]) -> None:
        """The arm's folder, whole: that of a single run, without the adapter where it has diverged."""
        job, history = self.batch.job, self.history(arm, result, times)
        state = TrainerState(global_step=sum(map(math.isfinite, result.losses)), log_history=history)
        adapter = () if result.diverged else ADAPTER_FILES
        with atomic_folder(arm.folder) as place:
            folder, config = RunFolder(place), arm.config
            if adapter:
                write_adapter(place, LoraAdapter(lora_config(job.name), self.pairs(arm, result.pairs)))
                write_sites(place, arm.plan, arm.left_out)
            if arm.arm.scale is not None and config.lora.lora_config is not None:  # the file's plan has another scale
                write_plan(place / PLAN_FILE.name, arm.plan)
                config = replace(config, lora=replace(config.lora, lora_config=str(arm.folder / PLAN_FILE.name)))
            folder.save_config(config)
            SPLIT.write(place, self.split.record())
            write_log(place, history)
            self.write_phases(arm, place, state.global_step)
            write_results_summary(config, state, place)
            outputs = {name: place / name for name in (*adapter, SPLIT.name, TRAINING_LOG, RESULTS_SUMMARY)}
            outputs |= save_input(job.renderer, job.record, place) | save_task(config.data, place, everywhere=True)
            facts = self.facts(arm, result, state)
            seconds = round(times[-1], 2)
            folder.record(
                "train",
                {**self.inputs, "plan": arm.config.lora.lora_config},
                outputs,
                seconds,
                **facts,
                training_seconds=seconds,
            )
            files = {name: sha256(place / name) for name in adapter if name != SITES.name}
            row = self.row(arm, result, history, facts)
            ARM.write(place, {"identity": self.batch.identity(arm), "files": files, "result": row})

    def pairs(self, arm: PlannedArm, trained: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, LoraPair]:
        scale, sites = scales(arm.plan), arm.plan.adapted
        return {path: pair_of(sites[path], a, b, scale[path]) for path, (a, b) in trained.items()}

    def write_phases(self, arm: PlannedArm, place: Path, steps: int) -> None:
        schedule = self.batch.schedule(arm)
        if schedule is None:
            return
        table, ranks = StepTable(place / PHASES_TABLE, COLUMNS), arm.plan.ranks
        table.cut(0)
        for step, phase in boundaries(schedule, steps):
            active = schedule.active(step)
            count = sum(arm.plan.adapted[path].parameters(ranks[path]) for path in active)
            table.append({"step": step + 1, "phase": phase, "sites": len(active), "parameters": count})

    def facts(self, arm: PlannedArm, result: TrainedArm, state: TrainerState) -> dict[str, Any]:
        return {
            "trainable_parameters": arm.plan.parameters,
            "total_parameters": self.total,
            "adapted_sites": len(arm.plan.ranks),
            "steps": state.global_step,
            "tokens": result.tokens,
            **({"best_step": result.best} if self.batch.keeps_best else {}),
            **({"left": result.left or NOT_FINITE} if result.diverged else {}),
        }

    def row(
        self, arm: PlannedArm, result: TrainedArm, history: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arm in arms.json."""
        last = result.validated.get(result.best or max(result.validated, default=0))
        return {
            "name": arm.arm.name,
            "ranks": arm.plan.ranks,
            "scales": sorted(set(scales(arm.plan).values())),
            "learning_rate": arm.learning_rate,
            "seed": arm.config.seed,
            "parameters": arm.plan.parameters,
            "steps": facts["steps"],
            "tokens": result.tokens,
            "train_loss": next((row["train_loss"] for row in history if "train_loss" in row), None),
            "eval_loss": last,
            "best_step": facts.get("best_step"),
            "left": facts.get("left"),
            "losses": describe_losses(history) if history else "no step was taken",
        }


def pair_of(site: Site, a: Tensor, b: Tensor, scale: float) -> LoraPair:
    """The pair of a site as a file has it."""
    transposed = site.transposed and not site.experts
    return LoraPair(a, b, scale, transposed, peft=site.peft, swapped=site.swapped, order=site.order)


def write_log(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """training_log.csv as the Trainer's run has it."""
    table = StepTable(folder / TRAINING_LOG, LOG_COLUMNS)
    table.cut(0)
    for row in history:
        if "train_loss" not in row:
            numbers = {name: f"{row[name]:.8g}" for name in LOG_COLUMNS[1:-1] if name in row}
            table.append({"step": row["step"], **numbers, "seconds": round(row["seconds"], 2)})
