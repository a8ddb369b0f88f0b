"""A job: rows rendered and checked before any weights are loaded, and the run's identity.

files ─ read_split ─▶ training and validation rows ─ prepare ─▶ Job(rows, validation, depth, facts)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.data.dataset import Collator, PackedDataset, RenderedDataset
from rankwise.data.depth.prepare import asked, depth_facts, gate_rate, idle, prepared
from rankwise.data.example import Example, Examples
from rankwise.data.images import Placed
from rankwise.data.input_record import InputRecord, warn_of_others
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import decode_aside, image_folder, renderer_for
from rankwise.data.sources.load import read_examples, settle
from rankwise.data.sources.table import own_validation
from rankwise.data.split import Split, split_groups, subset
from rankwise.errors import UsageError
from rankwise.files.atomic import about_to_write, fingerprints
from rankwise.files.checkpoint import base_files, resolve
from rankwise.files.processes import announce
from rankwise.models.depth.encoder import DepthSettings
from rankwise.models.targets import scales
from rankwise.options.commands import FinetuneConfig, TrainConfig
from rankwise.options.sections import DataSection, ModelSection
from rankwise.ranks.deltas import open_deltas
from rankwise.train.arguments import frozen_dtype, quantization
from rankwise.train.checkpoints import goes_on_from, identity_of
from rankwise.train.phases import schedule_of
from rankwise.train.towers import train_use


@dataclass(frozen=True)
class Job:
    """Training rows and their sources, checked before any weights are loaded.

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
        """The record of how rows become tokens, for later commands."""
        samples = self.rows.rows if isinstance(self.rows, PackedDataset) else self.rows
        return InputRecord.of(self.renderer, samples.examples)

    @property
    def collator(self) -> Collator:
        multiple_of = 1 if self.arguments.use_cpu else 8
        return Collator.of(self.renderer.tokenizer, multiple_of, self.renderer.sight)

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.arguments, **self.facts)


def render_rows(examples: Sequence[Example], renderer: Renderer) -> RenderedDataset:
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


def earlier_checkpoint(config: FinetuneConfig | TrainConfig) -> list[Path]:
    """The checkpoint that a resumed run goes on from: its prompts are made as they were."""
    folder = goes_on_from(config.resume_from_checkpoint, Path(config.output_dir))
    return [folder] if folder else []


def settle_training(config: TrainConfig) -> TrainConfig:
    """The config with what its data say by themselves: their task, and the validation rows of a labelled data set."""
    config = settle(config)
    if config.data.task != "labels" or config.val_path:
        return config
    assert config.data.data_path
    return replace(config, val_path=own_validation(config.data.data_path) if config.val_fraction else None)


def read_split(config: TrainConfig, *, sees_images: bool) -> tuple[Examples, Split]:
    """Training and validation rows: from two files, or a share of the groups of the sampled rows, held out with the
    seed."""
    path = config.data.data_path
    assert path is not None
    generator = random.Random(config.seed)
    examples = read_examples(config.data, path, sees_images=sees_images)
    sampled = examples.items
    if config.max_samples is not None:
        sampled = subset(sampled, 1.0, config.max_samples, generator)
    if config.val_path:
        validation = read_examples(config.data, config.val_path, "dev", sees_images=sees_images)
        own = own_pictures(config)
        split = Split(sampled, Placed(validation.items, own) if own else validation.items)
    else:
        split = split_groups(sampled, config.val_fraction, generator)
    if config.max_val_samples is not None and split.val:
        split = Split(split.train, subset(split.val, 1.0, config.max_val_samples, generator))
    return examples, split


def own_pictures(config: TrainConfig) -> Path | None:
    """Where the validation rows' image paths start, if that is not where the training rows' do."""
    if config.data.image_folder or not config.val_path:
        return None
    files = config.data.data_path, config.val_path
    first, second = (image_folder(replace(config.data, data_path=path)) for path in files)
    return second if first.resolve() != second.resolve() else None


