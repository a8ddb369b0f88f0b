"""Inputs common to all runs of a study: the model, three parts of the data, the sites, the probes."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rankwise.core.site import Site
from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.example import Example
from rankwise.data.input_record import warn_of_others
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import read_examples
from rankwise.data.split import Parts, Sizes, divided
from rankwise.data.vision_inputs import IGNORED
from rankwise.errors import DataError
from rankwise.evaluate.likelihood import Batch, training_batches
from rankwise.files.atomic import fingerprint, fingerprints, read_if_there
from rankwise.files.checkpoint import base_files, open_checkpoint, resolve
from rankwise.files.processes import announce, gathered, process_index
from rankwise.files.run_folder import CONFIG
from rankwise.models.load import load_structure, load_weights, torch_dtype
from rankwise.models.sites import model_sites, weight_table
from rankwise.models.targets import adaptable_sites, choose_sites
from rankwise.options.sections import DataSection, ModelSection
from rankwise.options.study import StudyConfig
from rankwise.page.text import plural
from rankwise.ranks.deltas import BaseWeights, SavedDeltas, open_deltas, write_deltas
from rankwise.train.finetune import language_parameters
from rankwise.train.job import render_rows
from rankwise.train.together.alone import borrowed, train_weights
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.starts import row_order

SCORING_BATCH, PICTURED_BATCH = 16, 8


@dataclass(frozen=True)
class ScoredItems:
    """Items that runs are scored on, as batches, with the id, the learnt tokens and the group of each."""

    batches: Sequence[Batch]
    tokens: NDArray[np.float64]
    groups: tuple[str, ...]
    ids: tuple[str, ...]

    def record(self) -> dict[str, list[Any]]:
        """In the order of the columns of a ledger's matrices; groups numbered as they appear."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(self.groups))}
        groups = [numbers[name] for name in self.groups]
        return {"ids": list(self.ids), "groups": groups, "tokens": [int(count) for count in self.tokens]}

    @classmethod
    def of(cls, examples: Sequence[Example], renderer: Renderer, device: str) -> ScoredItems:
        """Items of like length side by side: less padding."""
        data = RenderedDataset(examples, renderer)
        order = sorted(range(len(data)), key=lambda index: data.lengths[index])
        items = [data.examples[index] for index in order]
        groups, ids = tuple(item.group for item in items), tuple(item.id for item in items)
        if any(item.images for item in items) and renderer.sight is not None:
            tokens = [sum(label != IGNORED for label in data[index]["labels"][1:]) for index in order]
            return cls(PicturedBatches(items, renderer), np.array(tokens, dtype=np.float64), groups, ids)
        batches = training_batches(items, renderer, SCORING_BATCH)
        counts = torch.cat([(batch["labels"][:, 1:] != IGNORED).sum(1) for batch in batches])
        moved = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        return cls(moved, counts.double().numpy(), groups, ids)


@dataclass(frozen=True)
class PicturedBatches(Sequence[Batch]):
    """Items with pictures as batches, made each time they are asked for: pixels of all would fill the memory."""

    items: Sequence[Example]
    renderer: Renderer

    def __len__(self) -> int:
        return math.ceil(len(self.items) / PICTURED_BATCH)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        start = range(len(self))[index] * PICTURED_BATCH  # IndexError ends an iteration
        return training_batches(self.items[start : start + PICTURED_BATCH], self.renderer, PICTURED_BATCH)[0]


@dataclass(frozen=True)
class Material:
    """Model, data and probes, loaded once."""

    model: PreTrainedModel
    renderer: Renderer
    sites: tuple[Site, ...]
    parts: Parts
    rows: list[dict[str, Any]]
    files: tuple[Path, ...]
    device: str

    @property
    def collate(self) -> Collator:
        return Collator.of(self.renderer.tokenizer, sight=self.renderer.sight)

    @cached_property
    def dev(self) -> ScoredItems:
        return ScoredItems.of(self.parts.dev, self.renderer, self.device)

    @cached_property
    def test(self) -> ScoredItems:
        return ScoredItems.of(self.parts.test, self.renderer, self.device)

    def record(self) -> dict[str, Any]:
        """What a ledger's numbers are of: path → (m, n, experts) of the sites, and the items."""
        sites = {site.path: [*site.shape, site.experts] for site in self.sites}
        return {"sites": sites, "dev": self.dev.record(), "test": self.test.record()}

    def inputs(self, model: ModelSection, deltas: Sequence[str] = ()) -> dict[str, Any]:
        return inputs_of(model, self.files, self.renderer, deltas)


def inputs_of(
    model: ModelSection, files: Sequence[Path], renderer: Renderer, deltas: Sequence[str] = ()
) -> dict[str, Any]:
    """Fingerprints of all that is read: runs of other inputs are not reused."""
    return {
        "base": fingerprints(base_files(resolve(str(model.model_name), model.revision))),
        "data": [fingerprint(file) for file in files],
        "prompts": renderer.settings,
        "deltas": [fingerprint(open_deltas(Path(path)).checkpoint.files[0]) for path in deltas],
    }


def load_material(
    model: ModelSection,
    data: DataSection,
    target: str | None,
    device: str,
    read: tuple[Parts, tuple[Path, ...]],
    before_loading: Callable[[Renderer, list[dict[str, Any]]], object] = lambda renderer, rows: None,
) -> Material:
    """Model and data, checked. float32 unless --dtype says otherwise: what is measured here is small.

    read: the parts of the data and the files they come from, as `read_parts` gives them. before_loading: called with
    the renderer and the rendered training rows before any weights are read, and once all rows are known to be usable.
    """
    name = str(model.model_name)
    skeleton = load_structure(model, name)
    sites = sites_of(skeleton, target)
    renderer = renderer_for(data, model, name, skeleton.config)
    parts, files = read
    rendered = render_rows(parts.train, renderer)
    rows = [rendered[index] for index in range(len(rendered))]
    for items in (parts.dev, parts.test):
        check_held_out(items, renderer, parts.removed)
    before_loading(renderer, rows)
    device = device if device != "auto" else own_device()
    dtype = torch_dtype(model.dtype, trained=True, device=torch.device(device))
    weights = load_weights(model, name, dtype).to(device).eval()
    weights.requires_grad_(False)
    return Material(weights, renderer, sites, parts, rows, files, device)


