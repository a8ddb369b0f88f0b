"""Input record: what decides a model's input, stored with every artefact of a training run as `input.json`.

    train ── InputRecord.of(renderer, rows).save ──▶ run, adapter ── merge ──▶ model ── export ──▶ GGUF ── bundle
    later commands ── recorded(folders) ──▶ Recorded ── as_recorded(options) ──▶ renderer ── compare ──▶ line, errors

device.json stays the declaration of the device; the record holds its geometry only to notice another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.data.device import read_target
from rankwise.data.example import Example
from rankwise.data.render import STYLES, Renderer
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import CHECKPOINT, DEVICE, INPUT, beside, is_adapter
from rankwise.files.document import Document
from rankwise.files.processes import announce
from rankwise.files.run_folder import RunFolder
from rankwise.options.sections import DataSection

DOCUMENT = Document(INPUT, "rankwise-input/1", "an input record")
SHOWN, WIDE = 8, 60  # characters of a hash, and of a value in a message
TEMPLATE = ("chat_template_sha256", "chat_template_kwargs")
COMPARED = ("prompt", *TEMPLATE, "begin_tokens", "end_tokens", "image_geometry", "max_seq_length")
OPTIONS = {
    "prompt": "prompt",
    "chat_template_sha256": "chat_template",
    "chat_template_kwargs": "chat_template_kwargs",
    "image_geometry": "device_target",
    "max_seq_length": "max_seq_length",
}
HARMLESS = ("max_seq_length",)  # another limit leaves prompts as they are, or cuts them aloud


@dataclass(frozen=True)
class InputRecord:
    """Settings that turned training rows into tokens.

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
        own = renderer.tokenizer.get_chat_template() if renderer.tokenizer.chat_template else None
        return cls(
            prompt=renderer.style,
            max_seq_length=renderer.limit,
            overlong=renderer.overlong,
            begin_tokens={str(names(token)): token for token in renderer.begin_ids},
            end_tokens={str(names(token)): token for token in renderer.end_ids},
            chat_template_sha256=sha256_of(renderer.template_source) if chat else None,
            chat_template=None if not chat or renderer.template_source == own else renderer.template_source,
            chat_template_kwargs=dict(renderer.template_kwargs) if chat else {},
            system_prompt=shared_system_prompt(rows),
            image_geometry=geometry,
        )

    def save(self, folder: Path | str) -> Path:
        return DOCUMENT.write(folder, self)

    def words(self) -> str:
        """One line for people: `chat template of the tokenizer (sha256 1a2b3c4d), up to 2,048 tokens, ends at </s>`."""
        parts = [self._style(), *(f"{name}={shown(value)}" for name, value in self.chat_template_kwargs.items())]
        if self.system_prompt:
            parts.append(f"system prompt {shortened(self.system_prompt)}")
        if self.image_geometry is not None:
            size = self.image_geometry.get("image_size")
            device = f"of {size}×{size} pixels as on the device" if self.image_geometry else "as the model's processor"
            parts.append(f"pictures {device}{'' if self.image_geometry else ' takes them'}")
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


def read_input(folder: Path | str) -> tuple[InputRecord, Path] | None:
    """The record of an artefact's folder (a checkpoint's: of its run) and its file; None where there is none.

    DataError, naming the file, for one that is not whole or says something else.
    """
    file = beside(folder, INPUT)
    if file is None:
        return None
    record = DOCUMENT.read_as(InputRecord, file)
    if record.prompt not in STYLES or not record.end_tokens:
        raise DataError(f"{file}: not an input record of this version (prompt, end_tokens)")
    if record.chat_template is not None and sha256_of(record.chat_template) != record.chat_template_sha256:
        raise DataError(f"{file}: its chat_template is not the one of its chat_template_sha256; was it edited?")
    return record, file


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


