"""What answers, by what it told at some places of given answers. Arithmetic alone: no files, no models, no servers.

    Candidates: log p of each hypothesis ─┐
    told: place → token → log p ──────────┴─ judge (one API) ──▶ RouteFinding ── conclude (all) ──▶ Conclusion

A hypothesis is better, the less its KL(answers ‖ hypothesis): the log-likelihood of the answers under it, but for what
all have in common. It is over the tokens that were told, with one bin for all others, so it is never above the true
one. Hypotheses are compared item by item, and one replaces "tuned" only where Student's interval of the difference,
Bonferroni over all, leaves zero out and the answers are farther from the tuned model than rounding explains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.device.parity.floor import LEAST_KL, binned_kl, chance, effective
from rankwise.errors import need
from rankwise.page.text import plural

Array = NDArray[np.float64]
Told = Mapping[int, float]
TUNED, BASE, PART, PROMPT, SOUND, COARSE = "tuned", "base", "part", "prompt", "sound", "coarse"
PARTLY, OTHER, UNDECIDED = "partly tuned", "another model", "cannot tell"
RIVALS = (BASE, PART, PROMPT, COARSE)
ALPHA = 0.01  # of an interval that leaves the truth out, over all rivals of one API together
EXPLAINED = 0.5  # of the tuned model's KL; what leaves more of it explains little
LEEWAY = 2.0  # other ways to round weights to as many bits as ours are not twice as bad
TOLERABLE = 4  # bits of weights that are a way to serve a model and no fault
LEAST_SHOWN = 1e-9  # nats
ELSEWHERE = 10.0  # times farther off by one API than by another: no rounding of the same weights
LITTLE = 0.2  # of the probability; a server that tells less says little
WEIGHTS = "weights"  # words of hypotheses that begin with it are plural
FEWEST = 4  # items; a paired interval of fewer is wider than any effect


@dataclass(frozen=True)
class Hypothesis:
    """A model with a way to make prompts. kind: TUNED, BASE, PART (of what was tuned), PROMPT (the tuned model with
    another one), SOUND (the tuned model in other arithmetic), COARSE (its weights in few bits). words: what it is."""

    name: str
    kind: str
    words: str
    bits: int | None = None


@dataclass(frozen=True, eq=False)
class Candidates:
    """hypotheses: H. cases (P,): number of the case that a place belongs to. ids (P, U): tokens known there, -1 where
    there are fewer. log_probs (H, P, U): theirs, in nats."""

    hypotheses: tuple[Hypothesis, ...]
    cases: NDArray[np.int32]
    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]

    def number(self, name: str) -> int:
        return [one.name for one in self.hypotheses].index(name)

    def as_server(self, name: str, place: int, count: int) -> Told:
        """What a server that is this hypothesis would tell: its likeliest tokens."""
        row = self.log_probs[self.number(name), place]
        best = [int(column) for column in np.argsort(-row) if self.ids[place, column] >= 0][:count]
        return {int(self.ids[place, column]): float(row[column]) for column in best}


@dataclass(frozen=True)
class Spread:
    """A mean over items and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RouteFinding:
    """What one API's answers say.

    kind: TUNED, BASE, PARTLY, PROMPT, OTHER or UNDECIDED. name: the hypothesis that explains them best; "" where none
    does. words: what it is. kl: hypothesis → mean KL from the answers. gains: rival → by how much nearer than the
    tuned model it is (`nearer`). limit: KL up to which arithmetic explains a difference; apart: KL from tuned to base.
    untold: rivals that these rows do not tell from the tuned model. offered: tokens told at a place; mass: the
    probability of those that are known, both medians. longer: tokens of the prompt that the server counts beyond those
    of training.
    """

    route: str
    kind: str
    name: str
    words: str
    kl: Mapping[str, float]
    gains: Mapping[str, Spread]
    limit: float
    apart: float
    items: int
    places: int
    offered: int
    mass: float
    untold: tuple[str, ...] = ()
    longer: int | None = None


