"""What a row holds: its turns, and where its images go (placeholders of any program, matched with the images named).

    "Who? <|image_1|>", ["a.jpg"] ──▶ "Who? <image>", ("a.jpg",)

The forms that conversations come in are read as one, turns {role, content}, the system's first (`FORMS`):

    ShareGPT, LLaVA, Qwen-VL, XComposer   conversations: [{from, value}]
    messages                              messages: [{role, content}]
    XTuner                                conversation: [{system, input, output}]
    Firefly, Phi-3                        conversation, conversations: [{human or user, assistant}]
    the Cauldron, FineVision              images, texts: [{user, assistant}]
    swift                                 query, response, history: [[query, response]]
    Alpaca, Dolly                         instruction, input or context, output or response, history
    OpenOrca                              system_prompt, question, response
    TRL                                   prompt, completion (or response): texts, or lists of messages
    PaliGemma, Florence                   image, prefix, suffix

Texts are kept as they are but for the placeholder's spelling. A placeholder stands for one image, and every image needs
one; only an image that stands alone, without any placeholder, has a place of its own: first.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.sources.rows import BadRow, as_found
from rankwise.data.template import IMAGE, Marker, found

PICTURED = re.compile(  # names of columns that hold an image, or say which one is meant
    r"((left|right|input|source|has|num)_)?(image|img|picture|photo)s?"
    r"(_?(path|file|file_?name|name|url|uri|bytes|base64(_str)?|id|\d+)s?)?",
    re.IGNORECASE,
)
FILES = ("file", "files", "file_name", "filename", "file_path", "filepath", "path", "media")
FILE = re.compile(r"\S{1,400}\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
COLUMNS = "call that column 'image' or 'images' (a path, or a list of paths)"
BESIDE_TURNS = "list a turn's images beside the turns, or as parts of its content"
LONGEST_NAME = 200  # characters; a longer reference is a data URL
Slot = str | int | None  # the reference that it brings, the number of the listed image that it means, or the next one


@dataclass
class Slots:
    """The image places of a row as its texts are read, in order.

    pictured: whether the row has images; without any, another program's placeholder is text. listed: whether it lists
    them beside its texts. changes: what was done
    to the row, for `Example.changes`.
    """

    pictured: bool
    listed: bool = False
    places: list[Slot] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def read(self, text: str) -> str:
        """The text of a question with each placeholder written as IMAGE_SLOT. BadRow for a video's or a sound's."""
        pieces, end = [], 0
        for marker in found(text):
            if not self._is_place(marker, text[marker.start : marker.end]):
                continue
            self.places.append(marker.path if marker.path else marker.number)
            self.foreign += [] if marker.name == IMAGE_SLOT else [marker.name]
            pieces += [text[end : marker.start], IMAGE_SLOT]
            end = marker.end
        return "".join([*pieces, text[end:]])

    def _is_place(self, marker: Marker, written: str) -> bool:
        if not (self.pictured or marker.own or marker.path):
            self.changes.append(f"{marker.name} in a row without images is text")
            return False
        if marker.stands_for != IMAGE:
            raise BadRow(f"its text has a placeholder {written}: {marker.stands_for} cannot be trained on")
        return True

    def filled(self, listed: Sequence[str], *, repeat: bool = False) -> tuple[str, ...]:
        """The image of every place, in order.

        repeat: one listed image may fill several. BadRow where images and open places differ in number.
        """
        brought = [place for place in self.places if isinstance(place, str)]
        open_places = [place for place in self.places if not isinstance(place, str)]
        if brought and not open_places and listed == brought:  # named twice: in the text and beside it
            listed = []
        numbers = [place for place in open_places if place is not None]
        if numbers and len(numbers) < len(open_places):
            raise BadRow(f"some of its placeholders ({', '.join(self._names)}) have a number and some have none")
        if numbers:
            order = _by_number(numbers, listed, repeat)
        else:
            order = list(listed) * (len(open_places) if repeat and len(listed) == 1 and open_places else 1)
        if len(order) != len(open_places):
            raise BadRow(_mismatch(len(open_places), len(listed), self._names))
        self.changes += [f"{name} taken as the place of an image" for name in dict.fromkeys(self.foreign)]
        following = iter(order)
        return tuple(place if isinstance(place, str) else next(following) for place in self.places)

    @property
    def _names(self) -> list[str]:
        own = [IMAGE_SLOT] if len(self.foreign) < len(self.places) or not self.places else []
        return list(dict.fromkeys([*own, *self.foreign]))


def _by_number(numbers: Sequence[int], listed: Sequence[str], repeat: bool) -> list[str]:
    """The listed images in the order of these numbers, which count from 0 or 1 and name each of them."""
    first = min(min(numbers), 1)
    if set(numbers) != set(range(first, first + len(listed))) or (len(numbers) > len(listed) and not repeat):
        raise BadRow(
            f"its placeholders are numbered {', '.join(map(str, numbers))} for {_counted(len(listed), 'image')}; each "
            "image needs its own number once (more than once with --repeat-image)"
        )
    return [listed[number - first] for number in numbers]


def listed_images(row: Mapping[str, Any]) -> list[str]:
    """References under `image` or `images` (one, a list of them, or null); BadRow for anything else."""
    fields = [row[key] for key in ("images", "image") if row.get(key)]
    lists = [_as_list(each) for each in fields] or [[]]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise BadRow("has both image and images, and they differ")
    images = [reference_of(value) for value in lists[0]]
    if not all(images):
        raise BadRow('image must be a path or a list of paths (or of {"path": …}, {"bytes": …})')
    return [image for image in images if image]


def refuse_unread_images(values: Mapping[str, Any], advice: str) -> None:
    """BadRow where a key holds an image, or names one, of a row or turn whose images are not read: it would be learnt
    without them."""
    found = next((name for name, value in values.items() if _is_image(name, value)), None)
    if found:
        raise BadRow(f"{found!r} is not read, and there is no other image; {advice}, or leave it out")


def _is_image(name: str, value: Any) -> bool:
    given = [each for each in (value if isinstance(value, list) else [value]) if each]
    if PICTURED.fullmatch(name):
        return bool(given)
    if name in FILES:
        return any(isinstance(each, str) and FILE.fullmatch(each) for each in given)
    return any(isinstance(each, bytes) or (isinstance(each, Mapping) and each.get("bytes")) for each in given)


def _as_list(images: Any) -> list[Any]:
    """Images as a list: as it is, one, or MiniCPM's {"<image_00>": path} in the order of the numbers."""
    if isinstance(images, Mapping) and all(str(key).startswith("<image_") for key in images):
        return [images[key] for key in sorted(images)]
    return list(images) if isinstance(images, list | tuple) else [images]


