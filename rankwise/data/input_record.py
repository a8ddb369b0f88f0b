"""What decides a model's input, kept beside everything that is made of a training run: `input.json`.

    train ── InputRecord.of(renderer, rows).save ──▶ run, adapter ── merge ──▶ model ── export ──▶ GGUF ── bundle
    every later command ── read_input(folder) ──▶ its defaults; `differences` says where a flag or a file disagrees

device.json stays the declaration of the device; the record holds its geometry only to notice another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rankwise.data.example import Example
from rankwise.data.render import STYLES, Renderer
from rankwise.errors import DataError
from rankwise.files.adapter import beside
from rankwise.files.atomic import read_document, write_json

FILE, FORMAT = "input.json", "rankwise-input/1"
SHOWN, WIDE = 8, 60  # characters of a hash, and of a value in a message
TYPES: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,),
    "max_seq_length": (int,),
    "overlong": (str,),
    "begin_tokens": (dict,),
    "end_tokens": (dict,),
    "chat_template_sha256": (str, type(None)),
    "chat_template": (str, type(None)),
    "chat_template_kwargs": (dict,),
    "system_prompt": (str, type(None)),
    "image_geometry": (dict, type(None)),
}


@dataclass(frozen=True)
class InputRecord:
    """How training rows became tokens.

    prompt: sections, chat or raw. max_seq_length: tokens of a training row. overlong: what happened to longer ones.
    begin_tokens, end_tokens: text → id, of what opens a prompt (empty where nothing does) and of what ends an answer,
    the one that is trained first. chat_template_sha256: of the template in use, None without one; chat_template: its
    text where it is not the tokenizer's own. chat_template_kwargs: a pinned date is among them. system_prompt: the one
    that all training rows share. image_geometry: of the device that pictures are made for, {} for pictures as the
    model's own processor takes them, None where training saw none.
    """

    prompt: str
    max_seq_length: int
    overlong: str
    begin_tokens: Mapping[str, int]
    end_tokens: Mapping[str, int]
    chat_template_sha256: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    image_geometry: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, renderer: Renderer, rows: Iterable[Example] = ()) -> InputRecord:
        """Of a renderer without a reserve, and the rows that it is trained with."""
        names = renderer.tokenizer.convert_ids_to_tokens
        sight, chat = renderer.sight, renderer.style == "chat"
        geometry = None if sight is None else sight.target.geometry if sight.target else {}
        return cls(
            prompt=renderer.style,
            max_seq_length=renderer.limit,
            overlong=renderer.overlong,
            begin_tokens={str(names(token)): token for token in renderer.begin_ids},
            end_tokens={str(names(token)): token for token in renderer.end_ids},
            chat_template_sha256=sha256_of(renderer.template_source) if chat else None,
            chat_template=own_text(renderer) if chat else None,
            chat_template_kwargs=dict(renderer.template_kwargs) if chat else {},
            system_prompt=shared_system_prompt(rows),
            image_geometry=geometry,
        )

    def save(self, folder: Path | str) -> Path:
        return write_json(Path(folder) / FILE, {"format": FORMAT, **asdict(self)})

    def words(self) -> str:
        """One line for people: `chat template of the tokenizer (sha256 1a2b3c4d), up to 2,048 tokens, ends at </s>`."""
        parts = [self._style(), *(f"{name}={shown(value)}" for name, value in self.chat_template_kwargs.items())]
        if self.system_prompt:
            parts.append(f"system prompt {shortened(self.system_prompt)}")
        if self.image_geometry is not None:
            parts.append(geometry_words(self.image_geometry))
        ends = next(iter(self.end_tokens))
        return ", ".join([*parts, f"up to {self.max_seq_length:,} tokens", f"answers end at {ends}"])

    def _style(self) -> str:
        if self.prompt != "chat":
            return {"sections": "headed sections", "raw": "the rows' texts alone"}[self.prompt]
        owner = "given with --chat_template" if self.chat_template else "of the tokenizer"
        return f"chat template {owner} (sha256 {str(self.chat_template_sha256)[:SHOWN]})"

    def differences(self, now: InputRecord) -> dict[str, str]:
        """Field → `what it was, what it is now`, of what makes other prompts or ends answers elsewhere.

        max_seq_length is one of them; overlong and the system prompt follow from the rows. Templates are compared where
        both are chat, geometry where both saw pictures.
        """
        apart = {*TEMPLATE} if self.prompt != now.prompt else set()
        apart |= {"image_geometry"} if self.image_geometry is None or now.image_geometry is None else set()
        pairs = {name: (getattr(self, name), getattr(now, name)) for name in COMPARED if name not in apart}
        pairs["end_tokens"] = (list(self.end_tokens.items()), list(now.end_tokens.items()))  # the first one is trained
        return {name: f"{shown(was)} in training, {shown(is_)} now" for name, (was, is_) in pairs.items() if was != is_}

    def system_note(self, rows: Iterable[Example]) -> str:
        """A warning where rows lack the system prompt that all training rows had; empty where none does."""
        if self.system_prompt is None:
            return ""
        found = [system_prompt(row) == self.system_prompt for row in rows]
        if all(found):
            return ""
        return (
            f"warning: {len(found) - sum(found):,} of {len(found):,} rows do not begin with the system prompt that all "
            f"training rows had: {shortened(self.system_prompt)}"
        )


TEMPLATE = ("chat_template_sha256", "chat_template_kwargs")
COMPARED = ("prompt", *TEMPLATE, "begin_tokens", "end_tokens", "image_geometry", "max_seq_length")


def read_input(folder: Path | str) -> tuple[InputRecord, Path] | None:
    """The record of an artefact's folder (a checkpoint's: of its run) and its file; None where there is none.

    DataError, naming the file, for one that is not whole or says something else.
    """
    file = beside(Path(folder), FILE)
    return None if file is None else (parsed(read_document(file, FORMAT, "an input record"), file), file)


def parsed(content: Mapping[str, Any], file: Path) -> InputRecord:
    given = {name: value for name, value in content.items() if name != "format"}
    wrong = sorted(set(given) ^ {each.name for each in fields(InputRecord)})
    wrong += [name for name, kinds in TYPES.items() if name in given and not isinstance(given[name], kinds)]
    if wrong or given["prompt"] not in STYLES or not given["end_tokens"]:
        raise DataError(f"{file}: not an input record of this version ({', '.join(wrong) or 'prompt, end_tokens'})")
    record = InputRecord(**given)
    if record.chat_template is not None and sha256_of(record.chat_template) != record.chat_template_sha256:
        raise DataError(f"{file}: its chat_template is not the one of its chat_template_sha256; was it edited?")
    return record


def own_text(renderer: Renderer) -> str | None:
    """The template's text, where it is not the tokenizer's own."""
    tokenizer = renderer.tokenizer
    known = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return None if renderer.template_source == known else renderer.template_source


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def system_prompt(row: Example) -> str | None:
    first = row.turns[0]
    return first.text if first.role == "system" else None


def shared_system_prompt(rows: Iterable[Example]) -> str | None:
    """The system prompt that all rows begin with; read up to the first row with another one."""
    found: str | None = None
    for number, row in enumerate(rows):
        text = system_prompt(row)
        if text is None or (number and text != found):
            return None
        found = text
    return found


def geometry_words(geometry: Mapping[str, Any]) -> str:
    if not geometry:
        return "pictures as the model's processor takes them"
    return f"pictures of {geometry['image_size']}×{geometry['image_size']} pixels as on the device"


def shown(value: Any) -> str:
    """A value as JSON, by its beginning."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDE else text[: WIDE - 1] + "…"


def shortened(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= WIDE else line[: WIDE - 1] + "…")
