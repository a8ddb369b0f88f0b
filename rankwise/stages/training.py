"""What `finetune` and `train` share: the run folder held by one process, data read and rendered, the base's identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

from rankwise.config import DataSection, ModelSection
from rankwise.data import Collator, Example, Examples, RenderedDataset, Renderer, load
from rankwise.errors import UsageError
from rankwise.nets.load import load_model, load_tokenizer, meta_model
from rankwise.options import flatten
from rankwise.store.checkpoint import resolve
from rankwise.store.files import fingerprint
from rankwise.store.processes import announce, process_index
from rankwise.store.run import Record, RunFolder
from rankwise.train.arguments import frozen_dtype
from rankwise.train.resume import resume_point, start_over


@contextmanager
def held(folder: RunFolder, stage: str, config: Any, inputs: Mapping[str, Path | str]) -> Iterator[Record]:
    """The run folder, locked and recorded by the first process; the others work beside it."""
    if process_index()[0] != 0:
        yield Record()
        return
    with folder.lock(), folder.recording(stage, inputs) as record:
        folder.save_config(flatten(config))
        yield record


def check_data(data: DataSection, command: str) -> None:
    if not data.task:
        raise UsageError(f"{command}: --task says how rows become text; it is missing")
    if not data.data_path:
        raise UsageError(f"{command}: --data_path is missing: where are the rows?")


def read_examples(data: DataSection, path: str, split: str = "train") -> Examples:
    """The rows of a data set, with what was left out said aloud."""
    examples = load(data.task or "", path, split, skip_bad=data.skip_bad)
    for note in examples.notes():
        announce(note)
    return examples


def structure(model: ModelSection, name: str) -> PreTrainedModel:
    """The model without weights: names and sizes, checked before anything large is read."""
    return meta_model(name, model.revision, model.trust_remote_code)


def loaded(model: ModelSection, name: str, dtype: torch.dtype, quantization: str | None = None) -> PreTrainedModel:
    return load_model(
        name,
        dtype,
        attn_implementation=model.attn_implementation,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        quantization=quantization,
    )


def renderer_for(data: DataSection, model: ModelSection, name: str, config: Any) -> Renderer:
    """The renderer that evaluation uses too: the model's positions bound the length, its end tokens end answers."""
    folder = resolve(name, model.revision)
    has_own = (folder / "generation_config.json").is_file()
    eos = GenerationConfig.from_pretrained(folder).eos_token_id if has_own else config.eos_token_id
    return Renderer(
        load_tokenizer(name, model.revision, model.trust_remote_code),
        style=data.prompt,
        max_length=data.max_seq_length,
        overlong=data.overlong,
        positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        generation_eos=eos,
    )


def rendered(examples: Sequence[Example], renderer: Renderer) -> RenderedDataset:
    rows = RenderedDataset(examples, renderer)
    for note in rows.notes():
        announce(note)
    return rows


def collator_for(renderer: Renderer, arguments: TrainingArguments) -> Collator:
    return Collator.of(renderer.tokenizer, multiple_of=1 if arguments.use_cpu else 8)


def base_facts(model: ModelSection, name: str, arguments: TrainingArguments) -> dict[str, Any]:
    """The base as part of a run's identity: its files' content, not where they lie."""
    return {
        "base": fingerprints(base_files(resolve(name, model.revision))),
        "dtype": str(frozen_dtype(model.dtype, arguments)),
        "attn_implementation": model.attn_implementation,
    }


def base_files(folder: Path) -> list[Path]:
    """Configuration and weights of a model folder."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [folder / "config.json", *weights]


def fingerprints(files: Sequence[Path]) -> dict[str, str]:
    return {file.name: fingerprint(file) for file in files}


def data_facts(data: DataSection, examples: Examples, samples: int) -> dict[str, Any]:
    """The rows as part of a run's identity."""
    return {
        "data": fingerprints(examples.files),
        "task": data.task,
        "prompt": data.prompt,
        "max_seq_length": data.max_seq_length,
        "overlong": data.overlong,
        "samples": samples,
    }


def starting_point(
    asked: str | None, allow_partial: bool, overwrite: bool, folder: RunFolder, identity: Mapping[str, Any]
) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run that mixes with no earlier one."""
    _, processes = process_index()
    checkpoint = resume_point(asked, folder.path, identity, allow_partial=allow_partial, processes=processes)
    if checkpoint is None and process_index()[0] == 0:
        start_over(folder.path, overwrite)
    return checkpoint


def losses(history: Sequence[Mapping[str, Any]]) -> str:
    """`loss 2.31 → 0.52, validation 0.61`, from the Trainer's log."""
    training = [row["loss"] for row in history if "loss" in row]
    validation = [row["eval_loss"] for row in history if "eval_loss" in row]
    parts = []
    if training:
        parts.append(f"loss {training[0]:.3f}" + (f" → {training[-1]:.3f}" if len(training) > 1 else ""))
    if validation:
        parts.append(f"validation {validation[-1]:.3f}")
    return ", ".join(parts) or "no loss was logged"
