"""Phases: which sites train for how many optimizer steps. A schedule is a list of lengths, so no gap can exist.

    schedule = bind(parse_schedule("both:300 > mlp layers 0-10:300 > attention"), sites, seed=42)   # schedule.py reads
    schedule.active(step)        # the sites that train in the step that starts when `step` steps are done

A site out of phase is frozen, and still acts in the forward pass. What trains is a function of the step alone, so a
resumed run continues inside its phase. `norm:N` is too, once its choices are known: they are saved with checkpoints.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, permutations
from typing import Protocol

from rankwise.core.site import Site, nearest
from rankwise.errors import UsageError


class Schedule(Protocol):
    """A schedule bound to the sites of a model."""

    def active(self, step: int) -> frozenset[str]:
        """Paths of the sites that train in the optimizer step that starts when `step` steps are done."""

    def name(self, step: int) -> str:
        """What the phase of that step is called."""


@dataclass(frozen=True)
class Part:
    """Some sites: of these kinds and this tower, in this range of layers; what is None does not restrict.

    half: early or late, of the layers on either side of `cut` (the first of the late ones; None: the middle of each
    tower's layers).
    at_random: as many sites as the rest of the part says, drawn from all sites: the null of a phase.
    """

    kinds: tuple[str, ...] = ()
    tower: str | None = None
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
        """With the kind of the largest norm chosen next; of equal ones the first by name."""
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
            raise UsageError(f"--schedule {form} chooses between kinds of sites; only {', '.join(kinds)} is adapted")
        return BoundNorm(form, sites)
    sets = []
    for number, phase in enumerate(form.phases):
        generator = random.Random(f"{seed} {number}")
        sets.append(frozenset().union(*(part.chosen(sites, generator) for part in phase.parts)))
        if not sets[-1]:
            raise UsageError(f"--schedule: phase {phase.name!r} trains nothing: {described(sites)}")
        check_layers(phase, sites)
    return BoundPhases(form, tuple(sets))


def check_layers(phase: Phase, sites: Mapping[str, Site]) -> None:
    """Layers that are named must exist: a range that reaches beyond the model is a mistake about the model."""
    for part in phase.parts:
        meant = [site for site in sites.values() if part.tower in (None, site.tower)]
        top = max((site.layer for site in meant if site.layer is not None), default=0)
        last = part.layers[1] if part.layers else part.cut
        if last is not None and last > top:
            raise UsageError(f"--schedule: phase {phase.name!r} names layer {last}; {described(sites)}")


def described(sites: Mapping[str, Site]) -> str:
    layers = sorted({site.layer for site in sites.values() if site.layer is not None})
    kinds = ", ".join(sorted({site.kind for site in sites.values()}))
    return f"adapted are {len(sites)} sites ({kinds}) of layers {layers[0]} to {layers[-1]}" if layers else kinds


def boundaries(schedule: Schedule, steps: int) -> Sequence[tuple[int, str]]:
    """(step, name) of every change within the first `steps` steps, the beginning included."""
    names = [schedule.name(step) for step in range(steps)]
    return [(step, name) for step, name in enumerate(names) if step == 0 or name != names[step - 1]]


def listed_phases(form: Form, control: str) -> Phases:
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
    return in_order(with_lengths(listed_phases(form, "reversed"), steps)[::-1])


def permuted_form(form: Form, steps: int, seed: int) -> Phases:
    """Another order of the phases, drawn from the seed. UsageError where there is no other order."""
    phases = with_lengths(listed_phases(form, "permuted"), steps)
    if len({(phase.parts, phase.steps) for phase in phases}) < 2:
        raise UsageError(f"permuted:{form}: its phases have no other order")
    generator, order = random.Random(f"permuted {seed}"), phases
    while order == phases:
        order = generator.sample(phases, len(phases))
    return in_order(order)


def random_form(form: Form) -> Phases:
    phases = listed_phases(form, "random").phases
    drawn = [
        replace(phase, name=f"random {phase.name}", parts=tuple(replace(part, at_random=True) for part in phase.parts))
        for phase in phases
    ]
    return Phases(tuple(drawn))


OPPOSITE = {"early", "late"}


def returns(form: Form, *, any_order: bool = False) -> bool:
    """Whether a site may rest in one phase and train in another after it. any_order: in some order of the phases."""
    if not isinstance(form, Phases):
        return True
    triples = permutations(form.phases, 3) if any_order else combinations(form.phases, 3)
    return any(not (apart(one, last) or covers(rest, one) or covers(rest, last)) for one, rest, last in triples)


def apart(one: Phase, other: Phase) -> bool:
    """No site is in both."""
    return all(parts_apart(left, right) for left in one.parts for right in other.parts)


def parts_apart(one: Part, other: Part) -> bool:
    if one.at_random or other.at_random:
        return False
    kinds = one.kinds and other.kinds and not set(one.kinds) & set(other.kinds)
    towers = one.tower and other.tower and one.tower != other.tower
    halves = {one.half, other.half} == OPPOSITE and one.cut == other.cut
    return bool(kinds or towers or halves or layers_apart(one, other))


def layers_apart(one: Part, other: Part) -> bool:
    if one.half or other.half or one.layers is None or other.layers is None:
        return False
    return one.layers[1] < other.layers[0] or other.layers[1] < one.layers[0]


def covers(whole: Phase, some: Phase) -> bool:
    """Every site of `some` is in `whole`."""
    return all(any(part_covers(left, right) for left in whole.parts) for right in some.parts)


def part_covers(whole: Part, some: Part) -> bool:
    if whole == Part():
        return True
    if whole.at_random or some.at_random:
        return False
    kinds = not whole.kinds or (some.kinds and set(some.kinds) <= set(whole.kinds))
    tower = whole.tower in (None, some.tower)
    place = (whole.half, whole.layers) == (None, None) or (
        (whole.half, whole.cut, whole.layers) == (some.half, some.cut, some.layers)
    )
    return bool(kinds and tower and place)


KINDS = {
    "both": ("attention", "mlp"),
    "attention": ("attention",),
    "attn": ("attention",),
    "mlp": ("mlp",),
    "embed": ("embed",),
    "head": ("head",),
    "other": ("other",),
    "all": (),
}
TOWERS = ("language", "vision", "projector", "depth")
HALVES = ("early", "late")
STRATEGIES = {
    "both-mlp-attn": ("both", "mlp", "attention"),
    "attn-mlp-both": ("attention", "mlp", "both"),
    "both-mlp-both": ("both", "mlp", "both"),
    "early-late": ("early", "late"),
}
FORMS = "both:300 > mlp:300 > attention, layers 0-10:500 > layers 11-21, early > late, lisa:K@N, norm:N"
PART = re.compile(r"(?P<half>early|late)(@(?P<cut>\d+))?|layers?\s+(?P<first>\d+)(\s*-\s*(?P<last>\d+))?|(?P<word>\w+)")


def parse_schedule(text: str) -> Form:
    """The schedule that a text describes. UsageError says what is wrong and shows the forms."""
    text = text.strip()
    if whole := re.fullmatch(r"lisa:(\d+)(@(\d+))?", text):
        return checked(Lisa(int(whole[1]), int(whole[3] or 20)), text)
    if whole := re.fullmatch(r"norm:(\d+)", text):
        return checked(Norm(int(whole[1])), text)
    pieces = [piece.strip() for piece in text.split(">")]
    if not all(pieces):
        raise UsageError(
            f"--schedule {text!r}: an empty phase. In a shell, `>` needs quotes: --schedule 'both:300 > mlp'"
        )
    return Phases(tuple(parse_phase(piece) for piece in pieces))


def checked(form: Lisa | Norm, text: str) -> Form:
    if form.every < 1 or (isinstance(form, Lisa) and form.layers < 1):
        raise UsageError(f"--schedule {text}: numbers must be at least 1")
    return form


def parse_phase(text: str) -> Phase:
    """`mlp layers 0-10:300`: parts joined by `+`, then the length."""
    name, colon, steps = text.partition(":")
    if colon and not steps.strip().isdecimal():
        raise UsageError(
            f"--schedule: {text!r}: the length of a phase is a number of optimizer steps, as in {name}:300"
        )
    name = " ".join(name.split())
    return Phase(name, tuple(parse_part(part.strip()) for part in name.split("+")), int(steps) if colon else None)


def parse_part(text: str) -> Part:
    part, end = Part(), 0
    for match in PART.finditer(text):
        if text[end : match.start()].strip():
            break
        part, end = refined(part, match), match.end()
    if not end or text[end:].strip():
        raise UsageError(f"--schedule: cannot read {text!r}; forms are {FORMS}")
    return part


def refined(part: Part, match: re.Match[str]) -> Part:
    """The part with one more condition."""
    if match["half"]:
        return replace(part, half=match["half"], cut=int(match["cut"]) if match["cut"] else None)
    if match["first"]:
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first:
            raise UsageError(f"--schedule: layers {first}-{last} runs backwards")
        return replace(part, layers=(first, last))
    word = match["word"]
    if word in KINDS:
        return replace(part, kinds=KINDS[word])
    if word in TOWERS:
        return replace(part, tower=word)
    if word == "random":
        return replace(part, at_random=True)
    known = [*KINDS, *TOWERS, *HALVES, "layers", "random"]
    near = nearest(word, known) or known
    raise UsageError(f"--schedule: {word!r} is no kind of sites; did you mean {', '.join(near)}? Forms: {FORMS}")


def phases_of(name: str) -> int:
    """How many phases of a fixed length and a last one a named strategy has; 0 for one that has no such phases."""
    return len(STRATEGIES.get(plain_name(name).partition("@")[0], ()))


def plain_name(name: str) -> str:
    return name.strip().replace("->", "-").replace(" ", "")


def strategy(name: str, phase1_end: int, phase2_end: int) -> str:
    """The general form of a named strategy: `both-mlp-attn` (or with `->`), `early-late@CUT`, `lisa:K@N`, `norm:N`."""
    plain = plain_name(name)
    if plain.endswith("-"):
        raise UsageError(
            f"--phase_strategy {name}: the shell has cut it at `>`; write {plain}… with plain hyphens "
            f"({', '.join(STRATEGIES)}), or put the value in quotes"
        )
    if plain.startswith(("lisa:", "norm:")):
        return plain
    base, _, cut = plain.partition("@")
    if base not in STRATEGIES or (cut and (base != "early-late" or not cut.isdecimal())):
        near = nearest(plain, STRATEGIES) or list(STRATEGIES)
        raise UsageError(
            f"--phase_strategy {name}: did you mean {', '.join(near)}? Also: lisa:K@N, norm:N, early-late@CUT"
        )
    words = [f"{word}@{cut}" if cut else word for word in STRATEGIES[base]]
    ends = (phase1_end, phase2_end)[: len(words) - 1]
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    if min(lengths) < 1:
        raise UsageError(f"--phase1_end {phase1_end} and --phase2_end {phase2_end} must rise from above 0")
    return " > ".join([*(f"{word}:{n}" for word, n in zip(words, lengths, strict=False)), words[-1]])
