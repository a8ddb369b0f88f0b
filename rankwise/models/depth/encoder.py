"""Depth in a vision-language model: an encoding of each image token's depth, added to the projector's output.

    attach_depth(model, DepthSettings())
    model(..., pixel_values=…, depth=values)          # values: (image tokens of the batch,), in [0, 1]
    model.generate(..., pixel_values=…, depth=values)

    image ──▶ vision tower ──▶ projector ──▶ (tokens, E) ── + gate · PE(alpha · depth) ──▶ merged with the text

One mechanism for all families of transformers whose `get_image_features` gives the projector's output: the model and
its inner model become instances of subclasses that know `depth`, generation included. `depth.json` beside an adapter
says how it was trained to take depth: what must be the same wherever it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import beside
from rankwise.files.document import Document
from rankwise.options.sections import DEPTH_CONTROLS, DEPTH_GATES, DEPTH_LAYOUTS, DepthSection

DEPTH = Document("depth.json", "rankwise-depth/1", "depth settings")
ENCODER = "depth_preproc"  # the documented module names
BASE = 10_000.0  # of the frequencies
WITHOUT = (
    "this model was trained with depth, and its images came without: give `depth`, one value per image token "
    "(`rankwise.load` and the commands do, with the estimator that depth.json names)"
)


@dataclass(frozen=True)
class DepthSettings:
    """Depth settings of a model.

    alpha: depth in [0, 1] is multiplied by it before the encoding. input_size: the shorter side of an image as the
    estimator sees it. gate: `learned`, one number that starts at 0, or `none`, always 1: the encoding's length
    √(width/2) can then swamp the features. layout: sines before cosines, or by turns. estimator: file, folder or hub
    id; estimator_hash: its fingerprint. control: where the numbers come from (DEPTH_CONTROLS). gate_value: the
    trained gate of a merged model; an adapter holds its gate itself.
    """

    alpha: float = 100.0
    input_size: int = 518
    gate: str = "learned"
    layout: str = "split"
    estimator: str | None = None
    estimator_hash: str | None = None
    control: str = "estimated"
    gate_value: float | None = None

    def __post_init__(self) -> None:
        DepthSection(depth_alpha=self.alpha, depth_input_size=self.input_size)  # UsageError for a number out of range
        for name, value, known in (
            ("gate", self.gate, DEPTH_GATES),
            ("layout", self.layout, DEPTH_LAYOUTS),
            ("control", self.control, DEPTH_CONTROLS),
        ):
            if value not in known:
                raise UsageError(f"--depth_{name} takes {', '.join(known)}; got {value!r}")


def write_depth(folder: Path | str, settings: DepthSettings) -> Path:
    """`depth.json` in the folder of an adapter, a run or a merged model."""
    return DEPTH.write(folder, settings)


def read_depth(folder: Path | str) -> DepthSettings | None:
    """The settings of an adapter's folder (a checkpoint's: of its run folder), None for a model without depth.

    Raises DataError, naming the file, for one that says something else.
    """
    file = beside(folder, DEPTH.name)
    return None if file is None else DEPTH.read_as(DepthSettings, file)


class DepthEncoder(nn.Module):
    """Sinusoidal encoding of depth, times a gate, added to image features. width: that of the decoder, even.

    The gate is its only parameter; with the control `off` it is there and changes nothing.
    """

    def __init__(self, width: int, settings: DepthSettings) -> None:
        super().__init__()
        self.width, self.settings = width, settings
        start = 0.0 if settings.gate_value is None else settings.gate_value
        # One dimension: FSDP2 cannot shard a parameter without any.
        self.gate = nn.Parameter(torch.tensor([start])) if settings.gate == "learned" else None

    def encoding(self, depth: Tensor) -> Tensor:
        """(tokens,) in [0, 1] → (tokens, width) float32: sin and cos of alpha·d·ω, ω_k = 10000^(−2k/width)."""
        steps = torch.arange(self.width // 2, device=depth.device, dtype=torch.float32)
        angles = self.settings.alpha * depth.float()[:, None] * BASE ** (-2 * steps / self.width)
        waves = (angles.sin(), angles.cos())
        return torch.cat(waves, 1) if self.settings.layout == "split" else torch.stack(waves, 2).flatten(1)

    def forward(self, features: Sequence[Tensor], depth: Tensor) -> list[Tensor]:
        """features: (tokens, width) per image. depth: the tokens of all these images, in order.

        Raises DataError where the numbers of tokens differ, and for bfloat16: its 8 bits are fewer than a map has.
        """
        if depth.dtype == torch.bfloat16:
            raise DataError("bfloat16 depth has lost precision (did `inputs.to(dtype)` take it?); keep it in float32")
        counts = [part.shape[:-1].numel() for part in features]
        if sum(counts) != depth.numel():
            raise DataError(f"{depth.numel()} depth values for {sum(counts)} image tokens; give exactly one per token")
        parts = depth.to(features[0].device).flatten().split(counts)
        return [part + self.added(values).view_as(part).to(part) for part, values in zip(features, parts, strict=True)]

    def added(self, depth: Tensor) -> Tensor:
        strength: Tensor | float = 0.0 if self.settings.control == "off" else 1.0
        return self.encoding(depth) * (strength if self.gate is None else strength * self.gate)


def attach_depth(model: Any, settings: DepthSettings) -> Any:
    """The model, in place, with a fresh encoder (`depth_preproc`) at its inner model and `depth` as an input.

    After loading, not in `__init__`: loading would undo it. Raises UsageError for a model whose image features cannot
    be reached, and for a text model.
    """
    inner = model.base_model
    check_family(model, inner)
    width = model.config.get_text_config().hidden_size
    if width % 2:
        raise UsageError(f"depth needs an even decoder width, and {type(model).__name__} has {width}")
    setattr(inner, ENCODER, DepthEncoder(width, settings).to(model.device))
    if not takes_depth(model):
        families: tuple[type, type] = type(inner), type(model)
        inner.__class__, model.__class__ = with_depth_features(families[0]), with_depth_input(families[1])
    return model


def check_family(model: PreTrainedModel, inner: Any) -> None:
    known = hasattr(inner, "get_image_features") and inner is not model
    if not known or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"{type(model).__name__}: depth needs a model with image features that are merged with text")


def takes_depth(model: Any) -> bool:
    return "depth" in inspect.signature(model.forward).parameters


def encoder_of(model: Any) -> DepthEncoder | None:
    """The encoder of a model, plain or PEFT-wrapped; None without depth. With an adapter: the
    adapter's own, which PEFT puts after the base's."""
    found = [module for module in model.modules() if isinstance(module, DepthEncoder)]
    return found[-1] if found else None


@cache
def with_depth_features(family: type) -> type:
    """The family's inner model whose image features carry depth. generate() passes what the signature names."""

    def get_image_features(self: Any, *args: Any, depth: Tensor | None = None, **kwargs: Any) -> Any:
        if depth is None:
            raise DataError(WITHOUT)
        outputs = family.get_image_features(self, *args, **{**kwargs, "return_dict": True})  # type: ignore[attr-defined]
        outputs.pooler_output = getattr(self, ENCODER)(outputs.pooler_output, depth)
        return outputs

    return extend_method(family, get_image_features)


