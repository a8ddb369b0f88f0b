"""Image placeholders in the texts of a row, matched with the images that the row names.

    "Who? <IMAGE>", ["a.jpg"] ──▶ "Who? <image>", ("a.jpg",)

Texts are kept as they are but for the placeholder's spelling. A placeholder stands for one image, and every image needs
one: what the model sees where is never guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.data.example import IMAGE_MARKER, IMAGE_SLOT, Turn
from rankwise.data.sources.rows import BadRow

LONGEST_NAME = 200  # characters; a longer reference is a data URL


def listed_images(row: Mapping[str, Any]) -> list[str]:
    """References under `image` or `images` (a text, a list of texts, or null); BadRow for anything else."""
    fields = [row[key] for key in ("images", "image") if row.get(key)]
    lists = [[field] if isinstance(field, str) else field for field in fields] or [[]]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise BadRow("has both image and images, and they differ")
    images = lists[0]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BadRow("image must be a path or a list of paths")
    return list(images)


def slotted(text: str) -> tuple[str, int]:
    """The text with every placeholder written as IMAGE_SLOT, and how many there are."""
    return IMAGE_MARKER.subn(IMAGE_SLOT, text)


def filled(slots: Sequence[str | None], listed: Sequence[str], *, repeat: bool = False) -> tuple[str, ...]:
    """The image of every slot, in order.

    slots: the reference of a typed image part that brings its own, None for one that takes the next of the listed.
    repeat: a single listed image may fill several. BadRow where images and open slots differ in number.
    """
    open_slots = slots.count(None)
    if repeat and len(listed) == 1 and open_slots > 1:
        listed = list(listed) * open_slots
    if open_slots != len(listed):
        raise BadRow(_mismatch(open_slots, len(listed)))
    following = iter(listed)
    return tuple(next(following) if slot is None else slot for slot in slots)


def _mismatch(slots: int, images: int) -> str:
    found = f"{_counted(slots, 'placeholder')} ({IMAGE_SLOT}) for {_counted(images, 'image')}"
    if not slots:
        return f"{found}; put {IMAGE_SLOT} where the model shall see each image"
    if images == 1:
        return f"{found}; if they all mean that image, pass --repeat-image"
    return f"{found}; each placeholder stands for one image"


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def refuse_in_answers(turns: Sequence[Turn]) -> None:
    """BadRow where an answer holds a slot: answers are learnt, and an image is nothing that a model can write."""
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant" and IMAGE_SLOT in turn.text:
            raise BadRow(f"turn {number} is an answer and holds an image placeholder ({IMAGE_SLOT})")


def group_of(images: Sequence[str]) -> str:
    """One name for a sample's images, the same for samples with the same ones: a split keeps these together."""
    return " ".join(dict.fromkeys(map(short_name, images)))


def short_name(reference: str) -> str:
    """A reference that can be kept for every sample: of a data URL its SHA-256."""
    return reference if len(reference) <= LONGEST_NAME else hashlib.sha256(reference.encode()).hexdigest()
