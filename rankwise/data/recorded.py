"""How an artefact's input was made, as the commands after training use it: their defaults, one printed line, a refusal.

artefact/input.json ── recorded ──▶ Recorded ── as_recorded(options) ──▶ renderer ── compare ──▶ line, warnings, errors
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankwise.data import device, input_record, label_task
from rankwise.data.device import FILE as DEVICE
from rankwise.data.device import read_target
from rankwise.data.example import Example
from rankwise.data.input_record import FILE, InputRecord, read_input
from rankwise.data.render import Renderer
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import CHECKPOINT, beside, is_adapter
from rankwise.files.processes import announce
from rankwise.files.run_folder import RunFolder
from rankwise.options.sections import DataSection

OPTIONS = {
    "prompt": "prompt",
    "chat_template_sha256": "chat_template",
    "chat_template_kwargs": "chat_template_kwargs",
    "image_geometry": "device_target",
    "max_seq_length": "max_seq_length",
}
HARMLESS = ("max_seq_length",)  # another limit leaves prompts as they are, or cuts them aloud


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
            f"{file}: training saw pictures as {record.image_geometry or 'the processor takes them'}, and "
            f"{file.parent / DEVICE} {says}; put back the one of the training"
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
    asked = {field: option for field, option in OPTIONS.items() if getattr(given, option) not in (None, "auto")}
    for field, what in different.items():
        text = f"prompts are not those of training ({found.file}): {field} {what}"
        if field in HARMLESS or not strict:
            announce(f"warning: {f'--{asked[field]}: ' if field in asked else ''}{text}")
        elif field in asked:
            raise UsageError(f"--{asked[field]}: {text}; leave the option out")
        else:
            raise DataError(f"{text}; put back the files that it was trained with")


def announce_prompts(now: InputRecord | None, found: Recorded) -> None:
    """How prompts are made, in one line, with the file that says so; a warning where it should be there and is not."""
    if now is not None:
        same = found.record is not None and not found.record.differences(now)
        announce(f"prompts: {now.words()}{f' — from {found.file}' if same else ''}")
    if found.trained:
        announce(
            f"warning: {found.trained} has no {FILE} (made by an earlier version, or elsewhere): prompts are made as "
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
        raise DataError(f"{file} and {other_file} are of different trainings ({listed}); export the model again")


def warn_of_others(place: Path, renderer: Renderer) -> None:
    """Say where deltas that this training starts or plans from were made with other prompts."""
    found = read_input(place)
    different = found[0].differences(InputRecord.of(renderer)) if found else {}
    for field, what in different.items():
        announce(f"warning: {place} was trained with other prompts: {field} {what}")


def system_warning(found: Recorded, rows: Iterable[Example]) -> None:
    if found.record is not None and (note := found.record.system_note(rows)):
        announce(note)


def save_input(renderer: Renderer, record: InputRecord, folder: Path) -> dict[str, Path]:
    """input.json in the folder of what was trained, and device.json where it was trained for a device."""
    target = renderer.sight.target if renderer.sight else None
    return {"input": record.save(folder), **({"device": target.save(folder)} if target else {})}


CONTRACTS = (input_record.FILE, device.FILE, label_task.FILE)


def contracts(folder: Path) -> dict[str, Path]:
    """File name → file, of those that an artefact (of a checkpoint also: its run) has."""
    found = {name: beside(folder, name) for name in CONTRACTS}
    return {name: file for name, file in found.items() if file is not None}


def carry(source: Path, folder: Path) -> dict[str, Path]:
    """Copy them into another artefact's folder; name → the copy."""
    return {name: Path(shutil.copyfile(file, folder / name)) for name, file in contracts(source).items()}
