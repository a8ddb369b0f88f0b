"""The depth estimator: Depth Anything V2, frozen, from images to maps of relative inverse depth (near = large).

    estimator = load_estimator("depth_anything_v2_vits.pth")      # or a Hugging Face folder or hub id
    estimator.depth(image)                                        # (height, width) float32

    depth_anything_v2_vits.pth ── from_original ──▶ DepthAnythingForDepthEstimation, size recognised from the shapes

Original files name the tensors differently, and hold the query, key and value of a block as one matrix.
`LoadsWithDepth` is for a model class that brings encoder and estimator along when it is loaded, as Isaac does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoConfig, DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from rankwise.core.geometry import estimator_size
from rankwise.errors import DataError, UsageError
from rankwise.files.checkpoint import resolve
from rankwise.files.pickled import SUFFIXES, load_pickle
from rankwise.models.depth.encoder import DepthSettings, attach_depth, read_depth


@dataclass(frozen=True)
class Size:
    """What tells the sizes apart. taps: encoder layers, counted from 1, whose outputs the head reads."""

    name: str
    hidden: int
    layers: int
    fusion: int
    neck: tuple[int, int, int, int]
    taps: tuple[int, int, int, int]


SIZES = (
    Size("Small", 384, 12, 64, (48, 96, 192, 384), (3, 6, 9, 12)),
    Size("Base", 768, 12, 128, (96, 192, 384, 768), (3, 6, 9, 12)),
    Size("Large", 1024, 24, 256, (256, 512, 1024, 1024), (5, 12, 18, 24)),
)
ESTIMATOR = "depth_model"  # the documented module name
HEAD_WIDTH, PATCH, TRAINED_AT = 64, 14, 518
CLASS_TOKEN, QKV = "pretrained.cls_token", ".attn.qkv."

EMBEDDINGS, BLOCK = "backbone.embeddings", r"backbone.encoder.layer.\1"
NECK, FUSION = "neck.reassemble_stage.layers", "neck.fusion_stage.layers"
RENAMINGS = (
    (r"pretrained\.(cls_token|mask_token)", rf"{EMBEDDINGS}.\1"),
    (r"pretrained\.pos_embed", f"{EMBEDDINGS}.position_embeddings"),
    (r"pretrained\.patch_embed\.proj\.(\w+)", rf"{EMBEDDINGS}.patch_embeddings.projection.\1"),
    (r"pretrained\.blocks\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)\.(\w+)", rf"{BLOCK}.\2.\3"),
    (r"pretrained\.blocks\.(\d+)\.ls([12])\.gamma", rf"{BLOCK}.layer_scale\2.lambda1"),
    (r"pretrained\.blocks\.(\d+)\.attn\.([qkv])\.(\w+)", rf"{BLOCK}.attention.\2_proj.\3"),
    (r"pretrained\.blocks\.(\d+)\.attn\.proj\.(\w+)", rf"{BLOCK}.attention.o_proj.\2"),
    (r"pretrained\.norm\.(\w+)", r"backbone.layernorm.\1"),
    (r"depth_head\.projects\.(\d)\.(\w+)", rf"{NECK}.\1.projection.\2"),
    (r"depth_head\.resize_layers\.([013])\.(\w+)", rf"{NECK}.\1.resize.\2"),
    (r"depth_head\.scratch\.output_conv1\.(\w+)", r"head.conv1.\1"),
    (r"depth_head\.scratch\.output_conv2\.0\.(\w+)", r"head.conv2.\1"),
    (r"depth_head\.scratch\.output_conv2\.2\.(\w+)", r"head.conv3.\1"),
)
# The original counts its levels from 1 and its fusion from the finest; transformers from 0 and from the coarsest.
LEVEL = re.compile(r"depth_head\.scratch\.layer([1-4])_rn\.(\w+)")
REFINE = re.compile(r"depth_head\.scratch\.refinenet([1-4])\.(resConfUnit([12])\.conv([12])|out_conv)\.(\w+)")


def from_original(weights: Mapping[str, Tensor], path: Path) -> DepthAnythingForDepthEstimation:
    """The estimator with the tensors of an original file, on the CPU, float32.

    Raises DataError where the file is of no known size, lacks tensors, or holds others.
    """
    return fill_model(config_of(size_of(weights, path)), weights, path)


def size_of(weights: Mapping[str, Tensor], path: Path) -> Size:
    """Small, Base or Large, by the width of the class token and the number of blocks."""
    token = weights.get(CLASS_TOKEN)
    if token is None:
        raise DataError(f"{path}: not the weights of Depth Anything V2: {CLASS_TOKEN} is missing")
    layers = len({found[1] for key in weights if (found := re.match(r"pretrained\.blocks\.(\d+)\.", key))})
    for size in SIZES:
        if (token.shape[-1], layers) == (size.hidden, size.layers):
            return size
    known = ", ".join(f"{size.name} {size.hidden}×{size.layers}" for size in SIZES)
    raise DataError(f"{path}: Depth Anything V2 of {token.shape[-1]} × {layers} layers is none of {known}; cut short?")


def config_of(size: Size) -> DepthAnythingConfig:
    backbone = Dinov2Config(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // HEAD_WIDTH,
        patch_size=PATCH,
        image_size=TRAINED_AT,
        out_indices=list(size.taps),
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=size.hidden,
        neck_hidden_sizes=list(size.neck),
        fusion_hidden_size=size.fusion,
        head_hidden_size=32,
        patch_size=PATCH,
    )


def fill_model(
    config: DepthAnythingConfig, weights: Mapping[str, Tensor], path: Path
) -> DepthAnythingForDepthEstimation:
    """The config's model with these tensors, every one of them and no other."""
    with torch.device("meta"):
        model = DepthAnythingForDepthEstimation(config)
    state = rename_tensors(weights)
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = sorted(name for name in set(wanted) & set(state) if wanted[name].shape != state[name].shape)
    for names, what in ((missing, "are missing"), (extra, "are unexpected"), (other, "have different shapes")):
        if names:
            raise DataError(
                f"{path}: {len(names)} tensors of Depth Anything V2 {what} ({names[0]} …); cut short, or another model?"
            )
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model


