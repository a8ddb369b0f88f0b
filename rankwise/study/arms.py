"""The valid names in `arms:` and `primary:`, and their meaning.

plans    uniform  energy  loss …  shuffled  inverted:loss  compress  warm  plan-warm  uniform+compute  full  base
         eva+start  gora+start  attention  mlp  experts
phases   static   both:60 > mlp:60 > attention   reversed:…  permuted:…  random:…   static@…   full  base
         norm:20  yoked:norm:20
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.core.allocate import TOLERANCE, Rule, by_budget, decreasing, equalise, spectral_gains, uniform
from rankwise.core.factors import Factors
from rankwise.core.phase import Form, Norm, Phases, returns
from rankwise.core.schedule import parse_schedule, permuted_form, random_form, reversed_form, with_lengths
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.errors import UsageError
from rankwise.options.field import unknown
from rankwise.options.study import StudyConfig
from rankwise.ranks.gain import Batch, input_spectra, loss_gains

PARTS: Mapping[str, Callable[[Site], bool]] = {
    "attention": lambda site: site.kind == "attention",
    "mlp": lambda site: site.kind == "mlp",
    "experts": lambda site: site.experts > 0,
}
OF_THE_BASE = ("fisher", "gora", "adalora")  # rules that need training rows, and no probe's deltas
RULES = ("energy", "site", "type", "loss", "eva", *OF_THE_BASE)
STARTED = ("eva+start", "gora+start")  # a rule's ranks, and its initialization as well
Gains = Mapping[Site, Tensor]


@dataclass(frozen=True)
class Probed:
    """Inputs of the rules: a model in evaluation mode, its weight deltas, and rows of the training split."""

    model: nn.Module
    spectra: Mapping[Site, Spectrum]
    deltas: Mapping[Site, Tensor]
    batches: Sequence[Batch]


def gains_of(rule: str, probed: Probed, max_rank: int) -> Gains:
    """Gain of each further rank by a rule.

    energy: σ² of the delta. site: its share of the site's own energy. type: the mean σ² over the layers of a
    projection, so that its sites get equal ranks. loss: share of the loss drop along the path from base to tuned.
    eva: share of the inputs' variance (Paischer et al. 2024).
    """
    if rule == "loss":
        return loss_gains(probed.model, probed.deltas, probed.batches, max_rank)[0]
    if rule == "eva":
        return spectral_gains(input_spectra(probed.model, list(probed.deltas), probed.batches), "site")
    gains = spectral_gains(probed.spectra, "site" if rule == "site" else "none")
    return type_means(gains) if rule == "type" else gains


def type_means(gains: Gains) -> dict[Site, Tensor]:
    """The mean over the sites of one projection and shape, for each of them."""
    kinds: dict[tuple[str, tuple[int, int]], list[Site]] = {}
    for site in gains:
        kinds.setdefault((site.type_path, site.shape), []).append(site)
    result: dict[Site, Tensor] = {}
    for sites in kinds.values():
        length = max(len(gains[site]) for site in sites)
        padded = [torch.nn.functional.pad(gains[site].double(), (0, length - len(gains[site]))) for site in sites]
        result |= dict.fromkeys(sites, torch.stack(padded).mean(0))
    return {site: result[site] for site in gains}


def ranks_within(gains: Gains, budget: int, max_rank: int, tolerance: float = TOLERANCE) -> dict[Site, int]:
    """The rule's ranks: from 0, greedily by gain per parameter, then brought to the budget within the tolerance.

    From 0, since at a starved budget a smallest rank of 1 would leave a plan nothing to decide.
    """
    rule = Rule(min_rank=0, max_rank=max_rank)
    worth = {site: decreasing(gain) for site, gain in gains.items()}
    return equalise(by_budget(gains, budget, rule), budget, worth, {site: rule.most(site) for site in gains}, tolerance)


def part_of(sites: Iterable[Site], part: str) -> list[Site]:
    return [site for site in sites if PARTS[part](site)]


def uniform_ranks(sites: Sequence[Site], budget: int, tolerance: float = TOLERANCE) -> dict[Site, int]:
    """One rank everywhere, as nearly as the budget and the sizes of the matrices allow."""
    nothing = torch.zeros(0, dtype=torch.float64)
    most = {site: site.largest_rank for site in sites}
    return equalise(uniform(sites, budget), budget, dict.fromkeys(sites, nothing), most, tolerance)


def compress_pairs(
    pairs: Mapping[Site, tuple[Tensor, Tensor]], scales: Mapping[str, float], budget: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A trained adapter cut to the budget by the energy of its own product; path → A, B for the same scales."""
    factors = {site: Factors(scales[site.path] * b, a) for site, (a, b) in pairs.items()}
    gains = {site: each.svd()[1].square().cpu() for site, each in factors.items()}
    ranks = ranks_within(gains, budget, max(a.shape[0] for a, _ in pairs.values()))
    return {site.path: factors[site].compress(rank).lora(scales[site.path]) for site, rank in ranks.items() if rank}