@dataclass(frozen=True)
class Conclusion:
    """kind as in RouteFinding. line: the first of the output. more: what else is worth knowing, a sentence each."""

    kind: str
    line: str
    route: str
    more: tuple[str, ...] = ()
    routes: tuple[RouteFinding, ...] = field(default=())


# --- distances -------------------------------------------------------------------------------------------------------


def divergences(candidates: Candidates, told: Mapping[int, Told]) -> Array:
    """(H, places told): KL(told ‖ hypothesis) in nats, in the order of `told`."""
    return np.stack([_from_each(candidates, place, top) for place, top in told.items()], 1)


def _from_each(candidates: Candidates, place: int, top: Told) -> Array:
    """(H,)"""
    columns = [column for column, token in enumerate(candidates.ids[place]) if token >= 0 and int(token) in top]
    log_told = np.array([top[int(candidates.ids[place, column])] for column in columns], dtype=np.float64)
    return binned_kl(log_told, candidates.log_probs[:, place, columns].astype(np.float64))


def by_item(values: Array, items: Sequence[int]) -> Array:
    """(H, places) → (H, items): the mean of each item's places."""
    known = sorted(set(items))
    return np.stack([values[:, np.equal(items, one)].mean(1) for one in known], 1)


def nearer(tuned: Array, rival: Array, noise: float) -> Array:
    """(items,): by how much less far a rival is, between -1 and 1, so that no item outweighs the others: KL differs by
    orders of magnitude between them. Where both are within the noise it is near 0."""
    found: Array = (tuned - rival) / (np.abs(tuned) + np.abs(rival) + noise)
    return found


def spread(values: Array, alpha: float) -> Spread:
    """Mean and Student's interval; without bounds for fewer than FEWEST items."""
    mean, count = float(values.mean()), len(values)
    if count < FEWEST:
        return Spread(mean, -math.inf, math.inf)
    width = float(values.std(ddof=1)) / math.sqrt(count)
    width *= float(need("scipy.stats", extra="eval").t.isf(alpha / 2, count - 1))
    return Spread(mean, mean - width, mean + width)


# --- one API ---------------------------------------------------------------------------------------------------------


def judge(
    route: str,
    candidates: Candidates,
    told: Mapping[int, Told],
    k: float,
    *,
    strict: bool = False,
    longer: int | None = None,
) -> RouteFinding:
    """What a server's answers are. told: by the place's number, at least one. k: noise floors that are allowed. strict:
    weights in few bits are a fault."""
    items = [int(candidates.cases[place]) for place in told]
    distance = by_item(divergences(candidates, told), items)
    kl = {one.name: float(row.mean()) for one, row in zip(candidates.hypotheses, distance, strict=True)}
    tuned = distance[candidates.number(TUNED)]
    rivals = [one for one in candidates.hypotheses if one.kind in RIVALS]
    sizes = as_large_as(candidates, told)
    noise = max([LEAST_KL, *(sizes[one.name] for one in candidates.hypotheses if one.kind == SOUND)])
    gains = {
        one.name: spread(nearer(tuned, distance[candidates.number(one.name)], noise), ALPHA / len(rivals))
        for one in rivals
    }
    limit = noise_limit(candidates, told, k)
    kind, name, words = _named(rivals, kl, gains, limit, sizes, strict)
    fits = kl[name or TUNED] <= limit
    if longer and not fits and kind in (PARTLY, OTHER, TUNED):
        kind, name, words = PROMPT, "", counted(longer)
    untold = tuple(one for one, gain in gains.items() if gain.high >= 0) if kind == TUNED else ()
    return RouteFinding(
        route=route,
        kind=kind,
        name=name,
        words=words,
        kl=kl,
        gains=gains,
        limit=limit,
        apart=sizes[BASE],
        items=distance.shape[1],
        places=len(told),
        offered=int(np.median([len(top) for top in told.values()])),
        mass=float(np.median([known_mass(candidates, place, top) for place, top in told.items()])),
        untold=untold,
        longer=longer,
    )


