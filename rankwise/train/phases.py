"""Freeze and unfreeze adapters by a schedule, between steps and before clipping.

schedule ──▶ PhaseKeeper: on_step_begin (requires_grad) ──▶ backward ──▶ before_clipping (grad = None) ──▶ step

All adapters are in the optimizer from the start. In one process a frozen site does not require gradients, so that
backward ends at the first layer that trains. Several processes leave `requires_grad` alone, because DDP's reducer
counts on every gradient, and drop the gradients of frozen sites instead. Either way AdamW never sees a gradient of
zero, which would move a parameter: frozen weights stay as they are, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.core.phase import Bound, BoundNorm, BoundPhases, Form, Phases, bind
from rankwise.core.schedule import parse_schedule, strategy
from rankwise.core.site import Site
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import read_if_there, read_object, write_json
from rankwise.files.processes import announce
from rankwise.models.adapt import full_parameters, site_parameters
from rankwise.options.sections import PhasesSection
from rankwise.train.gradient_table import PHASES_TABLE, StepTable
from rankwise.train.gradients import GradientNorms, gradient_norm

PHASES_STATE = "phases.json"
COLUMNS = ("step", "phase", "sites", "parameters")


class PhaseKeeper(TrainerCallback):
    """Keeps the sites that are not in the current phase frozen.

    Args:
        schedule: bound to the adapted sites, and to those modules trained in full that take part in the phases.
        reset: forget the optimizer's state of a site when it becomes active again (default: keep it).
        output_dir: `phases.csv` there gets a row per change of phase.
        verbose: say so as well.
        full: paths of those modules; all else that is trained in full trains in every phase.
    """

    def __init__(
        self,
        schedule: Bound,
        output_dir: Path,
        *,
        reset: bool = False,
        verbose: bool = True,
        full: Collection[str] = (),
    ) -> None:
        self.schedule = schedule
        self.full = frozenset(full)
        self.reset = reset
        self.verbose = verbose
        self.table = StepTable(output_dir / PHASES_TABLE, COLUMNS)
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self.entered: dict[str, Any] = {}  # the row of the phase that has begun last
        self._toggles = True

    # --- at the beginning, and between steps -------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        self._toggles = args.world_size == 1
        whole = full_parameters(model)
        self.parameters = site_parameters(model) | {path: whole[path] for path in sorted(self.full)}
        if state.is_world_process_zero:
            self.table.cut(state.global_step)
        self.warn_unreached(state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **_: Any) -> None:
        step = state.global_step
        active = self.schedule.active(step)
        if self._toggles:
            self.require(frozenset(self.parameters) if measuring(self.schedule, step) else active)
        before = self.schedule.active(step - 1) if step else None
        if active == before:
            return
        if self.reset and before is not None:
            self.forget(active - before, optimizer)
        if state.is_world_process_zero:
            self.enter(step, active)

    def require(self, active: frozenset[str]) -> None:
        for path, parameters in self.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(path in active)

    def forget(self, paths: frozenset[str], optimizer: Any) -> None:
        for path in paths:
            for parameter in self.parameters[path]:
                optimizer.state.pop(parameter, None)

    def enter(self, step: int, active: frozenset[str]) -> None:
        """Print and record the phase that begins. The table counts steps as finished ones, like the other tables."""
        name = self.schedule.name(step)
        count = sum(parameter.numel() for path in active for parameter in self.parameters[path])
        self.entered = {"step": step + 1, "phase": name, "sites": len(active), "parameters": count}
        self.table.append(self.entered)
        if self.verbose:
            announce(f"phase from step {step + 1}: {name} ({len(active)} sites, {count:,} parameters)")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.require(frozenset(self.parameters))

    def warn_unreached(self, steps: int) -> None:
        starts = self.schedule.starts() if isinstance(self.schedule, BoundPhases) else []
        late = [self.schedule.name(start) for start in starts if start >= steps]
        if late:
            announce(f"warning: training ends at step {steps}, before the phases {', '.join(late)} begin")

    # --- between backward and clipping ---------------------------------------------------------------------------

    def before_clipping(self, step: int) -> None:
        """Drop the gradients of frozen sites, after a choice that needs them. `step` steps are done."""
        norm = measuring(self.schedule, step)
        if norm and step // norm.form.every == len(norm.choices):
            self.schedule = norm.chosen(self.norms_by_kind())
        active = self.schedule.active(step)
        for path, parameters in self.parameters.items():
            if path not in active:
                for parameter in parameters:
                    parameter.grad = None

    def norms_by_kind(self) -> dict[str, float]:
        """Gradient norm per √parameter of each kind of sites (a gradient scaler's factor cancels)."""
        assert isinstance(self.schedule, BoundNorm), "chosen by norm"
        kinds: dict[str, list[nn.Parameter]] = {}
        for path, parameters in self.parameters.items():
            kinds.setdefault(self.schedule.sites[path].kind, []).extend(parameters)
        norms = torch.stack([gradient_norm(parameters) for parameters in kinds.values()]).tolist()
        counts = [sum(parameter.numel() for parameter in parameters) for parameters in kinds.values()]
        return {kind: norm / math.sqrt(n) for kind, norm, n in zip(kinds, norms, counts, strict=True)}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the schedule's choices so far into the checkpoint before it is sealed."""
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / PHASES_STATE, self.record(state))

    def record(self, state: TrainerState) -> dict[str, Any]:
        done = max(state.global_step - 1, 0)
        record: dict[str, Any] = {"schedule": str(self.schedule.form), "phase": self.schedule.name(done)}
        if isinstance(self.schedule, BoundNorm):
            record |= {"choices": list(self.schedule.choices), "replay": str(self.schedule.replay(state.global_step))}
        return record

    def restore(self, checkpoint: Path) -> None:
        """Take up the choices that a checkpoint holds. DataError where a schedule needs them and they are gone."""
        if not isinstance(self.schedule, BoundNorm):
            return
        file = checkpoint / PHASES_STATE
        if not file.is_file():
            raise DataError(f"{file} is missing: without it the choices of {self.schedule.form} cannot be replayed")
        content: Mapping[str, Any] = read_object(file)
        self.schedule = replace(self.schedule, choices=tuple(content["choices"]))


