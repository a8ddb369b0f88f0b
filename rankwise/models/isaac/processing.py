"""Text and images together: a prompt with one `<|image_pad|>` per image → ids with one per image token, and patches.

    processor(text=["<|im_start|>user\\n<|image_pad|>What is this?<|im_end|>\\n"], images=[image])

    RGB image ─▶ (height, width) in multiples of 32, 256…6144 patches ─▶ bilinear, no antialias ─▶ (x/255 − ½)/½
        ─▶ patches of 16×16, flattened as (row, column, channel) ─▶ packed behind the other images' patches

An image gives height · width / 1024 tokens: 256×256 gives 64, 640×480 gives 300. `<image>`, which people and data sets
write, is never tokenised: the data layer cuts it out, and the chat template turns an image part into the placeholder.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, ProcessorMixin

from rankwise.core.geometry import scaled_blocks
from rankwise.errors import DataError
from rankwise.models.isaac.configuration import IsaacConfig

IMAGE_TOKEN = "<|image_pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class IsaacProcessor(ProcessorMixin):
    """Tokenizer and image processor.

    Chat template: plain ChatML, ours unless one is given. The released folder's own drops the parts of a message
    that has images and writes a think block into the last answer, so it is not read from there.
    """

    def __init__(
        self,
        image_processor: IsaacImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @classmethod
    def get_processor_dict(cls, name: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Saved settings; of a folder that no processor was saved in, none, so not its chat template either."""
        settings, kwargs = super().get_processor_dict(name, **kwargs)
        return (settings if "processor_class" in settings else {}), kwargs

    @classmethod
    def _get_arguments_from_pretrained(cls, name: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        subfolder = kwargs.pop("subfolder", "")
        images = IsaacImageProcessor.from_pretrained(name, subfolder=subfolder, **kwargs)
        return [images, cls._load_tokenizer_from_pretrained("tokenizer", name, subfolder=subfolder, **kwargs)]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholder once for each token of an image."""
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        scale = int(self.image_processor.pixel_shuffle_scale)
        return self.image_token * (patches // scale**2)


class IsaacImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict: not followed
    """Settings beside those of every image processor."""

    patch_size: int
    pixel_shuffle_scale: int
    min_num_patches: int
    max_num_patches: int
    max_pixels: int


class IsaacImageProcessor(TorchvisionBackend):
    """Images of any sizes → `pixel_values` (patches of all, 768) and `image_grid_thw` (images, 3): 1 and the rows
    and columns of patches.

    max_pixels: 60 million, as in the original; a larger image is a DataError.
    """

    valid_kwargs = IsaacImageProcessorKwargs
    model_input_names: ClassVar = ["pixel_values", "image_grid_thw"]
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    patch_size = 16
    pixel_shuffle_scale = 2
    min_num_patches = 256
    max_num_patches = 6144
    max_pixels = 60_000_000

    @classmethod
    def get_image_processor_dict(cls, name: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The saved settings; where a folder has none, as the released one, what its config.json says of patches.

        OSError where there is neither.
        """
        try:
            saved: tuple[dict[str, Any], dict[str, Any]] = super().get_image_processor_dict(name, **kwargs)
            return saved
        except OSError as error:
            settings, _ = IsaacConfig.get_config_dict(name, **kwargs)
            if settings.get("model_type") != IsaacConfig.model_type:
                raise OSError(f"{name}: no settings of an image processor, and no config.json of an Isaac") from error
            config = IsaacConfig.from_dict(settings)
        patches = {
            "patch_size": config.vision_config.patch_size,
            "pixel_shuffle_scale": config.pixel_shuffle_scale,
            "min_num_patches": config.vision_min_num_patches,
            "max_num_patches": config.vision_max_num_patches,
        }
        return patches, {}

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to."""
        block = self.patch_size * self.pixel_shuffle_scale
        per_block = self.pixel_shuffle_scale**2
        fewest, most = -(-self.min_num_patches // per_block), self.max_num_patches // per_block
        rows, columns = scaled_blocks(height, width, block, fewest, most)
        return rows * block, columns * block

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Patches of an image of that size; image tokens are this / pixel_shuffle_scale²."""
        tall, wide = self.target_size(height, width)
        return tall * wide // self.patch_size**2

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(image, Image):
            self.check_pixels(image.height, image.width)  # before it is decoded
        pixels: Tensor = super().process_image(image, *args, **kwargs)
        self.check_pixels(*pixels.shape[1:])
        return pixels

    def check_pixels(self, height: int, width: int) -> None:
        if height * width > self.max_pixels:
            raise DataError(f"an image of {width}×{height} pixels: Isaac takes at most {self.max_pixels:,} pixels")

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        kwargs.pop("do_resize", None)  # the size follows from the image, so there is no `size` to ask for
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        packed, grids = [], []
        for image in images:
            tall, wide = self.target_size(*image.shape[1:])
            image = self.rescale_and_normalize(
                resize(image, tall, wide), do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            packed.append(flat_patches(image, self.patch_size))
            grids.append([1, tall // self.patch_size, wide // self.patch_size])
        data = {"pixel_values": torch.cat(packed), "image_grid_thw": torch.tensor(grids)}
        return BatchFeature(data=data, tensor_type=return_tensors)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(channels, height, width) float32, bilinear without antialias; what came as bytes is rounded to whole ones."""
    if image.shape[1:] == (height, width):
        return image.float()
    larger = functional.interpolate(
        image[None].float(), size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )[0]
    return larger if image.is_floating_point() else larger.round().clamp(0, 255)


def flat_patches(image: Tensor, size: int) -> Tensor:
    """(channels, height, width) → (patches, size² · channels): patches row-major, each as (row, column, channel)."""
    channels, height, width = image.shape
    blocks = image.view(channels, height // size, size, width // size, size)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, size * size * channels)
