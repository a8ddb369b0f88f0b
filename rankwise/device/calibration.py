"""Calibration: an importance matrix of the task's own rows, prompts, answers and pictures.

    rows of the training part ── calibration_rows (none that is scored) ──▶ Calibration
        ── calibrated: the trained model on each row; Σ x² of every linear layer's inputs ──▶ imatrix.gguf

llama-imatrix reads text alone. Here the language model sees each row as training has it, pictures in their places, and
what is written is what llama-imatrix writes: the same sums under the same names (tests/device/test_calibration.py).
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.device.parity.reference import inputs_of
from rankwise.device.sides import Shipment, TrainedSide, renderer_of
from rankwise.errors import DataError
from rankwise.evaluate.generate import fitting
from rankwise.evaluate.likelihood import answer_ids, append_ids
from rankwise.files.atomic import digest_of, fingerprints
from rankwise.files.checkpoint import base_files, resolve
from rankwise.files.gguf import GGUFFile
from rankwise.files.processes import announce
from rankwise.gguf.imatrix import Imatrix, weighed, write
from rankwise.gguf.reading import first_few, gguf_names
from rankwise.models.sites import model_sites
from rankwise.options.commands import ValidateConfig
from rankwise.page.text import plural

ROUNDING = 0.02  # relative, of a column's sum of squares in half precision


@dataclass(frozen=True)
class Calibration:
    """Rows to calibrate on, with the renderer that knows where their pictures are."""

    rows: Sequence[Example]
    renderer: Renderer

    @property
    def pictures(self) -> int:
        return sum(len(row.images) for row in self.rows) if self.renderer.sight else 0

    @property
    def dataset(self) -> str:
        """For the file, and for people."""
        return f"{plural(len(self.rows), 'row')}, {plural(self.pictures, 'picture')}"


def calibration_rows(config: ValidateConfig, trained: TrainedSide, shipped: Shipment) -> Calibration:
    """--calibration_samples rows of --calibration_data [the training part of --data_path], drawn by --seed.

    DataError where one of them is an item that is scored: a matrix made for these would flatter.
    """
    path = str(config.calibration_data or config.data.data_path)
    renderer = trained.renderer
    if config.calibration_data:
        elsewhere = replace(config, data=replace(config.data, data_path=path))
        renderer = renderer_of(elsewhere, shipped, trained.name, [shipped.folder] if shipped.folder else [])
        renderer = renderer.leaving(trained.max_new_tokens)
    found = trained.task.examples(path, "train", replace(config.data, download=False))
    count = min(config.calibration_samples or 0, len(found))
    places = sorted(random.Random(config.seed).sample(range(len(found)), count))
    rows = fitting([found[place] for place in places], renderer)
    scored = {asked(item, trained.renderer) for item in trained.items}
    shared = [row.id for row in rows if asked(row, renderer) in scored]
    if shared:
        raise DataError(
            f"{found.files[0]}: {len(shared)} of the {len(rows)} calibration rows are among the items that are scored "
            f"({first_few(shared)}), which would flatter them; name a file of other rows with --calibration_data"
        )
    if not rows:
        raise DataError(f"{found.files[0]}: no rows to calibrate on")
    if len(rows) < (config.calibration_samples or 0):
        announce(f"note: {plural(len(rows), 'row')} to calibrate on, fewer than --calibration_samples")
    return Calibration(rows, renderer)


def asked(example: Example, renderer: Renderer) -> Hashable:
    """What an item asks: the texts of its prompt, and the content of its pictures."""
    pictures = [renderer.sight.reader.digest(name) for name in example.images] if renderer.sight else []
    return tuple((turn.role, turn.text) for turn in example.turns[:-1]), tuple(pictures)


def calibrated(trained: TrainedSide, calibration: Calibration, source: Path, out: Path) -> Imatrix:
    """The matrix of these rows for the GGUF file that was made of the trained model; one that is there already is
    taken. DataError where a matrix of the file is not a linear layer of the model (fused experts)."""
    made_from = digest_of(
        [
            fingerprints(base_files(resolve(trained.name))),
            [repr(asked(row, calibration.renderer)) + row.answer for row in calibration.rows],
            calibration.renderer.settings,
        ]
    )
    if out.is_file() and (earlier := Imatrix.read(out)).made_from == made_from:
        return earlier
    file = GGUFFile(source)
    layers = linear_layers(trained.model, file)
    announce(f"calibrating on {calibration.dataset}")
    with summed(layers) as sums:
        tokens = sum(ran(trained.model, calibration.renderer, row) for row in calibration.rows)
    parts, dataset = len(calibration.rows), f"{trained.task.name}: {calibration.dataset}"
    return write(out, sums, tokens, parts, dataset, made_from, file.architecture)


def linear_layers(model: Any, file: GGUFFile) -> dict[str, Any]:
    """llama.cpp's name of every matrix that is weighed → the module whose weight it is."""
    sites = [path for path, site in model_sites(model).items() if site.tower == "language" and not site.experts]
    modules = {name: model.get_submodule(key.removesuffix(".weight")) for name, key in named(sites, file).items()}
    missing = [name for name in weighed(file) if name not in modules]
    strange = [name for name, module in modules.items() if not same_columns(file.tensor(name), module)]
    for names, what in ((missing, "no linear layer of its own in transformers"), (strange, "other inputs there")):
        if names:
            raise DataError(
                f"{file.path}: {first_few(names)}: {what}, so no matrix can be computed here; make one with "
                "llama-imatrix and give it with --imatrix"
            )
    return {name: modules[name] for name in weighed(file)}


def named(sites: Sequence[str], file: GGUFFile) -> Mapping[str, str]:
    return gguf_names([f"{path}.weight" for path in sites], file)


def same_columns(stored: Tensor, module: Any) -> bool:
    """Whether the inputs of a layer are those of the file's matrix, in its order. Rows may change places."""
    weight = module.weight.detach().float().cpu()
    weight = weight.T if isinstance(module, Conv1D) else weight
    here, there = (matrix.square().sum(0) for matrix in (stored, weight))
    return here.shape == there.shape and torch.allclose(here, there, rtol=ROUNDING)


@contextmanager
def summed(layers: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The squares of the layers' inputs, summed over all tokens that they see meanwhile: (inputs,) by name."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: Any, given: tuple[Tensor, ...]) -> None:
            squares = given[0].detach().flatten(0, -2).double().square().sum(0).cpu()
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def ran(model: Any, renderer: Renderer, row: Example) -> int:
    """Run the model on a prompt and its answer, all of whose places reach every layer; number of tokens."""
    whole = append_ids(renderer.prompt(row), answer_ids(renderer, row, row.answer))
    with torch.inference_mode():
        model(**inputs_of(model, renderer, whole))
    return len(whole.input_ids)
