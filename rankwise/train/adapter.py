"""The adapter that `train` trains: the plan, checked against the model, and A and B at their planned start.

--lora_config | --lora_r ─▶ planned ─▶ adapted: random, a preliminary run's delta (warm_start), inputs (EVA)
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from rankwise.core.experts import join_experts, split_experts
from rankwise.core.factors import truncate
from rankwise.core.plan import RankPlan, recorded_sites
from rankwise.core.site import ROUTER, Site
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.likelihood import BESIDE
from rankwise.files.atomic import read_object
from rankwise.files.plan import find_plan, read_plan
from rankwise.files.processes import announce
from rankwise.models.adapt import ADAPTER, Allocation, adapt, adapt_allocated, check_savable, lora_config, lora_layers
from rankwise.models.depth.encoder import attach_depth
from rankwise.models.load import another_base, load_weights
from rankwise.models.sites import tower_of
from rankwise.models.targets import (
    LANGUAGE,
    adaptable_sites,
    check_plan,
    choose_sites,
    restrict_plan,
    scales,
    uniform_plan,
)
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import LoraSection
from rankwise.ranks.deltas import DeltaSource, check_finite, deltas, open_deltas, read_expert
from rankwise.train.arguments import frozen_dtype, quantization
from rankwise.train.job import Job

EVA_BATCHES, EVA_ROWS = 16, 8
PLAIN_SCALE, LARGE_SCALE = 2, 4


def check_lora(lora: LoraSection) -> None:
    """Refuse invalid combinations of LoRA options."""
    check_savable(lora)
    if lora.load_in_8bit and lora.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")
    if lora.warm_start == "delta" and (lora.use_dora or lora.init_lora_weights != "default"):
        raise UsageError("--warm_start delta is an initialisation: leave --use_dora and --init_lora_weights out")


def describe_target(lora: LoraSection) -> str:
    return ", ".join(lora.target_modules) or lora.target or "all attention and MLP projections"


def sites_for(lora: LoraSection, model: PreTrainedModel, routers: bool = False) -> dict[str, Site]:
    """What these options can adapt of a model; a plan says itself what it adapts."""
    named = lora.target_modules or [plan for plan in (lora.lora_config,) if plan]
    return adaptable_sites(model, lora.target, named, routers)


def choose_plan(
    lora: LoraSection, sites: Mapping[str, Site], name: str, towers: Sequence[str] = LANGUAGE
) -> tuple[RankPlan, list[str]]:
    """Sites and ranks to adapt in these towers, checked against the model; and the sites of a plan left out."""
    if not lora.lora_config:
        chosen = choose_sites(sites, lora.target, lora.target_modules, towers)
        plan = uniform_plan(chosen, lora.lora_r, lora.lora_alpha, lora.use_rslora, name)
        announce_scale(plan)
        return plan, []
    plan = load_plan(Path(lora.lora_config), sites, towers)
    for note in another_base(lora.lora_config, plan.model_name, name):
        announce(f"note: {note}")
    if any(site.kind == ROUTER for site in sites.values()) and all(row.site.kind != ROUTER for row in plan.sites):
        raise UsageError(f"--lora router: {lora.lora_config} has no ranks of routers; leave it out")
    left_out: list[str] = []
    if lora.target or lora.target_modules:
        plan, left_out = restrict_plan(plan, choose_sites(sites, lora.target, lora.target_modules, towers))
        announce(f"note: {len(left_out)} sites of the plan are outside the targets and are left out")
    for tower in towers:
        if all(row.site.tower != tower for row in plan.sites if row.rank):
            announce(f"note: the plan has nothing of the {tower} tower, which stays frozen")
    for row in plan.sites:
        if row.clipped and "above min" in row.clipped:
            announce(f"note: {row.site.path}: rank {row.clipped}; cut to it")
    if plan.doubt:
        announce(f"warning: {lora.lora_config}: {plan.doubt}")
    announce_scale(plan)
    return plan, left_out


def announce_scale(plan: RankPlan) -> None:
    """rsLoRA's scale, which is often several times plain LoRA's, with the learning rate that goes with it."""
    if not plan.use_rslora:
        return
    low, high = (plan.scale(rank) for rank in (plan.largest, min(plan.ranks.values())))
    span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    announce(f"rsLoRA: alpha {plan.alpha(plan.largest):g} at every site, scale alpha/√r = {span}")
    if high > LARGE_SCALE:
        announce(
            f"note: a scale above {LARGE_SCALE} makes every step larger: lower --learning_rate, to about "
            f"{PLAIN_SCALE / high:.2g} of what plain LoRA takes (scale {PLAIN_SCALE})"
        )


def load_plan(path: Path, sites: Mapping[str, Site], towers: Sequence[str] = LANGUAGE) -> RankPlan:
    """A plan from its file, for this model and within these towers."""
    file = find_plan(path)
    recorded = recorded_sites(read_object(file))
    if any(site.tower == "unknown" for site in recorded.values()):
        raise UsageError(
            f"{file} was made from files without a config.json: its sites are named by checkpoint keys and their tower "
            "is unknown. Make it again with `rankwise ranks` from Hugging Face model folders"
        )
    plan = read_plan(file, sites)
    check_plan(plan, towers)
    return plan


def adapt_base(
    config: TrainConfig, job: Job, plan: RankPlan, full: Collection[str] = (), allocation: Allocation | None = None
) -> PeftModel:
    """The base with its adapter at the planned start, and copies of the `full` modules. The one seed decides the random
    part. allocation: the plan is where AdaLoRA starts."""
    dtype = frozen_dtype(config.model.dtype, job.arguments)
    check_precision(full, dtype, job.arguments)
    base = load_weights(config.model, job.name, dtype, quantization(config.lora))
    if job.depth:
        attach_depth(base, job.depth)
    set_seed(config.seed)
    if allocation is not None:
        return adapt_allocated(base, plan, config.lora, allocation, full)
    if config.lora.init_lora_weights == "eva":
        directions = input_directions(base, plan, eva_batches(job, config.seed))
        model = adapt(base, plan, config.lora, full)
        eva_start(model, directions)
        return model
    model = adapt(base, plan, config.lora, full)
    if config.lora.deltas:
        generator, source = torch.Generator().manual_seed(config.seed), open_deltas(Path(config.lora.deltas))
        for note in another_base(config.lora.deltas, source.metadata.get("model_name"), job.name):
            announce(f"note: {note}")
        warm_start(model, plan, source, generator)
    return model


def check_precision(full: Collection[str], dtype: torch.dtype, arguments: TrainingArguments) -> None:
    """Modules trained in full are float32: among half-precision ones only autocast lets them work. A depth gate sees
    to that itself."""
    whole = [path for path in full if tower_of(path, {}) != "depth"]
    if whole and dtype != torch.float32 and not (arguments.bf16 or arguments.fp16):
        raise UsageError(f"--full among weights in {dtype} needs mixed precision: --bf16 or --fp16, or --dtype float32")


def eva_batches(job: Job, seed: int) -> list[dict[str, torch.Tensor]]:
    """A few batches of training rows, drawn with the seed, as model inputs without labels."""
    rows, collator = job.rows, job.collator
    count = min(len(rows), EVA_BATCHES * EVA_ROWS)
    chosen = random.Random(seed).sample(range(len(rows)), count)
    parts = [chosen[start : start + EVA_ROWS] for start in range(0, count - count % EVA_ROWS or count, EVA_ROWS)]
    batches = [collator([rows[index] for index in part]) for part in parts]
    return [{name: value for name, value in batch.items() if name not in BESIDE} for batch in batches]


def write_pair(layer: LoraLayer, lora_a: Tensor, lora_b: Tensor | None = None) -> None:
    """Copy values into a layer's A, and into its B where some are given."""
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.copy_(lora_a)
        if lora_b is not None:
            layer.lora_B[ADAPTER].weight.copy_(lora_b)