UNIFORM, STATIC, INVERTED, BASE, YOKED = "uniform", "static", "inverted", "base", "yoked"
NULLS = ("shuffled", INVERTED)
REFERENCES = ("full", BASE)
OTHERS = ("compress", "warm", "plan-warm", "uniform+compute")
DEFAULT_PLAN_ARMS = (UNIFORM, "energy", "site", "type", "loss", "eva+start", *NULLS, *OTHERS, *REFERENCES)
PLAN_ARMS = (UNIFORM, *RULES, *STARTED, *NULLS, *OTHERS, *REFERENCES, *PARTS)
WITHOUT_EXPERTS = ("loss", "eva", *OF_THE_BASE, "warm", "plan-warm", "compress")
# What a registration and a ledger call an arm: `eva` was once the name of `eva+start`, whose runs stay valid.
RECORDED = {"eva+start": "eva", "eva": "eva-ranks"}
OF_A_RULE = (*NULLS, "plan-warm")
CONTROLS = ("reversed", "permuted", "random")
VERSUS = " vs "


def rule_of(arm: str) -> str:
    """The rule whose ranks an arm takes, shuffles or inverts: energy unless it says so (`shuffled:loss`)."""
    name, _, rule = arm.removesuffix("+start").partition(":")
    return rule or (name if name in RULES else "energy")


def recorded(arm: str) -> str:
    """The arm's name in registrations and ledgers."""
    return RECORDED.get(arm, arm)


def control_of(arm: str) -> tuple[str, str]:
    """(reversed, permuted, random or nothing; the schedule's text)."""
    name, _, rest = arm.partition(":")
    return (name, rest) if name in CONTROLS else ("", arm)


def timed_like(arm: str) -> str | None:
    """The schedule whose wall clock a `static@SCHEDULE` arm is given."""
    name, at, schedule = arm.partition("@")
    return schedule if name == STATIC and at else None


def chooses(arm: str) -> bool:
    """Whether the arm chooses its phases during training (`norm:N`): such an arm trains separately."""
    return arm.partition(":")[0] == "norm"


def yoked_to(arm: str) -> str | None:
    """The arm `norm:N` whose choices of another seed a `yoked:norm:N` arm replays."""
    name, colon, rest = arm.partition(":")
    return rest if name == YOKED and colon else None


def has_phases(arm: str, config: StudyConfig) -> bool:
    return config.kind == "phases" and arm not in (STATIC, *REFERENCES) and timed_like(arm) is None


def has_state(arm: str, config: StudyConfig) -> bool:
    """Whether keeping or resetting the optimizer state makes a difference: some site rests and then trains again."""
    if not has_phases(arm, config):
        return False
    control, text = control_of(yoked_to(arm) or arm)
    form = parse_schedule(text)
    if control == "permuted":
        return returns(form, any_order=True)
    return returns(schedule_of(arm, config.steps, 0) or form) if control else returns(form)


def schedule_of(arm: str, steps: int, seed: int) -> Form | None:
    """The schedule of a phase arm for a seed; None where everything trains all the time. A yoked arm's comes from the
    run that it replays."""
    if arm in (STATIC, *REFERENCES) or timed_like(arm) is not None:
        return None
    control, text = control_of(arm)
    form = parse_schedule(text)
    if isinstance(form, Phases):
        with_lengths(form, steps)
    if control == "reversed":
        return reversed_form(form, steps)
    if control == "permuted":
        return permuted_form(form, steps, seed)
    return random_form(form) if control == "random" else form