def prepare(
    config: TrainConfig,
    name: str,
    arguments: TrainingArguments,
    plan: RankPlan,
    skeleton: PreTrainedModel,
    full: Sequence[str] = (),
) -> tuple[Split, Job]:
    """Render and check the rows, and establish the run's identity."""
    earlier = earlier_checkpoint(config)
    renderer = renderer_for(config.data, config.model, name, skeleton.config, earlier, anew=not earlier)
    if config.lora.deltas:
        warn_of_others(Path(config.lora.deltas), renderer)
    decode_aside(arguments, config.training, renderer)
    own = own_pictures(config)
    if own and renderer.sight is not None:
        renderer = replace(renderer, sight=replace(renderer.sight, reader=renderer.sight.reader.also(own)))
    examples, split = read_split(config, sees_images=renderer.sight is not None)
    rows = render_rows(split.train, renderer)
    evaluates = split.val and arguments.eval_strategy != "no"
    validation = render_rows(split.val, renderer) if evaluates else None
    both = [*rows.examples, *(validation.examples if validation else ())]
    depth, renderer = with_depth(config, renderer, both, arguments)
    what = {**base_facts(config.model, name, arguments), **data_facts(config.data, renderer, examples, rows)}
    what |= adapter_facts(config, plan, full) | depth_facts(depth)
    what |= {"balance": config.selection.balance} if config.selection.balance != "none" else {}
    chosen = PackedDataset(rows, renderer.limit) if config.packing else rows
    if config.packing:
        if renderer.sight is not None and examples.with_images:
            raise UsageError("--packing supports text rows only: in one row, images of several samples would mix")
        announce(f"packing: {len(rows):,} samples in {len(chosen):,} rows of up to {renderer.limit:,} tokens")
    return split, Job(name, arguments, renderer, chosen, validation, what, depth)


def with_depth(
    config: TrainConfig, renderer: Renderer, examples: Sequence[Example], arguments: TrainingArguments
) -> tuple[DepthSettings | None, Renderer]:
    """With --use_depth: depth of every image, made before anything is trained, and a renderer whose sight gives it."""
    for note in idle(config.depth):
        announce(note)
    settings = asked(config.depth)
    if settings is None:
        return None, renderer
    if renderer.sight is None or not any(example.images for example in examples):
        raise UsageError("--use_depth needs a vision-language model and rows with images")
    about_to_write()  # maps are made and kept
    sight, device = renderer.sight, arguments.device
    settings, sight = prepared(settings, config.depth, sight, examples, seed=config.seed, device=device)
    return settings, replace(renderer, sight=sight)


def adapter_facts(config: TrainConfig, plan: RankPlan, full: Sequence[str]) -> dict[str, Any]:
    """The options of `train` as part of a run's identity. What is new in a version is named only where it is in use, so
    that earlier checkpoints stay those of the same run."""
    lora, form, rates = config.lora, schedule_of(config.phases), rates_of(config)
    return {
        "validation": "rows of their own" if config.val_path else config.val_fraction,
        **({"max_val_samples": config.max_val_samples} if config.max_val_samples is not None else {}),
        "ranks": plan.ranks,
        "scales": sorted(set(scales(plan).values())),
        "lora": {
            "dropout": lora.dropout,
            "bias": lora.lora_bias,
            "dora": lora.use_dora,
            "rslora": plan.use_rslora,
            "init": lora.init_lora_weights,
            "loraplus_lr_ratio": lora.loraplus_lr_ratio,
            "warm_start": fingerprints(open_deltas(Path(lora.deltas)).checkpoint.files) if lora.deltas else None,
        },
        "quantization": quantization(lora),
        "packing": config.packing,
        "schedule": None if form is None else [str(form), config.phases.phase_state],
        **({"full": list(full)} if full else {}),
        **({"tower_rates": rates} if rates else {}),
    }


def rates_of(config: TrainConfig) -> dict[str, float]:
    """Tower → learning rate, of those with one of their own; the depth tower is the gate."""
    return {**train_use(config.towers).rates, **gate_rate(config.depth, config.training)}
