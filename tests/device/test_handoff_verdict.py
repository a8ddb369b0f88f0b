"""The verdict's arithmetic, on distributions that are written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from rankwise.device.handoff.answers import Heard, TokenLogProb
from rankwise.device.handoff.cases import HandoffCase, HandoffCases, Place
from rankwise.device.handoff.scale import require_natural
from rankwise.device.handoff.verdict import (
    BASE,
    COARSE,
    OTHER,
    PART,
    PARTLY,
    PROMPT,
    SOUND,
    TUNED,
    UNDECIDED,
    Candidates,
    Hypothesis,
    RouteFinding,
    conclude,
    divergences,
    judge,
    nats,
    nearer,
    spread,
)
from rankwise.errors import DataError

WORDS = {
    "tuned": (TUNED, None),
    "float16": (SOUND, None),
    "4 bits": (COARSE, 4),
    "2 bits": (COARSE, 2),
    "base": (BASE, None),
    "half": (PART, None),
    "BOS": (PROMPT, None),
}
HYPOTHESES = tuple(Hypothesis(name, kind, name, bits) for name, (kind, bits) in WORDS.items())
ITEMS, PLACES, TOKENS = 8, 3, 30


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    """Every hypothesis is the tuned model and so much noise of its own; half is between tuned and base."""
    noise = np.random.default_rng(0)
    shape = (ITEMS * PLACES, TOKENS)
    tuned = 2 * noise.standard_normal(shape)
    sizes = {"tuned": 0.0, "float16": 0.003, "4 bits": 0.2, "2 bits": 1.0, "base": 0.9, "half": 0.0, "BOS": 0.5}
    logits = {name: tuned + size * noise.standard_normal(shape) for name, size in sizes.items()}
    logits["half"] = (logits["tuned"] + logits["base"]) / 2
    cases = np.repeat(np.arange(ITEMS, dtype=np.int32), PLACES)
    ids = np.tile(np.arange(TOKENS, dtype=np.int32), (ITEMS * PLACES, 1))
    return Candidates(HYPOTHESES, cases, ids, log_softmax(np.stack([*logits.values()])).astype(np.float32))


def served(
    candidates: Candidates, name: str, count: int = TOKENS, extra: float = 0.0
) -> dict[int, Mapping[int, float]]:
    """What a server that is a hypothesis tells; extra: noise on its logits."""
    noise = np.random.default_rng(1)
    rows = candidates.log_probs[candidates.number(name)]
    moved = log_softmax(rows + extra * noise.standard_normal(rows.shape))
    return {
        place: {int(token): float(row[token]) for token in np.argsort(-row)[:count]} for place, row in enumerate(moved)
    }


def found(candidates: Candidates, name: str, count: int = TOKENS, extra: float = 0.0, **how: object) -> RouteFinding:
    return judge("ids", candidates, served(candidates, name, count, extra), 10.0, **how)  # type: ignore[arg-type]


def test_the_distance_is_kl_where_all_is_told(candidates: Candidates) -> None:
    measured = divergences(candidates, served(candidates, "base"))
    q, p = (candidates.log_probs[candidates.number(name)].astype(float) for name in ("base", "tuned"))
    assert measured[candidates.number("tuned")] == pytest.approx((np.exp(q) * (q - p)).sum(-1), abs=1e-5)
    assert measured[candidates.number("base")] == pytest.approx(0, abs=1e-6)


def test_the_distance_never_grows_where_less_is_told(candidates: Candidates) -> None:
    counts = (TOKENS, 20, 5, 1)
    by_count = [divergences(candidates, served(candidates, "base", count)) for count in counts]
    for more, less in pairwise(by_count):
        assert (less <= more + 1e-6).all()


def test_a_token_that_no_case_knows_is_one_of_the_others(candidates: Candidates) -> None:
    told = served(candidates, "tuned", 5)
    beside = {place: {**top, 10**6: -30.0} for place, top in told.items()}
    assert divergences(candidates, beside) == pytest.approx(divergences(candidates, told), abs=1e-9)


@pytest.mark.parametrize("count", [TOKENS, 5, 2])
@pytest.mark.parametrize(
    ("name", "kind"), [("tuned", TUNED), ("float16", TUNED), ("base", BASE), ("half", PARTLY), ("BOS", PROMPT)]
)
def test_what_is_served_is_named(candidates: Candidates, name: str, kind: str, count: int) -> None:
    one = found(candidates, name, count)
    assert one.kind == kind and one.name == ("tuned" if kind == TUNED else name)


@pytest.mark.parametrize(("name", "extra"), [("tuned", 0.002), ("base", 0.002), ("half", 0.002), ("BOS", 0.002)])
def test_noise_on_it_changes_nothing(candidates: Candidates, name: str, extra: float) -> None:
    assert found(candidates, name, 10, extra).kind == found(candidates, name, 10).kind


def test_few_bits(candidates: Candidates) -> None:
    """Of ours, of another format, and where the server is said to have more."""
    for name, extra in (("4 bits", 0.0), ("tuned", 0.2)):
        assert found(candidates, name, extra=extra).words == "4 bits"
        assert found(candidates, name, extra=extra).kind == TUNED
        assert found(candidates, name, extra=extra, strict=True).kind == PARTLY
    assert found(candidates, "2 bits").kind == PARTLY


def test_what_nothing_explains(candidates: Candidates) -> None:
    far = found(candidates, "tuned", extra=3.0)
    assert far.kind in (OTHER, PARTLY) and not far.name
    assert found(candidates, "tuned", extra=3.0, longer=3).words == "the server reads 3 tokens more than training has"


def test_prompt_tokens_alone_are_no_accusation(candidates: Candidates) -> None:
    """A server may count in its own way."""
    assert found(candidates, "tuned", longer=-1).kind == TUNED


def test_a_base_that_is_the_tuned_model(candidates: Candidates) -> None:
    same = candidates.log_probs.copy()
    same[candidates.number("base")] = same[candidates.number("tuned")]
    one = found(replace(candidates, log_probs=same), "tuned", extra=0.002)
    assert one.kind == UNDECIDED and conclude([one]).line.startswith("cannot tell: ")


def test_chance_accuses_nobody(candidates: Candidates) -> None:
    """Tuned models in arithmetic of their own, 200 times: never another verdict."""
    for seed in range(200):
        noise = np.random.default_rng(seed)
        rows = candidates.log_probs[candidates.number("tuned")]
        moved = log_softmax(rows + 0.003 * noise.standard_normal(rows.shape))
        told = {place: {int(t): float(row[t]) for t in np.argsort(-row)[:10]} for place, row in enumerate(moved)}
        assert judge("ids", candidates, told, 10.0).kind == TUNED


def test_a_row_that_is_far_off_does_not_outweigh_the_others() -> None:
    tuned, rival = np.array([1e-3] * 9 + [5.0]), np.array([1e-5] * 9 + [4.9])
    assert spread(tuned - rival, 0.01).low < 0 < spread(nearer(tuned, rival, 1e-6), 0.01).low


def test_fewer_than_four_items_have_no_interval() -> None:
    one = spread(np.array([1.0, 1.0, 1.0]), 0.05)
    assert (one.low, one.high) == (-np.inf, np.inf)


def test_weights_that_are_right_by_one_api_make_the_prompt_the_cause(candidates: Candidates) -> None:
    chat, ids = replace(found(candidates, "half"), route="chat"), found(candidates, "tuned")
    end = conclude([chat, ids])
    assert end.kind == PROMPT and end.line.startswith("another prompt: template, BOS, system text or ")
    assert conclude([ids, chat]).kind == TUNED
    assert "an app that uses this API gets other answers" in conclude([ids, chat]).more[0]


def test_few_bits_do_not_excuse_prompts_where_the_weights_are_exact(candidates: Candidates) -> None:
    """Token ids of another tokenizer, for example: answers as far off as weights of 4 bits, by one API only."""
    text, ids = (
        replace(found(candidates, "4 bits"), route="completions"),
        replace(found(candidates, "tuned"), route="ids"),
    )
    assert text.kind == TUNED and text.words
    end = conclude([text, ids])
    assert end.kind == PROMPT and "the weights are the TUNED model's by ids" in end.line
    both = replace(found(candidates, "4 bits"), route="ids")
    assert conclude([text, both]).kind == TUNED, "served in 4 bits"


def test_why_it_cannot_be_told_is_the_reason_that_holds(candidates: Candidates) -> None:
    """Tokens of another vocabulary, and too few items, are not answers that are too close."""
    foreign = {place: {TOKENS + 1000: -0.1} for place in range(ITEMS * PLACES)}
    assert "told and known have 0% of the probability" in conclude([judge("ids", candidates, foreign, 10.0)]).line
    few = {place: candidates.as_server("tuned", place, TOKENS) for place in range(PLACES)}
    assert conclude([judge("ids", candidates, few, 10.0)]).line.startswith("cannot tell: 1 of at least 4 items")


def test_an_api_that_cannot_tell_leaves_it_to_the_others(candidates: Candidates) -> None:
    unsure = replace(found(candidates, "tuned"), route="chat", kind=UNDECIDED, name="", words="")
    assert conclude([unsure, found(candidates, "base")]).kind == BASE
    assert conclude([unsure, found(candidates, "tuned")]).kind == TUNED


@pytest.mark.parametrize(
    ("value", "said"), [(2.04e-4, "2e-4"), (0.412, "0.41"), (1.31, "1.3"), (0.0, "0"), (3e-12, "0"), (9e-3, "9e-3")]
)
def test_nats(value: float, said: str) -> None:
    assert nats(value) == said


# --- on which scale answers are ---------------------------------------------------------------------------------------


def heard(
    candidates: Candidates, name: str, count: int, extra: float = 0.0, *, temperature: float = 1.0, unit: float = 1.0
) -> tuple[HandoffCases, list[Heard], RouteFinding]:
    """Answers of a hypothesis with noise of its own, after a temperature, in a unit of log-probability."""
    noise = np.random.default_rng(1)
    rows = candidates.log_probs[candidates.number(name)]
    moved = log_softmax((rows + extra * noise.standard_normal(rows.shape)) / temperature) / unit
    told = {place: {int(one): float(row[one]) for one in np.argsort(-row)[:count]} for place, row in enumerate(moved)}
    places = [tuple(Place(PLACES * item + one, one, "", True) for one in range(PLACES)) for item in range(ITEMS)]
    rows_ = tuple(HandoffCase(f"r{item}", "", (), (), own) for item, own in enumerate(places))
    cases = HandoffCases("tuned", "base", rows_, candidates, dict.fromkeys(range(TOKENS), (None, None)))
    answers = [
        Heard(case.id, place.forced, "ids", tuple(TokenLogProb(value, id) for id, value in told[place.row].items()))
        for case in rows_
        for place in case.places
    ]
    return cases, answers, judge("ids", candidates, told, 10.0)


@pytest.mark.parametrize("count", [1, 2, 5, 20, TOKENS])
def test_natural_logarithms_are_not_refused(candidates: Candidates, count: int) -> None:
    """Not those of any hypothesis, of another model, or of a sampler with a temperature."""
    temperatures = (0.2, 1 / np.log(10), np.log(2), 1, 1 / np.log(2), np.log(10), 5)
    for name, extra, temperature in product(WORDS, (0.0, 0.3, 1.0, 3.0), temperatures):
        require_natural(*heard(candidates, name, count, extra, temperature=temperature))


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize(("name", "count"), [*product(("tuned", "base", "4 bits"), (1, 5, TOKENS))])
def test_another_base_is_found(candidates: Candidates, base: int, name: str, count: int) -> None:
    with pytest.raises(DataError, match=f"log-probabilities on base {base}: as natural ones"):
        require_natural(*heard(candidates, name, count, unit=np.log(base)))


def test_another_base_of_another_model_is_found_by_the_sums(candidates: Candidates) -> None:
    """Nothing explains its answers on any base."""
    with pytest.raises(DataError, match="on base 2: as natural ones they sum to 100%"):
        require_natural(*heard(candidates, "tuned", TOKENS, 3.0, unit=np.log(2)))
