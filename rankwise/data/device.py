"""The phone's image and prompt processing, declared once: labels, training, evaluation and validation all use it.

    photo ── resize (letterbox, bilinear, black) ──▶ 256 × 256 ── the runtime's own processor ──▶ tiles ──▶ tokens

target = read_target(folder) or DeviceTarget()
target.resize(photo)          # the pixels of the device, from a picture as Pillow opens it
target.jpeg(photo)            # those pixels as the teacher gets them
target.save(folder)           # device.json, beside the data, the adapter, the merged model, the GGUF files

llama.cpp cuts a SmolVLM (Idefics3) image into tiles even where one tile holds all of it; `device_processor` does too:

    transformers, one tile:   <fake_token_around_image><global-img><image>×64<fake_token_around_image>
    llama.cpp, one tile:      <fake_token_around_image><row_1_col_1><image>×64 ⏎⏎
                              <fake_token_around_image><global-img><image>×64<fake_token_around_image>
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from transformers import BaseImageProcessor, Idefics3ImageProcessor, ProcessorMixin, SmolVLMImageProcessor

from rankwise.core.geometry import letterbox
from rankwise.data.images import ImageReader
from rankwise.data.pixels import BLACK, Unreadable, flattened
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import DEVICE, beside
from rankwise.files.document import Document

DOCUMENT = Document(DEVICE, "rankwise-device/1", "a device target")
SIZE, MAX_NEW_TOKENS, MARKER = 256, 32, "<__media__>"
CHOICES = {"prompt": ("chat", "raw"), "tiling": ("runtime", "processor")}


@dataclass(frozen=True)
class DeviceTarget:
    """The contract between training and the device.

    image_size: side of the square that an image becomes, in pixels. marker: what stands for an image in a prompt
    given to the runtime; never text to train on. max_new_tokens: longest answer, greedy. prompt: `chat`, the model's
    template, or `raw`, the prompt's text alone. longest_edge: what the model's own processor scales the image to, in
    pixels; None for one tile of the model's (512 for SmolVLM). tiling: `runtime` lays an image out as llama.cpp does
    (SmolVLM: always tiles and the whole image, though there be only one tile), `processor` as transformers does.
    jpeg_quality: of the image that a teacher sees. runtime, runtime_build: what the answers were validated on.
    """

    image_size: int = SIZE
    marker: str = MARKER
    max_new_tokens: int = MAX_NEW_TOKENS
    prompt: str = "chat"
    longest_edge: int | None = None
    tiling: str = "runtime"
    jpeg_quality: int = 90
    runtime: str = "llama.cpp"
    runtime_build: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("max_new_tokens", 1), ("longest_edge", 1), ("jpeg_quality", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise DataError(f"device target: {name} must be a whole number of at least {least}, got {value!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise DataError(f"device target: {name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def resize(self, image: Image.Image) -> Image.Image:
        """The pixels that the device gives to the model."""
        return resize_for_device(image, self.image_size)

    def jpeg(self, image: Image.Image) -> bytes:
        """The device's pixels as a JPEG, for the teacher."""
        return encoded(self.resize(image), "JPEG", quality=self.jpeg_quality)

    def png(self, image: Image.Image) -> bytes:
        """The device's pixels, exactly."""
        return encoded(self.resize(image), "PNG")

    @property
    def geometry(self) -> dict[str, Any]:
        """Image geometry, which decides the model's input tokens: training and the device must agree on it."""
        return {name: getattr(self, name) for name in ("image_size", "prompt", "longest_edge", "tiling")}

    def save(self, folder: Path | str) -> Path:
        return DOCUMENT.write(folder, self)


def read_target(folder: Path | str) -> DeviceTarget | None:
    """The target of a folder (a checkpoint's: of its run), or of a file; None where it has none.

    DataError where device.json is not one.
    """
    path = Path(folder) if Path(folder).is_file() else beside(folder, DEVICE)
    return None if path is None else DOCUMENT.read_as(DeviceTarget, path, partial=True)


