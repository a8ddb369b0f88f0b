"""The rungs about the answer: what the vision side makes of a picture, next-token distributions, greedy texts.

embeddings   not measured: a llama.cpp server hands out none
logprobs     along the reference's answer: mean, p99 and largest KL, other likeliest tokens
text         the runtime's own answer: equal, or first different where the reference is not sure itself
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.ship.llama.runtime import Runtime
from rankwise.ship.parity.cases import strata
from rankwise.ship.parity.divergence import Divergence, compare, joined, leaders
from rankwise.ship.parity.embedder import apart
from rankwise.ship.parity.floor import Thresholds
from rankwise.ship.parity.observed import Observed, common
from rankwise.ship.parity.rung import NO_PICTURE, NOT_MEASURED, Rung, judged, named

KLS = ("kl_mean", "kl_p99", "kl_max")
NO_EMBEDDINGS = (
    "a llama.cpp server does not hand out the embeddings of a picture; with llama-cpp-python installed (pip install "
    "llama-cpp-python) they are measured. An error in them shows at the logprobs too"
)
EQUAL, TIE, RUNS_ON, STOPS, DIFFERENT = "equal", "tie", "runs on", "stops early", "different"


def embeddings(seen: Sequence[Observed], _: Runtime, thresholds: Thresholds) -> Rung:
    """What the vision tower and the projector make of a picture, relative to its length (root mean square)."""
    pictured = [one for one in seen if one.case.images]
    if not pictured:
        return Rung("embeddings", NOT_MEASURED, why=NO_PICTURE)
    pairs = [(one, one.embeddings, one.expected.embeddings) for one in pictured]
    found = {one.case.id: apart(ours, theirs) for one, ours, theirs in pairs if ours is not None and theirs is not None}
    if not found:
        return Rung("embeddings", NOT_MEASURED, why=NO_EMBEDDINGS)
    wrong = [one for one in pictured if found.get(one.case.id, 0) > thresholds.embeddings]
    largest = max(found.values())
    measured = {"pictures": len(found), "largest_distance": largest if math.isfinite(largest) else None}
    apart_by = (
        f"{largest:.2g} apart, relative to their size" if math.isfinite(largest) else "of another number or width"
    )
    why = (
        f"{named(wrong)}: embeddings of the pictures are {apart_by} (limit {thresholds.embeddings:.2g}): the mmproj "
        "file is another model's (the base's?), or the runtime scales and normalises a picture otherwise; compare the "
        "pixel settings in the mmproj file with the processor's"
    )
    limit = {"largest_distance": thresholds.embeddings}
    return judged("embeddings", measured, limit, why if wrong else "", thresholds.note)


def logprobs(seen: Sequence[Observed], _: Runtime, thresholds: Thresholds) -> Rung:
    """KL within k floors, and no other likeliest token where the reference is sure."""
    heard = [one for one in seen if one.tops]
    threshold = {name: value for name, value in thresholds.as_dict().items() if name != "embeddings"}
    if not heard:
        return Rung("logprobs", NOT_MEASURED, {}, threshold, "the runtime told no log-probabilities of any answer")
    parts = {one.case.id: compare(one.expected.log_probs, one.tops, one.case.id) for one in heard}
    found = joined(list(parts.values()))
    measured = found.as_dict(thresholds.margin)
    measured |= {"floors": {name: thresholds.k * measured[name] / threshold[name] for name in KLS}}
    measured |= {"cases_not_told": len(seen) - len(heard), "by_kind": by_kind(heard, found)}
    facts = beyond(found, measured, thresholds)
    why = f"{'; '.join(facts)}. {suspect(heard, parts, thresholds)}" if facts else ""
    return judged("logprobs", measured, threshold, why, thresholds.note)


def beyond(found: Divergence, measured: Mapping[str, Any], thresholds: Thresholds) -> list[str]:
    """What exceeds its limit, in words."""
    limits = thresholds.as_dict()
    facts = [
        f"{name.replace('kl_', '')} KL {measured[name]:.2g} nats (limit {limits[name]:.2g})"
        for name in KLS
        if measured[name] > limits[name]
    ]
    flips = len(found.flips_above(thresholds.margin))
    if flips:
        facts.append(f"another likeliest token at {flips} of {len(found.positions)} places where the reference is sure")
    if thresholds.agreement is not None and found.agreement < thresholds.agreement:
        facts.append(f"top-1 agreement {found.agreement:.3f} (asked for: {thresholds.agreement:g})")
    return facts


def by_kind(heard: Sequence[Observed], found: Divergence) -> dict[str, dict[str, float]]:
    """Mean KL and agreement for each kind of picture."""
    parts = {kind: found.of(ids) for kind, ids in strata([one.case for one in heard]).items()}
    return {
        kind: {"positions": len(part.positions), "kl_mean": part.mean, "top1_agreement": part.agreement}
        for kind, part in parts.items()
    }


def suspect(heard: Sequence[Observed], parts: Mapping[str, Divergence], thresholds: Thresholds) -> str:
    """Which weights to look at: prompts without a picture never touch the vision side."""
    seeing = [one for one in heard if one.case.images]
    blind = joined([parts[one.case.id] for one in heard if not one.case.images])
    held = blind.positions and blind.mean <= thresholds.kl_mean and not blind.flips_above(thresholds.margin)
    if seeing and held:
        return (
            "Prompts without a picture agree, so the language weights are right: look at the mmproj file (is it the "
            "base's, or another model's?), and at what the runtime does to a picture"
        )
    which = "language weights" if seeing else "weights"
    return (
        f"The {which} are not those that were trained: is the GGUF made from this merged model, and not from its base? "
        "`rankwise export` compares every tensor with the checkpoint"
    )


def text(seen: Sequence[Observed], _: Runtime, thresholds: Thresholds) -> Rung:
    """Answers are equal up to ties, and end where the reference's end."""
    heard = [one for one in seen if one.free and one.expected.greedy]
    if not heard:
        return Rung("text", NOT_MEASURED, why="no case was answered freely on both sides")
    of: dict[str, list[Observed]] = {kind: [] for kind in (EQUAL, TIE, RUNS_ON, STOPS, DIFFERENT)}
    for one in heard:
        of[answered(one, thresholds.margin)].append(one)
    measured = {"cases": len(heard), **{kind.replace(" ", "_"): len(members) for kind, members in of.items()}}
    bad = next((kind for kind in REASONS if of[kind]), "")
    why = f"{named(of[bad])}: {REASONS[bad]}; {shown(of[bad][0])}" if bad else ""
    return judged("text", measured, {"different": 0, "margin": thresholds.margin}, why, thresholds.note)


REASONS = {
    RUNS_ON: "the runtime writes on behind the end token of training, so the GGUF ends answers with another one: look "
    "at tokenizer.ggml.eos_token_id and at generation_config.json of the merged model",
    STOPS: "the runtime ends answers where training goes on: look at tokenizer.ggml.eos_token_id",
    DIFFERENT: "another greedy answer where the reference is sure",
}


def answered(one: Observed, margin: float) -> str:
    """How the runtime's own answer compares with the reference's."""
    assert one.free
    expected, found = one.expected.answer, one.free.tokens
    place = common(expected, found)
    if place == len(expected):
        ended = expected[-1] in one.expected.end_ids
        return RUNS_ON if ended and len(found) > place else EQUAL
    if place == len(found):
        return STOPS
    return TIE if leaders(one.expected.log_probs[place].double())[1] <= margin else DIFFERENT


def shown(one: Observed) -> str:
    assert one.free
    return f"training answers {one.expected.text!r}, the runtime {one.free.text.strip()!r}"
