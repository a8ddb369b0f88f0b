"""The renderer of a run: one for training, evaluation and everything else that shows rows to a model.

model folder, data options ── renderer_for ──▶ Renderer ( + Sight where model and rows have images )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, TrainingArguments

from rankwise.config import DataSection, ModelSection
from rankwise.data import ImageReader, Renderer, Sight
from rankwise.data.device import DeviceReader, DeviceTarget, read_target
from rankwise.data.device_processor import device_processor
from rankwise.data.template import template_text
from rankwise.errors import DataError
from rankwise.nets.load import load_processor, load_tokenizer
from rankwise.store.checkpoint import resolve
from rankwise.store.processes import default_workers, process_index

SEEN_TASKS = ("conversations", "cota", "labels")  # sources whose rows may have images


def renderer_for(
    data: DataSection, model: ModelSection, name: str, config: Any, adapter: Path | None = None
) -> Renderer:
    """The model's positions bound the length, its end tokens end answers, its processor makes image tokens.

    `--prompt auto` is the chat template where images are seen (or what the device's target says), headed sections
    elsewhere. adapter: its folder, which may say which device it was trained for.
    """
    folder = resolve(name, model.revision)
    has_own = (folder / "generation_config.json").is_file()
    eos = GenerationConfig.from_pretrained(folder).eos_token_id if has_own else config.eos_token_id
    seeing = sees(data, config)
    target = target_for(data, [folder, *([adapter] if adapter else [])]) if seeing else None
    sight = sight_for(data, model, name, target) if seeing else None
    style = target.prompt if target and sight else "chat" if sight else "sections"
    style = style if data.prompt == "auto" else data.prompt
    return Renderer(
        sight.processor.tokenizer if sight else load_tokenizer(name, model.revision, model.trust_remote_code),
        style=style,
        max_length=data.max_seq_length,
        overlong=data.overlong,
        positions=positions(config),
        generation_eos=eos,
        sight=sight,
        chat_template=template_text(data.chat_template),
        template_kwargs=data.chat_template_kwargs or {},
    )


def positions(config: Any) -> int | None:
    """Tokens that a sequence may have: the model's positions, or fewer where its config says so (Isaac's does)."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_sequence_length"))
    return min((limit for limit in limits if limit is not None), default=None)


def decode_aside(arguments: TrainingArguments, given: Mapping[str, Any], renderer: Renderer) -> None:
    """On a GPU, images are decoded by worker processes unless --dataloader_num_workers says otherwise: decoding in the
    training process would keep the GPU waiting. On a CPU they would take cores from training."""
    if renderer.sight is not None and not arguments.use_cpu and "dataloader_num_workers" not in given:
        arguments.dataloader_num_workers = default_workers()


def sees(data: DataSection, config: Any) -> bool:
    """Whether the model takes images, and the rows may have some."""
    return data.task in SEEN_TASKS and hasattr(config, "vision_config")


def target_for(data: DataSection, models: Sequence[Path]) -> DeviceTarget | None:
    """The device that images and prompts are made for: as asked, else the one beside the data or a model.

    DataError where they are for different devices.
    """
    if data.device_target == "off":
        return None
    if data.device_target:
        given = read_target(data.device_target)
        if given is None:
            raise DataError(f"--device_target {data.device_target}: no device.json is there")
        return given
    path = Path(data.data_path or ".").expanduser()
    places = [path if path.is_dir() else path.parent, *models]
    found = {place: target for place in places if (target := read_target(place))}
    first = next(iter(found), None)
    for place, target in found.items():
        if target.geometry != found[first].geometry:
            raise DataError(
                f"{first} and {place} are for different devices ({found[first].geometry} against {target.geometry}): "
                "say which one with --device_target"
            )
    return found[first] if first else None


def sight_for(data: DataSection, model: ModelSection, name: str, target: DeviceTarget | None) -> Sight:
    """The model's processor, and a reader of images below the image folder (the data file's own by default); both as
    the device has them, where there is a target."""
    processor = load_processor(name, model.revision, model.trust_remote_code)
    reader: Any = image_reader(data)
    if target is None:
        return Sight(processor, reader)
    return Sight(device_processor(processor, target), DeviceReader(reader, target), target=target)


def image_reader(data: DataSection) -> ImageReader:
    path = Path(data.data_path or ".").expanduser()
    folder = Path(data.image_folder).expanduser() if data.image_folder else path if path.is_dir() else path.parent
    return ImageReader(folder, allow_outside=data.allow_outside, allow_urls=data.allow_urls)


def save_target(renderer: Renderer, folder: Path) -> dict[str, Path]:
    """device.json beside an adapter that was trained for a device, by the first process."""
    target = renderer.sight.target if renderer.sight else None
    if target is None or process_index()[0] != 0:
        return {}
    return {"device": target.save(folder)}
