"""Phases: which sites train for how many optimizer steps. A schedule is a list of lengths, so no gap can exist.

    schedule = bind(parse_schedule("both:300 > mlp layers 0-10:300 > attention"), sites, seed=42)   # see schedule.py
    schedule.active(step)        # the sites that train in the step that starts when `step` steps are done

A site out of phase is frozen, and still acts in the forward pass. What trains is a function of the step alone, so a
resumed run continues inside its phase. `norm:N` is too, once its choices are known: they are saved with checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, permutations
from typing import Protocol

from rankwise.core.site import Site
from rankwise.errors import UsageError


class Schedule(Protocol):
    """A schedule bound to the sites of a model."""

    def active(self, step: int) -> frozenset[str]:
        """Paths of the sites that train in the optimizer step that starts when `step` steps are done."""

    def name(self, step: int) -> str:
        """Name of the phase at that step."""


@dataclass(frozen=True)
class Part:
    """Some sites: of these kinds and this tower, in this range of layers; what is None does not restrict.

    projection: of this name only. experts: only parameters that hold a layer's experts.
    half: early or late, of the layers on either side of `cut` (the first of the late ones; None: the middle of each
    tower's layers).
    at_random: as many sites as the rest of the part says, drawn from all sites: the null of a phase.
    """

    kinds: tuple[str, ...] = ()
    tower: str | None = None
    projection: str | None = None
    experts: bool = False
    layers: tuple[int, int] | None = None
    half: str | None = None
    cut: int | None = None
    at_random: bool = False

    def chosen(self, sites: Mapping[str, Site], generator: random.Random) -> frozenset[str]:
        towers = {site.tower for site in sites.values()}
        spans = {tower: self.span([site for site in sites.values() if site.tower == tower]) for tower in towers}
        found = {
            path
            for path, site in sites.items()
            if (not self.kinds or site.kind in self.kinds)
            and (self.tower is None or site.tower == self.tower)
            and (self.projection is None or site.projection == self.projection)
            and (site.experts or not self.experts)
            and within(site.layer, spans[site.tower])
        }
        return frozenset(generator.sample(sorted(sites), len(found)) if self.at_random else found)

    def span(self, sites: Sequence[Site]) -> tuple[int, int | None]:
        """First and last layer among the sites of a tower; the last is None where layers do not matter."""
        if self.half is None:
            return self.layers or (0, None)
        count = 1 + max((site.layer for site in sites if site.layer is not None), default=0)
        cut = count // 2 if self.cut is None else self.cut
        return (0, cut - 1) if self.half == "early" else (cut, count - 1)


def within(layer: int | None, span: tuple[int, int | None]) -> bool:
    first, last = span
    return last is None or (layer is not None and first <= layer <= last)


@dataclass(frozen=True)
class Phase:
    """The sites of any of these parts, for a number of optimizer steps; None is to the end."""

    name: str
    parts: tuple[Part, ...]
    steps: int | None = None


@dataclass(frozen=True)
class Phases:
    """Phases one after the other; the last one runs to the end."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        for phase in self.phases[:-1]:
            if not phase.steps or phase.steps < 1:
                raise UsageError(f"--schedule: phase {phase.name!r} needs a length in steps, as in {phase.name}:300")
        if self.phases[-1].steps is not None:
            name = self.phases[-1].name
            raise UsageError(f"--schedule: the last phase runs to the end of training: write {name!r} without a length")

    def __str__(self) -> str:
        return " > ".join(f"{one.name}:{one.steps}" if one.steps else one.name for one in self.phases)

    @property
    def towers(self) -> frozenset[str]:
        """The towers that some phase names."""
        return frozenset(part.tower for phase in self.phases for part in phase.parts if part.tower)


@dataclass(frozen=True)
class Lisa:
    """LISA (Pan et al. 2024): `layers` random layers, drawn anew every `every` steps from (seed, step // every)."""

    layers: int
    every: int

    def __str__(self) -> str:
        return f"lisa:{self.layers}@{self.every}"


@dataclass(frozen=True)
class Norm:
    """Every `every` steps the kind of sites with the largest gradient norm per √parameter is chosen to train next."""

    every: int

    def __str__(self) -> str:
        return f"norm:{self.every}"


Form = Phases | Lisa | Norm


@dataclass(frozen=True)
class BoundPhases:
    """Phases with the sites of each."""

    form: Phases
    sets: tuple[frozenset[str], ...]

    def index(self, step: int) -> int:
        end = 0
        for number, phase in enumerate(self.form.phases):
            end += phase.steps or 0
            if phase.steps is None or step < end:
                return number
        raise AssertionError("the last phase has no end")

    def active(self, step: int) -> frozenset[str]:
        return self.sets[self.index(step)]

    def name(self, step: int) -> str:
        return self.form.phases[self.index(step)].name

    def starts(self) -> list[int]:
        """The step at which each phase begins."""
        lengths = [phase.steps or 0 for phase in self.form.phases]
        return [sum(lengths[:number]) for number in range(len(lengths))]


@dataclass(frozen=True)
class BoundLisa:
    """LISA over the layers of these sites; sites outside the layers train all the time, as in the paper."""

    form: Lisa
    sites: Mapping[str, Site]
    seed: int

    def layers(self, step: int) -> list[int]:
        there = sorted({site.layer for site in self.sites.values() if site.layer is not None})
        drawn = random.Random(f"{self.seed} {step // self.form.every}").sample(there, self.form.layers)
        return sorted(drawn)

    def active(self, step: int) -> frozenset[str]:
        drawn = {None, *self.layers(step)}
        return frozenset(path for path, site in self.sites.items() if site.layer in drawn)

    def name(self, step: int) -> str:
        return "layers " + ", ".join(map(str, self.layers(step)))


@dataclass(frozen=True)
class BoundNorm:
    """Kinds chosen by measurement. `choices`: one kind per window of `every` steps, as far as they are known.

    A window opens with a step in which every site gets a gradient and the choice is made; what moves in that step is
    still what the window before had chosen, and before the first choice everything.
    """

    form: Norm
    sites: Mapping[str, Site]
    choices: tuple[str, ...] = ()

    def measures(self, step: int) -> bool:
        return step % self.form.every == 0

    def kind(self, step: int) -> str | None:
        window = step // self.form.every - self.measures(step)
        return None if window < 0 else self.choices[window]

    def active(self, step: int) -> frozenset[str]:
        kind = self.kind(step)
        return frozenset(path for path, site in self.sites.items() if kind in (None, site.kind))

    def name(self, step: int) -> str:
        return self.kind(step) or "all"

    def chosen(self, norms: Mapping[str, float]) -> BoundNorm:
        """The schedule with the kind of the largest norm as its next choice; ties go to the first name."""
        return replace(self, choices=(*self.choices, max(sorted(norms), key=norms.__getitem__)))

    def replay(self, steps: int) -> Phases:
        """The fixed schedule that trains the same sites at each of the first `steps` steps: a yoked run's."""
        runs = [(name, len(list(group))) for name, group in groupby(self.name(step) for step in range(steps))]
        phases = [Phase(name, (Part(kinds=() if name == "all" else (name,)),), length) for name, length in runs]
        return Phases((*phases[:-1], replace(phases[-1], steps=None)))


Bound = BoundPhases | BoundLisa | BoundNorm


def bind(form: Form, sites: Mapping[str, Site], seed: int) -> Bound:
    """The schedule over the sites that are adapted. UsageError: a phase without a site, layers that do not exist."""
    if isinstance(form, Lisa):
        count = len({site.layer for site in sites.values()} - {None})
        if form.layers > count:
            raise UsageError(f"--schedule {form}: {form.layers} layers asked for, {count} are adapted")
        return BoundLisa(form, sites, seed)
    if isinstance(form, Norm):
        kinds = {site.kind for site in sites.values()}
        if len(kinds) < 2:
            raise UsageError(f"--schedule {form} needs at least two kinds of sites; only {', '.join(kinds)} is adapted")
        return BoundNorm(form, sites)
    sets = []
    for number, phase in enumerate(form.phases):
        generator = random.Random(f"{seed} {number}")
        sets.append(frozenset().union(*(part.chosen(sites, generator) for part in phase.parts)))
        if not sets[-1]:
            raise UsageError(f"--schedule: phase {phase.name!r} trains nothing: {describe_sites(sites)}")
        check_layers(phase, sites)
    return BoundPhases(form, tuple(sets))


def check_layers(phase: Phase, sites: Mapping[str, Site]) -> None:
    """Layers that are named must exist: a range that reaches beyond the model is a mistake about the model."""
    for part in phase.parts:
        meant = [site for site in sites.values() if part.tower in (None, site.tower)]
        top = max((site.layer for site in meant if site.layer is not None), default=0)
        last = part.layers[1] if part.layers else part.cut
        if last is not None and last > top:
            raise UsageError(f"--schedule: phase {phase.name!r} names layer {last}; {describe_sites(sites)}")


def describe_sites(sites: Mapping[str, Site]) -> str:
    layers = sorted({site.layer for site in sites.values() if site.layer is not None})
    kinds = ", ".join(sorted({site.kind for site in sites.values()}))
    return f"{len(sites)} sites ({kinds}) of layers {layers[0]} to {layers[-1]} are adapted" if layers else kinds


def boundaries(schedule: Schedule, steps: int) -> Sequence[tuple[int, str]]:
    """(step, name) of every change within the first `steps` steps, the beginning included."""
    names = [schedule.name(step) for step in range(steps)]
    return [(step, name) for step, name in enumerate(names) if step == 0 or name != names[step - 1]]


OPPOSITE = {"early", "late"}


def returns(form: Form, *, any_order: bool = False) -> bool:
    """Whether a site may rest in one phase and train again in a later one: where none does, keeping an optimizer state
    and resetting it are the same. any_order: in some order of the phases.

    Told from the schedule alone, before any model is read; where that does not tell, the answer is True.
    """
    if not isinstance(form, Phases):
        return True
    triples = permutations(form.phases, 3) if any_order else combinations(form.phases, 3)
    return any(not (apart(one, last) or covers(rest, one) or covers(rest, last)) for one, rest, last in triples)


def apart(one: Phase, other: Phase) -> bool:
    """Whether no site is in both."""
    return all(parts_apart(left, right) for left in one.parts for right in other.parts)


def parts_apart(one: Part, other: Part) -> bool:
    if one.at_random or other.at_random:
        return False
    kinds = one.kinds and other.kinds and not set(one.kinds) & set(other.kinds)
    towers = one.tower and other.tower and one.tower != other.tower
    names = one.projection and other.projection and one.projection != other.projection
    halves = {one.half, other.half} == OPPOSITE and one.cut == other.cut
    return bool(kinds or towers or names or halves or layers_apart(one, other))


def layers_apart(one: Part, other: Part) -> bool:
    if one.half or other.half or one.layers is None or other.layers is None:
        return False
    return one.layers[1] < other.layers[0] or other.layers[1] < one.layers[0]


def covers(whole: Phase, some: Phase) -> bool:
    """Whether every site of `some` is in `whole`."""
    return all(any(part_covers(left, right) for left in whole.parts) for right in some.parts)


def part_covers(whole: Part, some: Part) -> bool:
    if whole == Part():
        return True
    if whole.at_random or some.at_random:
        return False
    kinds = not whole.kinds or (some.kinds and set(some.kinds) <= set(whole.kinds))
    tower = whole.tower in (None, some.tower)
    name = whole.projection in (None, some.projection) and (some.experts or not whole.experts)
    place = (whole.half, whole.layers) == (None, None) or (
        (whole.half, whole.cut, whole.layers) == (some.half, some.cut, some.layers)
    )
    return bool(kinds and tower and name and place)