def known_mass(candidates: Candidates, place: int, top: Told) -> float:
    """Probability of the told tokens that the hypotheses know."""
    tokens = {int(token) for token in candidates.ids[place]}
    return min(1.0, sum(math.exp(value) for token, value in top.items() if token in tokens))


def as_large_as(candidates: Candidates, told: Mapping[int, Told]) -> dict[str, float]:
    """Hypothesis → mean KL to the tuned model, were it the server, at these places with as many tokens told."""
    return {
        one.name: float(divergences(candidates, pretended(candidates, one.name, told))[candidates.number(TUNED)].mean())
        for one in candidates.hypotheses
        if one.kind in (BASE, SOUND, COARSE)
    }


def pretended(candidates: Candidates, name: str, told: Mapping[int, Told]) -> dict[int, Told]:
    """What a server that is this hypothesis would have told."""
    return {place: candidates.as_server(name, place, max(len(top), 1)) for place, top in told.items()}


def noise_limit(candidates: Candidates, told: Mapping[int, Told], k: float) -> float:
    """k times the KL of the tuned model in other sound arithmetic; k is raised where the places are so few that chance
    alone exceeds it, as on the parity ladder."""
    limit = LEAST_KL
    for one in candidates.hypotheses:
        if one.kind == SOUND:
            found = divergences(candidates, pretended(candidates, one.name, told))[candidates.number(TUNED)]
            limit = max(limit, max(k, chance(effective(found))) * float(found.mean()))
    return limit


def _named(
    rivals: Sequence[Hypothesis],
    kl: Mapping[str, float],
    gains: Mapping[str, Spread],
    limit: float,
    sizes: Mapping[str, float],
    strict: bool,
) -> tuple[str, str, str]:
    """(kind, hypothesis, words)."""
    better = [
        one for one in rivals if gains[one.name].low > 0 and (one.kind == BASE or kl[one.name] <= EXPLAINED * kl[TUNED])
    ]
    best = min(better, key=lambda one: kl[one.name], default=None)
    if best and best.kind == BASE:
        return BASE, best.name, best.words
    coarse = {one.bits or 0: one for one in rivals if one.kind == COARSE}
    tolerated = [] if strict else [one for bits, one in coarse.items() if bits >= TOLERABLE]
    allowed = max([limit, *(LEEWAY * sizes[one.name] for one in tolerated)])
    if best and kl[TUNED] > limit and best not in tolerated:
        return (PROMPT if best.kind == PROMPT else PARTLY), best.name, best.words
    rejected = gains[BASE].high < 0
    if kl[TUNED] > allowed and not (best and best in tolerated):
        near = [one for one in coarse.values() if one not in tolerated and kl[TUNED] <= LEEWAY * sizes[one.name]]
        words = f"as far off as {near[0].words} are" if near else "nothing compared explains it"
        return (PARTLY if rejected else OTHER), "", words
    if not rejected:
        return UNDECIDED, "", ""
    served = tolerated[-1].words if kl[TUNED] > limit and tolerated else ""
    return TUNED, TUNED, served


# --- all of them -----------------------------------------------------------------------------------------------------


def conclude(findings: Sequence[RouteFinding]) -> Conclusion:
    """The verdict of all APIs, the one that an app would use first. Where it is not the tuned model that answers there,
    but is elsewhere, the weights are right, and the prompts are others."""
    first = next((one for one in findings if one.kind != UNDECIDED), findings[0])
    tuned = min((one for one in findings if one.kind == TUNED), key=lambda one: one.kl[TUNED], default=None)
    prompt = tuned is not None and (first.kind not in (TUNED, UNDECIDED) or by_prompt(first, tuned))
    kind = PROMPT if prompt else first.kind
    more = [_aside(one, first) for one in findings if one is not first]
    if first.untold:
        more.append(f"Not told apart from the tuned model on these rows: {', '.join(first.untold)}.")
    more += [
        f"{one.route}: {counted(one.longer)}{'; the answers do not show it' if one.kind == TUNED else ''}."
        for one in findings
        if one.longer and one.words != counted(one.longer)
    ]
    return Conclusion(kind, _line(first, tuned if prompt else None), first.route, tuple(more), tuple(findings))