def shown(value: Any) -> str:
    """A value as JSON, by its beginning."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDE else text[: WIDE - 1] + "…"


def shortened(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= WIDE else line[: WIDE - 1] + "…")


@dataclass(frozen=True)
class Recorded:
    """The record that counts and its file; without one, whether the model was trained here (`trained`) and should have
    one."""

    record: InputRecord | None = None
    file: Path | None = None
    trained: Path | None = None


def recorded(places: Sequence[Path]) -> Recorded:
    """The record of the first of these folders that has one: an adapter's goes before its base's.

    DataError where device.json beside it declares another device than it holds.
    """
    for place in places:
        found = read_input(place)
        if found is not None:
            require_device(*found)
            return Recorded(*found)
        if was_trained(place):
            return Recorded(trained=place)
    return Recorded()


def was_trained(place: Path) -> bool:
    """Whether a folder without a record is an adapter, a checkpoint, or came out of a training run."""
    tuned = place.name == "finetuned" and "finetune" in RunFolder(place.parent).stages()
    made = {"merge", "finetune"} & RunFolder(place).stages().keys()
    return is_adapter(place) or place.name.startswith(CHECKPOINT) or tuned or bool(made)


def require_device(record: InputRecord, file: Path) -> None:
    if record.image_geometry is None:
        return
    target = read_target(file.parent)
    declared = target.geometry if target else {}
    if declared != record.image_geometry:
        says = f"says {declared}" if target else "is not there"
        raise DataError(
            f"{file}: training used images as {record.image_geometry or 'the processor takes them'}, and "
            f"{file.parent / DEVICE} {says}; restore the one from training"
        )


def as_recorded(data: DataSection, found: Recorded, *, anew: bool = False) -> DataSection:
    """The options with what the record says where they say nothing; template variables are taken one by one.

    anew: a training that begins, from a model with a record. Its pictures are made for the device of its own data, if
    they declare one, whatever the model saw before.
    """
    record = found.record
    if record is None:
        return data
    chat = record.prompt == "chat" and data.prompt in ("auto", "chat")
    kwargs = {**(record.chat_template_kwargs if chat else {}), **(data.chat_template_kwargs or {})}
    without_device = not anew and record.image_geometry is not None and not record.image_geometry
    return replace(
        data,
        prompt=record.prompt if data.prompt == "auto" else data.prompt,
        max_seq_length=data.max_seq_length or record.max_seq_length,
        overlong=data.overlong or record.overlong,
        chat_template=data.chat_template or (record.chat_template if chat else None),
        chat_template_kwargs=kwargs or None,
        device_target=data.device_target or ("off" if without_device else None),
    )


def compare(given: DataSection, found: Recorded, renderer: Renderer, *, strict: bool) -> None:
    """Print how prompts are made, and where that is not how training made them.

    strict: other prompts would make a wrong artefact or a wrong proof. UsageError for a flag that makes others,
    DataError for a tokenizer, a template or a device that does. Elsewhere they are warned about.
    """
    now = InputRecord.of(renderer)
    announce_prompts(now, found)
    different = found.record.differences(now) if found.record else {}
    asked = {name: option for name, option in OPTIONS.items() if getattr(given, option) not in (None, "auto")}
    for name, what in different.items():
        text = f"prompts are not those of training ({found.file}): {name} {what}"
        if name in HARMLESS or not strict:
            announce(f"warning: {f'--{asked[name]}: ' if name in asked else ''}{text}")
        elif name in asked:
            raise UsageError(f"--{asked[name]}: {text}; leave the option out")
        else:
            raise DataError(f"{text}; restore the files that it was trained with")


def announce_prompts(now: InputRecord | None, found: Recorded) -> None:
    """How prompts are made, in one line, with the file that says so; a warning where it should be there and is not."""
    if now is not None:
        same = found.record is not None and not found.record.differences(now)
        announce(f"prompts: {now.words()}{f' — from {found.file}' if same else ''}")
    if found.trained:
        announce(
            f"warning: {found.trained} has no {INPUT} (made by an earlier version, or elsewhere): prompts are made as "
            "the options say, which may not be how it was trained"
        )


def require_same(first: Path, second: Path) -> None:
    """DataError where two folders of one model record other prompts."""
    found = [each for place in (first, second) if (each := read_input(place))]
    if len(found) < 2:
        return
    (record, file), (other, other_file) = found
    different = record.differences(other)
    if different:
        listed = "; ".join(f"{name}: {what}" for name, what in different.items())
        raise DataError(f"{file} and {other_file} come from different training runs ({listed}); export the model again")


def warn_of_others(place: Path, renderer: Renderer) -> None:
    """Say where deltas that this training starts or plans from were made with other prompts."""
    found = read_input(place)
    different = found[0].differences(InputRecord.of(renderer)) if found else {}
    for name, what in different.items():
        announce(f"warning: {place} was trained with other prompts: {name} {what}")


def system_warning(found: Recorded, rows: Iterable[Example]) -> None:
    if found.record is not None and (note := found.record.system_note(rows)):
        announce(note)


def save_input(renderer: Renderer, record: InputRecord, folder: Path) -> dict[str, Path]:
    """input.json in the folder of what was trained, and device.json where it was trained for a device."""
    target = renderer.sight.target if renderer.sight else None
    return {"input": record.save(folder), **({"device": target.save(folder)} if target else {})}
