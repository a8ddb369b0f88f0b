"""The documented names of the low-rank feature scripts' `model.py`: its networks, their layer and the factory.

    from rankwise.scripts import build_model

    net = build_model("adaptive_adalora", rank=64)           # for features (B, 256, 2048), normalised
    X_hat = net(normalised(features)).factors.product()

`rankwise features train | compare | show` are what the script files were.
"""

from __future__ import annotations

from PIL import Image

from rankwise.data.device import MARKER, MAX_NEW_TOKENS, SIZE, resize_for_device
from rankwise.features.nets import build
from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.features.nets.row_column import (
    AdaptiveLowRankProjAdaLoRA,
    LowRankProjMLP,
    LowRankProjSymmetric,
    SVDLinear,
)

__all__ = ["AdaptiveLowRankProjAdaLoRA", "LowRankProjMLP", "LowRankProjSymmetric", "SVDLinear", "build_model"]


def build_model(
    arch: str = "ResMLP",
    *,
    tokens: int = 256,
    channels: int = 2048,
    rank: int = 128,
    dropout: float = 0.1,
    refine: bool = False,
) -> Factorizer:
    """The network of a documented name (`ResMLP`, `MLP`, `AdaLoRA`, `adaptive_adalora`, `adaptive`) or of our own.

    The defaults are Qwen2.5-VL-3B's features of a 448 × 448 image, and the documented rank. UsageError for an unknown
    name or a value out of bounds. The classes themselves take one `FactorizerSettings` of the same fields.
    """
    return build(FactorizerSettings(arch, tokens, channels, rank, dropout, refine))


ANDROID_IMAGE_SIZE: int = SIZE
ANDROID_MAX_TOKENS: int = MAX_NEW_TOKENS
ANDROID_IMAGE_MARKER: str = MARKER


def resize_for_android(image: Image.Image, target_size: int = ANDROID_IMAGE_SIZE) -> Image.Image:
    """The picture as the app gives it to the model: filtered bilinear scaling, black padding."""
    return resize_for_device(image, target_size)
