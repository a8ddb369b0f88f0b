"""The controls of a schedule: what must do worse, or the schedule's own order explains nothing.

reversed_form   the same phases, last one first
permuted_form   the same phases in a random other order, fresh for every seed
random_form     random sites, as many as each phase has
"""

from __future__ import annotations

import random
from dataclasses import replace

from rankwise.core.phase import Form, Phase, Phases
from rankwise.errors import UsageError


def phases_of(form: Form, control: str) -> Phases:
    if not isinstance(form, Phases):
        raise UsageError(f"{control}:{form}: only a list of phases can be {control}")
    return form


def with_lengths(form: Phases, steps: int) -> list[Phase]:
    """The phases, the last one with the length that is left to it. UsageError where nothing is."""
    given = sum(phase.steps or 0 for phase in form.phases)
    if given >= steps:
        raise UsageError(f"the phases of {str(form)!r} take {given} steps before the last one, and there are {steps}")
    return [replace(phase, steps=phase.steps or steps - given) for phase in form.phases]


def in_order(phases: list[Phase]) -> Phases:
    return Phases((*phases[:-1], replace(phases[-1], steps=None)))


def reversed_form(form: Form, steps: int) -> Phases:
    return in_order(with_lengths(phases_of(form, "reversed"), steps)[::-1])


def permuted_form(form: Form, steps: int, seed: int) -> Phases:
    """Another order of the phases, drawn from the seed. UsageError where there is no other order."""
    phases = with_lengths(phases_of(form, "permuted"), steps)
    if len({(phase.parts, phase.steps) for phase in phases}) < 2:
        raise UsageError(f"permuted:{form}: its phases have no other order")
    generator, order = random.Random(f"permuted {seed}"), phases
    while order == phases:
        order = generator.sample(phases, len(phases))
    return in_order(order)


def random_form(form: Form) -> Phases:
    phases = phases_of(form, "random").phases
    drawn = [
        replace(phase, name=f"random {phase.name}", parts=tuple(replace(part, at_random=True) for part in phase.parts))
        for phase in phases
    ]
    return Phases(tuple(drawn))