def measuring(schedule: Bound, step: int) -> BoundNorm | None:
    """The schedule, where it lets every site have a gradient in this step, to choose by."""
    return schedule if isinstance(schedule, BoundNorm) and schedule.measures(step) else None


def phase_of(checkpoint: Path) -> str | None:
    """The phase that a checkpoint was saved in; None where training had none."""
    phase: str | None = read_if_there(checkpoint / PHASES_STATE).get("phase")
    return phase


RECOMMENDED = "both-mlp-attn"


def schedule_of(phases: PhasesSection) -> Form | None:
    """The schedule given by the options; None where everything trains all the time."""
    named = phases.phase_strategy or (RECOMMENDED if phases.dynamic_lora else None)
    if phases.schedule and named:
        raise UsageError("--schedule and --phase_strategy (or --dynamic_lora) both define the phases; give one")
    if named:
        return parse_schedule(strategy(named, phases.phase1_end, phases.phase2_end))
    return parse_schedule(phases.schedule) if phases.schedule else None


def phase_keeper(
    phases: PhasesSection,
    sites: Mapping[str, Site],
    seed: int,
    arguments: TrainingArguments,
    full: Mapping[str, Site] | None = None,
) -> PhaseKeeper | None:
    """The phase keeper, bound to the sites to be adapted: invalid phases are refused before the model loads.

    full: modules that are trained in full. They take part in the phases where a phase names their tower; else they
    train all the time, as the words of a schedule mean adapted matrices.

    Raises UsageError for phases that train nothing, and under DeepSpeed, whose wrapper steps inside backward.
    """
    form = schedule_of(phases)
    if form is None:
        return None
    if arguments.deepspeed:
        raise UsageError("phases do not work under DeepSpeed, which steps inside backward; use FSDP2 (--fsdp) instead")
    named = form.towers if isinstance(form, Phases) else frozenset()
    taking_part = {path: site for path, site in (full or {}).items() if site.tower in named}
    always = sorted({site.tower for site in (full or {}).values()} - named)
    if always:
        announce(f"note: no phase names {', '.join(always)}, which is trained in full: it trains in every phase")
    schedule: Bound = bind(form, {**sites, **taking_part}, seed)
    reset = phases.phase_state == "reset"
    return PhaseKeeper(schedule, Path(arguments.output_dir), reset=reset, full=taking_part)


def gradient_norms(
    phases: PhasesSection, keeper: PhaseKeeper | None, arguments: TrainingArguments
) -> GradientNorms | None:
    """The table of gradient norms, where one is wanted and can be had."""
    if phases.log_frequency == 0:
        return None
    if arguments.deepspeed:
        announce("note: no gradient norms under DeepSpeed, which steps inside backward; FSDP2 (--fsdp) has them")
        return None
    name = None if keeper is None else lambda step: keeper.schedule.name(step - 1)
    return GradientNorms(Path(arguments.output_dir), phases.log_frequency, name)