def warm_start(model: PeftModel, plan: RankPlan, source: DeltaSource, generator: torch.Generator) -> None:
    """Start from a preliminary run: A and B of each site become the leading singular vectors of its delta.

    base + adapter is then base + truncated delta. DataError where the run has no delta of a planned site, or one with
    entries that are not finite.
    """
    settings = model.peft_config[ADAPTER]
    if settings.use_dora or settings.init_lora_weights is not True:
        raise UsageError("--warm_start delta goes with the default initialisation, without --use_dora")
    missing = [path for path in plan.ranks if path not in source.sites]
    if missing:
        raise DataError(
            f"the preliminary run has no delta of {len(missing)} planned sites ({missing[0]} …); the plan and --deltas "
            "must be of one model"
        )
    layers, scale = lora_layers(model), scales(plan)
    for site, delta in deltas(source, [site for site in plan.adapted.values() if not site.experts]):
        check_finite(site, delta)
        factors = truncate(delta.matrix, plan.ranks[site.path], generator)
        write_pair(layers[site.path], *factors.lora(scale[site.path]))
    for site in plan.adapted.values():
        if site.experts:
            warm_experts(layers[site.path], site, source, plan.ranks[site.path], scale[site.path], generator)


def warm_experts(
    layer: LoraLayer, site: Site, source: DeltaSource, rank: int, scale: float, generator: torch.Generator
) -> None:
    """The same expert by expert. One that did not move keeps its random A: with both factors zero it never would."""
    flat_a, flat_b = (half[ADAPTER].weight.detach() for half in (layer.lora_A, layer.lora_B))
    a, b = (part.clone() for part in split_experts(flat_a, flat_b, site.experts, site.swapped))
    for expert in range(site.experts):
        delta = read_expert(source, site, expert)
        if delta.energy:
            a[expert], b[expert] = truncate(delta.matrix, rank, generator).lora(scale)
    write_pair(layer, *join_experts(a, b, site.swapped))


def input_directions(
    model: PreTrainedModel, plan: RankPlan, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Path → leading directions (r, n) of the site's inputs on these batches: EVA (Paischer et al. 2024).

    PEFT's own incremental SVD, on the model before it is adapted, at the plan's largest rank. UsageError where the
    batches hold fewer tokens than that.
    """
    r, modules = (choose_plan := lora_config(plan, LoraSection())).r, choose_plan.target_modules
    config = LoraConfig(r=r, target_modules=modules, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    tokens = min(int(batch["attention_mask"].sum()) for batch in batches)
    if tokens < config.r:
        raise UsageError(
            f"--init_lora_weights eva needs batches of at least {config.r} tokens, the smallest has {tokens}; raise "
            "--per_device_train_batch_size"
        )
    was_training = model.training
    model.eval()
    moved = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
    found = get_eva_state_dict(model, moved, config, show_progress_bar=False)
    model.train(was_training)
    return {path: found[path][:rank] for path, rank in plan.ranks.items()}


def eva_start(model: PeftModel, directions: Mapping[str, Tensor]) -> None:
    """A becomes the leading directions of each site's inputs; B stays zero."""
    for path, layer in lora_layers(model).items():
        write_pair(layer, directions[path])
