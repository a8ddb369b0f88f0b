"""From an image to a matrix (T, D): the processor's input, then a model's vision encoder or a plain encoder.

    picture ── Preparation ──▶ square, or as the device shows it ── pixels, features ──▶ [((T, D), grid), …]

A vision-language model (`ModelEye`) gives what its language part gets; a plain encoder (`EncoderEye`: DINOv2 and 3,
SigLIP, CLIP, ViT …) its last hidden state at the patches. What stands in front of the patches (a class token,
registers) is dropped: it has no place on the picture. Of two towers (CLIP, SigLIP) the one that sees is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel, ProcessorMixin

from rankwise.core.geometry import WHOLE, Grid
from rankwise.data.depth.maps import image_grids
from rankwise.data.device import DeviceTarget, device_processor
from rankwise.data.pixels import BLACK, WHITE, Colour
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, UsageError
from rankwise.features.cache_writer import digest
from rankwise.files.atomic import about_to_write
from rankwise.files.checkpoint import resolve
from rankwise.models.load import PIXELS, check_torchvision, load_config, main_input, model_class
from rankwise.models.vision_features import image_features, load_vision_side

CONTRAST = "return_loss"  # of images and texts: what CLIP, SigLIP and their kin can be asked for
UNUSED = ("pooler", "head", "embeddings.mask_token")  # behind the last hidden state, or for training alone
Seen = tuple[Tensor, tuple[int, int]]
FRONT = 32  # most class tokens and registers that stand in front
Inputs = Mapping[str, Tensor]
SQUARE = 448  # pixels: 16 × 16 tokens in the Qwen-VL families
FILTER = Image.Resampling.BICUBIC  # Pillow's own default


@dataclass(frozen=True)
class ModelEye:
    """A vision-language model: the features that its language model receives."""

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


Eye = ModelEye | EncoderEye


def is_encoder(config: Any) -> bool:
    """Whether a model is a vision encoder: its only input is pixels, or it is contrastive with one such tower."""
    if hasattr(config, "vision_config"):
        forward = getattr(model_class(config), "forward", None)
        return forward is not None and CONTRAST in inspect.signature(forward).parameters
    return main_input(config) == PIXELS


def load_encoder(name: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> PreTrainedModel:
    """The encoder in evaluation mode. DataError where the files lack weights that its patch tokens need."""
    folder, config = resolve(name, revision), load_config(name, revision)
    about_to_write()
    try:
        model, found = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: cannot load the encoder: {error}") from error
    encoder = vision_half(model, config)
    prefix = next((f"{path}." for path, module in model.named_modules() if module is encoder and path), "")
    lacking = [
        key
        for key in sorted(found["missing_keys"])
        if key.startswith(prefix) and not any(part in key.removeprefix(prefix) for part in UNUSED)
    ]
    if lacking:
        raise DataError(f"{folder}: the files lack {len(lacking)} weights of the encoder: {', '.join(lacking[:5])}")
    return encoder.to(device).eval()


def vision_half(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """The outermost part that was built from the vision config; a model without one is that itself."""
    kind = type(getattr(config, "vision_config", config))
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel) and type(part.config) is kind)
    return next(parts)


def load_image_processor(name: str, revision: str | None = None) -> Any:
    """DataError where the folder has none."""
    check_torchvision()
    folder = resolve(name, revision)
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            f"{folder}: cannot load an image processor ({error}); put the preprocessor_config.json of the model there"
        ) from error


def own_side(processor: Any, config: Any) -> int:
    """Side of the square that an encoder's processor makes; the config's, where it makes none."""
    cropped = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    size = cropped or getattr(processor, "size", None) or {}
    found = size.get("height") or size.get("shortest_edge")
    stated = getattr(getattr(config, "vision_config", config), "image_size", None)
    side = found or (stated[0] if isinstance(stated, list | tuple) else stated)
    if not side:
        raise UsageError(f"{type(processor).__name__} and the config state no image size; give --image_size")
    return int(side)


def unresized(processor: Any) -> Any:
    """The processor for pictures that have their size already; one that lays patches out itself still does."""
    if not hasattr(processor, "max_num_patches"):
        processor.do_resize = processor.do_center_crop = False
    return processor


@torch.inference_mode()
def encoder_features(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Seen]:
    """(patch tokens (T, D), their (rows, columns)) of each picture. UsageError for an encoder whose tokens are not one
    row-major grid of patches behind what stands in front."""
    parameters = inspect.signature(model.forward).parameters
    taken: dict[str, Tensor | bool] = {name: value for name, value in inputs.items() if name in parameters}
    if "interpolate_pos_encoding" in parameters and "spatial_shapes" not in inputs:
        taken["interpolate_pos_encoding"] = True
    hidden = model(**taken).last_hidden_state
    if "spatial_shapes" in inputs:  # SigLIP 2: every picture has a grid of its own, padded at the end
        shapes = [(int(rows), int(columns)) for rows, columns in inputs["spatial_shapes"].tolist()]
        return [(row[: grid[0] * grid[1]], grid) for row, grid in zip(hidden, shapes, strict=True)]
    grid = patch_grid(model, inputs[PIXELS])
    front = (hidden.shape[1] if hidden.dim() == 3 else 0) - grid[0] * grid[1]
    if front < 0 or front > FRONT:
        raise UsageError(
            f"{type(model).__name__} gives {tuple(hidden.shape[1:])} for {grid[0]} × {grid[1]} patches: the position "
            "of its tokens in the image is unknown"
        )
    return [(row[front:], grid) for row in hidden]


def patch_grid(model: PreTrainedModel, pixels: Tensor) -> tuple[int, int]:
    size = getattr(model.config, "patch_size", None)
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    if not high or pixels.dim() != 4:
        raise UsageError(f"{type(model).__name__} has no patch size: the position of its tokens is unknown")
    return pixels.shape[-2] // high, pixels.shape[-1] // wide


@dataclass(frozen=True)
class Preparation:
    """How pictures go to the processor: to a square of `side` pixels whatever their shape, or as `target`'s device
    shows them, or, with neither, as they are."""

    side: int | None = SQUARE
    target: DeviceTarget | None = None

    def __post_init__(self) -> None:
        assert not (self.side and self.target)

    @property
    def background(self) -> Colour:
        """What transparency is laid on before."""
        return BLACK if self.target else WHITE

    def picture(self, image: Image.Image) -> Image.Image:
        if self.target:
            return self.target.resize(image)
        return image if self.side is None else image.resize((self.side, self.side), FILTER)

    def processor(self, processor: ProcessorMixin) -> ProcessorMixin:
        return device_processor(processor, self.target) if self.target else processor

    def record(self, images: Any) -> dict[str, Any]:
        """For the recipe: all that decides the tensors of a picture. images: the image processor."""
        own = images.to_json_string()
        return {
            "stretched_to": self.side,
            "device": self.target.geometry if self.target else None,
            "processor": f"{type(images).__name__} {digest(own.encode())[:12]}",
        }


def grids(processor: ProcessorMixin, image: Image.Image) -> tuple[Grid, ...] | None:
    """One grid per matrix of a prepared picture; None for a family whose rule is not known here, which has then one
    matrix per picture."""
    try:
        return image_grids(processor, *image.size)
    except UsageError:
        return None


def picture_digest(image: Image.Image) -> str:
    """SHA-256 of the pixels that the processor gets: what the model cannot tell apart is one picture."""
    return digest(f"{image.mode} {image.size}".encode() + image.tobytes())
