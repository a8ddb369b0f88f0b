"""The demo's world: restaurants drawn from a small grammar, described in words.

Two kinds of text come out of it. `guide` pages are plain prose, several wordings of the same restaurants: what the
demo's base model reads. Task rows pair a meaning representation with its wording, in the official CSV form of E2E
NLG: what the fine-tune reads. Both leave out the (name, food) pairs that only the held-out rows have.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rankwise.files.atomic import atomic_write

NAMES = (
    *("The Blue Lantern", "Willow House", "The Copper Kettle", "Harbour Lights", "The Old Mill", "Green Olive"),
    *("The Silver Spoon", "Maple Corner", "The Red Fox", "Stone Bridge", "The Golden Pear", "River Garden"),
    *("The Black Swan", "Lemon Tree", "The White Hart", "Cedar Room"),
)
SIGHTS = (
    *("Kings Theatre", "Central Station", "Market Hall", "Park Hotel", "Tower Bridge", "Rose Museum"),
    *("Green Park", "North Pier"),
)
VALUES = {
    "name": NAMES,
    "eatType": ("restaurant", "pub", "coffee shop"),
    "food": ("Italian", "French", "Indian", "Chinese", "Japanese", "English", "Spanish", "Greek"),
    "priceRange": ("cheap", "moderate", "high"),
    "customer rating": ("low", "average", "5 out of 5"),
    "area": ("city centre", "riverside", "old town"),
    "familyFriendly": ("yes", "no"),
    "near": SIGHTS,
}
ALWAYS = ("name", "eatType", "food")
OPTIONAL_SHARE = 0.7
HELD_OUT_OF = 6
PRICE = {
    "cheap": ("cheap", "low cost"),
    "moderate": ("moderately priced", "mid-range"),
    "high": ("expensive", "high priced"),
}
PLACE = {
    "city centre": ("in the city centre", "in the centre of the city"),
    "riverside": ("by the riverside", "on the riverside"),
    "old town": ("in the old town", "in the old part of town"),
}
RATING = {
    "low": ("It is poorly rated", "Its customer rating is low"),
    "average": ("It has an average rating", "Its customer rating is average"),
    "5 out of 5": ("It is rated 5 out of 5", "Its customer rating is 5 out of 5"),
}
FAMILY = {"yes": ("welcomes families", "is family friendly"), "no": ("is not for children", "is not family friendly")}

# What a visitor says of each attribute: of any value under "", else of this one.
VISITS: dict[str, dict[str, tuple[str, ...]]] = {
    "name": {"": ("We had dinner at {}.", "Last week we went to {}.")},
    "eatType": {"": ("They call it a {}.", "A real {}!")},
    "food": {"": ("The cook makes {} dishes.", "I love {} food.")},
    "priceRange": {
        "cheap": ("We paid little.", "What a cheap meal!"),
        "moderate": ("We paid a fair price.", "The bill was moderate."),
        "high": ("We paid a lot.", "The bill was high."),
    },
    "customer rating": {
        "low": ("Never again.", "I give it a low mark."),
        "average": ("Nothing special.", "I give it an average mark."),
        "5 out of 5": ("We will come back.", "I give it 5 out of 5."),
    },
    "area": {
        "city centre": ("We walked through the city centre.",),
        "riverside": ("We walked along the riverside.",),
        "old town": ("We walked through the old town.",),
    },
    "familyFriendly": {
        "yes": ("Our children had fun.", "Bring your family."),
        "no": ("Our children were bored.", "Leave your family at home."),
    },
    "near": {"": ("You can see {} from there.", "We parked at {}.")},
}

TAGS = {"yes": "family", "no": "adults"}
MARKS = (("/", " "), (" ", "/"), ("(", ")"), ("{", "}"), ("<", ">"))


@dataclass(frozen=True)
class Restaurant:
    """Its facts, attribute → value, in the order of `VALUES`."""

    facts: dict[str, str]

    @property
    def meaning(self) -> str:
        """The meaning representation: `name[The Red Fox], eatType[pub], food[Greek]`."""
        return ", ".join(f"{attribute}[{value}]" for attribute, value in self.facts.items())

    @property
    def held_out(self) -> bool:
        """Whether its (name, food) pair is kept for the held-out rows; one pair in `HELD_OUT_OF` is."""
        name = VALUES["name"].index(self.facts["name"])
        return (name + VALUES["food"].index(self.facts["food"])) % HELD_OUT_OF == 0


def draw(random_state: random.Random) -> Restaurant:
    """A restaurant with a name, a type, a food and some of the other facts."""
    return Restaurant(
        {
            attribute: random_state.choice(values)
            for attribute, values in VALUES.items()
            if attribute in ALWAYS or random_state.random() < OPTIONAL_SHARE
        }
    )


def restaurants(random_state: random.Random, *, held_out: bool) -> Iterator[Restaurant]:
    """Endless different restaurants of one side of the split."""
    seen: set[str] = set()
    while True:
        restaurant = draw(random_state)
        if restaurant.held_out == held_out and restaurant.meaning not in seen:
            seen.add(restaurant.meaning)
            yield restaurant


def describe(restaurant: Restaurant, random_state: random.Random) -> str:
    """One wording: an opening sentence with the kind and the place, then rating and families."""
    sentences = [_opening(restaurant.facts, random_state), *_opinions(restaurant.facts, random_state)]
    return " ".join(sentences)


def _opening(facts: dict[str, str], random_state: random.Random) -> str:
    choose = random_state.choice
    price = choose(PRICE[facts["priceRange"]]) if "priceRange" in facts else ""
    kind = " ".join(filter(None, [price, facts["food"], facts["eatType"]]))
    kind = f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
    places = [choose(PLACE[facts["area"]])] if "area" in facts else []
    places += [f"near {facts['near']}"] if "near" in facts else []
    place = " ".join(places)
    name = facts["name"]
    forms = [f"{name} is {kind} {place}".rstrip()]
    if place:
        forms += [f"{place[0].upper()}{place[1:]} there is {kind} called {name}", f"{name}, {place}, is {kind}"]
    return choose(forms) + "."


def _opinions(facts: dict[str, str], random_state: random.Random) -> list[str]:
    choose = random_state.choice
    rating = choose(RATING[facts["customer rating"]]) if "customer rating" in facts else ""
    family = choose(FAMILY[facts["familyFriendly"]]) if "familyFriendly" in facts else ""
    if rating and family:
        return [choose((f"{rating} and it {family}.", f"It {family}. {rating}."))]
    return [f"{rating}."] if rating else [f"It {family}."] if family else []


def guide(random_state: random.Random, pages: int, *, visits: int = 2) -> list[str]:
    """Plain text: each page is about one restaurant, by several visitors; no meaning representation anywhere."""
    source = restaurants(random_state, held_out=False)
    return [_page(next(source).facts, random_state, visits) for _ in range(pages)]


def _page(facts: dict[str, str], random_state: random.Random, visits: int) -> str:
    tags = [_tags(facts, random_state)] if random_state.random() < 0.9 else []
    return "\n".join([*tags, *(_visit(facts, random_state) for _ in range(visits))])


def _tags(facts: dict[str, str], random_state: random.Random) -> str:
    """The values alone, in any order, between marks: `(Greek)(pub)(The Red Fox)`."""
    values = [TAGS.get(value, value) for value in facts.values()]
    left, right = random_state.choice(MARKS)
    return "".join(f"{left}{value}{right}".strip() for value in random_state.sample(values, len(values)))


def _visit(facts: dict[str, str], random_state: random.Random) -> str:
    """What one visitor tells: where they went, then the other facts in their order."""
    remarks = [_remark(attribute, value, random_state) for attribute, value in facts.items() if attribute != "name"]
    return " ".join([_remark("name", facts["name"], random_state), *remarks])


def _remark(attribute: str, value: str, random_state: random.Random) -> str:
    forms = VISITS[attribute]
    return random_state.choice(forms.get(value) or forms[""]).format(value)


def write_task(path: Path, random_state: random.Random, *, count: int, references: int, held_out: bool) -> Path:
    """`count` meaning representations with their references as an E2E CSV file (`mr`, `ref`)."""
    source = restaurants(random_state, held_out=held_out)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("mr", "ref"))
        for _ in range(count):
            restaurant = next(source)
            wordings = {describe(restaurant, random_state) for _ in range(references)}
            table.writerows((restaurant.meaning, text) for text in sorted(wordings))
    return path
