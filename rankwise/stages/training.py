"""What `finetune` and `train` share: the run folder held by one process, rows, the run's identity, training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from rankwise.config import (
    CheckConfig,
    DataSection,
    EvaluateConfig,
    FinetuneConfig,
    ModelSection,
    TrainConfig,
    ValidateConfig,
)
from rankwise.core.plan import RankPlan
from rankwise.data.collate import Collator
from rankwise.data.example import Example, Examples
from rankwise.data.input_record import InputRecord
from rankwise.data.packing import PackedDataset
from rankwise.data.render import Renderer
from rankwise.data.rendered import RenderedDataset
from rankwise.data.sources import kind_of, load
from rankwise.data.sources.conversations import speakers_of
from rankwise.data.sources.labels import own_validation
from rankwise.errors import UsageError
from rankwise.nets.adapters import require_converted, save_adapter, write_sites
from rankwise.nets.depth_settings import DepthSettings
from rankwise.nets.load import check_quantizer, load_model, meta_model
from rankwise.stages.rendering import reading
from rankwise.store.adapter import LoraPair
from rankwise.store.checkpoint import open_checkpoint, resolve
from rankwise.store.files import fingerprint, rehearsing
from rankwise.store.processes import announce, process_index
from rankwise.store.run import Record, RunFolder
from rankwise.train.arguments import frozen_dtype
from rankwise.train.resume import goes_on_from, identity_of
from rankwise.train.trainer import ACCURACY, RankwiseTrainer

Configured = TypeVar("Configured", FinetuneConfig, TrainConfig, CheckConfig, EvaluateConfig, ValidateConfig)
TRAINING = ("train", "finetune")


@dataclass(frozen=True)
class Job:
    """What is trained on and from where, checked before a weight is loaded.

    `facts` make the run this run, beside the training arguments: a checkpoint with other facts is refused.
    """

    name: str
    arguments: TrainingArguments
    renderer: Renderer
    rows: RenderedDataset | PackedDataset
    validation: RenderedDataset | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    depth: DepthSettings | None = None

    @cached_property
    def record(self) -> InputRecord:
        """How its rows become tokens, for every command that comes after."""
        samples = self.rows.rows if isinstance(self.rows, PackedDataset) else self.rows
        return InputRecord.of(self.renderer, samples.examples)

    @property
    def collator(self) -> Collator:
        multiple_of = 1 if self.arguments.use_cpu else 8
        return Collator.of(self.renderer.tokenizer, multiple_of, self.renderer.sight)

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.arguments, **self.facts)


@contextmanager
def held(
    folder: RunFolder, stage: str, inputs: Mapping[str, Path | str], *, rehearsed: bool = False
) -> Iterator[Record]:
    """The run folder, locked and recorded by the first process; the others work beside it.

    rehearsed: a dry run goes on into the block, without the folder; the block itself calls `about_to_write`.
    """
    if process_index()[0] != 0 or (rehearsed and rehearsing()):
        yield Record()
        return
    with folder.lock(), folder.recording(stage, inputs) as record:
        yield record


def settled(config: Configured) -> Configured:
    """The config with what its data say by themselves: their task where none is given, and a labelled data set brings
    its own validation rows."""
    config = replace(config, data=replace(config.data, task=task_of(config.data)))
    if config.data.task != "labels" or not isinstance(config, TrainConfig) or config.val_path:
        return config
    assert config.data.data_path
    return replace(config, val_path=own_validation(config.data.data_path) if config.val_fraction else None)


def task_of(data: DataSection) -> str | None:
    """The task as given, else as the data show it (`kind_of`)."""
    return data.task or (kind_of(data.data_path) if data.data_path else None)


def check_data(data: DataSection, command: str) -> None:
    if not data.task:
        where = f", and {data.data_path} does not show it" if data.data_path else ""
        raise UsageError(f"{command}: --task says how rows become text; it is missing{where}")
    if not data.data_path:
        raise UsageError(f"{command}: --data_path is missing: where are the rows?")
    speakers_of(data.roles)


def read_examples(data: DataSection, path: str, split: str = "train", *, sees_images: bool = False) -> Examples:
    """The rows of a data set, with what was left out said aloud. `--download` fills the folder of --data_path; a file
    named beside it is read as it is. Of several processes the first one downloads while the others wait."""
    fetches = data.download and path == data.data_path
    with PartialState().local_main_process_first() if fetches else nullcontext():
        examples = load(
            data.task or "",
            path,
            split,
            download=fetches,
            **reading(data),
        )
    for note in examples.notes(sees_images=sees_images):
        announce(note)
    return examples


def warn_of_training_rows(run: Path, file: Path, measured: str) -> None:
    """Say so where a training run in this folder, or in the one above, has learnt from this very file."""
    entries = [RunFolder(folder).stages().get(stage, {}) for folder in (run, run.parent) for stage in TRAINING]
    learnt_from = {entry.get("inputs", {}).get("data", {}).get("fingerprint") for entry in entries}
    if fingerprint(file) in learnt_from:
        announce(f"warning: {file} is what {run} was trained on, so {measured} how well its rows are remembered")


def structure(model: ModelSection, name: str) -> PreTrainedModel:
    """The model without weights: names and sizes, checked before anything large is read."""
    return meta_model(name, model.revision, model.trust_remote_code)


def loadable(model: ModelSection, name: str) -> PreTrainedModel:
    """The same of a model whose weights will be read: UsageError where a package for them is missing."""
    skeleton = structure(model, name)
    check_quantizer(skeleton.config)
    return skeleton


def loaded(model: ModelSection, name: str, dtype: torch.dtype, quantization: str | None = None) -> PreTrainedModel:
    return load_model(
        name,
        dtype,
        attn_implementation=model.attn_implementation,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        quantization=quantization,
    )


def rendered(examples: Sequence[Example], renderer: Renderer) -> RenderedDataset:
    rows = RenderedDataset(examples, renderer)
    for note in rows.notes():
        announce(note)
    return rows


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


def model_fingerprint(folder: Path) -> str:
    """One digest of a model's configuration and weights: what else lies in its folder does not change it."""
    return hashlib.sha256(json.dumps(fingerprints(base_files(folder))).encode()).hexdigest()


