"""The model under evaluation: base and adapter, the renderer of its training, and the engine that runs it.

MODEL_OR_ADAPTER ── base_and_adapter ──▶ (base, adapter) ── subject ──▶ Subject ── generator ──▶ texts, labels
                 ── load ──▶ Trained: the same for Python, with the processor of images and text

trained = rankwise.load("runs/isaac_depth/train")            # a run folder, an adapter, a checkpoint, or a model
inputs = trained.processor(text=[prompt], images=[picture], return_tensors="pt")
trained.model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rankwise.data.depth.prepare import estimator_of, prepared, trained_with, with_depth_output
from rankwise.data.device import DeviceTarget, device_processor, read_target
from rankwise.data.example import Example
from rankwise.data.input_record import InputRecord, recorded
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.classify import label_set
from rankwise.evaluate.generate import GenerationSettings, Generator, HFGenerator, pick_device
from rankwise.evaluate.likelihood import longest_answer
from rankwise.evaluate.tasks import Task, part
from rankwise.files.adapter import adapter_files, base_and_adapter, is_adapter
from rankwise.files.atomic import about_to_write
from rankwise.files.checkpoint import resolve
from rankwise.models.adapters import load_adapter
from rankwise.models.depth.encoder import DepthSettings, attach_depth, read_depth
from rankwise.models.depth.estimator import ESTIMATOR
from rankwise.models.load import load_config, load_model, load_processor, load_tokenizer, torch_dtype
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import DepthUseSection, ModelSection


@dataclass(frozen=True)
class Subject:
    """A model under test. `model` is on its device, in evaluation mode; None where vLLM loads it itself. depth: how it
    takes depth, if it does."""

    base: str
    adapter: Path | None
    renderer: Renderer
    model: Any = None
    depth: DepthSettings | None = None

    @property
    def places(self) -> list[Path]:
        """Folders with training records, the adapter's before its base's."""
        return [*([self.adapter] if self.adapter else []), resolve(self.base)]

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


def refuse_for_vllm(config: EvaluateConfig) -> None:
    """UsageError for what vLLM cannot run, installed or not: as far as files that are there already tell."""
    folder = Path(str(config.model_name))
    adapter = adapter_files(folder)[0].parent if is_adapter(folder) else None
    part("vllm_engine").refuse(config.generation.num_beams, adapter)
    if folder.is_dir() and read_depth(adapter or folder):
        raise UsageError("--engine vllm does not support depth, which this model needs: --engine transformers")


def renderer_of(config: EvaluateConfig, base: str, adapter: Path | None) -> Renderer:
    """The renderer that the model's training used."""
    places = [adapter] if adapter else []
    return renderer_for(config.data, ModelSection(model_name=base), base, load_config(base), places)


def subject(config: EvaluateConfig, base: str, adapter: Path | None, renderer: Renderer) -> Subject:
    """The model with its adapter."""
    depth = trained_with(base, adapter, config.depth)
    if config.engine == "vllm":
        if depth:
            raise UsageError("--engine vllm does not support depth, which this model needs: --engine transformers")
        if renderer.sight is not None:
            raise UsageError("--engine vllm takes text only here; images need --engine transformers")
        about_to_write()
        return Subject(base, adapter, renderer)
    device = pick_device(config.device)
    model: Any = plain_model(base, config.dtype, device)
    if depth:
        attach_depth(model, depth)
    if adapter:
        model = load_adapter(model, adapter)
    return Subject(base, adapter, renderer, model.to(device).eval(), depth)


def add_depth(config: EvaluateConfig, tested: Subject, examples: Sequence[Example]) -> Subject:
    """The subject with depth for the images of these samples, made where the cache lacks it."""
    sight = tested.renderer.sight
    if tested.depth is None or sight is None or not any(example.images for example in examples):
        return tested
    depth, sight = prepared(tested.depth, config.depth, sight, examples, seed=config.seed, device=tested.device)
    return replace(tested, renderer=replace(tested.renderer, sight=sight), depth=depth)


