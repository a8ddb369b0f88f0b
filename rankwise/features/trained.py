"""Trained networks on the disk, and the features that they were trained on.

    results/<arch>/best_model.safetensors, .json ── networks ──▶ Network(net, cache)
    save_factorizer(net, run)          # both files or neither
    net = load_factorizer(run)         # built from the settings, every tensor checked by name, shape and type

The settings hold the fingerprint of the weights, so that files of two runs cannot be mixed up unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import DataError, UsageError
from rankwise.features.cache import INDEX, FeatureCache, open_cache
from rankwise.features.nets import build
from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.files.atomic import atomic_files, read_object, sha256
from rankwise.files.checkpoint import Shard
from rankwise.files.document import Document
from rankwise.files.pickled import load_pickle
from rankwise.files.run_folder import CONFIG
from rankwise.options.features import canonical

WEIGHTS, OLDER, SETTINGS = "best_model.safetensors", "best_model.pt", "best_model.json"
DOCUMENT = Document(SETTINGS, "rankwise-factorizer/1", "a network's settings", "rankwise features train")


@dataclass(frozen=True)
class SavedSettings:
    """Content of `best_model.json`."""

    settings: FactorizerSettings
    weights_sha256: str


def save_factorizer(net: Factorizer, folder: Path | str) -> Path:
    """Write the network into a folder, which is made; returns the path of the weights."""
    weights, settings = Path(folder) / WEIGHTS, Path(folder) / SETTINGS
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic_files(weights, settings) as (weights_file, settings_file):
        save_file(state, weights_file, metadata={"format": "pt"})
        saved = SavedSettings(net.settings, sha256(weights_file))
        settings_file.write_text(DOCUMENT.text(saved), encoding="utf-8")
    return weights


def load_factorizer(folder: Path | str) -> Factorizer:
    """The network of a folder, on the CPU, in evaluation mode; torch's global generator is left as it was.

    Where there is no `best_model.safetensors`, a `best_model.pt` with the same tensors is read, its tensors only.
    Raises DataError, naming the file, where one is missing, damaged, or not of the other.
    """
    folder = Path(folder)
    saved = DOCUMENT.read_as(SavedSettings, folder / SETTINGS)
    weights = folder / WEIGHTS
    if not weights.is_file() and (folder / OLDER).is_file():
        weights = folder / OLDER
        state = load_pickle(weights)
    else:
        state = read_weights(weights, saved.weights_sha256)
    try:
        with torch.random.fork_rng(devices=[]):
            net = build(saved.settings)
    except UsageError as error:
        raise DataError(f"{folder / SETTINGS}: {error}") from error
    check_state(state, net.state_dict(), weights)
    net.load_state_dict(state)
    return net.eval()


def read_weights(path: Path, fingerprint: str) -> dict[str, Tensor]:
    shard = Shard(path)
    if sha256(path) != fingerprint:
        raise DataError(f"{path}: not the weights that {SETTINGS} was written with: altered, or mixed from two runs")
    return {key: shard.tensor(key).clone() for key in shard.entries}


def check_state(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """DataError unless both have the same names, shapes and types."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        name = (missing or extra)[0]
        what = "is missing" if missing else "has no place"
        raise DataError(f"{path}: {name} {what}: not the weights of the network in {SETTINGS}")
    for name, value in wanted.items():
        if (found[name].shape, found[name].dtype) != (value.shape, value.dtype):
            raise DataError(
                f"{path}: {name} is {tuple(found[name].shape)} {found[name].dtype} where the network in {SETTINGS} "
                f"has {tuple(value.shape)} {value.dtype}"
            )


@dataclass(frozen=True)
class Network:
    """A trained factorizer and the run folder that it comes from. cache: what it was trained on; None with the reason
    where that cannot be read any more."""

    folder: Path
    net: Factorizer
    cache: FeatureCache | None
    lost: str = ""

    @property
    def name(self) -> str:
        return self.net.settings.arch

    @property
    def rank(self) -> int:
        return self.net.settings.rank

    def cache_or(self, path: str | None) -> FeatureCache:
        """The cache of a path, where one is given, else its own. DataError where that cannot be read."""
        cache = open_cache(path) if path else self.cache
        if cache is None:
            raise DataError(f"{self.folder}: its feature cache cannot be read, give it as --features: {self.lost}")
        return cache


def networks(results_dir: str, archs: Sequence[str]) -> list[Network]:
    """Those asked for, or all that have finished. DataError for one that is not there or damaged."""
    root = Path(results_dir)
    folders = [root / canonical(arch) for arch in archs] or sorted(file.parent for file in root.glob(f"*/{SETTINGS}"))
    for folder in folders:
        if not (folder / SETTINGS).is_file():
            raise DataError(f"{folder}: no trained network ({SETTINGS}); train it with `rankwise features train`")
    return [Network(folder, load_factorizer(folder), *trained_on(folder)) for folder in folders]


def trained_on(folder: Path) -> tuple[FeatureCache | None, str]:
    """The cache of a run, and why there is none where there is none."""
    try:
        where = read_object(folder / CONFIG).get("features")
        if not isinstance(where, str):
            raise DataError(f"{folder / CONFIG} does not name the features that it was trained on")
        return open_cache(where), ""
    except DataError as error:
        return None, str(error)


def stretch_of(found: Sequence[Network]) -> int | None:
    """The square that pictures were stretched to when the networks' features were captured; None where they were not,
    or nothing says so."""
    for each in found:
        if each.cache is not None and (each.cache.path / INDEX).is_file():
            side: int | None = read_object(each.cache.path / INDEX)["settings"].get("stretched_to")
            return side
    return None


def is_of(each: Network, fingerprint: str) -> bool:
    """Whether a network's cache holds features of the model with this fingerprint."""
    return each.cache is not None and each.cache.model is not None and each.cache.model.fingerprint == fingerprint
