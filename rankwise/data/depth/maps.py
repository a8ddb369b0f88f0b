"""The depth of a data set's images at their tokens, read from a cache that a pass before training has filled.

    maps = DepthMaps(reader, processor, DepthCache(folder), source)
    missing = maps.missing(references)          # what the pass must make
    maps.store(task, depth_map)                 # (height, width), any scale, near = large
    maps.for_image("photos/17.jpg")             # (tokens,) float16 in [0, 1]

Every control goes through the same cache, the same float16 values and, in the model, the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import ProcessorMixin

from rankwise.core import geometry as core
from rankwise.core.geometry import WHOLE, Grid, bounded_size, centre_crop, tile_counts, tiled
from rankwise.data.depth.cache import BrokenMap, DepthCache, DepthFiles, MapKey, inverse_depth
from rankwise.data.device import AlwaysTiled, DeviceReader
from rankwise.data.images import ImageReader, shown
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import sha256

__all__ = ["Grid", "image_grids"]

Rule = Callable[[Any, int, int], tuple[Grid, ...]]


def image_grids(processor: ProcessorMixin, width: int, height: int) -> tuple[Grid, ...]:
    """The grids of one image's tokens, in the order in which the tokens stand in the prompt, row-major inside.

    Qwen2-VL, Qwen2.5-VL, Isaac, LLaVA: one grid. SmolVLM, Idefics3: the tiles, row-major, then the whole image.
    Raises UsageError, naming the family, where the processor's rule is not known here.
    """
    images = processor.image_processor
    rule = RULES.get(type(images).__name__.removeprefix("Tiled").removesuffix("Pil"))
    if rule is None or not getattr(images, "do_resize", True):
        known = "Qwen2-VL, Qwen2.5-VL, Isaac, SmolVLM, Idefics3 and LLaVA (CLIP)"
        raise UsageError(
            f"{type(processor).__name__} with {type(images).__name__}: how its image tokens lie on the image is not "
            f"known here, so depth has no place to go; it works with the processors of {known}, images resized"
        )
    return rule(processor, width, height)


def merged_patches(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    """One token per merge_size² patches of the image resized within its pixel limits."""
    images = processor.image_processor
    side = images.patch_size * images.merge_size
    size = images.size
    tall, wide = bounded_size(height, width, side, size["shortest_edge"], size["longest_edge"])
    return (Grid(WHOLE, tall // side, wide // side),)


def shuffled_patches(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    """Isaac: one token per pixel-shuffled block of the image resized to whole blocks."""
    images = processor.image_processor
    side = images.patch_size * images.pixel_shuffle_scale
    tall, wide = images.target_size(height, width)
    return (Grid(WHOLE, tall // side, wide // side),)


def tiles_and_whole(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    images = processor.image_processor
    side = math.isqrt(processor.image_seq_len)
    if not images.do_image_splitting:
        return tiled(0, 0, side)
    longest, tile = images.size["longest_edge"], images.max_image_size["longest_edge"]
    rows, columns = tile_counts(height, width, longest, tile)
    if isinstance(images, AlwaysTiled) and not rows:
        rows, columns = 1, 1
    return tiled(rows, columns, side)


def cropped_patches(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    """CLIP: the middle of the image, one token per patch; the class token must be dropped."""
    images, patch = processor.image_processor, processor.patch_size
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    shortest = images.size.get("shortest_edge")
    crop = images.crop_size["height"], images.crop_size["width"]
    if extra or not images.do_center_crop or not shortest or max(crop) > shortest:
        raise UsageError(
            f"{type(processor).__name__}: depth needs one token per patch of an image that is resized by its shortest "
            "side and cropped in the middle; this processor's settings are others"
        )
    return (Grid(centre_crop(height, width, shortest, crop), crop[0] // patch, crop[1] // patch),)


RULES: dict[str, Rule] = {
    "Qwen2VLImageProcessor": merged_patches,
    "IsaacImageProcessor": shuffled_patches,
    "SmolVLMImageProcessor": tiles_and_whole,
    "Idefics3ImageProcessor": tiles_and_whole,
    "CLIPImageProcessor": cropped_patches,
}


NEEDS_NO_MAP = ("off", "constant", "ramp")
LUMINANCE = "luminance"


@dataclass(frozen=True)
class MapTask:
    """One cached map: whose depth it is, at which image's tokens. They differ where maps are shuffled."""

    maker: str
    grids: tuple[Grid, ...]
    key: MapKey