@cache
def with_depth_input(family: type) -> type:
    """The family's model with `depth` in its forward. It sees the images first, and hands on what it has seen, as
    generate() does in the families themselves."""
    positional = list(inspect.signature(family.forward).parameters)[1:]  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, depth: Tensor | None = None, **kwargs: Any) -> Any:
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        if given.get("pixel_values") is not None:
            seen = image_features(self.base_model, given, depth)
            given = {**given, "pixel_values": None, "mm_encoder_outputs": {"image": seen}}
        elif depth is not None:
            raise DataError(f"{depth.numel()} depth values without images; give both or neither")
        return family.forward(self, **given)  # type: ignore[attr-defined]

    return extend_method(family, forward)


def image_features(inner: Any, given: dict[str, Any], depth: Tensor | None) -> Any:
    names = inspect.signature(inner.get_image_features).parameters
    wanted = {name: given[name] for name in names if given.get(name) is not None}
    return inner.get_image_features(**wanted, depth=depth)


def extend_method(family: type, method: Any) -> type:
    """A subclass with this one method over the family's, `depth` in its signature.

    It keeps the family's name: configs are saved with it, and transformers looks classes up by it.
    """
    original = inspect.signature(getattr(family, method.__name__))
    ordinary = [one for one in original.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [one for one in original.parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD]
    depth = inspect.Parameter("depth", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
    method.__signature__ = original.replace(parameters=[*ordinary, depth, *rest])
    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__doc__": family.__doc__}
    return type(family.__name__, (family,), {**names, method.__name__: method})
