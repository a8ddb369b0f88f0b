"""The rungs of the parity ladder: what was observed of every case, compared, with a reason where a comparison fails.

    pixels          the picture as sent, as Skia and as the app make it: within one grey level of training's
    image tokens    tokens in place of the pictures, delimiters included
    token ids       the text's ids; one BOS; the delimiters that the runtime writes; the GGUF's chat template
    embeddings      what the vision tower makes of a picture; a llama.cpp server hands out none
    logprobs        along the reference's answer: mean, p99 and largest KL, other likeliest tokens
    text            the runtime's own answer: equal, or first different where the reference is not sure itself

A new rung is a function and a row of `RUNGS`, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from rankwise.data.device import changes
from rankwise.device.parity.cases import strata
from rankwise.device.parity.floor import Divergence, Thresholds, compare, joined, leaders
from rankwise.device.parity.pixels import (
    LIMIT,
    drawn_on_canvas,
    not_measured,
    reason,
    seen_by_skia,
    sent_by_us,
    told_by_app,
)
from rankwise.device.parity.reference import Observed, common, distance, named

OK, BROKEN, NOT_MEASURED = "ok", "broken", "not measured"
NO_PICTURE = "no case has a picture"
KLS = ("kl_mean", "kl_p99", "kl_max")
NO_EMBEDDINGS = (
    "a llama.cpp server does not hand out the embeddings of a picture; with llama-cpp-python installed (pip install "
    "llama-cpp-python) they are measured. An error in them shows at the logprobs too"
)
NO_SETTLED = (
    "at every place a near tie in a router decides more than rounding does, so that llama.cpp may rightly choose other "
    "experts: compare more items (--parity_samples)"
)
UNTOLD = "the app's answers have no {}"
SHOWN_IDS, SHOWN_CHARACTERS = 6, 40


class Speech(Protocol):
    """Writes ids out, for reasons."""

    def detokenize(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Rung:
    """measured: numbers; threshold: what they are held to; why: where the rung is broken, what was seen, where it comes
    from and what to do; where it is not measured, why not. note: how much a rung that holds is worth."""

    name: str
    status: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    threshold: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judged(name: str, measured: Mapping[str, Any], threshold: Mapping[str, Any], why: str, note: str = "") -> Rung:
    """Status: broken where there is a reason, else ok, with the note."""
    return Rung(name, BROKEN, measured, threshold, why) if why else Rung(name, OK, measured, threshold, note=note)


def said(rung: Mapping[str, Any]) -> str:
    """A stored rung in a table: `ok (weak: k = 199)`, `not measured`."""
    return f"{rung['status']} ({rung['note']})" if rung.get("note") else str(rung["status"])


def unmeasured(rungs: Iterable[Mapping[str, Any]]) -> list[str]:
    """What rungs do not show: those that were not measured though there are pictures, and why."""
    return [
        f"{rung['name']} not measured: {rung['why']}"
        for rung in rungs
        if rung["status"] == NOT_MEASURED and rung["why"] != NO_PICTURE
    ]


# --- the prompt ------------------------------------------------------------------------------------------------------


def pixels(seen: Sequence[Observed], _: Speech, __: Thresholds) -> Rung:
    """Every side within one grey level; ok only where a side has pictures that the device changes."""
    pictured = [one for one in seen if one.expected.pixels or one.case.images]
    if not pictured:
        return Rung("pixels", NOT_MEASURED, why=NO_PICTURE)
    ours = [one for one in pictured if not one.by_app]
    sent, app, skia = sent_by_us(ours), told_by_app(pictured), seen_by_skia(ours)
    # What is sent in its own size is at least decoded.
    sources = [(source.content, one.case.size) for one in pictured for source in one.case.sources]
    changed = sum(size is None or changes(content, size) for content, size in sources)
    measured = {
        "pictures": sum(len(one.case.images) for one in pictured),
        "changed_by_the_device": changed,
        **sent.measured(),
        **skia.measured(),
        **app.measured(),
        **drawn_on_canvas(pictured).measured(),
        "tiles": sorted({"×".join(map(str, tile)) for one in pictured for tile in one.expected.tiles}),
        "kinds": {kind: len(ids) for kind, ids in strata([one.case for one in pictured]).items()},
    }
    limit = {f"{side.name}_largest_difference": LIMIT for side in (sent, skia, app) if side.found}
    why = next((reason(side) for side in (sent, app, skia) if side.wrong), "")
    if why or app.found or (skia.found and changed):
        return judged("pixels", measured, limit, why, " and ".join(one.name for one in (skia, app) if one.found))
    why = not_measured(skia) if ours else UNTOLD.format("sha256_rgb and no png")
    return Rung("pixels", NOT_MEASURED, measured, limit, why)


def image_tokens(seen: Sequence[Observed], _: Speech, __: Thresholds) -> Rung:
    """The numbers are equal, case by case."""
    pictured = [one for one in seen if one.case.images or one.expected.expansions]
    if not pictured:
        return Rung("image tokens", NOT_MEASURED, why=NO_PICTURE)
    heard = [one for one in pictured if one.tells_prompt]
    if not any(one.tells_prompt or one.refused for one in pictured):
        return Rung("image tokens", NOT_MEASURED, why=UNTOLD.format("prompt_ids"))
    measured = {
        "reference": sorted({one.expected.span for one in heard}),
        "runtime": sorted({one.span for one in heard}),
        "embeddings_in_reference": sorted({one.expected.image_tokens for one in pictured}),
    }
    return judged("image tokens", measured, {"difference": 0}, why_other_count(pictured, heard))


def why_other_count(pictured: Sequence[Observed], heard: Sequence[Observed]) -> str:
    slots = [one for one in pictured if one.case.prompt.count(one.case.marker) != len(one.case.images)]
    refused = [one for one in pictured if one.refused]
    wrong = [one for one in heard if one.expected.span != one.span]
    if slots:
        return (
            f"{named(slots)}: the prompt does not hold one marker ({slots[0].case.marker}) for each picture; another "
            "text in its place is read as words"
        )
    if refused:
        return f"{named(refused)}: the runtime refuses the prompt: {refused[0].refused}"
    if wrong:
        return (
            f"{named(wrong)}: a picture is {wrong[0].expected.span} tokens in training and {wrong[0].span} in the "
            "runtime, which cuts it into other tiles. Set longest_edge and tiling in device.json (`runtime` lays a "
            "picture out as llama.cpp does), train with that target, and export with it"
        )
    return ""


def token_ids(seen: Sequence[Observed], runtime: Speech, _: Thresholds) -> Rung:
    """Equal ids, and the runtime read what it was meant to."""
    heard = [one for one in seen if one.tells_prompt]
    if not any(one.tells_prompt or one.refused for one in seen):
        return Rung("token ids", NOT_MEASURED, why=UNTOLD.format("prompt_ids"))
    refused = [one for one in seen if one.refused and not one.case.images]
    wrong = [one for one in heard if list(one.expected.ids) != one.whole_ids]
    read = [one for one in heard if one.free and echoed(one.free.prompt_text) != echoed(one.wanted)]
    asked = [one for one in seen if one.template]
    templates = [why for one in asked if (why := template_reason(one))]
    measured = {
        "cases": len(seen),
        "ids_equal": len(heard) - len(wrong),
        "read_as_written": len(heard) - len(read),
        "template_equal": not templates if asked else None,
    }
    if refused:
        why = f"{named(refused)}: the runtime refuses the prompt: {refused[0].refused}"
    elif wrong:
        why = f"{named(wrong)}: {ids_reason(wrong[0], runtime)}"
    elif read:
        why = f"{named(read)}: {text_reason(read[0])}"
    else:
        why = templates[0] if templates else ""
    return judged("token ids", measured, {"different": 0}, why)


def echoed(prompt: str) -> str:
    """Without the space that SentencePiece puts before a prompt without BOS: llama.cpp's echo leaves it out."""
    return prompt.removeprefix(" ")


