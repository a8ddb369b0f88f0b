"""Schedules as people write them: `--schedule "both:300 > mlp layers 0-10"`, the named strategies, and their controls.

    parse_schedule(strategy("both-mlp-attn", 300, 600))      # both:300 > mlp:300 > attention

A phase is parts joined by `+` and a length in optimizer steps; a part is words that each narrow it down: a kind (both:
attention, mlp and mixer; each of them, all; embed, head, router, other where such sites are adapted), experts, a
projection (down_proj), a tower, layers A-B, early or late (half of the layers, or from @CUT), random.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from rankwise.core.phase import Form, Lisa, Norm, Part, Phase, Phases
from rankwise.core.site import ATTENTION, MLP, nearest
from rankwise.errors import UsageError

KINDS = {
    "both": ("attention", "mlp", "mixer"),
    "attention": ("attention",),
    "attn": ("attention",),
    "mlp": ("mlp",),
    "mixer": ("mixer",),
    "router": ("router",),
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
FORMS = (
    "both:300 > mlp:300 > attention, layers 0-10:500 > layers 11-21, early > late, experts, down_proj, lisa:K@N, norm:N"
)
PART = re.compile(r"(?P<half>early|late)(@(?P<cut>\d+))?|layers?\s+(?P<first>\d+)(\s*-\s*(?P<last>\d+))?|(?P<word>\w+)")


def parse_schedule(text: str) -> Form:
    """The schedule that a text describes. UsageError says what is wrong and shows the forms."""
    text = text.strip()
    if whole := re.fullmatch(r"lisa:(\d+)(@(\d+))?", text):
        return check_numbers(Lisa(int(whole[1]), int(whole[3] or 20)), text)
    if whole := re.fullmatch(r"norm:(\d+)", text):
        return check_numbers(Norm(int(whole[1])), text)
    pieces = [piece.strip() for piece in text.split(">")]
    if not all(pieces):
        raise UsageError(
            f"--schedule {text!r}: an empty phase. In a shell, `>` needs quotes: --schedule 'both:300 > mlp'"
        )
    return Phases(tuple(parse_phase(piece) for piece in pieces))


def check_numbers(form: Lisa | Norm, text: str) -> Form:
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
        part, end = narrow(part, match), match.end()
    if not end or text[end:].strip():
        raise UsageError(f"--schedule: cannot read {text!r}; valid forms: {FORMS}")
    return part


def narrow(part: Part, match: re.Match[str]) -> Part:
    """The part with one more condition."""
    if match["half"]:
        return replace(part, half=match["half"], cut=int(match["cut"]) if match["cut"] else None)
    if match["first"]:
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first:
            raise UsageError(f"--schedule: layers {first}-{last}: the first layer must not be above the last")
        return replace(part, layers=(first, last))
    word = match["word"]
    if word in KINDS:
        return replace(part, kinds=KINDS[word])
    if word in TOWERS:
        return replace(part, tower=word)
    if word == "random":
        return replace(part, at_random=True)
    if word == "experts":
        return replace(part, experts=True)
    if word in ATTENTION | MLP or "_" in word:  # of a family with names of its own: that it matches is asked later
        return replace(part, projection=word)
    known = [*KINDS, *TOWERS, *HALVES, "layers", "random", "experts"]
    near = nearest(word, known) or known
    raise UsageError(f"--schedule: unknown kind of sites {word!r}; did you mean {', '.join(near)}? Forms: {FORMS}")


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
        raise UsageError(f"need 0 < --phase1_end < --phase2_end; got {phase1_end} and {phase2_end}")
    return " > ".join([*(f"{word}:{n}" for word, n in zip(words, lengths, strict=False)), words[-1]])


def require_phases(form: Form, control: str) -> Phases:
    """A control must do worse, or the schedule's own order explains nothing. UsageError for a form without phases."""
    if not isinstance(form, Phases):
        raise UsageError(f"{control}:{form}: {control} needs a list of phases")
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
    """The same phases, last one first."""
    return in_order(with_lengths(require_phases(form, "reversed"), steps)[::-1])


def permuted_form(form: Form, steps: int, seed: int) -> Phases:
    """Another order of the phases, drawn from the seed. UsageError where there is no other order."""
    phases = with_lengths(require_phases(form, "permuted"), steps)
    if len({(phase.parts, phase.steps) for phase in phases}) < 2:
        raise UsageError(f"permuted:{form}: its phases have no other order")
    generator, order = random.Random(f"permuted {seed}"), phases
    while order == phases:
        order = generator.sample(phases, len(phases))
    return in_order(order)


def random_form(form: Form) -> Phases:
    """Random sites, as many as each phase has."""
    phases = require_phases(form, "random").phases
    drawn = [
        replace(phase, name=f"random {phase.name}", parts=tuple(replace(part, at_random=True) for part in phase.parts))
        for phase in phases
    ]
    return Phases(tuple(drawn))