def sites_of(skeleton: PreTrainedModel, target: str | None) -> tuple[Site, ...]:
    """The matrices that arms adapt."""
    return tuple(choose_sites(adaptable_sites(skeleton, target), target).values())


def check_held_out(items: Sequence[Example], renderer: Renderer, removed: Mapping[str, int]) -> None:
    """Say which of the items are left out. DataError for those that cannot be rendered, and for fewer groups than a
    spread can be estimated from: now, not after hours of training."""
    try:
        usable = RenderedDataset(items, renderer) if items else None
    except DataError as error:
        raise DataError(f"held-out items: {error}") from error
    for note in usable.notes() if usable else []:
        announce(f"held-out items: {note}")
    groups = len({item.group for item in usable.examples}) if usable else 0
    if groups < 2:
        counts = ", ".join(f"{count} ({what})" for what, count in removed.items())
        raise DataError(
            f"held-out items: {len(usable or ())} can be used, of {plural(groups, 'group')}; at least two groups are "
            f"needed to know how sure a difference is: give more rows, of more dialogues, tables or pictures; removed "
            f"as near-duplicates: {counts}"
        )


def own_device() -> str:
    """A GPU for each process, where there are any."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def read_parts(
    data: DataSection, sizes: Sizes, seed: int, dev_path: str | None = None, test_path: str | None = None
) -> tuple[Parts, tuple[Path, ...]]:
    """Train, dev and test rows, and the files they come from."""
    pool = read_examples(data, str(data.data_path))
    dev = read_examples(data, dev_path, "dev") if dev_path else None
    test = read_examples(data, test_path, "test") if test_path else None
    parts = divided(pool, dev, test, sizes, random.Random(seed))
    files = [file for examples in (pool, dev, test) if examples for file in examples.files]
    return parts, tuple(files)


def open_probes(material: Material, config: StudyConfig, folder: Path, recipe: str) -> list[SavedDeltas]:
    """The given deltas, or those of own probes, which the first process trains where they are not there yet.

    recipe: hash of what the study is made of; a probe of another one is trained anew.
    """
    given = config.probe.deltas
    if given:
        found = [open_deltas(Path(path)) for path in given]
        for path in given:
            warn_of_others(Path(path), material.renderer)
    else:
        places = [folder / "probe" / str(index) for index in range(config.probe.probes)]
        for index, place in enumerate(places):
            if process_index()[0] == 0 and not is_of(place, recipe):
                announce(f"probe {index + 1} of {len(places)}: {config.probe.probe_steps} full updates")
                train_probe(material, config, place / "deltas", index, recipe)
        gathered({})  # the others wait for the first
        found = [open_deltas(place) for place in places]
    for source in found:
        missing = [site.path for site in material.sites if site.path not in source.sites]
        if missing:
            raise DataError(f"{source.description}: no delta of {missing[0]}; the deltas must be of the study's model")
    return found


def is_of(place: Path, recipe: str) -> bool:
    return (place / "deltas").is_dir() and open_deltas(place).metadata.get("recipe") == recipe


def probe_rows(material: Material, config: StudyConfig, index: int) -> list[int]:
    """Positions of a probe's rows in the training part."""
    count = min(config.probe.probe_rows, len(material.rows))
    return random.Random(f"{config.seed} probe {index}").sample(range(len(material.rows)), count)


def train_probe(material: Material, config: StudyConfig, folder: Path, index: int, recipe: str) -> None:
    """All language parameters for a few updates on rows of the training part; saves the deltas."""
    model = material.model
    own, name = config.probe, str(config.model.model_name)
    settings = ArmSettings(own.probe_steps, own.probe_batch_size)
    chosen = probe_rows(material, config, index)
    order = row_order(len(chosen), own.probe_steps * own.probe_batch_size, config.seed + index)
    parameters = language_parameters(model)
    files = open_checkpoint(resolve(name, config.model.revision))
    base = BaseWeights.before_training(files, weight_table(model, files.keys()), parameters)
    with borrowed(model, parameters) as trained:
        rows = [material.rows[position] for position in chosen]
        if not train_weights(model, trained, rows, order, material.collate, settings, own.probe_learning_rate):
            raise DataError(f"the probe diverged at --probe_learning_rate {own.probe_learning_rate:g}; lower it")
        facts = {
            "model_name": name,
            "num_samples": len(chosen),
            "steps": own.probe_steps,
            "seed": config.seed + index,
            "recipe": recipe,
            "rows": [material.parts.train[position].id for position in chosen],
        }
        write_deltas(folder, parameters, base, model_sites(model), facts)


def probe_cost(config: StudyConfig) -> int:
    """Steps at the study's batch size that train on as many rows as a probe did."""
    if not config.probe.deltas:
        rows = config.probe.probe_steps * config.probe.probe_batch_size
        return math.ceil(rows / config.batch_size)
    costs = []
    for path in map(Path, config.probe.deltas):
        settings = read_if_there(path / CONFIG)
        per_step: int = settings.get("batch_size", config.batch_size) * settings.get("gradient_accumulation", 1)
        costs.append(math.ceil(int(open_deltas(path).metadata["steps"]) * per_step / config.batch_size))
    return max(costs)
