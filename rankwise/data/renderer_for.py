"""Build the renderer of a run: one for training, evaluation and everything else that shows rows to a model.

    model folder, input.json, data options ── renderer_for ──▶ Renderer ( + Sight where model and rows have images )

Which model families with images are tested stands in families.json, written by the test matrix: one that is refused
stops before weights load, one that is not there is used with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, TrainingArguments

from rankwise.data.device import DeviceReader, DeviceTarget, device_processor, read_target
from rankwise.data.images import ImageReader
from rankwise.data.input_record import InputRecord, Recorded, as_recorded, compare, recorded
from rankwise.data.render import Renderer
from rankwise.data.template import template_text
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import is_adapter
from rankwise.files.atomic import read_object
from rankwise.files.checkpoint import resolve
from rankwise.files.processes import announce, default_workers
from rankwise.models.load import forward_inputs, load_config, load_processor, load_tokenizer
from rankwise.options.sections import CONVERSATIONS, MAX_SEQ_LENGTH, OVERLONG, DataSection, ModelSection

TABLE = Path(__file__).with_name("families.json")
PAGE = "docs/vision.md lists the tested families"


@dataclass(frozen=True)
class Standing:
    """state: `exact`, `refused` or `untested`; why: in words."""

    state: str
    why: str = ""


def standing(model_type: str) -> Standing:
    """What the table says of a family, by the `model_type` of its config."""
    found = table(TABLE)["families"].get(model_type)
    return Standing(found["state"], found.get("why", "")) if found else Standing("untested")


@cache
def table(path: Path) -> dict[str, Any]:
    """{"versions": {package: version}, "families": {model_type: {"state", "why"}}}."""
    return read_object(path)


def blind_warning_for(model_type: str) -> str | None:
    """The warning for a family whose image input is not supported (no vision config: Emu3, Chameleon, Fuyu)."""
    if model_type not in table(TABLE)["families"]:
        return None
    return f"warning: images are not supported for the family {model_type}: training uses the text of rows only; {PAGE}"


def warning_for(model_type: str) -> str | None:
    """What to tell the user of a family that is about to be used; None for a tested one.

    UsageError, with the reason, for a family that is refused.
    """
    found = standing(model_type)
    if found.state == "refused":
        raise UsageError(f"models of the family {model_type} cannot be used with images: {found.why}; {PAGE}")
    if found.state == "exact":
        return None
    why = f" ({found.why})" if found.why else ""
    return (
        f"warning: the family {model_type} is not among the tested ones{why}: run `rankwise check` on your rows first, "
        f"which compares prompts, pixels and batches with the family's own code; {PAGE}"
    )


TOKENIZER, PROCESSOR = "tokenizer_config.json", ("processor_config.json", "preprocessor_config.json")


def renderer_for(
    data: DataSection,
    model: ModelSection,
    name: str,
    config: Any,
    places: Sequence[Path] = (),
    *,
    strict: bool = False,
    anew: bool = False,
    of_others: bool = False,
) -> Renderer:
    """The model's positions bound the length, its end tokens end answers, its processor makes image tokens.

    What training recorded (input.json) are the options' defaults; how prompts are made is printed. places: folders of
    what was trained, before the model's own: an adapter, an export, a run that goes on; an adapter's own tokenizer
    counts, as when it is merged. strict: see `recorded.compare`.
    anew: a training that begins, see `recorded.as_recorded`. of_others: perhaps of another trainer, which leaves no
    record, so that its lack says nothing.
    """
    if data.task in CONVERSATIONS:
        said = warning_for if sees(data, config) else blind_warning_for
        if warning := said(config.model_type):
            announce(warning)
    renderer, found = rendered_as(data, model, name, config, places, anew=anew, of_others=of_others)
    compare(data, found, renderer, strict=strict)
    return renderer


def rendered_as(
    data: DataSection,
    model: ModelSection,
    name: str,
    config: Any,
    places: Sequence[Path] = (),
    *,
    anew: bool = False,
    of_others: bool = False,
) -> tuple[Renderer, Recorded]:
    """The renderer, and the record that its defaults are from."""
    folder = resolve(name, model.revision)
    places = [*places, folder]
    found = recorded(places)
    found = Recorded() if of_others and not found.record else found
    data = as_recorded(data, found, anew=anew)
    seeing = sees(data, config)
    target = target_for(data, [*places, *([found.file.parent] if found.file else [])]) if seeing else None
    sight = sight_for(data, model, name, places, target, config) if seeing else None
    tokenizer = sight.processor.tokenizer if sight else tokenizer_of(model, brought(places, TOKENIZER) or name)
    style = data.prompt if data.prompt != "auto" else style_for(data, sight, tokenizer, earlier=bool(found.trained))
    renderer = Renderer(
        tokenizer,
        style=style,
        max_length=data.max_seq_length or own_length(config),
        overlong=data.overlong or OVERLONG,
        positions=positions(config),
        generation_eos=eos_of(folder, config),
        sight=sight,
        skip_bad=data.skip_bad,
        chat_template=template_text(data.chat_template),
        template_kwargs=data.chat_template_kwargs or {},
        vocabulary=None if brought(places, TOKENIZER) else embeddings(config),
    )
    return renderer, found


def require_input(folder: Path) -> None:
    """DataError where the tokenizer, the template or the device of a model folder is not that of its own record."""
    found = recorded([folder])
    if found.record is None:
        return
    renderer, _ = rendered_as(shown_as(found.record), ModelSection(), str(folder), load_config(str(folder)))
    different = found.record.differences(InputRecord.of(renderer))
    if different:
        listed = "; ".join(f"{name}: {what}" for name, what in different.items())
        raise DataError(f"prompts of the model are not those of training ({found.record.words()}): {listed}")


def shown_as(record: InputRecord) -> DataSection:
    """Options under which a model that has no rows to read is rendered: with its sight where training had it."""
    seen = CONVERSATIONS[0] if record.image_geometry is not None else None
    return DataSection(task=seen)


def style_for(data: DataSection, sight: Sight | None, tokenizer: Any, *, earlier: bool) -> str:
    """What `--prompt auto` is: as the device's target says, else the chat template where images are seen or where the
    model has one and every row is a conversation; headed sections elsewhere. earlier: as before there were records,
    when conversations without images were sections."""
    has_template = bool(data.chat_template or tokenizer.chat_template)
    if sight is not None and sight.target:
        return sight.target.prompt
    if sight is not None:
        return "raw" if sight.prefixes else "chat"
    return "chat" if has_template and data.task in CONVERSATIONS and not earlier else "sections"


def eos_of(folder: Path, config: Any) -> Any:
    """End tokens of the generation config, else of the model's own."""
    has_own = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder).eos_token_id if has_own else config.eos_token_id