def ids_reason(one: Observed, runtime: Speech) -> str:
    expected, found = list(one.expected.ids), one.whole_ids
    begin = one.expected.begin_id
    if found == [begin, *expected]:
        twice = "a second BOS" if expected[:1] == [begin] else "a BOS"
        return (
            f"the runtime reads {twice} at the beginning, which training never saw; set tokenizer.ggml.add_bos_token "
            "to false in the GGUF, or send the prompt without its own"
        )
    if [begin, *found] == expected:
        return "the BOS of training is missing; set tokenizer.ggml.add_bos_token to true in the GGUF"
    place = common(expected, found)
    ours, theirs = (repr(runtime.detokenize(ids[place : place + SHOWN_IDS])) for ids in (expected, found))
    return (
        f"from token {place} on, training has {ours} and the runtime reads {theirs}; is the prompt made by the same "
        "template, and are its special tokens parsed and not read as text?"
    )


def text_reason(one: Observed) -> str:
    assert one.free
    place = common([*map(ord, one.wanted)], [*map(ord, one.free.prompt_text)])
    wanted, read = (repr(text[place : place + SHOWN_CHARACTERS]) for text in (one.wanted, one.free.prompt_text))
    return (
        f"the runtime read another prompt than training has: at character {place} it has {read}, training {wanted} "
        "(delimiters of tiles are the runtime's own: see tiling in device.json)"
    )