def reference_of(value: Any) -> str | None:
    """An image as a row names it: a path or URL; {"path": …} or {"url": …}; {"bytes": …}, as `datasets` exports it, as
    a data URL. None for anything else."""
    if isinstance(value, bytes):
        return embedded(value)
    if isinstance(value, Mapping):
        if content := value.get("bytes") or value.get("data"):
            return embedded(content)
        value = value.get("path") or value.get("url")
    return value if isinstance(value, str) and value.strip() else None


def embedded(content: Any) -> str:
    """The bytes of a picture (in JSON: base64, or a list of numbers) as a data URL."""
    if isinstance(content, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in content):
        content = bytes(content)
    if isinstance(content, bytes):
        content = base64.b64encode(content).decode()
    if not isinstance(content, str):
        raise BadRow("bytes of an image are base64 or a list of numbers")
    return content if content.startswith("data:") else f"data:image/unknown;base64,{content}"


def put_first(text: str, count: int) -> str:
    """The text after this many image slots, each on a line of its own."""
    return f"{IMAGE_SLOT}\n" * count + text


def _mismatch(slots: int, images: int, names: Sequence[str]) -> str:
    what = f"{_counted(slots, 'placeholder')} ({', '.join(names)}) for {_counted(images, 'image')}"
    if not slots:
        return (
            f"{what}; put {IMAGE_SLOT} where the model shall see each image, or pass --image-first where they come "
            "before the text"
        )
    if images == 1:
        return f"{what}; if they all mean that image, pass --repeat-image"
    return f"{what}; each placeholder stands for one image"


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def refuse_in_answer(text: str) -> None:
    """BadRow where an answer holds a slot: answers are learnt, and an image is nothing that a model can write."""
    if any(marker.own for marker in found(text)):
        raise BadRow(f"an answer holds an image placeholder ({IMAGE_SLOT})")


def sample_of(
    identity: str, row: Mapping[str, Any], turns: Sequence[Turn], images: tuple[str, ...], changes: Sequence[str]
) -> Example:
    """The sample of a row: its images are its group, `task_type` its stratum."""
    stratum = row.get("task_type")
    return Example(
        id=identity,
        group=group_of(images) or identity,
        turns=tuple(turns),
        references=(turns[-1].text,),
        stratum=None if stratum is None else str(stratum),
        images=images,
        changes=tuple(dict.fromkeys(changes)),
    )


