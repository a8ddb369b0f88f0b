"""`rankwise train --arms FILE`: many adapters over one frozen base, trained in the same batches, a folder for each.

    run/r8/       adapter (plain PEFT), sites.json, training_log.csv, resolved_config.json, manifest.json, arm.json
    run/r16/      …
    run/arms.json what came of each arm

Each arm is what `rankwise train --lora_dropout 0` makes of its `resolved_config.json`, up to rounding. An arm's folder
appears when its batch is done; `arm.json` in it says what the arm was asked for, so that it is not trained again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import DefaultFlowCallback

from rankwise.core.phase import Bound, bind, boundaries
from rankwise.data.dataset import RenderedDataset
from rankwise.data.input_record import save_input
from rankwise.data.split import SPLIT, Split
from rankwise.errors import DivergedError, UsageError
from rankwise.files.adapter import LoraAdapter, LoraPair, lora_config, write_adapter
from rankwise.files.atomic import about_to_write, atomic_folder, sha256
from rankwise.files.document import Document
from rankwise.files.plan import PLAN_FILE, write_plan
from rankwise.files.processes import announce, gathered, own_share, process_index
from rankwise.files.processes import finish as leave_group
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.adapt import adapt, keep_trainable_layout, lora_pairs
from rankwise.models.adapters import SITES, write_sites
from rankwise.models.load import load_readable_structure, load_weights
from rankwise.models.targets import scales
from rankwise.options.commands import TrainConfig
from rankwise.page.text import amount, plural
from rankwise.train.arguments import frozen_dtype, quantization
from rankwise.train.checkpoints import differences, identity_of
from rankwise.train.gradient_table import LOG_COLUMNS, TRAINING_LOG, StepTable
from rankwise.train.job import Job, adapter_facts, prepare
from rankwise.train.phases import COLUMNS, PHASES_TABLE, schedule_of
from rankwise.train.results import (
    ADAPTER_FILES,
    RESULTS_SUMMARY,
    describe_losses,
    next_command,
    write_results_summary,
)
from rankwise.train.rows import LengthGrouped, Seeded
from rankwise.train.selection import balanced, save_task
from rankwise.train.step import memory_advice
from rankwise.train.together.alone import twin_of
from rankwise.train.together.requested import PlannedArm, plan_arm, read_arms, refuse, refuse_model
from rankwise.train.together.stacked import ArmSettings, check_keys, learning_rates
from rankwise.train.together.train import Arm, TrainedArm, Validation, fitting, train_together

ARM = Document("arm.json", "rankwise-arm/1", "an arm", "rankwise train --arms", ("identity", "files", "result"))
ARMS = Document("arms.json", "rankwise-arms/1", "the arms of a run", "rankwise train --arms")


def run_arms(config: TrainConfig, name: str, arguments: TrainingArguments, inputs: Mapping[str, str | None]) -> Path:
    """Train the arms of the file. Returns the run folder, which has a folder for each."""
    refuse(config, arguments)
    arms, folder = read_arms(config), RunFolder(config.output_dir)
    try:
        with held(folder, "train", {**inputs, "arms": str(config.arms)}) as record:
            # what trains, on what: before a weight is loaded
            skeleton = load_readable_structure(config.model, name)
            refuse_model(skeleton)
            planned = [plan_arm(config, arm, skeleton, name, arguments.learning_rate) for arm in arms]
            split, job = prepare(config, name, arguments, planned[0].plan, skeleton)
            batch = ArmBatch(config, job, split, inputs, sum(each.numel() for each in skeleton.parameters()))
            batch.check(planned)
            left = batch.unfinished(planned)
            # train: processes share the arms
            about_to_write()
            if process_index()[0] == 0:
                folder.save_config(config)
            batch.train(own_share(left, [1.0] * len(left)))
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


@dataclass(frozen=True)
class ArmBatch:
    """What all arms share. config: the command's. total: parameters of the base."""

    config: TrainConfig
    job: Job
    split: Split
    inputs: Mapping[str, str | None]
    total: int

    @property
    def rows(self) -> RenderedDataset:
        assert isinstance(self.job.rows, RenderedDataset)
        return self.job.rows

    @cached_property
    def settings(self) -> ArmSettings:
        """The real run's shape: its schedule over its own steps, warm-up, clipping, decay, rows per update."""
        given = self.job.arguments
        return ArmSettings(
            steps=given.max_steps,
            batch_size=given.per_device_train_batch_size,
            lr_scheduler=str(given.lr_scheduler_type.value),
            warmup_steps=given.get_warmup_steps(given.max_steps),
            weight_decay=given.weight_decay,
            betas=(given.adam_beta1, given.adam_beta2),
            eps=given.adam_epsilon,
            max_grad_norm=given.max_grad_norm or 0.0,
            phase_state=self.config.phases.phase_state,
            epoch_rows=len(self.epoch(self.sampler(0))),
            scheduler_kwargs=tuple(sorted(dict(given.lr_scheduler_kwargs or {}).items())),
        )

    @property
    def per_epoch(self) -> int:
        """Steps."""
        return -(-self.settings.epoch_rows // self.settings.batch_size)

    def sampler(self, seed: int) -> Sampler[int]:
        """The Trainer's order of the rows."""
        given, rows = self.job.arguments, self.rows
        seed = seed if given.data_seed is None else given.data_seed
        if self.config.selection.balance != "none":
            return balanced(self.config.selection, rows, seed)
        if given.train_sampling_strategy == "group_by_length":
            return LengthGrouped(rows.lengths, given.per_device_train_batch_size, seed)
        if given.train_sampling_strategy == "sequential":
            return torch.utils.data.SequentialSampler(rows)
        found: Sampler[int] = SeedableRandomSampler(rows, data_seed=seed)
        return found

    def epoch(self, sampler: Sampler[int], epoch: int = 0) -> list[int]:
        if isinstance(sampler, (Seeded, SeedableRandomSampler)):
            sampler.set_epoch(epoch)
        rows, size = list(sampler), self.job.arguments.per_device_train_batch_size
        return rows[: len(rows) // size * size] if self.job.arguments.dataloader_drop_last else rows

    def order(self, seed: int) -> list[int]:
        """The rows of all steps of an arm."""
        sampler, epochs = self.sampler(seed), -(-self.settings.steps // self.per_epoch)
        return [row for epoch in range(epochs) for row in self.epoch(sampler, epoch)]

    def schedule(self, arm: PlannedArm) -> Bound | None:
        form = schedule_of(self.config.phases)
        return None if form is None else bind(form, arm.plan.adapted, arm.config.seed)

    def check(self, planned: Sequence[PlannedArm]) -> None:
        """Refuse rows, schedules and phases that arms cannot have, before a weight is loaded."""
        if any(example.images for example in self.rows.examples):
            raise UsageError("--arms does not go with rows that have images; train the arms one after the other")
        if not self.epoch(self.sampler(0)):
            raise UsageError("--dataloader_drop_last leaves no batch: fewer rows than --per_device_train_batch_size")
        check_keys(self.job.collator([self.rows[0]]))
        for arm in planned:
            learning_rates(self.settings, arm.learning_rate)
            self.schedule(arm)

    def identity(self, arm: PlannedArm) -> dict[str, Any]:
        """What makes the arm this arm, whichever process trains it, and beside whom."""
        facts = {**self.job.facts, **adapter_facts(arm.config, arm.plan, ())}
        best = sorted(self.moments["evaluate"]) if self.keeps_best else None
        own = {
            "learning_rate": arm.learning_rate,
            "seed": arm.config.seed,
            "steps": self.settings.steps,
            "best_of": best,
        }
        return identity_of(self.job.arguments, **facts) | own | {"processes": 1}

    @property
    def keeps_best(self) -> bool:
        return self.job.validation is not None and bool(self.job.arguments.load_best_model_at_end)

    def unfinished(self, planned: Sequence[PlannedArm]) -> list[PlannedArm]:
        """The arms that are not there yet.

        UsageError where some are, and neither --resume_from_checkpoint true nor --overwrite says what to do with them,
        or where one is of another run.
        """
        there = [arm for arm in planned if (arm.folder / ARM.name).is_file()]
        if not there or self.config.training.get("overwrite"):
            return list(planned)
        if str(self.config.resume_from_checkpoint).lower() in ("none", "false", "no"):
            raise UsageError(
                f"{self.config.output_dir} has {plural(len(there), 'finished arm')} ({there[0].arm.name} …); keep them "
                "with --resume_from_checkpoint true, train all anew with --overwrite, or choose another --output_dir"
            )
        kept = [arm for arm in there if self.is_whole(arm)]
        announce(f"kept: {len(kept)} of {plural(len(planned), 'arm')}, finished earlier")
        return [arm for arm in planned if arm not in kept]

    def is_whole(self, arm: PlannedArm) -> bool:
        """Whether the arm is as it was written; where its files have changed, it is trained anew."""
        content = ARM.read(arm.folder)
        found = differences(content["identity"], self.identity(arm))
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

    def train(self, planned: Sequence[PlannedArm]) -> None:
        """The arms of this process, in batches of as many as one forward pass takes: more at once would be no faster,
        and what is finished is kept."""
        if not planned:
            return
        base = self.base()
        length = fmean(self.rows.lengths[: self.settings.rows])
        size = fitting(math.ceil(length * self.settings.batch_size), base.device)
        for first in range(0, len(planned), size):
            self.train_batch(base, planned[first : first + size])

    def base(self) -> PreTrainedModel:
        job, quantized = self.job, quantization(self.config.lora)
        dtype = frozen_dtype(self.config.model.dtype, job.arguments)
        base = load_weights(self.config.model, job.name, dtype, quantized)
        if quantized:
            keep_trainable_layout(base)
        else:
            base.to(job.arguments.device)
        return base

    def train_batch(self, base: PreTrainedModel, planned: Sequence[PlannedArm]) -> None:
        """One batch, from the starts to the folders."""
        for arm in planned:
            print(arm.line())
        job, arms, times, started = self.job, [self.arm(base, arm) for arm in planned], list[float](), time.monotonic()
        with memory_advice(MEMORY), torch.autocast(base.device.type, torch.bfloat16, enabled=job.arguments.bf16):
            trained = train_together(
                base,
                arms,
                self.rows,
                job.collator,
                self.settings,
                watch=True,
                validation=self.validation,
                after_step=lambda step: times.append(time.monotonic() - started),
            )
        for arm, result in zip(planned, trained, strict=True):
            self.write(arm, result, times)

    def arm(self, base: PreTrainedModel, arm: PlannedArm) -> Arm:
        """Its factors as PEFT draws them from its seed, its order of the rows."""
        set_seed(arm.config.seed)
        with twin_of(base) as twin:
            drawn = lora_pairs(adapt(twin, arm.plan, arm.config.lora))
        start = {path: (pair.lora_A, pair.lora_B) for path, pair in drawn.items()}
        schedule = self.schedule(arm)
        active = None if schedule is None else schedule.active
        return Arm(start, scales(arm.plan), arm.learning_rate, self.order(arm.config.seed), active)

    @cached_property
    def validation(self) -> Validation | None:
        if self.job.validation is None:
            return None
        rows, size = self.job.validation, self.job.arguments.per_device_eval_batch_size
        order = sorted(range(len(rows)), key=lambda place: -rows.lengths[place])
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [self.job.collator([rows[place] for place in part]) for part in parts]
        return Validation(batches, self.moments["evaluate"], self.keeps_best)

    @cached_property
    def moments(self) -> dict[str, set[int]]:
        """The steps after which the Trainer logs and evaluates."""
        given, steps, flow = self.job.arguments, self.settings.steps, DefaultFlowCallback()
        state, found = TrainerState(max_steps=steps), {"log": set[int](), "evaluate": set[int]()}
        state.compute_steps(given, steps)
        for step in range(1, steps + 1):
            state.global_step, state.epoch, control = step, step / self.per_epoch, TrainerControl()
            flow.on_step_end(given, state, control)
            if step % self.per_epoch == 0 or step == steps:
                flow.on_epoch_end(given, state, control)
            for name, moments in found.items():
                if getattr(control, f"should_{name}"):
                    moments.add(step)
        return found

    def history(self, arm: PlannedArm, result: TrainedArm, times: Sequence[float]) -> list[dict[str, Any]]:
        """What the Trainer would have logged, with the seconds since the batch began."""
        rows, last, rates = list[dict[str, Any]](), 0, learning_rates(self.settings, arm.learning_rate).tolist()
        done = sum(math.isfinite(loss) for loss in result.losses)
        for step in range(1, done + 1):
            at = {"step": step, "epoch": step / self.per_epoch, "seconds": times[step - 1]}
            if step in self.moments["log"]:
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
        job, history = self.job, self.history(arm, result, times)
        state = TrainerState(global_step=sum("loss" in row for row in history), log_history=history)
        state.global_step = sum(math.isfinite(loss) for loss in result.losses)
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
            ARM.write(place, {"identity": self.identity(arm), "files": files, "result": row})

    def pairs(self, arm: PlannedArm, trained: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, LoraPair]:
        scale, sites = scales(arm.plan), arm.plan.adapted
        return {path: LoraPair(a, b, scale[path], sites[path].transposed) for path, (a, b) in trained.items()}

    def write_phases(self, arm: PlannedArm, place: Path, steps: int) -> None:
        schedule = self.schedule(arm)
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
            **({"best_step": result.best} if self.keeps_best else {}),
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


NOT_FINITE = "a loss or gradient was not finite"
MEMORY = (
    "Lower --per_device_train_batch_size or --max_seq_length, name fewer arms, or load the base with --load_in_8bit or "
    "--load_in_4bit; finished arms are kept with --resume_from_checkpoint true"
)


def write_log(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """training_log.csv as the Trainer's run has it."""
    table = StepTable(folder / TRAINING_LOG, LOG_COLUMNS)
    table.cut(0)
    for row in history:
        if "train_loss" not in row:
            numbers = {name: f"{row[name]:.8g}" for name in LOG_COLUMNS[1:-1] if name in row}
            table.append({"step": row["step"], **numbers, "seconds": round(row["seconds"], 2)})


def describe_arms(config: TrainConfig) -> list[str]:
    """For --dry-run."""
    arms = read_arms(config)
    names = ", ".join(arm.name for arm in arms[:6]) + (f" and {amount(len(arms) - 6)} more" if len(arms) > 6 else "")
    return [f"train {plural(len(arms), 'adapter')} in one batch: {names}", f"write each to {config.output_dir}/NAME"]
