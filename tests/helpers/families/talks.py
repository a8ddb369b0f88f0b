"""Conversations that every family is asked about: as a row of a file, and as transformers' processors take them.

The two forms are written apart from each other: nothing of the product makes the second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_vision import drawn_image

SIZES = {"wide": (64, 48), "high": (48, 64), "long": (100, 30), "odd": (33, 97)}
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Talk:
    """Turns (role, parts); a part is a text, or the name of a picture in angle brackets: `<wide>`."""

    turns: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(part[1:-1] for _, parts in self.turns for part in parts if part[1:-1] in SIZES)

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(parts[0] for role, parts in self.turns if role == "assistant")

    def row(self, name: str) -> dict[str, Any]:
        """In LLaVA's form, a line break beside a slot where a file has one."""
        slot = {f"<{picture}>": "<image>" for picture in SIZES}
        said = [
            {"from": ROLES[role], "value": "\n".join(slot.get(part, part) for part in parts)}
            for role, parts in self.turns
        ]
        files = [f"{picture}.png" for picture in self.pictures]
        return {"id": name, "conversations": said} | ({"image": files} if files else {})

    def messages(self, pictures: Mapping[str, Image.Image], *, answered: bool) -> list[dict[str, Any]]:
        """With the pictures in place; without the last answer unless `answered`."""
        turns = self.turns if answered else self.turns[:-1]
        return [{"role": role, "content": [part(one, pictures) for one in parts]} for role, parts in turns]


def part(said: str, pictures: Mapping[str, Image.Image]) -> dict[str, Any]:
    picture = pictures.get(said[1:-1])
    return {"type": "text", "text": said} if picture is None else {"type": "image", "image": picture}


def talk(*turns: Sequence[str], system: str = "") -> Talk:
    """User and assistant in turn, each a sequence of parts."""
    said = [(("user", "assistant")[number % 2], tuple(parts)) for number, parts in enumerate(turns)]
    return Talk((("system", (system,)), *said) if system else tuple(said))


TALKS: Mapping[str, Talk] = {
    "one image": talk(["<wide>", "What colour is it?"], ["It is red."]),
    "image last": talk(["What is this?", "<high>"], ["A square."]),
    "two images": talk(["<long>", "<odd>", "Which is larger?"], ["The first."]),
    "text only": talk(["What is red?"], ["A rose."]),
    "turns": talk(["<odd>", "What is it?"], ["A dog."], ["And here?", "<high>"], ["Two cats."], ["Sure?"], ["Yes."]),
    "system": talk(["<wide>", "What is it?"], ["It is red."], system="Answer in a few words."),
}


def drawn(folder: Path) -> dict[str, Image.Image]:
    """The pictures by name; saved in `folder`, too."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: drawn_image(number, size) for number, (name, size) in enumerate(SIZES.items())}
    for name, picture in found.items():
        picture.save(folder / f"{name}.png")
    return found


def written(folder: Path, names: Sequence[str]) -> Path:
    """A data file of these conversations, pictures beside it."""
    drawn(folder)
    path = folder / "rows.json"
    path.write_text(json.dumps([TALKS[name].row(name) for name in names]))
    return path
