"""What `rankwise evaluate` puts to the test: the model with its adapter, its renderer, and the engine that runs it.

MODEL_OR_ADAPTER ── base_and_adapter ──▶ (base, adapter) ── subject ──▶ Subject ── generator ──▶ texts, labels
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rankwise.data.dataset import check_samples
from rankwise.data.depth.prepare import prepared, trained_with
from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import adapter_files, is_adapter, read_adapter
from rankwise.files.checkpoint import resolve
from rankwise.files.processes import announce, process_index
from rankwise.models.adapters import load_adapter
from rankwise.models.depth.encoder import attach_depth
from rankwise.models.depth.settings import DepthSettings
from rankwise.models.load import load_config, load_model, load_tokenizer
from rankwise.models.sites import torch_dtype
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import ModelSection
from rankwise.score.classify import label_set
from rankwise.score.generate import GenerationSettings, Generator, HFGenerator
from rankwise.score.likelihood import longest_answer
from rankwise.score.tasks import Task
from rankwise.score.vllm_engine import VLLMGenerator


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
        """Folders that may say how it was trained, the adapter's before its base's."""
        return [*([self.adapter] if self.adapter else []), resolve(self.base)]

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


def base_and_adapter(path: str, base_model: str | None) -> tuple[str, Path | None]:
    """(base model, adapter folder or None). Whatever takes an adapter accepts the run folder."""
    folder = resolve(path)
    if not is_adapter(folder):
        return path, None
    base = base_model or read_adapter(folder).base_model
    if not base:
        raise DataError(f"{folder}: the adapter doesn't say what its base model is; give it with --base_model_id")
    return base, adapter_files(folder)[0].parent


def subject(config: EvaluateConfig, base: str, adapter: Path | None) -> Subject:
    """The model with its adapter, and the renderer that its training used."""
    places = [adapter] if adapter else []
    renderer = renderer_for(config.data, ModelSection(model_name=base), base, load_config(base), places)
    depth = trained_with(base, adapter, config.depth)
    if config.engine == "vllm":
        if depth:
            raise UsageError("--engine vllm knows no depth, and this model was trained with it")
        if renderer.sight is not None:
            raise UsageError("--engine vllm answers text only here; images need --engine transformers")
        return Subject(base, adapter, renderer)
    device = pick_device(config.device)
    model: Any = plain_model(base, config.dtype, device)
    if depth:
        attach_depth(model, depth)
    if adapter:
        model = load_adapter(model, adapter)
    return Subject(base, adapter, renderer, model.to(device).eval(), depth)


def seeing(config: EvaluateConfig, tested: Subject, examples: Sequence[Example]) -> Subject:
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
        raise UsageError(
            f"--forget: {config.model_name} is no adapter; give the model that it was made from with --base_model_id"
        )
    tokenizer, own = load_tokenizer(name), tested.renderer.tokenizer
    if any(tokenizer(text)["input_ids"] != own(text)["input_ids"] for text in documents):
        raise DataError(
            f"{name} and {config.model_name} cut the text into different tokens, so nothing can be compared"
        )
    return plain_model(name, config.dtype, tested.device)


def generator(config: EvaluateConfig, tested: Subject, task: Task, examples: Sequence[Example]) -> Generator:
    """The engine, with a renderer that leaves room for what is generated, or for the longest label."""
    if by_likelihood(config, task):
        reserve = longest_answer(tested.renderer, examples[0], label_set(examples))
    else:
        reserve = config.generation.max_new_tokens
    renderer = tested.renderer.leaving(reserve)
    decoding = GenerationSettings(batch_size=config.batch_size, seed=config.seed, **vars(config.generation))
    if config.engine == "vllm":
        return VLLMGenerator(tested.base, renderer, decoding, tested.adapter, config.dtype)
    return HFGenerator(tested.model, renderer, decoding)


def by_likelihood(config: EvaluateConfig, task: Task) -> bool:
    return task.classifies and config.classify == "likelihood"


def fitting(examples: Sequence[Example], renderer: Renderer) -> list[Example]:
    """The items whose prompts fit; the others are counted aloud."""
    checked = check_samples(examples, renderer, prompts=True)
    for note in checked.notes():
        announce(note)
    return [examples[index] for index in checked.usable]


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one; of several processes each takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to torch here")
    if name == "cuda" and process_index()[1] > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device is auto, cpu or cuda, got {name}") from error
