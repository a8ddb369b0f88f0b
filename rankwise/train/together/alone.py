"""Arms that train by themselves: `norm:N`, which chooses on the way what trains next, rows of pictures, experts, all
weights.

    trained, replay = train_alone(model, arm, bind(Norm(20), sites, seed=0), rows, collate, settings)
    str(replay)        # all:1 > mlp:40 > attention: what a yoked arm trains as a fixed schedule

`train_together` trains many arms at once and must know beforehand which sites move at which step. All else is alike:
start, scales, order of rows, optimizer and schedule of the rate, what diverges, and no dropout. `train_alone` goes
through the project's own Trainer; `train_weights` is a plain loop over all weights, for probes and for the arm `full`.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Subset
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)

from rankwise.core.phase import Bound, BoundNorm, Phases
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site
from rankwise.errors import DivergedError, Interrupted, UsageError
from rankwise.models.adapt import (
    ADAPTER,
    Allocation,
    adapt,
    adapt_allocated,
    factor_weights,
    lora_layers,
    lora_pairs,
)
from rankwise.models.sites import model_sites
from rankwise.options.sections import LoraSection
from rankwise.page.progress import progress
from rankwise.train.adalora import RankAllocation, budget_of
from rankwise.train.arguments import build_arguments
from rankwise.train.phases import PhaseKeeper
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.stacked import Pairs
from rankwise.train.together.train import Arm, Collate, TokenRows, TrainedArm, compared, why_left
from rankwise.train.trainer import SAMPLE_INDEX, RankwiseTrainer

StepLosses = MutableMapping[tuple[int, ...], float]  # the base's, by the rows of a step
JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Undropped(RankwiseTrainer):
    """A Trainer without any dropout, that of the base included: arms differ in nothing but their phases."""

    def compute_loss(self, model: nn.Module, *args: Any, **rest: Any) -> Any:
        model.eval()
        return super().compute_loss(model, *args, **rest)

    @torch.no_grad()
    def base_loss(self, batch: Mapping[str, Any]) -> float:
        """Of the same model on a batch, without its adapter."""
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != SAMPLE_INDEX})
        with self.model.disable_adapter(), self.compute_loss_context_manager():
            return float(self.compute_loss(self.model, inputs))


class DivergenceStop(TrainerCallback):
    """Ends a run that diverges, after the eighth of its steps that shows it.

    of_base: the base's loss on the rows of a step (from 0). reason: why the run was ended; empty where it was not.
    """

    def __init__(self, of_base: Callable[[int], float]) -> None:
        self.of_base, self.reason = of_base, ""
        self.losses: list[float] = []

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        steps = compared(state.global_step, state.max_steps)
        if steps:
            base = fmean(map(self.of_base, steps))
            self.reason = why_left(fmean(self.losses[steps.start :]), base, True, steps)
            control.should_training_stop = bool(self.reason) or control.should_training_stop


def train_alone(
    model: PreTrainedModel,
    arm: Arm,
    schedule: Bound | None,
    rows: TokenRows,
    collate: Collate,
    settings: ArmSettings,
    base_losses: StepLosses | None = None,
) -> tuple[TrainedArm, Phases | None]:
    """Train an arm, under a schedule if any; returns the result and of an adaptive one the equivalent fixed schedule.

    The model is only read, and afterwards as it was. `arm.active` plays no part. An arm that diverged is told as
    `train_together` tells it; its fixed schedule stays in the phase in which it ended.

    base_losses: the arm is watched, as `train_together` watches, against these; what is missing is computed and kept.

    Raises UsageError where the process sees several GPUs, Interrupted on a signal.
    """
    order = list(arm.order[: settings.rows])
    with tempfile.TemporaryDirectory(prefix="rankwise-") as name, single_process(), twin_of(model) as twin:
        folder = Path(name)
        reset = settings.phase_state == "reset"
        keeper = PhaseKeeper(schedule, folder, reset=reset, verbose=False) if schedule else None

        def of_base(step: int) -> float:
            assert base_losses is not None
            taken = tuple(order[settings.taken(step)])
            if taken not in base_losses:
                base_losses[taken] = trainer.base_loss(collate([rows[index] for index in taken]))
            return base_losses[taken]

        stop = DivergenceStop(of_base) if base_losses is not None else None
        trainer = Undropped(
            model=adapted(twin, arm.start, arm.scales),
            args=arguments(arm, settings, folder, model.device),
            train_dataset=Subset(rows, order),  # type: ignore[arg-type]
            data_collator=collate,
            phases=keeper,
            callbacks=[stop] if stop else [],
        )
        finite = finishes(trainer)
        steps = [row for row in trainer.state.log_history if "loss" in row]
        nothing = [torch.nan] * (settings.steps - len(steps))
        pairs = {path: (pair.lora_A, pair.lora_B) for path, pair in lora_pairs(trainer.model).items()}
    losses, norms = ([float(row[column]) for row in steps] + nothing for column in ("loss", "grad_norm"))
    tokens = sum(len(rows[index]["input_ids"]) for index in order[: len(steps) * settings.batch_size])
    left = ""
    if stop is not None:
        left = stop.reason if finite else why_left(math.nan, math.nan, False, range(len(steps) + 1))
    result = TrainedArm(pairs, losses, norms, not finite or bool(left), left, tokens=tokens)
    if keeper is None or not isinstance(keeper.schedule, BoundNorm):
        return result, None
    return result, keeper.schedule.replay(max(1, len(steps)))


def allocated_ranks(
    model: PreTrainedModel,
    sites: Sequence[Site],
    target: int,
    learning_rate: float,
    rows: TokenRows,
    order: Sequence[int],
    collate: Collate,
    settings: ArmSettings,
    seed: int,
) -> dict[str, int]:
    """Path → rank that AdaLoRA leaves a site of twice the mean rank `target`, by the defaults of `train --allocator
    adalora`. The model is only read.

    UsageError where a site is too small for the starting rank, DivergedError where the run diverges.
    """
    first = 2 * target
    if small := next((site for site in sites if site.full_rank < first), None):
        raise UsageError(
            f"adalora starts with rank {first} everywhere, twice the budget's, and {small.path} {small.shape} has no "
            f"more than {small.full_rank}; lower --budgets, or leave the arm out"
        )
    allocation = Allocation(first, target, budget_of(first, target, len(sites), settings.steps))
    nothing = Arm({}, {}, learning_rate, order)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as name, single_process(), twin_of(model) as twin:
        folder = Path(name)
        own = model_sites(twin)
        plan = RankPlan(tuple(PlannedSite(own[site.path], first) for site in sites))
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            allocated = adapt_allocated(twin, plan, LoraSection(lora_dropout=0.0), allocation)
        allocator = RankAllocation(allocation, folder)
        trainer = Undropped(
            model=allocated,
            args=arguments(nothing, settings, folder, model.device),
            train_dataset=Subset(rows, order),  # type: ignore[arg-type]
            data_collator=collate,
            allocator=allocator,
        )
        if not finishes(trainer):
            raise DivergedError(f"the arm adalora diverged at rate {learning_rate:g}, the middle of the grid; lower it")
    return {path: int(mask.sum()) for path, mask in allocator.kept.items()}


def finishes(trainer: RankwiseTrainer) -> bool:
    """Train to the end; False where a loss or gradient was not finite, in which case that step was not taken."""
    try:
        trainer.train()
    except DivergedError:
        return False
    except Interrupted as stop:
        text = "interrupted; this run starts afresh when the same command is given again, finished runs are kept"
        raise Interrupted(text, stop.exit_code - 128) from stop
    return True


@contextmanager
def twin_of(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A copy of the modules that shares every tensor: an adapter on it leaves nothing behind on the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def adapted(twin: PreTrainedModel, pairs: Pairs, scales: Mapping[str, float]) -> PeftModel:
    """The PEFT model of these factors and scales."""
    sites = model_sites(twin)
    planned = [PlannedSite(sites[path], a.shape[-2]) for path, (a, _) in pairs.items()]
    found = adapt(twin, RankPlan(tuple(planned)), LoraSection(lora_dropout=0.0))
    for path, layer in lora_layers(found).items():
        layer.scaling[ADAPTER] = scales[path]
        for half, start in zip(factor_weights(path, layer), pairs[path], strict=True):
            half.copy_(start)
    return found


def arguments(arm: Arm, settings: ArmSettings, folder: Path, device: torch.device) -> TrainingArguments:
    """TrainingArguments that say what `settings` says to `train_together`; float32 unless the base is otherwise."""
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UsageError(
            "a run that shares no forward pass with others (norm:N, rows with pictures, fused experts) trains on one "
            "GPU, and several are visible: start one process, with CUDA_VISIBLE_DEVICES=0"
        )
    beta1, beta2 = settings.betas
    given = {
        "use_cpu": device.type == "cpu",
        "optim": "adamw_torch",
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": settings.eps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "learning_rate": arm.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_steps,
        "per_device_train_batch_size": settings.batch_size,
        "max_steps": settings.steps,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return build_arguments(folder, 0, given, dtype="float32")


@contextmanager
def single_process() -> Iterator[None]:
    """Hide the other processes of the job, each of which is busy with a run of its own, from the Trainer."""
    kept = {name: os.environ.pop(name) for name in JOB if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def train_weights(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: TokenRows,
    order: Sequence[int],
    collate: Collate,
    settings: ArmSettings,
    learning_rate: float,
) -> bool:
    """Train these parameters in place, without dropout; whether it stayed finite (it stops where it did not)."""
    model.eval()
    optimizer = torch.optim.AdamW(
        parameters, learning_rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    scheduler = get_scheduler(settings.lr_scheduler, optimizer, settings.warmup_steps, settings.steps)
    device = parameters[0].device
    for step in progress(range(settings.steps), desc="full", unit="step"):
        taken = order[step * settings.batch_size : (step + 1) * settings.batch_size]
        batch = {name: value.to(device) for name, value in collate([rows[index] for index in taken]).items()}
        batch.pop("sample_index", None)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
        if not torch.isfinite(loss + norm):
            return False
        optimizer.step()
        scheduler.step()
    return True


@contextmanager
def borrowed(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """These parameters to train, the others frozen; afterwards all are as they were, bit for bit."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield list(parameters.values())
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        for parameter, state in before.items():
            parameter.requires_grad_(state)
            parameter.grad = None