def plain_model(name: str, dtype: str, device: torch.device) -> Any:
    return load_model(name, torch_dtype(dtype, trained=False, device=device)).to(device).eval()


def compared_base(config: EvaluateConfig, tested: Subject, documents: Sequence[str]) -> Any:
    """The base of a merged or fully tuned model, with the same tokens."""
    name = config.base_model_id
    if not name:
        raise UsageError(f"--forget: {config.model_name} is not an adapter; give its base model with --base_model_id")
    tokenizer, own = load_tokenizer(name), tested.renderer.tokenizer
    if any(tokenizer(text)["input_ids"] != own(text)["input_ids"] for text in documents):
        raise DataError(f"{name} and {config.model_name} tokenize the text differently, so nothing can be compared")
    return plain_model(name, config.dtype, tested.device)


def generator(config: EvaluateConfig, tested: Subject, task: Task, examples: Sequence[Example]) -> Generator:
    """The engine, with a renderer that leaves room for what is generated, or for the longest label."""
    if task.classifies and config.classify == "likelihood":
        reserve = longest_answer(tested.renderer, examples[0], label_set(examples))
    else:
        reserve = config.generation.max_new_tokens
    renderer = tested.renderer.leaving(reserve)
    decoding = GenerationSettings(batch_size=config.batch_size, seed=config.seed, **vars(config.generation))
    if config.engine == "vllm":
        engine: Generator = part("vllm_engine").VLLMGenerator(
            tested.base, renderer, decoding, tested.adapter, config.dtype
        )
        return engine
    return HFGenerator(tested.model, renderer, decoding)


@dataclass(frozen=True)
class Trained:
    """model: on its device, in evaluation mode; PEFT-wrapped where there is an adapter. processor: of images and text
    (with depth where the model takes it, as the runtime where it was trained for a device), or the tokenizer of a text
    model. target: that device; `target.resize` makes the pictures that the model was trained on. record: how training
    made prompts, where it says so; the tokenizer has its chat template."""

    model: Any
    processor: Any
    depth: DepthSettings | None = None
    target: DeviceTarget | None = None
    record: InputRecord | None = None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def load(
    path: str | Path,
    *,
    base_model: str | None = None,
    depth_checkpoint_path: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Trained:
    """Base + adapter + depth from an adapter's folder, a run folder, one of its checkpoints, or a (merged) model.

    A model that was trained with depth gets its encoder, its gate and its estimator, which `depth.json` names and
    whose fingerprint is checked. depth_checkpoint_path: that estimator in another place. base_model: the base where
    the adapter does not say it, or in another place.

    Raises DataError where a part is missing or is another one than in training: a model trained with depth does not
    run without its estimator.
    """
    base, adapter = base_and_adapter(str(path), base_model)
    settings = trained_with(base, adapter, DepthUseSection(depth_checkpoint_path=depth_checkpoint_path))
    estimator = estimator_of(settings) if settings else None
    place = pick_device(device)
    model: Any = load_model(base, torch_dtype(dtype, trained=False, device=place)).to(place)
    processor = load_processor(base) if hasattr(load_config(base), "vision_config") else load_tokenizer(base)
    target = (read_target(adapter) if adapter else None) or read_target(resolve(base))
    if target:
        processor = device_processor(processor, target)
    found = recorded([*([adapter] if adapter else []), resolve(base)])
    if found.record and found.record.chat_template:
        getattr(processor, "tokenizer", processor).chat_template = found.record.chat_template
    if settings:
        attach_depth(model, settings)
        processor = with_depth_output(processor, settings, estimator)
    if estimator:
        estimator.model.to(place)
        setattr(model, ESTIMATOR, estimator)
    if adapter:
        model = load_adapter(model, adapter)
    return Trained(model.to(place).eval(), processor, settings, target, found.record)
