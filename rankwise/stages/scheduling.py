"""From the phase options to a schedule over the adapted sites, and what watches the gradients meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import TrainingArguments

from rankwise.core.phase import Bound, Form, Phases, bind, parse_schedule, strategy
from rankwise.core.site import Site
from rankwise.errors import UsageError
from rankwise.files.processes import announce
from rankwise.options.sections import PhasesSection
from rankwise.train.gradients import GradientNorms
from rankwise.train.phases import PhaseKeeper

RECOMMENDED = "both-mlp-attn"


def schedule_of(phases: PhasesSection) -> Form | None:
    """The schedule as it was asked for; None where everything trains all the time."""
    named = phases.phase_strategy or (RECOMMENDED if phases.dynamic_lora else None)
    if phases.schedule and named:
        raise UsageError(
            "--schedule and --phase_strategy (or --dynamic_lora) both say which phases there are; give one"
        )
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
    """What freezes and thaws, bound to the sites that will be adapted: wrong phases are refused before the model loads.

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