def template_reason(one: Observed) -> str:
    """Why the template in the GGUF is not training's; "" where it is."""
    assert one.template
    text, found = one.template
    if found == text:
        return ""
    return (
        f"the chat template in the GGUF makes {found!r} where the model's own makes "
        f"{text!r}; an app that uses the GGUF's asks otherwise than training did. Export again from the merged folder"
    )


# --- the answer ------------------------------------------------------------------------------------------------------


def embeddings(seen: Sequence[Observed], _: Speech, thresholds: Thresholds) -> Rung:
    """What the vision tower and the projector make of a picture, relative to its length (root mean square)."""
    pictured = [one for one in seen if one.case.images]
    if not pictured:
        return Rung("embeddings", NOT_MEASURED, why=NO_PICTURE)
    pairs = [(one, one.embeddings, one.expected.embeddings) for one in pictured]
    found = {one.case.id: distance(ours, other) for one, ours, other in pairs if ours is not None and other is not None}
    if not found:
        return Rung("embeddings", NOT_MEASURED, why=NO_EMBEDDINGS)
    wrong = [one for one in pictured if found.get(one.case.id, 0) > thresholds.embeddings]
    largest = max(found.values())
    known = math.isfinite(largest)
    apart_by = f"{largest:.2g} apart, relative to their size" if known else "of another number or width"
    why = (
        f"{named(wrong)}: embeddings of the pictures are {apart_by} (limit {thresholds.embeddings:.2g}): the mmproj "
        "file is another model's (the base's?), or the runtime scales and normalises a picture otherwise; compare the "
        "pixel settings in the mmproj file with the processor's"
    )
    measured = {"pictures": len(found), "largest_distance": largest if known else None}
    limit = {"largest_distance": thresholds.embeddings}
    return judged("embeddings", measured, limit, why if wrong else "", thresholds.note)