def default_arms(config: StudyConfig) -> list[str]:
    if config.kind == "plans":
        return list(DEFAULT_PLAN_ARMS)
    third = max(1, config.steps // 3)
    schedule = f"both:{third} > mlp:{third} > attention"
    return [STATIC, schedule, *(f"{control}:{schedule}" for control in CONTROLS), f"{STATIC}@{schedule}"]


def check_arm(arm: str, config: StudyConfig) -> None:
    """Check that an arm is valid for the study's kind."""
    if config.kind == "phases":
        timed, yoked = timed_like(arm), yoked_to(arm)
        if yoked is not None and not isinstance(parse_schedule(yoked), Norm):
            raise UsageError(f"{arm}: only `norm:N` can be replayed, as in yoked:norm:20; other schedules are fixed")
        if timed is not None and (chooses(timed) or yoked_to(timed)):
            raise UsageError(f"{arm}: the duration of an adaptive schedule is not known in advance")
        if yoked is None:
            schedule_of(timed if timed is not None else arm, config.steps, 0)
        return
    name, colon, rule = arm.partition(":")
    if name not in PLAN_ARMS or (colon and (name not in OF_A_RULE or rule not in RULES)):
        known = [*PLAN_ARMS, *(f"{null}:{rule}" for null in OF_A_RULE for rule in RULES)]
        raise unknown(arm, known, "--arms", "arm")


def check_mixture(arms: Iterable[str], config: StudyConfig, sites: Sequence[Site]) -> None:
    """UsageError, naming the arm, for what no arm with experts can be; and for a part that the model does not have."""
    arms, experts = list(arms), part_of(sites, "experts")
    if config.kind == "plans":
        empty = next((arm for arm in arms if arm in PARTS and not part_of(sites, arm)), None)
        if empty:
            raise UsageError(f"--arms {empty}: none of the matrices to adapt is of that kind; leave it out")
    if experts and config.kind == "phases":
        raise UsageError(
            f"--kind phases: arms of a schedule share forward passes, and {experts[0].path} is a parameter of experts; "
            "give --target attention_only, or compare runs of `rankwise train` with schedules"
        )
    refused = [arm for arm in arms if rule_of(arm) in WITHOUT_EXPERTS or arm.partition(":")[0] in WITHOUT_EXPERTS]
    if experts and refused:
        raise UsageError(
            f"--arms {refused[0]}: not for experts: it needs inputs, gradients or dense deltas of modules, and "
            f"{experts[0].path} is a parameter; name the arms, for instance --arms uniform,attention,experts,energy, "
            "or give --target attention_only"
        )


def contrast(text: str, arms: tuple[str, ...], option: str = "--primary") -> tuple[str, str]:
    first, versus, second = (part.strip() for part in text.partition(VERSUS))
    if not versus or first == second:
        raise UsageError(f"{option} takes `ARM vs ARM`; got {text!r}")
    for arm in (first, second):
        if arm not in arms:
            raise UsageError(
                f"{unknown(arm, arms, f'{option} {text!r}', 'arm')}. The arms are {', '.join(arms)}: add it to --arms, "
                f"or compare these with {option}"
            )
    return first, second


def default_contrasts(arms: tuple[str, ...], config: StudyConfig) -> tuple[tuple[str, str], ...]:
    """Every rule and part against uniform rank; every schedule against training everything all the time, and one that
    chooses against what it chose for another seed."""
    if config.kind == "plans":
        return tuple((arm, UNIFORM) for arm in arms if arm in (*RULES, *STARTED, *PARTS) and UNIFORM in arms)
    own = [arm for arm in arms if has_phases(arm, config) and not control_of(arm)[0] and yoked_to(arm) is None]
    yoked = [(str(yoked_to(arm)), arm) for arm in arms if yoked_to(arm) is not None]
    return (*((arm, STATIC) for arm in own if STATIC in arms), *yoked)