def resize_for_device(image: Image.Image, size: int = SIZE) -> Image.Image:
    """The image as RGB, upright by its EXIF note, scaled into a square of `size` pixels by the app's filtered scaling,
    centred on black; transparency on black too, as a bitmap that is drawn on it.

    Bilinear without antialiasing, as phones scale bitmaps: Pillow's BILINEAR widens its filter when shrinking.
    DataError for 32-bit and float pixels, whose white nothing says.
    """
    try:
        image = flattened(image, BLACK)
    except Unreadable as reason:
        raise DataError(f"a picture {reason}") from reason
    if image.size == (size, size):
        return image
    place = letterbox(*image.size, size)
    pixels = pil_to_tensor(image)[None].float()
    scaled = functional.interpolate(pixels, (place.height, place.width), mode="bilinear", align_corners=False)
    square = torch.zeros(3, size, size, dtype=torch.uint8)
    rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
    square[:, rows, columns] = scaled[0].round().clamp(0, 255).byte()
    shown: Image.Image = to_pil_image(square)
    return shown


def changes(content: bytes, size: int = SIZE) -> bool:
    """Whether a stored picture is another one on the device: of another shape, turned, or transparent."""
    with Image.open(io.BytesIO(content)) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return picture.size != (size, size) or turned or bool(picture.has_transparency_data)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@dataclass(frozen=True)
class DeviceReader:
    """An ImageReader whose pictures have gone through the device's geometry. Raises BadImage as it does."""

    reader: ImageReader
    target: DeviceTarget

    @property
    def folder(self) -> Path:
        return self.reader.folder

    def also(self, folder: Path) -> DeviceReader:
        return replace(self, reader=self.reader.also(folder))

    def open(self, reference: str) -> Image.Image:
        return self.target.resize(replace(self.reader, background=BLACK).open(reference))

    def content(self, reference: str) -> bytes:
        return self.reader.content(reference)

    def size(self, reference: str) -> tuple[int, int]:
        self.reader.size(reference)  # a picture that is not there has no size
        return self.target.image_size, self.target.image_size

    def digest(self, reference: str) -> str:
        return self.reader.digest(reference)

    def mark(self, reference: str) -> bytes:
        return self.reader.mark(reference)


class AlwaysTiled:
    """An image that fits one tile becomes a tile and the whole image, as larger ones do."""

    def split_images(self, images: Tensor, *args: Any, **how: Any) -> tuple[Tensor, list[int], list[int]]:
        """images: (batch, 3, height, width) → frames (batch, tiles + 1, 3, side, side), rows and columns of each."""
        frames, rows, columns = super().split_images(images, *args, **how)  # type: ignore[misc]
        if rows[0]:
            return frames, rows, columns
        ones = [1] * len(rows)
        return torch.cat([frames, frames], 1), ones, list(ones)


class TiledSmolVLMImageProcessor(AlwaysTiled, SmolVLMImageProcessor):
    """SmolVLM's image processor with llama.cpp's tiling."""


class TiledIdefics3ImageProcessor(AlwaysTiled, Idefics3ImageProcessor):
    """Idefics3's image processor with llama.cpp's tiling."""


TILED: dict[type[BaseImageProcessor], type[BaseImageProcessor]] = {
    SmolVLMImageProcessor: TiledSmolVLMImageProcessor,
    Idefics3ImageProcessor: TiledIdefics3ImageProcessor,
}


def tiles(processor: ProcessorMixin) -> bool:
    """Whether the family cuts images into tiles of its own size."""
    return isinstance(processor.image_processor, tuple(TILED))


def device_processor(processor: ProcessorMixin, target: DeviceTarget) -> ProcessorMixin:
    """A copy of the processor that lays images out as the target's runtime does.

    Families that do not cut images into tiles stay as they are: their sizes follow from the image's. UsageError for a
    `longest_edge` that such a family has no place for.
    """
    if not tiles(processor):
        if target.longest_edge is not None:
            raise UsageError(
                f"device target: longest_edge acts on processors that cut images into tiles (SmolVLM, Idefics3), and "
                f"{type(processor).__name__} does not; leave it out"
            )
        return processor
    own = processor.image_processor
    settings = own.to_dict() | {"size": {"longest_edge": longest_edge(processor, target)}}
    if target.tiling == "runtime":
        settings["do_image_splitting"] = True
    kind = TILED[type(own)] if target.tiling == "runtime" and type(own) in TILED else type(own)
    changed = copy.copy(processor)
    changed.image_processor = kind.from_dict(settings)
    return changed


def longest_edge(processor: ProcessorMixin, target: DeviceTarget) -> int:
    """What the processor scales an image's longest side to, in pixels."""
    return target.longest_edge or int(processor.image_processor.max_image_size["longest_edge"])
