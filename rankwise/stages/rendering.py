"""The renderer of a run: one for training, evaluation and everything else that shows rows to a model.

model folder, data options ── renderer_for ──▶ Renderer ( + Sight where model and rows have images )
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, TrainingArguments

from rankwise.config import DataSection, ModelSection
from rankwise.data import ImageReader, Renderer, Sight
from rankwise.nets.load import load_processor, load_tokenizer
from rankwise.store.checkpoint import resolve
from rankwise.store.processes import default_workers

SEEN_TASKS = ("conversations", "cota")  # sources whose rows may have images


def renderer_for(data: DataSection, model: ModelSection, name: str, config: Any) -> Renderer:
    """The model's positions bound the length, its end tokens end answers, its processor makes image tokens.

    `--prompt auto` is the chat template where images are seen, headed sections elsewhere.
    """
    folder = resolve(name, model.revision)
    has_own = (folder / "generation_config.json").is_file()
    eos = GenerationConfig.from_pretrained(folder).eos_token_id if has_own else config.eos_token_id
    sight = sight_for(data, model, name) if sees(data, config) else None
    style = data.prompt if data.prompt != "auto" else "chat" if sight else "sections"
    return Renderer(
        sight.processor.tokenizer if sight else load_tokenizer(name, model.revision, model.trust_remote_code),
        style=style,
        max_length=data.max_seq_length,
        overlong=data.overlong,
        positions=positions(config),
        generation_eos=eos,
        sight=sight,
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


def sight_for(data: DataSection, model: ModelSection, name: str) -> Sight:
    """The model's processor, and a reader of images below the image folder (the data file's own by default)."""
    return Sight(load_processor(name, model.revision, model.trust_remote_code), image_reader(data))


def image_reader(data: DataSection) -> ImageReader:
    path = Path(data.data_path or ".").expanduser()
    folder = Path(data.image_folder).expanduser() if data.image_folder else path if path.is_dir() else path.parent
    return ImageReader(folder, allow_outside=data.allow_outside, allow_urls=data.allow_urls)
