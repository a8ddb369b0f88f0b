"""A trained network on the disk: `best_model.safetensors` with its weights, `best_model.json` with what it is.

    save_factorizer(net, run)          # both files or neither
    net = load_factorizer(run)         # built from the settings, every tensor checked by name, shape and type

The settings hold the fingerprint of the weights, so that files of two runs cannot be mixed up unseen.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import DataError, UsageError
from rankwise.features.nets import build
from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.files.atomic import atomic_files, read_document, sha256
from rankwise.files.checkpoint import Shard
from rankwise.files.pickled import load_pickle

WEIGHTS, OLDER, SETTINGS = "best_model.safetensors", "best_model.pt", "best_model.json"
FORMAT = "rankwise-factorizer/1"


def save_factorizer(net: Factorizer, folder: Path | str) -> Path:
    """Write the network into a folder, which is made; returns the path of the weights."""
    weights, settings = Path(folder) / WEIGHTS, Path(folder) / SETTINGS
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic_files(weights, settings) as (weights_file, settings_file):
        save_file(state, weights_file, metadata={"format": "pt"})
        content = {"format": FORMAT, "settings": asdict(net.settings), "weights_sha256": sha256(weights_file)}
        settings_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return weights


def load_factorizer(folder: Path | str) -> Factorizer:
    """The network of a folder, on the CPU, in evaluation mode.

    Where there is no `best_model.safetensors`, a `best_model.pt` with the same tensors is read, its tensors only.
    Raises DataError, naming the file, where one is missing, damaged, or not of the other.
    """
    folder = Path(folder)
    settings, fingerprint = read_settings(folder / SETTINGS)
    weights = folder / WEIGHTS
    if not weights.is_file() and (folder / OLDER).is_file():
        weights = folder / OLDER
        state = load_pickle(weights)
    else:
        state = read_weights(weights, fingerprint)
    net = built(settings, folder / SETTINGS)
    check_state(state, net.state_dict(), weights)
    net.load_state_dict(state)
    return net.eval()


def read_settings(path: Path) -> tuple[dict[str, Any], str]:
    """(the settings, SHA-256 of the weights) of a settings file."""
    if not path.is_file():
        raise DataError(f"{path}: no trained network here; `rankwise features train` makes one")
    content = read_document(path, FORMAT, "a network's settings")
    settings, fingerprint = content.get("settings"), content.get("weights_sha256")
    if not isinstance(settings, dict) or not isinstance(fingerprint, str):
        raise DataError(f"{path}: `settings` or `weights_sha256` is missing or of another type; save the network again")
    return settings, fingerprint


def read_weights(path: Path, fingerprint: str) -> dict[str, Tensor]:
    shard = Shard(path)
    if sha256(path) != fingerprint:
        raise DataError(f"{path}: not the weights that {SETTINGS} beside it was written with: altered, or of two runs")
    return {key: shard.tensor(key).clone() for key in shard.entries}


def built(settings: dict[str, Any], path: Path) -> Factorizer:
    """The network of these settings; torch's global generator is left as it was."""
    wanted = FactorizerSettings.__annotations__
    types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    wrong = sorted(wanted.keys() ^ settings.keys()) or [
        key
        for key, value in settings.items()
        if not isinstance(value, types[wanted[key]]) or (isinstance(value, bool) and wanted[key] != "bool")
    ]
    if wrong:
        raise DataError(f"{path}: settings {', '.join(wrong)} are missing, unknown or of another type")
    try:
        with torch.random.fork_rng(devices=[]):
            return build(FactorizerSettings(**settings))
    except UsageError as error:
        raise DataError(f"{path}: {error}") from error


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
