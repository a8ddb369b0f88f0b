"""Does any site rest and then train again? Where none does, keeping an optimizer state and forgetting it are the same.

    returns(parse_schedule("both:60 > mlp:60 > attention"))      # True: attention rests and comes back
    returns(parse_schedule("early:100 > late"))                  # False

Told from the schedule's text alone, before any model is read; where the text does not tell, the answer is True.
"""

from __future__ import annotations

from itertools import combinations, permutations

from rankwise.core.phase import Form, Part, Phase, Phases

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