def processor_of(model: ModelSection, name: str, places: Sequence[Path]) -> Any:
    """An adapter's own processor, else the model's; with the adapter's tokenizer, where it brings that alone: merged
    into one folder they are the same."""
    own, words = brought(places, *PROCESSOR), brought(places, TOKENIZER)
    processor = load_processor(own or name, model.revision, model.trust_remote_code)
    if words and not own:
        tokenizer = tokenizer_of(model, words)
        tokenizer.chat_template = tokenizer.chat_template or processor.tokenizer.chat_template
        processor.tokenizer = tokenizer
    return processor


def tokenizer_of(model: ModelSection, name: str) -> Any:
    return load_tokenizer(name, model.revision, model.trust_remote_code)


def brought(places: Sequence[Path], *names: str) -> str | None:
    """The folder of an adapter that brings one of these files of its own."""
    own = (place for place in places if is_adapter(place) and any((place / name).is_file() for name in names))
    return next(map(str, own), None)


def positions(config: Any) -> int | None:
    """Tokens that a sequence may have: the model's positions, or fewer where its config says so (Isaac's does)."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_sequence_length"))
    return min((limit for limit in limits if limit is not None), default=None)


def embeddings(config: Any) -> int | None:
    """Rows of the language model's embeddings. (An adapter with a tokenizer of its own may bring more.)"""
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None)
    return rows and rows + getattr(text, "additional_vocab_size", 0)


def own_length(config: Any) -> int:
    """Tokens of one sample where nothing says so: as the model's config does (Isaac: 16,384), else the usual limit."""
    return getattr(config.get_text_config(), "max_sequence_length", None) or MAX_SEQ_LENGTH


def decode_aside(arguments: TrainingArguments, given: Mapping[str, Any], renderer: Renderer) -> None:
    """On a GPU, images are decoded by worker processes unless --dataloader_num_workers says otherwise: decoding in the
    training process would keep the GPU waiting. On a CPU they would take cores from training."""
    if renderer.sight is not None and not arguments.use_cpu and "dataloader_num_workers" not in given:
        arguments.dataloader_num_workers = default_workers()


def sees(data: DataSection, config: Any) -> bool:
    """Whether the model takes images, and the rows may have some."""
    return data.task in CONVERSATIONS and hasattr(config, "vision_config")


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
    path = Path(data.data_path or ".")
    own = [path if path.is_dir() else path.parent] if data.data_path else []
    places = [*own, *models]
    found = {place: target for place in places if (target := read_target(place))}
    if not found:
        return None
    first, nearest = next(iter(found.items()))
    for place, target in found.items():
        if target.geometry != nearest.geometry:
            raise DataError(
                f"{first} and {place} are for different devices ({nearest.geometry} against {target.geometry}): "
                "choose one with --device_target"
            )
    return nearest


def sight_for(
    data: DataSection, model: ModelSection, name: str, places: Sequence[Path], target: DeviceTarget | None, config: Any
) -> Sight:
    """The model's processor (see `processor_of`), and a reader of images below the image folder (the data file's own by
    default); both as the device has them, where there is a target."""
    processor = processor_of(model, name, places)
    reader: Any = image_reader(data)
    takes = forward_inputs(config)
    if target is None:
        return Sight(processor, reader, takes=takes)
    return Sight(device_processor(processor, target), DeviceReader(reader, target), target=target, takes=takes)


def image_folder(data: DataSection) -> Path:
    """Where the rows' image paths start."""
    path = Path(data.data_path or ".")
    return Path(data.image_folder) if data.image_folder else path if path.is_dir() else path.parent


def image_reader(data: DataSection) -> ImageReader:
    return ImageReader(image_folder(data), allow_outside=data.allow_outside, allow_urls=data.allow_urls)