@dataclass(frozen=True)
class DepthMaps:
    """Depth values of images by their references.

    source: what made the maps (`depth_cache.source_name` of an estimator); files and luminance name themselves.
    control: one of core.depth.CONTROLS. donors: image digest → reference whose map it gets (control `shuffled`).
    seed: of the within-image permutation and of the shuffle.
    """

    reader: ImageReader | DeviceReader
    processor: Any
    cache: DepthCache
    source: str = ""
    control: str = "estimated"
    files: DepthFiles | None = None
    seed: int = 42
    donors: Mapping[str, str] = field(default_factory=dict, repr=False)
    _known: dict[str, tuple[str, tuple[Grid, ...]]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.control in core.CONTROLS, self.control
        assert (self.control == "file") == (self.files is not None), self.control

    def for_image(self, reference: str) -> Tensor:
        """(tokens,) float16 in [0, 1], in the order of the image's tokens.

        Raises DataError where the cache lacks the map, BrokenMap where it cannot be read.
        """
        if self.control in NEEDS_NO_MAP:
            return synthetic(self.control, self._seen(reference)[1])
        task = self.task(reference)
        values = self.cache.read(task.key)
        if values is None:
            raise DataError(
                f"image {shown(reference)}: its depth map is not in {self.cache.folder} (deleted since the start, or "
                "the image has changed); run the command again, which makes what is missing before it starts"
            )
        return core.permuted(values, task.grids, self.seed) if self.control == "permuted" else values

    def task(self, reference: str) -> MapTask:
        """What is cached for an image."""
        digest, grids = self._seen(reference)
        maker = reference
        if self.control == "shuffled":
            if digest not in self.donors:
                raise UsageError(f"image {shown(reference)} is not in the set whose depth maps were shuffled")
            maker = self.donors[digest]
        return MapTask(maker, grids, MapKey(self._seen(maker)[0], self._source(maker), grids))

    def shuffled(self, references: Iterable[str]) -> DepthMaps:
        """These maps with every image's replaced by another one's, drawn with the seed over the whole set."""
        by_digest = {self._seen(reference)[0]: reference for reference in references}
        if len(by_digest) < 2:
            raise UsageError("--depth_control shuffled needs at least two different images")
        digests = sorted(by_digest)
        order = core.derangement(len(digests), torch.Generator().manual_seed(self.seed))
        donors = {digests[index]: by_digest[digests[other]] for index, other in enumerate(order)}
        return replace(self, control="shuffled", donors=donors)

    def missing(self, references: Iterable[str]) -> tuple[list[MapTask], list[str]]:
        """(what is to be made, one task per map; what was found broken and must be made again)."""
        if self.control in NEEDS_NO_MAP:
            return [], []
        found: dict[MapKey, MapTask] = {}
        broken: list[str] = []
        for reference in dict.fromkeys(references):
            task = self.task(reference)
            if task.key in found:
                continue
            try:
                absent = self.cache.read(task.key) is None
            except BrokenMap as error:
                broken.append(str(error))
                absent = True
            if absent:
                found[task.key] = task
        return list(found.values()), broken

    def store(self, task: MapTask, depth: Tensor) -> None:
        """Cache one map (height, width), normalised, at the task's tokens. Raises DataError for one with NaN."""
        self.cache.write(task.key, at_tokens(depth, task.grids, task.maker))

    def own_map(self, reference: str) -> Tensor:
        """The map that needs no estimator: measured depth from a file, or the image's luminance."""
        if self.files is not None:
            return inverse_depth(self.files.file(reference))
        return luminance(self.reader.open(reference))

    def _source(self, reference: str) -> str:
        if self.files is not None:
            return f"file {sha256(self.files.file(reference))}"
        return LUMINANCE if self.control == LUMINANCE else self.source

    def _seen(self, reference: str) -> tuple[str, tuple[Grid, ...]]:
        """An image's digest and grids, read once."""
        if reference not in self._known:
            grids = image_grids(self.processor, *self.reader.size(reference))
            self._known[reference] = self.reader.digest(reference), grids
        return self._known[reference]


def at_tokens(depth: Tensor, grids: Sequence[Grid], name: str) -> Tensor:
    """A map (height, width) → (tokens,) float16 in [0, 1]. Raises DataError, naming the image, for one with NaN."""
    try:
        return core.on_grids(core.normalised(depth), grids)
    except ValueError as error:
        raise DataError(f"image {shown(name)}: its depth estimate failed: {error}") from error


def synthetic(control: str, grids: Sequence[Grid]) -> Tensor:
    """The values of controls that do not look at the image. `off`: the model adds nothing, whatever they are."""
    return core.on_grids(core.ramp(), grids) if control == "ramp" else core.constant(grids)


def luminance(image: Image.Image) -> Tensor:
    """Brightness as if it were depth, (height, width): ITU-R 601 luma."""
    pixels: Tensor = pil_to_tensor(image.convert("L"))
    return pixels[0].float()
