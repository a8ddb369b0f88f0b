"""Depth at image tokens: where the tokens lie (`image_grids`), the maps' cache on disk, and a data set's maps.

    <folder>/3f/3f9c….safetensors              {"depth": (tokens,) float16}, its key as metadata; whole once it is named
    --depth_maps DIR                           DIR/kitchen/17.png belongs to the image kitchen/17.jpg
    --depth_maps pairs.csv                     image_path,depth_path, both relative to the table's folder

    maps = DepthMaps(reader, processor, DepthCache(folder), source)
    missing = maps.missing(references)          # what the pass must make
    maps.store(task, depth_map)                 # (height, width), any scale, near = large
    maps.for_image("photos/17.jpg")             # (tokens,) float16 in [0, 1]

Every control goes through the same cache, the same float16 values and, in the model, the same parameters.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import ProcessorMixin

from rankwise.core import geometry as core
from rankwise.core.geometry import WHOLE, Grid, bounded_size, centre_crop, tile_counts, tiled
from rankwise.data.device import AlwaysTiled, DeviceReader
from rankwise.data.images import ImageReader, shown
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import atomic_write, sha256
from rankwise.options.sections import DEPTH_CONTROLS

FORMAT = "rankwise-depth-map/1"
REMEDY = "run the command again, which makes it anew before it starts"
COLUMNS = ("image_path", "depth_path")
MODES = ("I;16", "I;16B", "I;16L", "I")
NEEDS_NO_MAP = ("off", "constant", "ramp")
LUMINANCE = "luminance"
Rule = Callable[[Any, int, int], tuple[Grid, ...]]


class BrokenMap(DataError):
    """A cached map that cannot be used. The pass that fills the cache makes it again; a reader stops."""


@dataclass(frozen=True)
class MapKey:
    """What a cached map depends on: the image, what made the map (with its input size), and the token grids.

    image, source: hexadecimal digests or short names.
    """

    image: str
    source: str
    grids: tuple[Grid, ...]

    @property
    def text(self) -> str:
        grids = [[*grid.box, grid.rows, grid.columns] for grid in self.grids]
        return json.dumps({"format": FORMAT, "image": self.image, "source": self.source, "grids": grids})

    @property
    def tokens(self) -> int:
        return sum(grid.tokens for grid in self.grids)


@dataclass(frozen=True)
class DepthCache:
    """A folder of maps normalised to [0, 1], float16, before alpha."""

    folder: Path

    def file(self, key: MapKey) -> Path:
        name = hashlib.sha256(key.text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, key: MapKey) -> Tensor | None:
        """(tokens,) float16 in [0, 1], or None where there is none. Raises BrokenMap."""
        file = self.file(key)
        if not file.is_file():
            return None
        try:
            with safe_open(str(file), framework="pt") as content:
                same = (content.metadata() or {}).get("key") == key.text
                values: Tensor = content.get_tensor("depth")
        except (OSError, SafetensorError) as error:
            raise BrokenMap(f"{file}: not a sound depth map ({error}); {REMEDY}") from error
        if (
            not same
            or values.dtype != torch.float16
            or values.shape != (key.tokens,)
            or not ((values >= 0) & (values <= 1)).all()
        ):
            raise BrokenMap(f"{file}: not the depth map that its name says; {REMEDY}")
        return values

    def write(self, key: MapKey, values: Tensor) -> None:
        assert values.shape == (key.tokens,) and values.dtype == torch.float16
        with atomic_write(self.file(key)) as temporary:
            save_file({"depth": values.contiguous()}, str(temporary), metadata={"key": key.text})


def source_name(fingerprint: str, input_size: int) -> str:
    """An estimator's name in a key: the same weights at another input size give other maps."""
    return f"{fingerprint}@{input_size}"


@dataclass(frozen=True)
class DepthFiles:
    """Depth file of each image. table: image reference → file; without one the names decide."""

    folder: Path
    table: Mapping[str, Path] | None = field(default=None, repr=False)

    @classmethod
    def at(cls, place: Path) -> DepthFiles:
        """A folder, or a CSV table with the columns image_path and depth_path."""
        if place.is_dir():
            return cls(place)
        if not place.is_file():
            raise DataError(f"{place}: no such folder or table of depth maps")
        with place.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise DataError(f"{place}, line 1: a table of depth maps has the columns {', '.join(COLUMNS)}")
            table = {row["image_path"]: place.parent / row["depth_path"] for row in rows}
        return cls(place.parent, table)

    def file(self, reference: str) -> Path:
        """The map of an image. Raises DataError where there is none."""
        named = PurePosixPath(reference)
        if self.table is not None:
            found = self.table.get(reference)
        elif named.is_absolute() or ".." in named.parts:
            found = None
        else:
            found = self.folder / named.with_suffix(".png")
        if found is None or not found.is_file():
            looked = f"in the table, or not at its place: {found}" if self.table is not None else f"at {found}"
            raise DataError(f"image {reference}: no depth map {looked}")
        return found


def inverse_depth(file: Path) -> Tensor:
    """Relative inverse depth (height, width), near = large, from a 16-bit PNG of distances in any unit.

    0 means not measured and counts as farthest. Raises DataError for other kinds of images.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in MODES:
                raise DataError(f"{file}: a depth map is a 16-bit grey PNG; this is {image.mode}")
            distance = torch.from_numpy(np.asarray(image).astype(np.float32))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{file}: not a readable depth map ({error})") from error
    measured = distance > 0
    if not bool(measured.any()):
        raise DataError(f"{file}: no measured pixels (all values are 0)")
    inverse = torch.where(measured, 1 / distance, torch.inf)
    return torch.where(measured, inverse, inverse.min())


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
            f"{type(processor).__name__} with {type(images).__name__}: the grid of its image tokens is not "
            f"known here, so depth cannot be aligned with them; use a processor of {known}, images resized"
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
            "side and cropped in the middle; this processor has other settings"
        )
    return (Grid(centre_crop(height, width, shortest, crop), crop[0] // patch, crop[1] // patch),)


RULES: dict[str, Rule] = {
    "Qwen2VLImageProcessor": merged_patches,
    "IsaacImageProcessor": shuffled_patches,
    "SmolVLMImageProcessor": tiles_and_whole,
    "Idefics3ImageProcessor": tiles_and_whole,
    "CLIPImageProcessor": cropped_patches,
}


@dataclass(frozen=True)
class MapTask:
    """One cached map: whose depth it is, at which image's tokens. They differ where maps are shuffled."""

    maker: str
    grids: tuple[Grid, ...]
    key: MapKey


@dataclass(frozen=True)
class DepthMaps:
    """Depth values of images by their references.

    source: what made the maps (`source_name` of an estimator); files and luminance name themselves.
    control: one of DEPTH_CONTROLS. donors: image digest → reference whose map it gets (control `shuffled`).
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
        assert self.control in DEPTH_CONTROLS, self.control
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
                "the image has changed); run the command again: it computes missing maps first"
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
        """Digest and grids of an image, read once."""
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
