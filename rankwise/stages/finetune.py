"""rankwise finetune: a short full fine-tune on a subset, for the sake of its deltas.

rankwise finetune --model_name MODEL --task e2e_nlg --data_path DIR --subset_ratio 0.01 -o saved_models/probe
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from rankwise.config import FinetuneConfig
from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.data import Example, Examples, RenderedDataset, Renderer, subset
from rankwise.errors import UsageError
from rankwise.nets.adapt import LoraSettings, adapt, trainable_parameters
from rankwise.nets.adapters import save_adapter, write_sites
from rankwise.nets.delta_files import BaseWeights, write_deltas
from rankwise.nets.sites import model_sites, tower_of, tower_prefixes, weight_table
from rankwise.nets.targets import choose_sites, uniform_plan
from rankwise.show.format import amount, duration
from rankwise.stages import training as shared
from rankwise.store.checkpoint import open_checkpoint, resolve
from rankwise.store.files import atomic_folder
from rankwise.store.processes import announce, process_index
from rankwise.store.run import Record, RunFolder
from rankwise.train.arguments import FINETUNE_DEFAULTS, build_arguments, frozen_dtype
from rankwise.train.memory import memory_available, memory_needed, refuse_too_large
from rankwise.train.resume import identity_of
from rankwise.train.tables import TRAINING_LOG
from rankwise.train.trainer import RankwiseTrainer

FEW_UPDATES = 50
LORA_RATE = 1e-4
MAX_SHARD = "5GB"
TRAINED_TOWERS = ("language",)


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before a weight is loaded."""

    name: str
    arguments: TrainingArguments
    skeleton: PreTrainedModel
    sites: Mapping[str, Site]
    renderer: Renderer
    rows: RenderedDataset
    identity: Mapping[str, Any]
    checkpoint: Path | None


def run(config: FinetuneConfig) -> Path:
    """The whole command; returns the run folder."""
    check(config)
    name = config.model.model_name
    assert name is not None
    arguments = arguments_of(config)
    folder = RunFolder(config.output_dir)
    with shared.held(folder, "finetune", config, {"model": name, "data": str(config.data.data_path)}) as record:
        prepared = prepare(config, name, arguments, folder)
        started = time.monotonic()
        trainer = (train_lora if config.method == "lora" else train_full)(config, prepared, folder.path)
        record.facts |= {
            "steps": trainer.state.global_step,
            "samples": len(prepared.rows),
            "training_seconds": round(time.monotonic() - started, 2),
        }
        if trainer.is_world_process_zero():
            finish(config, trainer, record)
    return folder.path


def check(config: FinetuneConfig) -> None:
    """Combinations that cannot work, before anything is read."""
    shared.check_data(config.data, "finetune")
    if not config.model.model_name:
        raise UsageError("finetune needs a model: --model_name FOLDER_OR_HUB_ID")
    if config.skip_shards < 0:
        raise UsageError(f"--skip_shards must be at least 0, got {config.skip_shards}")
    if config.method == "lora" and config.save != "deltas":
        raise UsageError("--method lora saves its adapter, whose spectra are exact; --save is for --method full")
    if config.method == "full" and (config.training.get("fsdp") or config.training.get("deepspeed")):
        if config.save != "checkpoints":
            raise UsageError("with sharded parameters, --save checkpoints is what finetune can write")


def arguments_of(config: FinetuneConfig) -> TrainingArguments:
    own = {
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "num_train_epochs": config.num_epochs,
        **({"use_wandb": True} if config.use_wandb else {}),
    }
    given = own | dict(config.training)
    if given.get("eval_strategy", "no") != "no":
        raise UsageError("finetune has no validation rows: it makes a delta, not a model; leave --eval_strategy out")
    return build_arguments(config.output_dir, config.seed, given, FINETUNE_DEFAULTS, config.model.dtype)


