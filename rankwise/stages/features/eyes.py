"""What sees the pictures of a capture: the vision side of a vision-language model, or a plain vision encoder.

pictures ── Eye.pixels ──▶ tensors ── Eye.features ──▶ (T, D) per matrix;  Eye.grids says how many one picture makes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from rankwise.core.geometry import WHOLE, Grid
from rankwise.data.features.preparing import grids
from rankwise.data.vision_inputs import Sight
from rankwise.models.vision_features import image_features, load_vision_side
from rankwise.nets.encoder import encoder_features, load_encoder

Inputs = Mapping[str, Tensor]


class Eye(Protocol):
    """processor: the image processor, which decides the tensors of a picture."""

    @property
    def processor(self) -> Any: ...

    def load(self, dtype: torch.dtype, device: torch.device) -> Any: ...

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]: ...

    def grids(self, image: Image.Image) -> tuple[Grid, ...] | None:
        """One per matrix of a prepared picture; None for one matrix, of which nothing is known before it is seen."""

    def features(self, model: Any, inputs: Inputs) -> list[tuple[Tensor, Grid | None]]: ...


@dataclass(frozen=True)
class ModelEye:
    """A vision-language model: what its language part gets."""

    name: str
    sight: Sight
    revision: str | None = None

    @property
    def processor(self) -> Any:
        return self.sight.processor.image_processor

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        return load_vision_side(self.name, dtype, device, self.revision)

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return self.sight.pixels([[image] for image in images])

    def grids(self, image: Image.Image) -> tuple[Grid, ...] | None:
        return grids(self.sight.processor, image)

    def features(self, model: Any, inputs: Inputs) -> list[tuple[Tensor, Grid | None]]:
        return [(matrix, None) for matrix in image_features(model, inputs)]


@dataclass(frozen=True)
class EncoderEye:
    """A vision encoder: its last hidden state at the patches."""

    name: str
    processor: Any
    revision: str | None = None

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        return load_encoder(self.name, dtype, device, self.revision)

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor(images=list(images), return_tensors="pt"))

    def grids(self, image: Image.Image) -> tuple[Grid, ...] | None:
        return None

    def features(self, model: Any, inputs: Inputs) -> list[tuple[Tensor, Grid | None]]:
        return [(matrix, Grid(WHOLE, *grid)) for matrix, grid in encoder_features(model, inputs)]