def fingerprints(files: Sequence[Path]) -> dict[str, str]:
    return {file.name: fingerprint(file) for file in files}


def data_facts(data: DataSection, renderer: Renderer, examples: Examples, rows: RenderedDataset) -> dict[str, Any]:
    """The rows as part of a run's identity: the files, and what came of them in the end."""
    return {
        "data": fingerprints(examples.files),
        "task": data.task,
        **renderer.settings,
        "samples": len(rows),
        "rows": rows.checked.digest,
        **({"aux_reason": True} if data.aux_reason else {}),
    }


def before(config: FinetuneConfig | TrainConfig) -> list[Path]:
    """The checkpoint that a resumed run goes on from: its prompts are made as they were."""
    folder = goes_on_from(config.resume_from_checkpoint, Path(config.output_dir))
    return [folder] if folder else []


def whole_state(trainer: RankwiseTrainer) -> Mapping[str, Tensor] | None:
    """The state dict gathered from all processes where parameters are sharded; every process must ask for it."""
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


def plain_model(trainer: RankwiseTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def write_adapter_files(
    trainer: RankwiseTrainer,
    folder: Path,
    name: str,
    plan: RankPlan,
    left_out: list[str],
    initial: Mapping[str, LoraPair] | None = None,
    full: Mapping[str, str] | None = None,
) -> None:
    """The adapter in this folder, and sites.json beside it. full: path → tower of the modules trained in full."""
    state = whole_state(trainer)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(plain_model(trainer), folder, name, initial, state)
        write_sites(folder, plan, left_out, full)
        if initial:
            require_converted(plain_model(trainer), folder, open_checkpoint(resolve(name)), meta_model(name))


def losses(history: Sequence[Mapping[str, Any]]) -> str:
    """`loss 2.31 → 0.52, validation 0.61, accuracy 0.93`, from the Trainer's log."""
    training = [row["loss"] for row in history if "loss" in row]
    training = training or [row["train_loss"] for row in history if "train_loss" in row]
    validation = [row["eval_loss"] for row in history if "eval_loss" in row]
    accuracy = [row[ACCURACY] for row in history if ACCURACY in row]
    first_and_last = [f"{value:.3f}" for value in dict.fromkeys((training[0], training[-1]))]
    last = {"validation": validation[-1:], "accuracy": accuracy[-1:]}
    return f"loss {' → '.join(first_and_last)}" + "".join(f", {name} {row:.3f}" for name in last for row in last[name])