def prepare(config: FinetuneConfig, name: str, arguments: TrainingArguments, folder: RunFolder) -> Prepared:
    """Names, rows, memory and the starting point, all checked."""
    skeleton = shared.structure(config.model, name)
    examples = shared.read_examples(config.data, str(config.data.data_path))
    renderer = shared.renderer_for(config.data, config.model, name, skeleton.config)
    rows = shared.rendered(chosen(config, examples), renderer)
    warn_few_updates(len(rows), arguments)
    if config.method == "full":
        trained = sum(parameter.numel() for parameter in language_parameters(skeleton).values())
        needed = memory_needed(skeleton, trained, arguments, max(rows.lengths))
        announce(refuse_too_large(needed, memory_available(arguments.device)))
    facts = {
        **shared.base_facts(config.model, name, arguments),
        **shared.data_facts(config.data, examples, len(rows)),
        "subset": [config.subset_ratio, config.max_samples, config.skip_shards],
        "method": [config.method, config.lora_r if config.method == "lora" else None],
    }
    identity = identity_of(arguments, **facts)
    checkpoint = shared.starting_point(
        config.resume_from_checkpoint,
        config.allow_partial_resume,
        bool(config.training.get("overwrite_output_dir")),
        folder,
        identity,
    )
    return Prepared(name, arguments, skeleton, model_sites(skeleton), renderer, rows, identity, checkpoint)


def chosen(config: FinetuneConfig, examples: Examples) -> list[Example]:
    """The subset of the seed; with --skip_shards N the (N+1)-th of disjoint subsets of equal size."""
    generator = random.Random(config.seed)
    rest: Sequence[Example] = examples.items
    picked = subset(rest, config.subset_ratio, config.max_samples, generator)
    for _ in range(config.skip_shards):
        taken = {example.id for example in picked}
        rest = [example for example in rest if example.id not in taken]
        if len(rest) < len(picked):
            raise UsageError(f"--skip_shards {config.skip_shards}: only {len(rest)} rows are left for another subset")
        ratio = min(1.0, config.subset_ratio * len(examples) / len(rest))
        picked = subset(rest, ratio, config.max_samples, generator)
    return picked


def warn_few_updates(samples: int, arguments: TrainingArguments) -> None:
    batches = math.ceil(samples / (arguments.per_device_train_batch_size * arguments.world_size))
    updates = math.ceil(math.ceil(batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)
    updates = arguments.max_steps if arguments.max_steps > 0 else updates
    if updates < FEW_UPDATES:
        announce(
            f"warning: {samples} samples make {updates} updates; below {FEW_UPDATES} the delta shows the optimizer's "
            "first steps more than the task. Raise --subset_ratio or --num_epochs, or lower --gradient_accumulation"
        )


def language_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter of the trained towers, embeddings, norms and head included, by name."""
    towers = tower_prefixes(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if tower_of(name.rpartition(".")[0], towers) in TRAINED_TOWERS
    }


def train_full(config: FinetuneConfig, prepared: Prepared, folder: Path) -> RankwiseTrainer:
    """All language parameters in float32; then the deltas, or both checkpoints."""
    model = shared.loaded(config.model, prepared.name, torch.float32)
    model.requires_grad_(False)
    trained = language_parameters(model)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    checkpoint = open_checkpoint(resolve(prepared.name, config.model.revision))
    base = BaseWeights.before_training(checkpoint, weight_table(prepared.skeleton, checkpoint.keys()), trained)
    first = process_index()[0] == 0
    if config.save != "deltas" and first:
        save_checkpoint(model, prepared.renderer, folder / "pretrained")
    trainer = trained_by(model, prepared)
    if config.save != "deltas":
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if first:
            save_checkpoint(
                trainer.accelerator.unwrap_model(trainer.model), prepared.renderer, folder / "finetuned", state
            )
    if config.save != "checkpoints" and first:
        write_deltas(
            folder / "deltas", trained, base, prepared.sites, delta_facts(config, prepared, trainer, checkpoint.files)
        )
    return trainer


def trained_by(model: Any, prepared: Prepared) -> RankwiseTrainer:
    set_seed(prepared.arguments.seed)
    trainer = RankwiseTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=prepared.rows,
        data_collator=shared.collator_for(prepared.renderer, prepared.arguments),
        identity=prepared.identity,
    )
    trainer.train(prepared.checkpoint)
    return trainer


def save_checkpoint(
    model: PreTrainedModel, renderer: Renderer, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """A Hugging Face folder in float32 with its tokenizer, whole or not at all."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state, max_shard_size=MAX_SHARD)
        renderer.tokenizer.save_pretrained(temporary)


def delta_facts(
    config: FinetuneConfig, prepared: Prepared, trainer: RankwiseTrainer, files: Sequence[Path]
) -> dict[str, Any]:
    """What the deltas are deltas of, and how they came about."""
    return {
        "model_name": prepared.name,
        "revision": config.model.revision,
        "base_fingerprints": shared.fingerprints(files),
        "num_samples": len(prepared.rows),
        "seed": config.seed,
        "optimizer": str(prepared.arguments.optim.value),
        "learning_rate": config.learning_rate,
        "steps": trainer.state.global_step,
        "task": config.data.task,
    }


def train_lora(config: FinetuneConfig, prepared: Prepared, folder: Path) -> RankwiseTrainer:
    """A high-rank LoRA as the probe; `ranks --adapter` reads its spectra from the factors."""
    if config.learning_rate < LORA_RATE:
        announce(
            f"note: --learning_rate {config.learning_rate:g} suits full fine-tuning; LoRA usually takes 1e-4 or more"
        )
    plan = lora_plan(config, prepared)
    model = shared.loaded(config.model, prepared.name, frozen_dtype(config.model.dtype, prepared.arguments))
    set_seed(config.seed)
    trainer = trained_by(adapt(model, plan, LoraSettings(dropout=0.0)), prepared)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder, prepared.name, state=state)
        write_sites(folder, plan, [])
    return trainer


