"""rankwise finetune: a short full fine-tune on a subset, to obtain its weight deltas.

rankwise finetune --model_name MODEL --task e2e_nlg --data_path DIR --subset_ratio 0.01 -o saved_models/probe
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from rankwise.data.example import Example, Examples
from rankwise.data.input_record import InputRecord, save_input
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import decode_aside, renderer_for
from rankwise.data.sources.load import check_data, read_examples, settle
from rankwise.data.split import subset
from rankwise.errors import UsageError
from rankwise.files.adapter import INPUT
from rankwise.files.atomic import atomic_folder, fingerprints
from rankwise.files.checkpoint import open_checkpoint, resolve
from rankwise.files.processes import announce, process_index
from rankwise.files.run_folder import Record, RunFolder, held
from rankwise.models.adapt import adapt
from rankwise.models.load import load_readable_structure, load_weights
from rankwise.models.sites import check_towers, model_sites, tower_parameters, weight_table
from rankwise.models.targets import adaptable_sites, choose_sites, uniform_plan
from rankwise.options.commands import FinetuneConfig
from rankwise.options.sections import LoraSection, TowersSection
from rankwise.page.text import amount, command_line, duration
from rankwise.pipeline.idle import refuse_idle
from rankwise.ranks.deltas import BaseWeights, write_deltas
from rankwise.train.arguments import FINETUNE_DEFAULTS, build_arguments, frozen_dtype
from rankwise.train.estimate.cost import run_length
from rankwise.train.estimate.gpus import memory_available, memory_needed, refuse_too_large
from rankwise.train.gradient_table import TRAINING_LOG
from rankwise.train.job import Job, base_facts, data_facts, earlier_checkpoint, render_rows
from rankwise.train.launch import check_folder, finished_checkpoints, starting_point, train_job
from rankwise.train.launch import going_on as going_on
from rankwise.train.results import describe_losses, plain_model, whole_state, write_adapter_files
from rankwise.train.towers import check_rates, describe_trained, finetune_use
from rankwise.train.trainer import RankwiseTrainer

LORA_RATE = 1e-4
MAX_SHARD = "5GB"
FEW_UPDATES = 50
earlier = finished_checkpoints


def language_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every parameter of the language tower, embeddings, norms and head included, by name."""
    return tower_parameters(model, ["language"])


