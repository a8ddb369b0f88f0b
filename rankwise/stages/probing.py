"""The two kinds of preliminary run: all parameters in float32, or a LoRA of high rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from rankwise.data.input_record import InputRecord
from rankwise.data.recorded import save_input
from rankwise.data.render import Renderer
from rankwise.files.atomic import atomic_folder, fingerprints
from rankwise.files.checkpoint import open_checkpoint, resolve
from rankwise.files.processes import announce, process_index
from rankwise.models.adapt import LoraSettings, adapt, choose_sites, uniform_plan
from rankwise.models.load import loaded
from rankwise.models.sites import model_sites, tower_parameters, weight_table
from rankwise.nets.delta_files import BaseWeights, write_deltas
from rankwise.options.commands import FinetuneConfig
from rankwise.stages.beginning import train_job
from rankwise.stages.towers import finetune_use, trained_lines
from rankwise.stages.training import Job, plain_model, whole_state, write_adapter_files
from rankwise.train.arguments import frozen_dtype
from rankwise.train.trainer import RankwiseTrainer

LORA_RATE = 1e-4
MAX_SHARD = "5GB"


def language_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every parameter of the language tower, embeddings, norms and head included, by name."""
    return tower_parameters(model, ["language"])


def train_full(config: FinetuneConfig, job: Job, skeleton: PreTrainedModel, checkpoint: Path | None) -> RankwiseTrainer:
    """All parameters of the towers set to `full`, in float32; then the deltas, or both checkpoints."""
    folder, first = Path(config.output_dir), process_index()[0] == 0
    model = loaded(config.model, job.name, torch.float32)
    model.requires_grad_(False)
    towers = finetune_use(config.towers, config.method)
    trained = tower_parameters(model, towers.full)
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
    sites = choose_sites(model_sites(skeleton), towers=towers.lora)
    plan = uniform_plan(sites, config.lora_r, None, False, job.name)
    for line in trained_lines(skeleton, plan, {}):
        announce(line)
    model = loaded(config.model, job.name, frozen_dtype(config.model.dtype, job.arguments))
    set_seed(config.seed)
    adapted = adapt(model, plan, LoraSettings(dropout=0.0))
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
    """What the deltas are deltas of, and how they came about."""
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