def rename_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under transformers' module names; a key that no rule knows keeps its own."""
    return {new_name(key): value for key, value in split_qkv(weights).items()}


def split_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joined query, key and value matrices taken apart, in that order."""
    parts: dict[str, Tensor] = {}
    for key, value in weights.items():
        if QKV in key and len(value) % 3 == 0:
            parts |= {
                key.replace(QKV, f".attn.{name}."): part for name, part in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            parts[key] = value
    return parts


def new_name(key: str) -> str:
    if level := LEVEL.fullmatch(key):
        return f"neck.convs.{int(level[1]) - 1}.{level[2]}"
    if refine := REFINE.fullmatch(key):
        place = f"{FUSION}.{4 - int(refine[1])}"
        inner = "projection" if refine[3] is None else f"residual_layer{refine[3]}.convolution{refine[4]}"
        return f"{place}.{inner}.{refine[5]}"
    for pattern, name in RENAMINGS:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    return key


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
        pixels = prepare_pixels(image, self.input_size).to(self.model.device)
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
        raise DataError(f"{folder}: {len(wrong)} weights are missing or unexpected ({wrong[0]} …)")
    return model


def prepare_pixels(image: Image.Image, input_size: int) -> Tensor:
    """(1, 3, height, width) as Depth Anything V2 prepares it: shorter side `input_size`, multiples of 14, bicubic."""
    pixels = pil_to_tensor(image).float()[None] / 255
    size = estimator_size(image.height, image.width, input_size)
    resized = functional.interpolate(pixels, size, mode="bicubic", align_corners=False)
    return (resized - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


class LoadsWithDepth:
    """To stand before PreTrainedModel among a class's bases."""

    @classmethod
    def from_pretrained(
        cls,
        name: Any,
        *args: Any,
        use_depth: bool = False,
        depth_checkpoint_path: str | None = None,
        depth_alpha: float | None = None,
        depth_input_size: int | None = None,
        depth_gate: str | None = None,
        depth_layout: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As PreTrainedModel.from_pretrained; with `use_depth` the model has a depth encoder and its gate.

        What is not given is as in the folder's depth.json (a merged model's), else as in DepthSettings. With
        depth_checkpoint_path the frozen estimator stands at `model.depth_model`: no part of the model's parameters,
        its state dict or what is saved. Raises UsageError for depth options without `use_depth`.
        """
        given: dict[str, Any] = {
            "estimator": depth_checkpoint_path,
            "alpha": depth_alpha,
            "input_size": depth_input_size,
            "gate": depth_gate,
            "layout": depth_layout,
        }
        chosen = {option: value for option, value in given.items() if value is not None}
        if chosen and not use_depth:
            raise UsageError(f"the depth option {next(iter(chosen))} needs use_depth=True")
        loaded = super().from_pretrained(name, *args, **kwargs)  # type: ignore[misc]
        if use_depth:
            recorded = read_depth(name) if Path(str(name)).is_dir() else None
            attach_with_estimator(
                loaded[0] if isinstance(loaded, tuple) else loaded, replace(recorded or DepthSettings(), **chosen)
            )
        return loaded


def attach_with_estimator(model: Any, settings: DepthSettings) -> None:
    """The encoder, and the estimator where one is named, on the model's device."""
    if settings.estimator:
        estimator = load_estimator(settings.estimator, settings.input_size)
        estimator.model.to(model.device)
        settings = replace(settings, estimator_hash=estimator.fingerprint)
        setattr(model, ESTIMATOR, estimator)
    attach_depth(model, settings)
