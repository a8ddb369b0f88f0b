"""The parts of `ranks` that read data and run the model: --gain, and signals and metrics from activations or gradients.

Loaded by name when one of them is asked for, so that plain `ranks` imports no data reader.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path

import torch

from rankwise.core.plan import RankPlan
from rankwise.data.example import one_per_prompt
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load, task_of
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import Batch, answer_losses, training_batches
from rankwise.files.lineage import warn_of_training_rows
from rankwise.models.load import load_model
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import ModelSection
from rankwise.ranks.decide import Running
from rankwise.ranks.gain import Gain, arms_of, gain_kept
from rankwise.ranks.probe import Probe


def running_model(config: RanksConfig, probe: Probe, path: str | None = None, split: str = "train") -> Running:
    """The base model and up to `num_samples` items, one per prompt, drawn with the seed."""
    name = probe.model_name
    if not name:
        raise UsageError("--gain, --metric and --signal run the base model: give it with --model_name")
    model = load_model(name, torch.float32).to(config.device).eval()
    tuned = [Path(each) for each in (config.deltas, config.adapter, config.tuned) if each]
    data = replace(config.data, data_path=path or config.data.data_path)  # beside which pictures and device.json lie
    renderer = renderer_for(data, ModelSection(model_name=name), name, model.config, tuned)
    batches = probe_batches(config, renderer, data.data_path, split)
    return Running(model, [{key: value.to(config.device) for key, value in batch.items()} for batch in batches])


def probe_batches(config: RanksConfig, renderer: Renderer, path: str | None, split: str) -> list[Batch]:
    data = config.data
    assert data.task is not None
    assert path is not None
    how = replace(data, download=data.download and not Path(path).is_file())
    examples = load(data.task, Path(path), split, how)
    for note in examples.notes(sees_images=renderer.sight is not None):
        print(note)
    items = one_per_prompt(examples)
    random.Random(config.seed).shuffle(items)
    return training_batches(items[: config.num_samples], renderer, config.batch_size)


def measure_gain(config: RanksConfig, plan: RankPlan, probe: Probe) -> Gain:
    """The share of the loss gain that the plan keeps, against uniform, inverted and shuffled plans."""
    held_out = Path(str(config.gain))
    if config.deltas and held_out.is_file():
        warn_of_training_rows(Path(config.deltas), held_out, "the gain tells")
    running = running_model(config, probe, config.gain, "dev")
    ranks = {row.site: row.rank for row in plan.sites}
    generator = torch.Generator().manual_seed(config.seed)
    deltas = {site: probe.source.read(site).matrix.to(config.device) for site in ranks}
    losses = functools.partial(answer_losses, batches=running.batches)
    return gain_kept(running.model, deltas, arms_of(ranks, generator), losses, config.seed)


def with_task(config: RanksConfig) -> RanksConfig:
    """The config with the task of its data, or of the held-out ones, where none is given."""
    shown = replace(config.data, data_path=config.data.data_path or config.gain)
    return replace(config, data=replace(config.data, task=task_of(shown)))