def by_prompt(first: RouteFinding, tuned: RouteFinding) -> bool:
    """Whether answers that few bits would explain are those of another prompt: by the other API the same weights are
    exact, and much nearer."""
    return bool(first.words) and not tuned.words and first.kl[TUNED] > ELSEWHERE * tuned.kl[TUNED]


def _line(one: RouteFinding, tuned: RouteFinding | None) -> str:
    """The first line."""
    near, base = nats(one.kl[TUNED]), nats(one.kl[BASE])
    if tuned:
        cause = one.words if one.kind == PROMPT else "template, BOS, system text or tokenizer"
        return (
            f"another prompt: {cause}; the weights are the TUNED model's by {tuned.route} "
            f"(KL {nats(tuned.kl[TUNED])}; by {one.route} {near})"
        )
    if one.kind == TUNED:
        served = f", as {one.words} are" if one.words else ""
        return f"answers are the TUNED model's{served} (KL {near}; to base {base})"
    if one.kind == BASE:
        return f"the BASE model's: the adapter has no effect (KL {base}; to tuned {near})"
    if one.kind in (PARTLY, PROMPT):
        verb = f"{',' if ',' in one.words else ''} explain{'' if one.words.startswith(WEIGHTS) else 's'}"
        best = f"{one.words}{verb} it best (KL {nats(one.kl[one.name])}; to" if one.name else f"{one.words} (KL to"
        if one.kind == PARTLY:
            return f"partly tuned: {best} tuned {near}, to base {base})"
        return f"another prompt: {best} the prompt of training {near})"
    if one.kind == OTHER:
        return f"another model's: neither tuned (KL {near}) nor base (KL {base}), and {one.words}"
    why = "base and tuned are too close on these rows"
    if one.items < FEWEST:
        why = f"{one.items} of at least {FEWEST} items"
    elif one.mass < LITTLE:
        why = f"tokens that are told and known have {one.mass:.0%} of the probability; is it the model's vocabulary?"
    return (
        f"cannot tell: {why} (KL between them {nats(one.apart)}, of rounding up to {nats(one.limit)}; answers to tuned "
        f"{near}, to base {base})"
    )


def _aside(one: RouteFinding, first: RouteFinding) -> str:
    """A sentence about another API."""
    numbers = f"KL to tuned {nats(one.kl[TUNED])}, to base {nats(one.kl[BASE])}"
    said = {TUNED: "the tuned model", BASE: "the base", UNDECIDED: "cannot tell"}.get(
        one.kind, f"{one.kind}: {one.words}"
    )
    if one.kind not in (TUNED, UNDECIDED) and first.kind == TUNED:
        said += "; an app that uses this API gets other answers"
    return f"{one.route}: {said} ({numbers})."


def counted(longer: int) -> str:
    """Tokens of a prompt beside those of training, in words."""
    return f"the server reads {plural(abs(longer), 'token')} {'more' if longer > 0 else 'fewer'} than training has"


def nats(value: float) -> str:
    """2e-4, 0.41, 1.3"""
    if value >= 0.01:
        return f"{value:.2g}"
    return f"{value:.0e}".replace("e-0", "e-") if value >= LEAST_SHOWN else "0"


def as_dict(finding: RouteFinding) -> dict[str, Any]:
    """For a document: spreads as lists, infinite bounds as null."""
    plain = {name: getattr(finding, name) for name in finding.__dataclass_fields__}
    bounds = {
        name: [bound if math.isfinite(bound) else None for bound in (one.mean, one.low, one.high)]
        for name, one in finding.gains.items()
    }
    return plain | {"kl": dict(finding.kl), "gains": bounds, "untold": list(finding.untold)}