def logprobs(seen: Sequence[Observed], _: Speech, thresholds: Thresholds) -> Rung:
    """KL within k floors, and no other likeliest token where the reference is sure."""
    heard = [one for one in seen if one.tops]
    threshold = {name: value for name, value in thresholds.as_dict().items() if name != "embeddings"}
    if not heard:
        return Rung("logprobs", NOT_MEASURED, {}, threshold, "the runtime told no log-probabilities of any answer")
    every = {one.case.id: compare(one.expected.log_probs, one.tops, one.case.id) for one in heard}
    parts = {name: one.but(thresholds.apart) for name, one in every.items()}
    found, moved = joined(list(parts.values())), joined([one.only(thresholds.apart) for one in every.values()])
    if not found.positions:
        return Rung("logprobs", NOT_MEASURED, routed_apart(moved, thresholds), threshold, NO_SETTLED)
    measured = found.as_dict(thresholds.margin) | routed_apart(moved, thresholds)
    measured |= {"floors": {name: thresholds.k * measured[name] / threshold[name] for name in KLS}}
    measured |= {"cases_not_told": len(seen) - len(heard), "by_kind": by_kind(heard, found)}
    facts = beyond(found, measured, thresholds)
    why = f"{'; '.join(facts)}. {suspect(heard, parts, thresholds)}" if facts else ""
    apart = f"; {len(moved.positions)} more places are near ties of routers" if moved.positions else ""
    return judged("logprobs", measured, threshold, why, thresholds.note + apart)


def routed_apart(moved: Divergence, thresholds: Thresholds) -> dict[str, Any]:
    """The places that another choice of experts may move, which no limit holds; {} where routers have no near ties."""
    if not thresholds.near_ties:
        return {}
    return {
        "near_ties_of_routers": thresholds.near_ties,
        "positions_of_another_routing": len(moved.positions),
        "kl_mean_of_another_routing": moved.mean if moved.positions else None,
        "kl_max_of_another_routing": moved.max if moved.positions else None,
        "flips_of_another_routing": len(moved.flips),
    }


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
        if part.positions
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


EQUAL, TIE, RUNS_ON, STOPS, DIFFERENT = "equal", "tie", "runs on", "stops early", "different"
ROUTED = "another routing"
REASONS = {
    RUNS_ON: "the runtime writes on behind the end token of training, so the GGUF ends answers with another one: look "
    "at tokenizer.ggml.eos_token_id and at generation_config.json of the merged model",
    STOPS: "the runtime ends answers where training goes on: look at tokenizer.ggml.eos_token_id",
    DIFFERENT: "another greedy answer where the reference is sure",
}


def text(seen: Sequence[Observed], _: Speech, thresholds: Thresholds) -> Rung:
    """Answers are equal up to ties, and end where the reference's end."""
    heard = [one for one in seen if one.free and one.expected.greedy]
    if not heard:
        return Rung("text", NOT_MEASURED, why="no case was answered freely on both sides")
    kinds = (EQUAL, TIE, *((ROUTED,) if thresholds.near_ties else ()), RUNS_ON, STOPS, DIFFERENT)
    of: dict[str, list[Observed]] = {kind: [] for kind in kinds}
    for one in heard:
        of[answered(one, thresholds)].append(one)
    measured = {"cases": len(heard), **{kind.replace(" ", "_"): len(members) for kind, members in of.items()}}
    why = ""
    if bad := next((kind for kind in REASONS if of[kind]), ""):
        first = of[bad][0]
        assert first.free
        shown = f"training answers {first.expected.text!r}, the runtime {first.free.text.strip()!r}"
        why = f"{named(of[bad])}: {REASONS[bad]}; {shown}"
    return judged("text", measured, {"different": 0, "margin": thresholds.margin}, why, thresholds.note)


def answered(one: Observed, thresholds: Thresholds) -> str:
    """How the runtime's own answer compares with the reference's."""
    assert one.free
    expected, found = one.expected.answer, one.free.tokens
    place = common(expected, found)
    if place == len(expected):
        ended = expected[-1] in one.expected.end_ids
        return RUNS_ON if ended and len(found) > place else EQUAL
    if place == len(found):
        return STOPS
    if leaders(one.expected.log_probs[place].double())[1] <= thresholds.margin:
        return TIE
    return ROUTED if (one.case.id, place) in thresholds.apart else DIFFERENT


RUNGS: Mapping[str, Callable[[Sequence[Observed], Speech, Thresholds], Rung]] = {
    "pixels": pixels,
    "image tokens": image_tokens,
    "token ids": token_ids,
    "embeddings": embeddings,
    "logprobs": logprobs,
    "text": text,
}
