"""rankwise train: LoRA or QLoRA with a rank plan or one rank, resumable, ending in a PEFT adapter.

rankwise train --model_name MODEL --lora_config configs/lora_rank_config.json --task e2e_nlg --data_path DIR
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from rankwise.config import TrainConfig
from rankwise.core.plan import RankPlan
from rankwise.data import Example, Examples, PackedDataset, Renderer, Split, split_groups, subset
from rankwise.errors import UsageError
from rankwise.nets.adapt import MOVES_BASE, lora_pairs, scales
from rankwise.nets.depth import attach_depth
from rankwise.nets.depth_settings import DepthSettings
from rankwise.nets.sites import model_sites
from rankwise.nets.towers import full_sites
from rankwise.stages import training as shared
from rankwise.stages.adapting import adapted, check_lora, described_target, planned, quantization, settings_of
from rankwise.stages.depth import asked, depth_facts, depth_lines, gate_module, idle, prepared, save_depth
from rankwise.stages.estimate import Rows, check_estimate, estimate, show
from rankwise.stages.outcome import SPLIT_FILE, adapter_folder, finish
from rankwise.stages.rendering import decode_aside, renderer_for
from rankwise.stages.scheduling import gradient_norms, phase_keeper, schedule_of
from rankwise.stages.towers import check_rates, full_of, train_use, trained_lines, words
from rankwise.store.deltas import open_deltas
from rankwise.store.files import read_object, write_json
from rankwise.store.plan_file import find_plan
from rankwise.store.processes import announce
from rankwise.store.run import RunFolder
from rankwise.train.arguments import build_arguments
from rankwise.train.tables import TRAINING_LOG


def run(config: TrainConfig) -> Path:
    """The whole command; returns the run folder, whose root holds the adapter."""
    config = shared.settled(config)
    check(config)
    name = base_name(config)
    arguments = arguments_of(config)
    if config.estimate.estimate:
        return estimated(config, name, arguments)
    folder, towers = RunFolder(config.output_dir), train_use(config.towers)
    with shared.held(folder, "train", inputs(config, name)) as record:
        skeleton = shared.structure(config.model, name)
        depth = asked(config.depth)
        if depth:
            attach_depth(skeleton, depth)
        whole = full_of(skeleton, towers)
        full = whole | gate_module(skeleton)
        plan, left_out = planned(config.lora, model_sites(skeleton), name, towers.lora)
        for line in trained_lines(skeleton, plan, full):
            announce(line)
        keeper = phase_keeper(config.phases, plan.adapted, config.seed, arguments, full_sites(skeleton, list(whole)))
        split, job = prepare(config, name, arguments, plan, skeleton, tuple(full))
        checkpoint = shared.starting_point(config, job)
        save_depth(job.depth, folder.path)
        model = adapted(config, job, plan, full)
        initial = lora_pairs(model) if config.lora.init_lora_weights in MOVES_BASE else None
        started = time.monotonic()
        trainer = shared.trained(
            model,
            job,
            checkpoint,
            loraplus_lr_ratio=config.lora.loraplus_lr_ratio,
            tower_rates=towers.rates,
            phases=keeper,
            gradients=gradient_norms(config.phases, keeper, arguments),
        )
        seconds = time.monotonic() - started
        shared.write_adapter_files(trainer, adapter_folder(config), name, plan, left_out, initial, full)
        record.outputs |= save_depth(job.depth, adapter_folder(config))
        if trainer.is_world_process_zero():
            write_json(folder / SPLIT_FILE, split.record())
            total = sum(parameter.numel() for parameter in skeleton.parameters())
            finish(config, trainer, len(plan.ranks), total, record, seconds)
            record.facts |= {"trained_in_full": list(full)} if full else {}
    return folder.path


def check(config: TrainConfig) -> None:
    """Combinations that cannot work, before anything is read."""
    check_estimate(config.estimate, config)
    if config.data.data_path or not config.estimate.estimate:
        shared.check_data(config.data, "train")
    if not config.model.model_name and not config.lora.lora_config:
        raise UsageError("train needs a base model: --model_name FOLDER_OR_HUB_ID")
    check_lora(config.lora)
    check_rates(train_use(config.towers), config.training)
    schedule_of(config.phases)
    asked(config.depth)


def estimated(config: TrainConfig, name: str, arguments: TrainingArguments) -> Path:
    """Print what the run would take instead of running it; returns the folder that it would have."""
    skeleton, towers = shared.structure(config.model, name), train_use(config.towers)
    full = full_of(skeleton, towers)
    plan, _ = planned(config.lora, model_sites(skeleton), name, towers.lora)
    settings = settings_of(config.lora, full)
    rows = estimated_rows(config, name, skeleton)
    show(estimate(config, name, arguments, skeleton, plan, settings, quantization(config.lora), rows), config.estimate)
    return Path(config.output_dir)


def estimated_rows(config: TrainConfig, name: str, skeleton: PreTrainedModel) -> Rows:
    """The training rows as they would be, or rows of the greatest length where none are given."""
    if not config.data.data_path:
        return Rows(None, 0, None, config.data.max_seq_length)
    renderer = renderer_for(config.data, config.model, name, skeleton.config)
    _, split = read_split(config, sees_images=renderer.sight is not None)
    rows = shared.rendered(split.train, renderer)
    chosen = PackedDataset(rows, renderer.limit) if config.packing else rows
    return Rows(chosen, renderer.tokenizer.pad_token_id or 0, renderer.sight, renderer.limit)


def base_name(config: TrainConfig) -> str:
    """The base as given, else as the plan names it."""
    if config.model.model_name:
        return config.model.model_name
    assert config.lora.lora_config is not None
    plan = find_plan(Path(config.lora.lora_config))
    name = read_object(plan).get("model_name")
    if not name:
        raise UsageError(f"{plan} does not name its model; give it with --model_name")
    return str(name)


def arguments_of(config: TrainConfig) -> TrainingArguments:
    given = dict(config.training)
    if not config.val_path and config.val_fraction == 0:
        if given.get("eval_strategy", "no") != "no":
            raise UsageError("--eval_strategy needs validation rows: --val_path, or a --val_fraction above 0")
        given["eval_strategy"] = "no"
    return build_arguments(config.output_dir, config.seed, given, dtype=config.model.dtype)


def inputs(config: TrainConfig, name: str) -> dict[str, Path | str]:
    found = {
        "model": name,
        "data": config.data.data_path,
        "validation": config.val_path,
        "plan": config.lora.lora_config,
        "deltas": config.lora.deltas,
    }
    return {key: value for key, value in found.items() if value}


def read_split(config: TrainConfig, *, sees_images: bool) -> tuple[Examples, Split]:
    """Training and validation rows: from two files, or a share of the groups held out with the seed."""
    path = config.data.data_path
    assert path is not None
    generator = random.Random(config.seed)
    examples = shared.read_examples(config.data, path, sees_images=sees_images)
    if config.val_path:
        validation = shared.read_examples(config.data, config.val_path, "dev", sees_images=sees_images)
        split = Split(examples.items, validation.items)
    else:
        split = split_groups(examples.items, config.val_fraction, generator)
    if config.max_samples is not None:
        split = Split(subset(split.train, 1.0, config.max_samples, generator), split.val)
    return examples, split


def prepare(
    config: TrainConfig,
    name: str,
    arguments: TrainingArguments,
    plan: RankPlan,
    skeleton: PreTrainedModel,
    full: Sequence[str] = (),
) -> tuple[Split, shared.Job]:
    """Rows, rendered and checked, and what the run is."""
    renderer = renderer_for(config.data, config.model, name, skeleton.config)
    decode_aside(arguments, config.training, renderer)
    examples, split = read_split(config, sees_images=renderer.sight is not None)
    rows = shared.rendered(split.train, renderer)
    evaluates = split.val and arguments.eval_strategy != "no"
    validation = shared.rendered(split.val, renderer) if evaluates else None
    depth, renderer = with_depth(
        config, renderer, [*rows.examples, *(validation.examples if validation else ())], arguments
    )
    what = facts(config, name, arguments, plan, renderer, examples, len(rows)) | tower_facts(config, full)
    what |= depth_facts(depth)
    chosen = PackedDataset(rows, renderer.limit) if config.packing else rows
    if config.packing:
        refuse_packed_images(examples, renderer)
        announce(f"packing: {len(rows):,} samples in {len(chosen):,} rows of up to {renderer.limit:,} tokens")
    return split, shared.Job(name, arguments, renderer, chosen, validation, what, depth)


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
        raise UsageError("--use_depth needs a model that sees images, and rows that have some")
    settings, sight = prepared(
        settings, config.depth, renderer.sight, examples, seed=config.seed, device=arguments.device
    )
    return settings, replace(renderer, sight=sight)


def refuse_packed_images(examples: Examples, renderer: Renderer) -> None:
    if renderer.sight is not None and examples.with_images:
        raise UsageError("--packing takes rows of text only: in one row, images of several samples would mix")


def facts(
    config: TrainConfig,
    name: str,
    arguments: TrainingArguments,
    plan: RankPlan,
    renderer: Renderer,
    examples: Examples,
    samples: int,
) -> dict[str, Any]:
    """What makes this run this run, beside the training arguments."""
    lora, form = config.lora, schedule_of(config.phases)
    return {
        **shared.base_facts(config.model, name, arguments),
        **shared.data_facts(config.data, renderer, examples, samples),
        "validation": "rows of their own" if config.val_path else config.val_fraction,
        "ranks": plan.ranks,
        "scales": sorted(set(scales(plan).values())),
        "lora": {
            "dropout": lora.lora_dropout,
            "bias": lora.lora_bias,
            "dora": lora.use_dora,
            "rslora": plan.use_rslora,
            "init": lora.init_lora_weights,
            "loraplus_lr_ratio": lora.loraplus_lr_ratio,
            "warm_start": shared.fingerprints(open_deltas(Path(lora.deltas)).checkpoint.files) if lora.deltas else None,
        },
        "quantization": quantization(lora),
        "packing": config.packing,
        "schedule": None if form is None else [str(form), config.phases.phase_state],
    }


def tower_facts(config: TrainConfig, full: Sequence[str]) -> dict[str, Any]:
    """Of a run in which not all is an adapter at one rate."""
    rates = train_use(config.towers).rates
    return {**({"full": list(full)} if full else {}), **({"tower_rates": dict(rates)} if rates else {})}


def describe(config: TrainConfig) -> list[str]:
    config = shared.settled(config)
    check(config)
    lora = config.lora
    what = f"the plan {lora.lora_config}" if lora.lora_config else f"rank {lora.lora_r} at {described_target(lora)}"
    lines = [f"adapt {config.model.model_name or 'the model that the plan names'} with {what}"]
    lines += [words(train_use(config.towers))]
    if quantization(lora):
        lines.append(f"load the base in {quantization(lora)} (extra: quant)")
    if lora.deltas:
        lines.append(f"start from the deltas in {lora.deltas}")
    lines += depth_lines(asked(config.depth))
    form = schedule_of(config.phases)
    if form is not None:
        lines.append(f"train in phases: {form}")
    held_out = config.val_path or f"{config.val_fraction:.0%} of the groups held out"
    lines.append(f"train on {config.data.data_path} as {config.data.task}, validate on {held_out}")
    return [*lines, f"write the adapter, sites.json, {TRAINING_LOG} and checkpoints to {config.output_dir}"]
