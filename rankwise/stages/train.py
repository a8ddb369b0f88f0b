"""rankwise train: LoRA or QLoRA with a rank plan or one rank, resumable, ending in a PEFT adapter.

rankwise train --model_name MODEL --lora_config configs/lora_rank_config.json --task e2e_nlg --data_path DIR
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments, set_seed

from rankwise.config import LoraSection, TrainConfig
from rankwise.core.plan import RankPlan, recorded_sites
from rankwise.core.site import Site
from rankwise.data import Collator, Examples, RenderedDataset, Split, split_groups, subset
from rankwise.errors import UsageError
from rankwise.nets.adapt import LoraSettings, adapt, lora_pairs, scales, trainable_parameters
from rankwise.nets.adapters import save_adapter, write_sites
from rankwise.nets.sites import model_sites
from rankwise.nets.starts import eva_start, input_directions, warm_start
from rankwise.nets.targets import check_plan, choose_sites, restricted, uniform_plan
from rankwise.show.format import amount, duration, percent
from rankwise.stages import training as shared
from rankwise.store.deltas import open_deltas
from rankwise.store.files import fingerprint, read_object, write_json
from rankwise.store.plan_file import find_plan, read_plan
from rankwise.store.processes import announce
from rankwise.store.run import Record, RunFolder
from rankwise.train.arguments import build_arguments, frozen_dtype
from rankwise.train.resume import identity_of
from rankwise.train.tables import TRAINING_LOG
from rankwise.train.trainer import RankwiseTrainer

EVA_BATCHES, EVA_ROWS = 16, 8
Rows = tuple[RenderedDataset, RenderedDataset | None]


def run(config: TrainConfig) -> Path:
    """The whole command; returns the run folder, whose root holds the adapter."""
    check(config)
    name = base_name(config)
    arguments = arguments_of(config)
    folder = RunFolder(config.output_dir)
    with shared.held(folder, "train", config, inputs(config, name)) as record:
        skeleton = shared.structure(config.model, name)
        plan, left_out = planned(config.lora, model_sites(skeleton), name)
        examples, split = read_split(config)
        renderer = shared.renderer_for(config.data, config.model, name, skeleton.config)
        rows = datasets(split, renderer, arguments)
        identity = identity_of(arguments, **facts(config, name, arguments, plan, examples, len(rows[0])))
        checkpoint = shared.starting_point(
            config.resume_from_checkpoint,
            config.allow_partial_resume,
            bool(config.training.get("overwrite_output_dir")),
            folder,
            identity,
        )
        collator = shared.collator_for(renderer, arguments)
        model = adapted(config, name, arguments, plan, rows[0], collator)
        initial = lora_pairs(model) if config.lora.init_lora_weights in ("pissa", "olora") else None
        trainer = RankwiseTrainer(
            model=model,
            args=arguments,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            data_collator=collator,
            identity=identity,
            loraplus_lr_ratio=config.lora.loraplus_lr_ratio,
        )
        started = time.monotonic()
        trainer.train(checkpoint)
        seconds = time.monotonic() - started
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if trainer.is_world_process_zero():
            trained = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(trained, folder.path, name, initial, state)
            write_sites(folder.path, plan, left_out)
            write_json(folder / "split.json", split.record())
            finish(config, trainer, plan, record, seconds)
    return folder.path


def check(config: TrainConfig) -> None:
    """Combinations that cannot work, before anything is read."""
    lora = config.lora
    shared.check_data(config.data, "train")
    settings_of(lora)
    if not config.model.model_name and not lora.lora_config:
        raise UsageError("train needs a base model: --model_name FOLDER_OR_HUB_ID")
    if lora.lora_config and (lora.lora_alpha is not None or lora.use_rslora):
        raise UsageError(
            "--lora_alpha and --use_rslora do not go with a rank plan: the plan owns the scale (alpha = 2·r at every "
            "site, or its own use_rslora)"
        )
    if lora.load_in_8bit and lora.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")
    if (lora.warm_start == "delta") != bool(lora.deltas):
        raise UsageError("--warm_start delta and --deltas FINETUNE_RUN go together")
    if lora.warm_start == "delta" and (lora.use_dora or lora.init_lora_weights != "default"):
        raise UsageError("--warm_start delta is an initialisation: leave --use_dora and --init_lora_weights out")
    if not 0 <= lora.lora_dropout < 1:
        raise UsageError(f"--lora_dropout must be at least 0 and below 1, got {lora.lora_dropout}")


def settings_of(lora: LoraSection) -> LoraSettings:
    return LoraSettings(lora.lora_dropout, lora.lora_bias, lora.use_dora, lora.init_lora_weights)


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


def planned(lora: LoraSection, sites: Mapping[str, Site], name: str) -> tuple[RankPlan, list[str]]:
    """What is adapted with which rank, checked against the model; and what of a plan is left out."""
    if not lora.lora_config:
        chosen = choose_sites(sites, lora.target, lora.target_modules)
        return uniform_plan(chosen, lora.lora_r, lora.lora_alpha, lora.use_rslora, name), []
    file = find_plan(Path(lora.lora_config))
    check_plan(RankPlan(tuple(row for row in read_plan(file, sites).sites)))
    recorded = recorded_sites(read_object(file))
    if any(site.tower == "unknown" for site in recorded.values()):
        raise UsageError(
            f"{file} was made from files without a config.json: its sites are named by checkpoint keys and their tower "
            "is unknown. Make it again with `rankwise ranks` from Hugging Face model folders"
        )
    plan, left_out = read_plan(file, sites), []
    if lora.target or lora.target_modules:
        plan, left_out = restricted(plan, choose_sites(sites, lora.target, lora.target_modules))
        announce(f"note: {len(left_out)} sites of the plan are outside --target and are left out")
    for row in plan.sites:
        if row.clipped and "above min" in row.clipped:
            announce(f"note: {row.site.path}: rank {row.clipped}; cut to it")
    return plan, left_out


def read_split(config: TrainConfig) -> tuple[Examples, Split]:
    """Training and validation rows: from two files, or a share of the groups held out with the seed."""
    path = config.data.data_path
    assert path is not None
    generator = random.Random(config.seed)
    examples = shared.read_examples(config.data, path)
    if config.val_path:
        split = Split(examples.items, shared.read_examples(config.data, config.val_path, "dev").items)
    else:
        split = split_groups(examples.items, config.val_fraction, generator)
    if config.max_samples is not None:
        split = Split(tuple(subset(split.train, 1.0, config.max_samples, generator)), split.val)
    return examples, split


def datasets(split: Split, renderer: Any, arguments: TrainingArguments) -> Rows:
    evaluates = split.val and arguments.eval_strategy != "no"
    return shared.rendered(split.train, renderer), shared.rendered(split.val, renderer) if evaluates else None


def facts(
    config: TrainConfig, name: str, arguments: TrainingArguments, plan: RankPlan, examples: Examples, samples: int
) -> dict[str, Any]:
    """What makes this run this run, beside the training arguments."""
    lora = config.lora
    return {
        **shared.base_facts(config.model, name, arguments),
        **shared.data_facts(config.data, examples, samples),
        "validation": [config.val_path, config.val_fraction],
        "ranks": plan.ranks,
        "scales": sorted(set(scales(plan).values())),
        "lora": {
            "dropout": lora.lora_dropout,
            "bias": lora.lora_bias,
            "dora": lora.use_dora,
            "rslora": plan.use_rslora,
            "init": lora.init_lora_weights,
            "loraplus_lr_ratio": lora.loraplus_lr_ratio,
            "warm_start": fingerprint(Path(lora.deltas)) if lora.deltas else None,
        },
        "quantization": quantization(lora),
    }


def quantization(lora: LoraSection) -> str | None:
    return "8bit" if lora.load_in_8bit else "4bit" if lora.load_in_4bit else None


def adapted(
    config: TrainConfig,
    name: str,
    arguments: TrainingArguments,
    plan: RankPlan,
    rows: RenderedDataset,
    collator: Collator,
) -> PeftModel:
    """The base with its adapter at the planned start. The one seed decides the random part."""
    base = shared.loaded(config.model, name, frozen_dtype(config.model.dtype, arguments), quantization(config.lora))
    settings = settings_of(config.lora)
    set_seed(config.seed)
    if settings.init == "eva":
        directions = input_directions(base, plan, eva_batches(rows, collator, config.seed))
        model = adapt(base, plan, settings)
        eva_start(model, directions)
        return model
    model = adapt(base, plan, settings)
    if config.lora.deltas:
        generator = torch.Generator().manual_seed(config.seed)
        warm_start(model, plan, open_deltas(Path(config.lora.deltas)), generator)
    return model


def eva_batches(rows: RenderedDataset, collator: Collator, seed: int) -> list[dict[str, torch.Tensor]]:
    """A few batches of training rows, drawn with the seed, as model inputs without labels."""
    count = min(len(rows), EVA_BATCHES * EVA_ROWS)
    chosen = random.Random(seed).sample(range(len(rows)), count)
    parts = [chosen[start : start + EVA_ROWS] for start in range(0, count - count % EVA_ROWS or count, EVA_ROWS)]
    batches = [collator([rows[index] for index in part]) for part in parts]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def finish(config: TrainConfig, trainer: RankwiseTrainer, plan: RankPlan, record: Record, seconds: float) -> None:
    """Enter the run in its manifest, and say in a few lines what came out and what comes next."""
    folder = Path(config.output_dir)
    trainable, total = trainable_parameters(trainer.accelerator.unwrap_model(trainer.model))
    base = total - trainable
    steps = trainer.state.global_step
    record.outputs |= {
        name: folder / name for name in ("adapter_model.safetensors", "adapter_config.json", "sites.json")
    }
    record.outputs["log"] = folder / TRAINING_LOG
    record.facts |= {
        "trainable_parameters": trainable,
        "total_parameters": base,
        "adapted_sites": len(plan.ranks),
        "steps": steps,
        "training_seconds": round(seconds, 2),
    }
    print(
        f"train: {steps:,} steps in {duration(seconds)}, {shared.losses(trainer.state.log_history)}; "
        f"{amount(trainable)} trainable parameters, {percent(trainable / base)} of full fine-tuning ({amount(base)})"
    )
    print(f"adapter in {folder}, losses in {folder / TRAINING_LOG}")
    print(f"next: rankwise evaluate {folder} --task {config.data.task} --data_path {config.data.data_path}")


def describe(config: TrainConfig) -> list[str]:
    check(config)
    lora = config.lora
    what = f"the plan {lora.lora_config}" if lora.lora_config else f"rank {lora.lora_r} at {described_target(lora)}"
    lines = [f"adapt {config.model.model_name or 'the model that the plan names'} with {what}"]
    if quantization(lora):
        lines.append(f"load the base in {quantization(lora)} (extra: quant)")
    if lora.deltas:
        lines.append(f"start from the deltas in {lora.deltas}")
    held_out = config.val_path or f"{config.val_fraction:.0%} of the groups held out"
    lines.append(f"train on {config.data.data_path} as {config.data.task}, validate on {held_out}")
    return [*lines, f"write the adapter, sites.json, {TRAINING_LOG} and checkpoints to {config.output_dir}"]


def described_target(lora: LoraSection) -> str:
    return ", ".join(lora.target_modules) or lora.target or "all attention and MLP projections"
