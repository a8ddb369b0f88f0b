"""Answers that are no natural log-probabilities of this model's tokens, refused before they are judged.

Heard* ── require_known ──▶ by_api, judge ──▶ RouteFinding ── require_natural ──▶ a verdict

What no distribution can be is found line by line (`Heard.of`). On base 2, probabilities sum to less than 1, as those of
a flatter model would; on base 10 to more, unless few are told. That is found by what explains the answers: a hypothesis
does once they are natural logarithms, and none does as they are told. Of another model, by the sums: what is flat in
truth would sum to more than 1 at some place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from rankwise.device.handoff.answers import SLACK, Heard, by_api
from rankwise.device.handoff.cases import HandoffCases
from rankwise.device.handoff.verdict import FEWEST, RouteFinding, by_item, divergences, nats, pretended
from rankwise.errors import DataError

BASES = {2: math.log(2), 10: math.log(10)}
CLEARLY, FEW = 0.25, 0.1  # of the KL as told: what is left on the right base, by several tokens, and by fewer
NEAR = 0.1  # what is told on the right base has as much probability as the model's own likeliest tokens, but for this
WHOLE, PART, SEVERAL = 0.9, 0.8, 5  # medians over places: the probability told, on the right base and as told; tokens


def require_known(cases: HandoffCases, answers: Sequence[Heard]) -> None:
    """DataError where an API tells no token that tuned or base find likely anywhere: those of another vocabulary."""
    texts = cases.ids_of(0).keys() | cases.ids_of(1).keys()
    for api in cases.routes:
        own = [one for one in answers if one.api == api]
        told = [token for one in own for token in one.top]
        if told and not any(one.id in cases.tokens if one.id is not None else one.text in texts for one in told):
            first = told[0].text if told[0].id is None else told[0].id
            raise DataError(
                f"{own[0].where}: {api}: none of the tokens told, here or elsewhere, is one that tuned or base find "
                f"likely, such as {first!r}: give the ids or the texts of {cases.reference}'s own tokenizer"
            )


def require_natural(cases: HandoffCases, answers: Sequence[Heard], finding: RouteFinding) -> None:
    """DataError for one API's answers that are on another scale, or only say which token was taken."""
    own, best = [one for one in answers if one.api == finding.route], min(finding.kl.values())
    if best <= finding.limit:
        return
    if all(one.certain for one in own):
        raise DataError(
            f"{own[0].where}: {finding.route}: every answer is one token of probability 1, which is what was taken at "
            "temperature 0, and not what the model says: tell log-probabilities from before sampling"
        )
    for base, factor in BASES.items():
        scaled = [one.times(factor) for one in own]
        if finding.items < FEWEST or any(one.mass > 1 + SLACK for one in scaled):
            continue
        told = by_api(cases, scaled)[finding.route]
        items = [int(cases.candidates.cases[place]) for place in told]
        distances = by_item(divergences(cases.candidates, told), items).mean(1)
        natural, nearest = float(distances.min()), cases.candidates.hypotheses[int(distances.argmin())].name
        sums = [median(one.mass for one in each) for each in (scaled, own)]
        whole = [sum(map(math.exp, one.values())) for one in pretended(cases.candidates, nearest, told).values()]
        several = finding.offered >= SEVERAL
        fits = natural <= (CLEARLY if several else FEW) * best and sums[0] >= median(whole) - NEAR
        if fits or (several and sums[0] >= WHOLE and sums[1] <= PART):
            raise DataError(
                f"{own[0].where}: {finding.route}: log-probabilities on base {base}: as natural ones they sum to "
                f"{sums[0]:.0%} (as told {sums[1]:.0%}), their KL to the nearest model is {nats(natural)} (as told "
                f"{nats(best)}); multiply each by {factor:.4f}"
            )
