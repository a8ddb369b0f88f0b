"""What a cache's shards are made of: pictures seen by a model's tower, or matrices with a known spectrum.

IMAGES, --model ──▶ PictureShards   ─┐
--synthetic ──────▶ SyntheticShards ─┴─ made(k) ──▶ Matrices ──▶ CacheWriter
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rankwise.data.device import read_target
from rankwise.data.features.cache import ModelOrigin
from rankwise.data.features.pictures import open_pictures
from rankwise.data.features.preparing import SQUARE, Preparation
from rankwise.data.features.synthetic import Synthetic
from rankwise.data.features.writer import CacheRecipe, Matrices, shard_places
from rankwise.data.images import ImageReader
from rankwise.data.vision_inputs import Sight
from rankwise.errors import UsageError
from rankwise.files.adapter import is_adapter
from rankwise.files.checkpoint import model_fingerprint, resolve
from rankwise.models.depth.settings import read_depth
from rankwise.models.load import load_config, load_processor, takes
from rankwise.nets.encoder import is_encoder, load_image_processor, own_side, unresized
from rankwise.options.features import CaptureConfig
from rankwise.stages.features.eyes import EncoderEye, Eye, ModelEye
from rankwise.stages.features.picture_shards import PictureShards, Step


class Shards(Protocol):
    """The shards of one cache: `made` gives the rows of one of them, the same whenever it is called."""

    @property
    def recipe(self) -> CacheRecipe: ...

    def size(self, shard: int) -> int: ...

    def made(self, shard: int, step: Step) -> Matrices: ...


def shards_of(config: CaptureConfig) -> Shards:
    if config.synthetic is not None:
        settings = Synthetic(config.tokens, config.channels, config.spectrum, config.shared, config.seed, config.smooth)
        return SyntheticShards(settings, config.synthetic, config.shard_size, config.cache_dtype)
    assert config.model_name and config.images
    folder = seeing_model(config.model_name, config.revision)
    preparation, eye = eye_of(config, folder)
    pictures = open_pictures(config.images, background=preparation.background)
    origin = ModelOrigin(config.model_name, model_fingerprint(folder))
    return PictureShards(config, pictures, preparation, eye, origin)


def eye_of(config: CaptureConfig, folder: Path) -> tuple[Preparation, Eye]:
    """How pictures are prepared, and what sees them: a vision-language model's vision side, or an encoder."""
    name = str(config.model_name)
    known = load_config(name, config.revision)
    if is_encoder(known):
        processor = load_image_processor(name, config.revision)
        if config.native:
            return Preparation(None), EncoderEye(name, processor, config.revision)
        side = config.image_size or own_side(processor, known)
        return Preparation(side), EncoderEye(name, unresized(processor), config.revision)
    preparation = preparation_of(config, folder)
    processor = preparation.processor(load_processor(name, config.revision))
    # The reader is never asked: pictures come prepared.
    return preparation, ModelEye(name, Sight(processor, ImageReader(folder)), config.revision)


def seeing_model(name: str, revision: str | None) -> Path:
    """The folder of a whole model that takes images. UsageError for an adapter, a text model, a model with depth."""
    folder = resolve(name, revision)
    if is_adapter(folder):
        raise UsageError(f"{name} is an adapter; `rankwise merge` makes a model of it, whose features can be captured")
    config = load_config(name, revision)
    if not hasattr(config, "vision_config") and not is_encoder(config):
        told = takes(config)
        raise UsageError(
            f"{name} is a text model: it has no image features"
            if told == "input_ids"
            else f"{name} takes {told}, not pictures: it has no image features"
        )
    if read_depth(folder):
        raise UsageError(f"{name} adds depth to its image features, and features are captured without; give its base")
    return folder


def preparation_of(config: CaptureConfig, folder: Path) -> Preparation:
    if config.native:
        return Preparation(None)
    target = read_target(folder) if config.image_size is None else None
    return Preparation(None, target) if target else Preparation(config.image_size or SQUARE)


@dataclass(frozen=True)
class SyntheticShards:
    """Matrices with a known spectrum; each is a picture of its own."""

    settings: Synthetic
    count: int
    shard_size: int
    dtype: str

    @property
    def recipe(self) -> CacheRecipe:
        one = self.settings
        return CacheRecipe(
            shards=len(self.places),
            dtype=self.dtype,
            model=None,
            pictures=f"{self.count} synthetic",
            settings={
                "shard_size": self.shard_size,
                "tokens": one.tokens,
                "channels": one.channels,
                "spectrum": one.spectrum,
                "shared": one.shared,
                "seed": one.seed,
                "smooth": one.smooth,
            },
            source=f"synthetic, spectrum {one.spectrum}, shared {one.shared:g}",
            spectrum=one.normalised_values,
        )

    @property
    def places(self) -> list[range]:
        return shard_places(self.count, self.shard_size)

    def size(self, shard: int) -> int:
        return len(self.places[shard])

    def made(self, shard: int, step: Step) -> Matrices:
        matrices, names = [], []
        for place in self.places[shard]:
            matrices.append(self.settings.matrix(place))
            names.append(f"synthetic-{place:06d}")
            step(1)
        groups = tuple(hashlib.sha256(f"{self.settings.seed} {name}".encode()).hexdigest() for name in names)
        return Matrices(torch.stack(matrices), tuple(names), groups, self.settings.grid)
