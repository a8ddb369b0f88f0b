"""rankwise train: LoRA or QLoRA with a rank plan or one rank, resumable, ending in a PEFT adapter.

rankwise train --model_name MODEL --lora_config configs/lora_rank_config.json --task e2e_nlg --data_path DIR
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.data.depth.prepare import asked, depth_lines, gate_module, save_depth
from rankwise.data.input_record import save_input
from rankwise.data.sources.load import check_data
from rankwise.data.split import SPLIT
from rankwise.errors import UsageError
from rankwise.files.adapter import LoraPair
from rankwise.files.atomic import read_object
from rankwise.files.plan import find_plan
from rankwise.files.processes import announce
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.adapt import MOVES_BASE, lora_pairs, trainable_parameters
from rankwise.models.depth.encoder import attach_depth
from rankwise.models.load import load_config, load_readable_structure
from rankwise.models.sites import full_sites
from rankwise.options.commands import TrainConfig
from rankwise.pipeline.idle import refuse_idle
from rankwise.train.adalora import (
    RankAllocation,
    allocation_facts,
    allocation_of,
    check_allocation,
    start_rank,
    starting_lora,
)
from rankwise.train.adapter import adapt_base, check_lora, choose_plan, describe_target, sites_for
from rankwise.train.arguments import build_arguments, frozen_dtype, quantization
from rankwise.train.estimate.command import check_estimate, run_estimate
from rankwise.train.experts import refuse_asked, report_unquantized, settle_dropout
from rankwise.train.job import Job, prepare, rates_of, settle_training
from rankwise.train.launch import check_folder, finished_checkpoints, starting_point, train_job
from rankwise.train.launch import going_on as going_on
from rankwise.train.phases import gradient_norms, phase_keeper, schedule_of
from rankwise.train.results import (
    Outcome,
    adapter_folder,
    finish,
    plain_model,
    save_allocated,
    write_adapter_files,
)
from rankwise.train.selection import (
    Patience,
    accuracy_of,
    arguments_for,
    check_selection,
    sampler_of,
    save_task,
    selection_lines,
)
from rankwise.train.together.arm_folder import ARM
from rankwise.train.together.command import describe_arms, run_arms
from rankwise.train.towers import check_rates, default_towers, describe_towers, describe_trained, full_of, train_use
from rankwise.train.trainer import RankwiseTrainer


def run(config: TrainConfig) -> Path:
    """Run the command. Returns the run folder, whose root holds the adapter."""
    config = check(config)
    name = base_name(config)
    config = default_towers(config, load_config(name, config.model.revision, config.model.trust_remote_code))
    arguments = arguments_of(config)
    if config.arms:
        return run_arms(config, name, arguments, inputs(config, name))
    if config.estimate.estimate:
        return run_estimate(config, name, arguments)
    check_folder(config)
    folder, towers = RunFolder(config.output_dir), train_use(config.towers)
    with held(folder, "train", inputs(config, name)) as record:
        # what trains: names and shapes, before a weight is loaded
        skeleton = load_readable_structure(config.model, name)
        if depth := asked(config.depth):
            attach_depth(skeleton, depth)
        whole = full_of(skeleton, towers)
        full = whole | gate_module(skeleton)
        sites = sites_for(config.lora, skeleton, towers.routers)
        plan, left_out = choose_plan(starting_lora(config), sites, name, towers.lora)
        config = settle_dropout(config, plan)
        report_unquantized(config, skeleton, frozen_dtype(config.model.dtype, arguments))
        for line in describe_trained(skeleton, plan, full):
            announce(line)
        keeper = phase_keeper(config.phases, plan.adapted, config.seed, arguments, full_sites(skeleton, list(whole)))
        # on what, and what makes the run this run
        split, job = prepare(config, name, arguments, plan, skeleton, tuple(full))
        sampler = sampler_of(config.selection, job)
        allocation = allocation_of(config, plan, len(sampler or job.rows), arguments)
        job = replace(job, facts={**job.facts, **allocation_facts(allocation)})
        checkpoint = starting_point(config, job)
        # train
        model = adapt_base(config, job, plan, full, allocation)
        initial = lora_pairs(model) if config.lora.init_lora_weights in MOVES_BASE else None
        allocator = RankAllocation(allocation, folder.path) if allocation else None
        started = time.monotonic()
        trainer = train_job(
            config,
            model,
            job,
            checkpoint,
            beside=lambda place: [save_depth(job.depth, place), save_task(config.data, place)],
            loraplus_lr_ratio=config.lora.loraplus_lr_ratio,
            tower_rates=rates_of(config),
            phases=keeper,
            allocator=allocator,
            gradients=gradient_norms(config.phases, keeper, arguments),
            accuracy=accuracy_of(config.selection, job),
            sampler=sampler,
            callbacks=[Patience(patience)] if (patience := config.selection.early_stopping) else [],
        )
        seconds = time.monotonic() - started
        # what it leaves
        outcome = save_trained(config, trainer, allocator, job, plan, left_out, initial, full)
        record.outputs |= save_depth(job.depth, adapter_folder(config))
        record.outputs |= save_task(config.data, adapter_folder(config))
        if trainer.is_world_process_zero():
            record.outputs |= save_input(job.renderer, job.record, adapter_folder(config))
            SPLIT.write(folder, split.record())
            total = sum(parameter.numel() for parameter in skeleton.parameters())
            finish(config, trainer, outcome, total, record, seconds)
            record.facts |= {"trained_in_full": list(full)} if full else {}
    return folder.path


def save_trained(
    config: TrainConfig,
    trainer: RankwiseTrainer,
    allocator: RankAllocation | None,
    job: Job,
    plan: RankPlan,
    left_out: list[str],
    initial: Mapping[str, LoraPair] | None,
    full: Mapping[str, str],
) -> Outcome:
    """Save the adapter as plain PEFT, and describe it."""
    trainable, _ = trainable_parameters(plain_model(trainer))
    if allocator is None:
        write_adapter_files(trainer, adapter_folder(config), job.name, plan, left_out, initial, full)
    elif trainer.is_world_process_zero():
        return save_allocated(trainer, allocator, job, config, plan, left_out, full)
    return Outcome(len(plan.ranks), trainable)


def check(config: TrainConfig) -> TrainConfig:
    """The config with what its data say; invalid combinations of options are refused before anything is read."""
    config = settle_training(config)
    check_estimate(config.estimate, config)
    if config.data.data_path or not config.estimate.estimate:
        check_data(config.data, "train")
    if not config.model.model_name and not config.lora.lora_config:
        raise UsageError("train needs a base model: --model_name FOLDER_OR_HUB_ID")
    check_lora(config.lora)
    check_allocation(config)
    refuse_asked(config)
    refuse_idle(config)
    check_rates(rates_of(config), config.training)
    check_selection(config.selection, config.data.task, config.training, packing=config.packing)
    schedule_of(config.phases)
    asked(config.depth)
    return config


def earlier(config: TrainConfig) -> list[Path]:
    """What an earlier run has left in the folder: finished arms, or checkpoints."""
    return sorted(Path(config.output_dir).glob(f"*/{ARM.name}")) if config.arms else finished_checkpoints(config)


def base_name(config: TrainConfig) -> str:
    """The base as given, else as the plan names it."""
    if config.model.model_name:
        return config.model.model_name
    assert config.lora.lora_config is not None
    plan = find_plan(Path(config.lora.lora_config))
    name = read_object(plan).get("model_name")
    if not name:
        raise UsageError(f"{plan}: model not recorded; give it with --model_name")
    return str(name)


def arguments_of(config: TrainConfig) -> TrainingArguments:
    given = dict(config.training)
    if not config.val_path and config.val_fraction == 0:
        if given.get("eval_strategy", "no") != "no":
            raise UsageError("--eval_strategy needs validation rows: --val_path, or a --val_fraction above 0")
        given["eval_strategy"] = "no"
    given = arguments_for(config.selection, given)
    return build_arguments(config.output_dir, config.seed, given, dtype=config.model.dtype)


def inputs(config: TrainConfig, name: str) -> dict[str, str | None]:
    rows = {"data": config.data.data_path, "validation": config.val_path}
    return {"model": name, **rows, "plan": config.lora.lora_config, "deltas": config.lora.deltas}


def describe(config: TrainConfig) -> list[str]:
    config = settle_training(config)
    name = config.model.model_name
    if name and Path(name, "config.json").is_file():
        config = default_towers(config, load_config(name, config.model.revision, config.model.trust_remote_code))
    lora = config.lora
    what = f"the plan {lora.lora_config}" if lora.lora_config else f"rank {lora.lora_r} at {describe_target(lora)}"
    twice = f"twice the largest rank that fits (at most {2 * lora.lora_r})"
    what += f", rsLoRA with alpha {f'{lora.lora_alpha:g}' if lora.lora_alpha else twice}" if lora.use_rslora else ""
    lines = [f"adapt {config.model.model_name or 'the model that the plan names'} with {what}"]
    if config.allocation.allocator != "none":
        lines.append(f"let AdaLoRA divide the ranks: {start_rank(config)} everywhere, {lora.lora_r} on average at last")
    lines += [describe_towers(train_use(config.towers))]
    if quantization(lora):
        lines.append(f"load the base in {quantization(lora)} (extra: quant)")
    if lora.deltas:
        lines.append(f"start from the deltas in {lora.deltas}")
    lines += depth_lines(asked(config.depth))
    form = schedule_of(config.phases)
    if form is not None:
        lines.append(f"train in phases: {form}")
    lines += selection_lines(config.selection)
    held_out = config.val_path or f"{config.val_fraction:.0%} of the groups held out"
    lines.append(f"train on {config.data.data_path} as {config.data.task}, validate on {held_out}")
    return [*describe_arms(config), *lines[1:]] if config.arms else lines
