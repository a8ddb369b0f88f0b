"""What `finetune` and `train` share: the run folder held by one process, rows, the run's identity, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.data.dataset import Collator, PackedDataset, RenderedDataset
from rankwise.data.example import Example, Examples
from rankwise.data.input_record import InputRecord
from rankwise.data.render import Renderer
from rankwise.files.adapter import LoraPair
from rankwise.files.atomic import fingerprints
from rankwise.files.checkpoint import base_files, open_checkpoint, resolve
from rankwise.files.processes import announce
from rankwise.models.adapters import require_converted, save_adapter, write_sites
from rankwise.models.depth.encoder import DepthSettings
from rankwise.models.load import meta_model
from rankwise.options.commands import FinetuneConfig, TrainConfig
from rankwise.options.sections import DataSection, ModelSection
from rankwise.train.arguments import frozen_dtype
from rankwise.train.checkpoints import goes_on_from, identity_of
from rankwise.train.trainer import ACCURACY, RankwiseTrainer


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


def describe_losses(history: Sequence[Mapping[str, Any]]) -> str:
    """`loss 2.31 → 0.52, validation 0.61, accuracy 0.93`, from the Trainer's log."""
    training = [row["loss"] for row in history if "loss" in row]
    training = training or [row["train_loss"] for row in history if "train_loss" in row]
    validation = [row["eval_loss"] for row in history if "eval_loss" in row]
    accuracy = [row[ACCURACY] for row in history if ACCURACY in row]
    first_and_last = [f"{value:.3f}" for value in dict.fromkeys((training[0], training[-1]))]
    last = {"validation": validation[-1:], "accuracy": accuracy[-1:]}
    return f"loss {' → '.join(first_and_last)}" + "".join(f", {name} {row:.3f}" for name in last for row in last[name])
