"""The parts of `ranks` that read data and run the model: --gain, and signals and metrics from activations or gradients.

Loaded by name when one of them is asked for, so that plain `ranks` imports no data reader.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.data.dataset import RenderedDataset
from rankwise.data.example import Example, Examples, one_per_prompt
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load, task_of
from rankwise.data.split import Split, split_groups
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.likelihood import Batch, answer_losses, training_batches
from rankwise.files.lineage import warn_of_training_rows
from rankwise.models.load import load_model
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import ModelSection
from rankwise.ranks.choice import METRICS, UNIFORM, choose, per_group
from rankwise.ranks.decide import Decision, Running, decide
from rankwise.ranks.deltas import dense
from rankwise.ranks.gain import Gain, Losses, arms_of, gain_kept
from rankwise.ranks.probe import Probe

LEAST = 20  # groups in each half: below, a bootstrap's interval is too narrow


def running_model(config: RanksConfig, probe: Probe, path: str | None = None, split: str = "train") -> Running:
    """The base model and up to `num_samples` items, one per prompt, drawn with the seed."""
    path = path or config.data.data_path
    model, renderer = model_and_renderer(config, probe, path)
    return Running(model, on_device(config, probe_batches(config, renderer, path, split)))


def model_and_renderer(config: RanksConfig, probe: Probe, path: str | None) -> tuple[nn.Module, Renderer]:
    name = probe.model_name
    if not name:
        raise UsageError("--gain, --metric and --signal run the base model: give it with --model_name")
    model = load_model(name, torch.float32).to(config.device).eval()
    tuned = [Path(each) for each in (config.deltas, config.adapter, config.tuned) if each]
    data = replace(config.data, data_path=path)  # beside which pictures and device.json lie
    return model, renderer_for(data, ModelSection(model_name=name), name, model.config, tuned)


def on_device(config: RanksConfig, batches: Sequence[Batch]) -> list[Batch]:
    return [{key: value.to(config.device) for key, value in batch.items()} for batch in batches]


def probe_batches(config: RanksConfig, renderer: Renderer, path: str | None, split: str) -> list[Batch]:
    examples = read_rows(config, path, split)
    for note in examples.notes(sees_images=renderer.sight is not None):
        print(note)
    return training_batches(drawn_items(config, examples), renderer, config.batch_size)


def read_rows(config: RanksConfig, path: str | None, split: str) -> Examples:
    data = config.data
    assert data.task is not None
    assert path is not None
    how = replace(data, download=data.download and not Path(path).is_file())
    return load(data.task, Path(path), split, how)


def drawn_items(config: RanksConfig, examples: Examples) -> list[Example]:
    items = one_per_prompt(examples)
    random.Random(config.seed).shuffle(items)
    return items[: config.num_samples]


def measure_gain(config: RanksConfig, plan: RankPlan, probe: Probe) -> Gain:
    """The share of the loss gain that the plan keeps, against uniform, inverted and shuffled plans."""
    warn_of_probe_rows(config)
    running = running_model(config, probe, config.gain, "dev")
    ranks = {row.site: row.rank for row in plan.sites}
    generator = torch.Generator().manual_seed(config.seed)
    losses = functools.partial(answer_losses, batches=running.batches)
    return gain_kept(running.model, moves(config, probe), arms_of(ranks, generator), losses, config.seed)


def warn_of_probe_rows(config: RanksConfig) -> None:
    held_out = Path(str(config.gain))
    if config.deltas and held_out.is_file():
        warn_of_training_rows(Path(config.deltas), held_out, "the gain tells")


def moves(config: RanksConfig, probe: Probe) -> dict[Site, Tensor]:
    return {site: dense(probe.source, site).matrix.to(config.device) for site in probe.spectra}


def gain_halves(config: RanksConfig, examples: Examples | None = None) -> Split:
    """Held-out items for `--metric auto`, of these or of --gain: `train` to choose by, `val` to confirm on; no group is
    in both.

    DataError where intervals would be of too few groups.
    """
    items = drawn_items(config, examples or read_rows(config, config.gain, "dev"))
    groups = len({item.group for item in items})
    if groups < 2 * LEAST:
        raise DataError(
            f"--gain {config.gain} gives {len(items)} items of {groups} groups (restaurant, dialogue, table …) within "
            f"--num_samples {config.num_samples}; --metric auto needs {2 * LEAST} groups, half of them to choose and "
            "half to confirm: give more rows, or name a metric"
        )
    return split_groups(items, 0.5, random.Random(config.seed))


def choose_metric(config: RanksConfig, probe: Probe) -> Decision:
    """The plan of the metric that keeps most of the gain on half of the held-out items, where the other half confirms
    that it keeps more than uniform rank; else uniform rank.

    Metrics that run the model are computed on the rows of --data_path, without it on the items that choose.
    """
    warn_of_probe_rows(config)
    model, renderer = model_and_renderer(config, probe, config.gain)
    examples = read_rows(config, config.gain, "dev")
    for note in examples.notes(sees_images=renderer.sight is not None):
        print(note)
    halves = gain_halves(config, examples)
    choosing, confirming = (held_out(config, part, renderer) for part in (halves.train, halves.val))
    if config.data.data_path:
        measured = on_device(config, probe_batches(config, renderer, config.data.data_path, "train"))
    else:
        measured = choosing.batches
    found = {name: decided(config, probe, Running(model, measured), metric=name) for name in METRICS}
    found[UNIFORM] = decided(config, probe, None, signal=UNIFORM, metric="weight")
    plans = {name: {row.site: row.rank for row in one.plan.sites} for name, one in found.items()}
    choice = choose(model, moves(config, probe), plans, choosing.losses, confirming.losses, config.seed)
    return replace(found[choice.metric], choice=choice)


def decided(config: RanksConfig, probe: Probe, running: Running | None, **changes: Any) -> Decision:
    return decide(replace(config, **changes), probe.spectra, functools.partial(dense, probe.source), running)


@dataclass(frozen=True)
class HeldOut:
    """Items as batches, and their losses by group."""

    batches: list[Batch]
    groups: tuple[str, ...]

    @property
    def losses(self) -> Losses:
        return per_group(functools.partial(answer_losses, batches=self.batches), self.groups)


def held_out(config: RanksConfig, items: Sequence[Example], renderer: Renderer) -> HeldOut:
    usable = RenderedDataset(items, renderer).examples
    batches = training_batches(usable, renderer, config.batch_size)
    return HeldOut(on_device(config, batches), tuple(item.group for item in usable))


def with_task(config: RanksConfig) -> RanksConfig:
    """The config with the task of its data, or of the held-out ones, where none is given."""
    shown = replace(config.data, data_path=config.data.data_path or config.gain)
    return replace(config, data=replace(config.data, task=task_of(shown)))