def group_of(images: Sequence[str]) -> str:
    """One name for a sample's images, the same for samples with the same ones: a split keeps these together."""
    return " ".join(dict.fromkeys(map(short_name, images)))


def short_name(reference: str) -> str:
    """A reference that can be kept for every sample: of a data URL its SHA-256."""
    return reference if len(reference) <= LONGEST_NAME else hashlib.sha256(reference.encode()).hexdigest()


Row = dict[str, Any]
LISTS = ("conversations", "messages", "conversation", "texts")
ASKED, ANSWERED = ("input", "user", "human"), ("output", "assistant")  # keys of a question and its answer in one turn
BESIDE = ("context", "choices", "options", "hint", "passage", "lecture")  # parts of a question in columns of their own


def turns_of(row: Row) -> Iterator[Row]:
    """Every turn of a row as it is written; BadRow where it has none."""
    system = row.get("system_prompt") or row.get("system")
    if system:
        yield {"role": "system", "content": system}
    form = next((form for keys, form in FORMS.items() if all(row.get(key) is not None for key in keys)), None)
    if form is None:
        needed = "needs a list of turns under 'conversations' or 'messages' (or another form of docs/data.md)"
        raise BadRow(f"{needed}; it has {', '.join(map(as_found, row)) or 'nothing'}")
    yield from form(row)


def refuse_beside(row: Row) -> None:
    """BadRow where a part of the question stands in a column that is not read: the model would answer without it."""
    found = next((name for name in BESIDE if row.get(name)), None)
    if found:
        raise BadRow(f"its question has {found!r} beside it, which no prompt would show: write it into the question")


def _listed(key: str) -> Callable[[Row], Iterator[Row]]:
    def form(row: Row) -> Iterator[Row]:
        turns = row[key]
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"needs a list of turns under {key!r}, found {as_found(turns)}")
        for turn in turns:
            if not isinstance(turn, dict):
                raise BadRow(f"a turn must be an object, found {as_found(turn)}")
            speaks = turn.get("from") or turn.get("role") or turn.keys().isdisjoint((*ASKED, *ANSWERED))
            yield from [turn] if speaks else _exchange(turn)

    return form


def _exchange(turn: Row) -> Iterator[Row]:
    """A question and its answer; XTuner's first one may bring the system's text."""
    if turn.get("system"):
        yield {"role": "system", "content": turn["system"]}
    asked = next((turn[key] for key in ASKED if turn.get(key)), None)
    if asked:  # without one, the answer goes on
        yield {"role": "user", "content": asked}
    yield {"role": "assistant", "content": next((turn[key] for key in ANSWERED if turn.get(key)), None)}


def _asked(row: Row, question: Any, answer: Any) -> Iterator[Row]:
    """The pairs of `history`, then this question and its answer."""
    refuse_beside(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow(f"history is a list of [question, answer], found {as_found(history)}")
    for said, replied in [*history, (question, answer)]:
        yield {"role": "user", "content": said}
        yield {"role": "assistant", "content": replied}


def _alpaca(row: Row) -> Iterator[Row]:
    more = "input" if row.get("input") else "context"
    parts = [row["instruction"], row.get(more) or ""]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow(f"instruction and {more} must be texts, found {as_found(parts)}")
    answer = row["response"] if row.get("output") is None else row["output"]
    return _asked({**row, more: None}, "\n".join(part for part in parts if part.strip()), answer)


def _pair(question: str, answer: str) -> Callable[[Row], Iterator[Row]]:
    return lambda row: _asked(row, row[question], row[answer])


def _prompted(answer: str) -> Callable[[Row], Iterator[Row]]:
    def form(row: Row) -> Iterator[Row]:
        if not any(isinstance(row[key], list) for key in ("prompt", answer)):
            yield from _asked(row, row["prompt"], row[answer])
            return
        refuse_beside(row)
        for role, key in (("user", "prompt"), ("assistant", answer)):
            yield from _listed(key)(row) if isinstance(row[key], list) else [{"role": role, "content": row[key]}]

    return form


FORMS: dict[tuple[str, ...], Callable[[Row], Iterator[Row]]] = {
    **{(key,): _listed(key) for key in LISTS},
    ("query", "response"): _pair("query", "response"),
    ("instruction", "output"): _alpaca,
    ("instruction", "response"): _alpaca,
    ("system_prompt", "question", "response"): _pair("question", "response"),
    ("prompt", "completion"): _prompted("completion"),
    ("prompt", "response"): _prompted("response"),
    ("prefix", "suffix"): _pair("prefix", "suffix"),
}