def lora_plan(config: FinetuneConfig, prepared: Prepared) -> RankPlan:
    return uniform_plan(choose_sites(prepared.sites), config.lora_r, None, False, prepared.name)


def outputs(config: FinetuneConfig) -> list[Path]:
    folder = Path(config.output_dir)
    if config.method == "lora":
        return [folder / name for name in ("adapter_model.safetensors", "adapter_config.json", "sites.json")]
    written = {"deltas": ["deltas"], "checkpoints": ["pretrained", "finetuned"]}
    return [folder / name for kind, names in written.items() if config.save in (kind, "both") for name in names]


def next_command(config: FinetuneConfig) -> str:
    folder = Path(config.output_dir)
    if config.method == "lora":
        return f"rankwise ranks --adapter {folder} --model_name {config.model.model_name}"
    if config.save == "checkpoints":
        return f"rankwise ranks {folder / 'pretrained'} {folder / 'finetuned'}"
    return f"rankwise ranks --deltas {folder}"


def finish(config: FinetuneConfig, trainer: RankwiseTrainer, record: Record) -> None:
    """Enter the run in its manifest, and say in a few lines what came out and what comes next."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if config.method == "lora":
        trainable = trainable_parameters(model)[0]
    else:
        record.facts["trained"] = [name for name, value in model.named_parameters() if value.requires_grad]
        trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    record.facts["trainable_parameters" if config.method == "full" else "probe_parameters"] = trainable
    record.outputs |= {path.name: path for path in outputs(config)}
    record.outputs["log"] = Path(config.output_dir) / TRAINING_LOG
    print(
        f"finetune: {trainer.state.global_step:,} updates on {record.facts['samples']:,} samples in "
        f"{duration(record.facts['training_seconds'])}, {shared.losses(trainer.state.log_history)}; "
        f"{amount(trainable)} parameters trained"
    )
    print("wrote " + ", ".join(str(path) for path in outputs(config)))
    print(f"next: {next_command(config)}")


def describe(config: FinetuneConfig) -> list[str]:
    check(config)
    what = "every language parameter" if config.method == "full" else f"a LoRA of rank {config.lora_r}"
    return [
        f"fine-tune {what} of {config.model.model_name} on {config.subset_ratio:.3%} of {config.data.data_path} "
        f"(at most {config.max_samples:,} rows) as {config.data.task}",
        "write " + ", ".join(str(path) for path in outputs(config)),
        f"continue with: {next_command(config)}",
    ]
