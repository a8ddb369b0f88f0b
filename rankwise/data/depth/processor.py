"""A processor that gives `depth` beside the pixels, as training did: for a model used from Python.

    processor = with_depth_output(processor, settings, estimator)
    inputs = processor(text=[…], images=[…], return_tensors="pt")      # pixel_values, …, depth
    inputs = processor(text=[…], images=[…], depth=values, …)          # values of your own, one per image token

The values are those of the training cache, bit for bit: the same estimator, one image at a time, rounded to float16.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.image_utils import load_image

from rankwise.core.geometry import permuted
from rankwise.data.depth.maps import NEEDS_NO_MAP, at_tokens, image_grids, luminance, synthetic
from rankwise.data.depth.prepare import ESTIMATED
from rankwise.errors import UsageError
from rankwise.models.depth.encoder import DepthSettings, encoder_of
from rankwise.models.depth.estimator import ESTIMATOR, DepthEstimator

OF_A_SET = ("shuffled", "file")
SEED = 42  # of the within-image permutation, as the commands' default


class ImageDepth:
    """Depth of single images at their tokens.

    estimator: where the settings' control looks at estimated depth.
    """

    def __init__(
        self, processor: Any, settings: DepthSettings, estimator: DepthEstimator | None, seed: int = SEED
    ) -> None:
        self.processor, self.settings, self.estimator, self.seed = processor, settings, estimator, seed

    def __call__(self, image: Image.Image, name: str) -> Tensor:
        """(tokens,) float16 in [0, 1]. UsageError for controls that need a whole data set."""
        control, picture = self.settings.control, image.convert("RGB")
        grids = image_grids(self.processor, *picture.size)
        if control in NEEDS_NO_MAP:
            return synthetic(control, grids)
        if control == "luminance":
            return at_tokens(luminance(picture), grids, name)
        if control in OF_A_SET:
            raise UsageError(f"depth control {control} belongs to a data set, not to one image: pass depth=values")
        assert self.estimator is not None, control
        values = at_tokens(self.estimator.depth(picture), grids, name)
        return permuted(values, grids, self.seed) if control == "permuted" else values


def with_depth_output(processor: Any, settings: DepthSettings, estimator: DepthEstimator | None) -> Any:
    """The processor, in place, with `depth` (image tokens of all images,) float32 among its outputs."""
    family: type = type(processor)
    processor.__class__ = giving_depth(family)
    processor.image_depth = ImageDepth(processor, settings, estimator)
    return processor


def depth_processor(processor: Any, model: Any) -> Any:
    """The processor, in place, for a model with depth that was put together by hand (plain PEFT, say): settings and
    estimator are the model's own, at `model.depth_model`. UsageError for a model without depth or estimator."""
    encoder = encoder_of(model)
    if encoder is None:
        raise UsageError(f"{type(model).__name__} has no depth encoder; load it with use_depth=True")
    estimator = getattr(model, ESTIMATOR, None)
    if estimator is None and encoder.settings.control in ESTIMATED:
        raise UsageError(f"{type(model).__name__} has no depth estimator; load it with depth_checkpoint_path=…")
    return with_depth_output(processor, encoder.settings, estimator)


@cache
def giving_depth(family: type) -> type:
    """The family's processor that gives depth. It keeps the family's name, which is saved with it."""
    assert issubclass(family, ProcessorMixin)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth = kwargs.pop("depth", None)
        images = inspect.signature(family.__call__).bind(self, *args, **kwargs).arguments.get("images")
        found = family.__call__(self, *args, **kwargs)
        if depth is None and images is not None:
            values = [self.image_depth(image, f"{index + 1}") for index, image in enumerate(pictures(images))]
            depth = torch.cat(values)
        if depth is not None:
            found["depth"] = depth.float()
        return found

    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__doc__": family.__doc__}
    return type(family.__name__, (family,), {**names, "__call__": call})


def pictures(images: Any) -> Iterator[Image.Image]:
    """All images of a batch in order, as the family's processor takes them: nested lists, files, URLs."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from pictures(image)
    elif isinstance(images, Image.Image):
        yield images
    elif isinstance(images, str):
        yield load_image(images)
    else:
        raise UsageError(f"depth needs images as PIL images, paths or URLs, not as {type(images).__name__}")