def full_parameters(config: FinetuneConfig, model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What `--method full` trains, by name: every parameter of the towers, or the matrices of `--target` alone."""
    towers = finetune_use(config.towers, config.method).full
    found = tower_parameters(model, towers)
    if config.target is None:
        return found
    chosen = choose_sites(adaptable_sites(model, config.target), config.target, towers=towers)
    return {site.weight: found[site.weight] for site in chosen.values()}


def train_full(config: FinetuneConfig, job: Job, skeleton: PreTrainedModel, checkpoint: Path | None) -> RankwiseTrainer:
    """All parameters of the towers set to `full`, or those of `--target`, in float32; then the deltas, or both
    checkpoints."""
    folder, first = Path(config.output_dir), process_index()[0] == 0
    model = load_weights(config.model, job.name, torch.float32)
    model.requires_grad_(False)
    towers = finetune_use(config.towers, config.method)
    trained = full_parameters(config, model)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    files = open_checkpoint(resolve(job.name, config.model.revision))
    base = BaseWeights.before_training(files, weight_table(skeleton, files.keys()), trained)
    if config.save != "deltas" and first:
        save_checkpoint(model, job.renderer, folder / "pretrained", record=job.record)
    set_seed(config.seed)
    trainer = train_job(config, model, job, checkpoint, tower_rates=towers.rates)
    state = whole_state(trainer)
    if config.save != "deltas" and first:
        save_checkpoint(plain_model(trainer), job.renderer, folder / "finetuned", state, record=job.record)
    if config.save != "checkpoints" and first:
        facts = delta_facts(config, job, trainer, files.files)
        write_deltas(folder / "deltas", trained, base, model_sites(skeleton), facts)
    return trainer


def train_lora(config: FinetuneConfig, job: Job, skeleton: PreTrainedModel, checkpoint: Path | None) -> RankwiseTrainer:
    """A high-rank LoRA as the probe; `ranks --adapter` reads its spectra from the factors."""
    if config.learning_rate < LORA_RATE:
        announce(f"note: --learning_rate {config.learning_rate:g} suits full fine-tuning; LoRA takes 1e-4 or more")
    towers = finetune_use(config.towers, config.method)
    sites = choose_sites(adaptable_sites(skeleton, config.target), config.target, towers=towers.lora)
    plan = uniform_plan(sites, config.lora_r, None, False, job.name)
    for line in describe_trained(skeleton, plan, {}):
        announce(line)
    model = load_weights(config.model, job.name, frozen_dtype(config.model.dtype, job.arguments))
    set_seed(config.seed)
    adapted = adapt(model, plan, LoraSection(lora_dropout=0.0))
    trainer = train_job(config, adapted, job, checkpoint, tower_rates=towers.rates)
    write_adapter_files(trainer, Path(config.output_dir), job.name, plan, [])
    return trainer


def save_checkpoint(
    model: PreTrainedModel,
    renderer: Renderer,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    record: InputRecord,
) -> None:
    """A Hugging Face folder in float32 with its tokenizer or processor, and how rows became its tokens: what the two of
    a pair are asked with. Whole or not at all."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state, max_shard_size=MAX_SHARD)
        (renderer.sight.processor if renderer.sight else renderer.tokenizer).save_pretrained(temporary)
        save_input(renderer, record, temporary)


def delta_facts(config: FinetuneConfig, job: Job, trainer: RankwiseTrainer, files: Sequence[Path]) -> dict[str, Any]:
    """Provenance of the deltas: the base, and how they were trained."""
    return {
        "model_name": job.name,
        "revision": config.model.revision,
        "base_fingerprints": fingerprints(files),
        "num_samples": len(job.rows),
        "seed": config.seed,
        "optimizer": str(job.arguments.optim.value),
        "learning_rate": config.learning_rate,
        "steps": trainer.state.global_step,
        "task": config.data.task,
    }


def run(config: FinetuneConfig) -> Path:
    """Run the command. Returns the run folder."""
    config = check(config)
    name = config.model.model_name
    assert name is not None
    arguments = arguments_of(config)
    check_folder(config)
    folder = RunFolder(config.output_dir)
    given: dict[str, Path | str] = {"model": name, "data": str(config.data.data_path)}
    with held(folder, "finetune", given) as record:
        skeleton = load_readable_structure(config.model, name)
        job = prepare(config, name, arguments, skeleton)
        checkpoint = starting_point(config, job)
        started = time.monotonic()
        trainer = (train_lora if config.method == "lora" else train_full)(config, job, skeleton, checkpoint)
        if trainer.is_world_process_zero():
            finish(config, trainer, len(job.rows), record, time.monotonic() - started)
    return folder.path


def check(config: FinetuneConfig) -> FinetuneConfig:
    """The config with its data's task; invalid combinations of options are refused before anything is read."""
    config = settle(config)
    check_data(config.data, "finetune")
    if not config.model.model_name:
        raise UsageError("finetune needs a model: --model_name FOLDER_OR_HUB_ID")
    refuse_idle(config)
    check_rates(finetune_use(config.towers, config.method).rates, config.training)
    if config.method == "lora" and config.save != "deltas":
        raise UsageError("--method lora saves its adapter, whose spectra are exact; --save is for --method full")
    sharded = config.training.get("fsdp") or config.training.get("deepspeed")
    if config.method == "full" and sharded and config.save != "checkpoints":
        raise UsageError("finetune with sharded parameters needs --save checkpoints")
    return config


def arguments_of(config: FinetuneConfig) -> TrainingArguments:
    own = {
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "num_train_epochs": config.num_epochs,
        **({"use_wandb": True} if config.use_wandb else {}),
    }
    given = own | dict(config.training)
    evaluating = [name for name in ("eval_strategy", "eval_steps") if given.get(name, "no") != "no"]
    if evaluating:
        raise UsageError(f"finetune has no validation rows: it makes a delta, not a model; leave --{evaluating[0]} out")
    return build_arguments(config.output_dir, config.seed, given, FINETUNE_DEFAULTS, config.model.dtype)


def prepare(config: FinetuneConfig, name: str, arguments: TrainingArguments, skeleton: PreTrainedModel) -> Job:
    """The subset, rendered and checked, and the memory that training on it takes."""
    towers = finetune_use(config.towers, config.method)
    check_towers(skeleton, towers.trained)
    earlier = earlier_checkpoint(config)
    renderer = renderer_for(config.data, config.model, name, skeleton.config, earlier, anew=not earlier)
    decode_aside(arguments, config.training, renderer)
    sees_images = renderer.sight is not None
    examples = read_examples(config.data, str(config.data.data_path), sees_images=sees_images)
    rows = render_rows(choose_subset(config, examples), renderer)
    warn_few_updates(len(rows), arguments)
    if config.method == "full":
        trained = sum(parameter.numel() for parameter in full_parameters(config, skeleton).values())
        needed = memory_needed(skeleton, trained, arguments, max(rows.lengths))
        announce(refuse_too_large(needed, memory_available(arguments.device)))
    facts = {
        **base_facts(config.model, name, arguments),
        **data_facts(config.data, renderer, examples, rows),
        "subset": [config.subset_ratio, config.max_samples, config.skip_shards],
        "method": [config.method, config.lora_r if config.method == "lora" else None],
    }
    if config.target is not None:
        facts |= {"target": config.target}
    if config.towers != TowersSection():
        facts |= {"towers": list(towers.trained), "tower_rates": dict(towers.rates)}
    return Job(name, arguments, renderer, rows, facts=facts)


def choose_subset(config: FinetuneConfig, examples: Examples) -> Sequence[Example]:
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
    updates = run_length(samples, arguments.per_device_train_batch_size, arguments).updates
    if updates < FEW_UPDATES:
        announce(
            f"warning: {samples} samples make {updates} updates; below {FEW_UPDATES} the delta shows the optimizer's "
            "first steps more than the task. Raise --subset_ratio or --num_epochs, or lower --gradient_accumulation"
        )


def outputs(config: FinetuneConfig) -> list[Path]:
    folder = Path(config.output_dir)
    if config.method == "lora":
        return [folder / name for name in ("adapter_model.safetensors", "adapter_config.json", "sites.json")]
    written = {"deltas": ["deltas"], "checkpoints": ["pretrained", "finetuned"]}
    return [folder / name for kind, names in written.items() if config.save in (kind, "both") for name in names]


def next_command(config: FinetuneConfig) -> str:
    folder, towers = Path(config.output_dir), finetune_use(config.towers, config.method).trained
    more = {} if towers == ("language",) else {"towers": ",".join(towers)}
    if config.method == "lora":
        return command_line("ranks", adapter=folder, model_name=config.model.model_name, **more)
    if config.save == "checkpoints":
        return command_line("ranks", folder / "pretrained", folder / "finetuned", **more)
    return command_line("ranks", deltas=folder, **more)


def finish(config: FinetuneConfig, trainer: RankwiseTrainer, samples: int, record: Record, seconds: float) -> None:
    """Enter the run in its manifest; print the results and the next command."""
    trained = {name: value.numel() for name, value in plain_model(trainer).named_parameters() if value.requires_grad}
    full = config.method == "full"
    record.facts |= {
        "steps": trainer.state.global_step,
        "samples": samples,
        "training_seconds": round(seconds, 2),
        "trainable_parameters" if full else "probe_parameters": sum(trained.values()),
        **({"trained": list(trained)} if full else {}),
    }
    beside = (Path(config.output_dir) / name for name in (TRAINING_LOG, INPUT))
    record.outputs |= {path.name: path for path in (*outputs(config), *beside)}
    print(
        f"finetune: {trainer.state.global_step:,} updates on {samples:,} samples in {duration(seconds)}, "
        f"{describe_losses(trainer.state.log_history)}; {amount(sum(trained.values()))} parameters trained"
    )
    print("wrote " + ", ".join(str(path) for path in outputs(config)))
    print(f"next: {next_command(config)}")


def describe(config: FinetuneConfig) -> list[str]:
    config = settle(config)
    towers = " and ".join(finetune_use(config.towers, config.method).trained)
    part = (
        f"every {towers} parameter" if config.target is None else f"the {towers} matrices of --target {config.target}"
    )
    what = part if config.method == "full" else f"a LoRA of rank {config.lora_r} ({towers})"
    return [
        f"fine-tune {what} on {config.subset_ratio:.3%} of {config.data.data_path} (at most {config.max_samples:,} "
        f"rows) as {config.data.task}",
        "write " + ", ".join(str(path) for path in outputs(config)),
        f"continue with: {next_command(config)}",
    ]
