"""The depth estimator: Depth Anything V2, frozen, from images to maps of relative inverse depth (near = large).

estimator = load_estimator("depth_anything_v2_vits.pth")      # or a Hugging Face folder or hub id
estimator.depth(image)                                        # (height, width) float32
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoConfig, DepthAnythingConfig, DepthAnythingForDepthEstimation

from rankwise.core.geometry import estimator_size
from rankwise.errors import DataError
from rankwise.files.checkpoint import resolve
from rankwise.files.pickled import SUFFIXES, load_pickle
from rankwise.nets.depth_weights import from_original

SMALL = "depth-anything/Depth-Anything-V2-Small-hf"  # Apache-2.0; Base and Large are for non-commercial use only
INPUT_SIZE = 518
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


@dataclass(frozen=True, eq=False)
class DepthEstimator:
    """A frozen estimator. input_size: the shorter side of an image as the network sees it, in pixels."""

    name: str
    model: DepthAnythingForDepthEstimation = field(repr=False)
    input_size: int = INPUT_SIZE

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of architecture and weights, the same for an original file and its conversion."""
        digest = hashlib.sha256(json.dumps(architecture(self.model.config)).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def depth(self, image: Image.Image) -> Tensor:
        """Relative inverse depth (height, width) of one RGB image, float32, on the CPU, at the network's resolution.

        One image at a time and in full float32: in a batch the last bits would depend on its company, on a GPU on the
        algorithm that is fastest today, and what is cached must not.
        """
        pixels = prepared(image, self.input_size).to(self.model.device)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            found: Tensor = self.model(pixel_values=pixels).predicted_depth
        return found[0].float().cpu()


def architecture(config: DepthAnythingConfig) -> list[Any]:
    """What decides the output beside the weights and their shapes."""
    backbone = config.backbone_config
    return [
        backbone.num_attention_heads,
        list(backbone.out_indices),
        config.patch_size,
        config.reassemble_factors,
        config.head_in_index,
        config.max_depth,
    ]


def load_estimator(name: str, input_size: int = INPUT_SIZE) -> DepthEstimator:
    """An estimator from an original `.pth`, a Hugging Face folder, or a hub id; frozen and in evaluation mode.

    Raises DataError where there is none, where the weights are another model's or cut short, and for models of metric
    depth (far = large).
    """
    path = resolve(name)
    if path.is_dir():
        model = from_folder(path)
    elif path.suffix in SUFFIXES:
        model = from_original(load_pickle(path), path)
    else:
        raise DataError(f"{path}: a depth estimator is a Hugging Face folder or an original {', '.join(SUFFIXES)} file")
    if model.config.depth_estimation_type != "relative":
        raise DataError(f"{path}: this model gives metric depth, far = large; give one of relative depth")
    return DepthEstimator(name, model.requires_grad_(False).eval(), input_size)


def from_folder(folder: Path) -> DepthAnythingForDepthEstimation:
    try:
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, DepthAnythingConfig):
            raise DataError(f"{folder}: a {config.model_type} model, not Depth Anything")
        model, info = DepthAnythingForDepthEstimation.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot load the estimator: {error}") from error
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} weights are missing or have no place ({wrong[0]} …)")
    return model


def prepared(image: Image.Image, input_size: int) -> Tensor:
    """(1, 3, height, width) as Depth Anything V2 prepares it: shorter side `input_size`, multiples of 14, bicubic."""
    pixels = pil_to_tensor(image).float()[None] / 255
    size = estimator_size(image.height, image.width, input_size)
    resized = functional.interpolate(pixels, size, mode="bicubic", align_corners=False)
    return (resized - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
