"""What the arms of a run share, and their training: rows, the order of them, the real run's shape.

batch = ArmBatch(config, job)
batch.check(planned)                                     # rows, schedule, phases: before a weight is loaded
for arm, result, times in batch.trained(planned): …      # batch after batch
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerControl, TrainerState, set_seed
from transformers.trainer_callback import DefaultFlowCallback

from rankwise.core.phase import Bound, bind
from rankwise.data.dataset import RenderedDataset
from rankwise.errors import UsageError
from rankwise.models.adapt import adapt, keep_trainable_layout, lora_pairs
from rankwise.models.load import load_weights
from rankwise.models.targets import scales
from rankwise.options.commands import TrainConfig
from rankwise.train.arguments import frozen_dtype, quantization
from rankwise.train.checkpoints import identity_of
from rankwise.train.job import Job, adapter_facts
from rankwise.train.phases import schedule_of
from rankwise.train.rows import LengthGrouped, Seeded
from rankwise.train.selection import balanced
from rankwise.train.step import memory_advice
from rankwise.train.together.alone import train_alone, twin_of
from rankwise.train.together.fit import score_in_turn
from rankwise.train.together.optimizer import ArmSettings, learning_rates
from rankwise.train.together.requested import PlannedArm
from rankwise.train.together.stacked import check_keys
from rankwise.train.together.train import Arm, TrainedArm, Validation, fitting, train_together

MEMORY = (
    "Lower --per_device_train_batch_size or --max_seq_length, or load the base with --load_in_8bit or --load_in_4bit; "
    "finished arms are kept with --resume_from_checkpoint true"
)


@dataclass(frozen=True)
class ArmBatch:
    """What all arms share. config, job: the command's. in_turn: the base has fused experts, whose arms train one after
    the other, by the Trainer."""

    config: TrainConfig
    job: Job
    in_turn: bool = False

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
        if self.in_turn and self.keeps_best:
            raise UsageError(
                "--arms does not go with --select loss here: the base has fused experts, so its arms train one after "
                "the other and keep their last weights"
            )
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

    def trained(self, planned: Sequence[PlannedArm]) -> Iterator[tuple[PlannedArm, TrainedArm, list[float]]]:
        """Each arm, what has become of it, and the seconds from the start of its batch to the end of each step.

        A batch has as many arms as one forward pass takes: more at once would be no faster, and of what is finished
        nothing is lost.
        """
        if not planned:
            return
        base = self.base()
        if self.in_turn:
            yield from self.train_in_turn(base, planned)
            return
        length = fmean(self.rows.lengths[: self.settings.rows])
        size = fitting(math.ceil(length * self.settings.batch_size), base.device)
        for first in range(0, len(planned), size):
            yield from self.train_batch(base, planned[first : first + size])

    def base(self) -> PreTrainedModel:
        job, quantized = self.job, quantization(self.config.lora)
        dtype = frozen_dtype(self.config.model.dtype, job.arguments)
        base = load_weights(self.config.model, job.name, dtype, quantized)
        if quantized:
            keep_trainable_layout(base)
        else:
            base.to(job.arguments.device)
        return base

    def train_batch(
        self, base: PreTrainedModel, planned: Sequence[PlannedArm]
    ) -> Iterator[tuple[PlannedArm, TrainedArm, list[float]]]:
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
            yield arm, result, times

    def train_in_turn(
        self, base: PreTrainedModel, planned: Sequence[PlannedArm]
    ) -> Iterator[tuple[PlannedArm, TrainedArm, list[float]]]:
        """The same, arm after arm, validated at the end alone."""
        known: dict[tuple[int, ...], float] = {}
        for arm in planned:
            print(arm.line())
            own, started = self.arm(base, arm), time.monotonic()
            with memory_advice(MEMORY):
                result, _ = train_alone(
                    base, own, self.schedule(arm), self.rows, self.job.collator, self.settings, known
                )
            steps, seconds = len(result.losses), time.monotonic() - started
            if self.validation is not None and not result.diverged:
                sums, tokens = score_in_turn(base, [result.pairs], [own.scales], self.validation.batches)
                result = replace(result, validated={steps: float(sums.sum() / tokens.sum())})
            yield arm, result, [seconds * (step + 1) / steps for step in range(steps)]

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
