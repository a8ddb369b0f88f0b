"""What an Isaac checkpoint's config.json says: a flat Qwen3 decoder, and a vision tower in `vision_config`.

    {"model_type": "isaac", "hidden_size": 2048, …, "vision_config": {"model_type": "pixel_shuffle_siglip2", …}}

The released file loads as it is; its `auto_map` names code that is not needed here. Defaults are Isaac 0.1's values.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

IMAGE_PAD = 151655  # <|image_pad|> in Qwen's vocabulary


@strict
class IsaacVisionConfig(PreTrainedConfig):
    """The vision tower: a SigLIP2 encoder whose output is pixel-shuffled.

    num_patches: learned positions, a square grid (256 = 16·16) that is resized to each image's.
    pixel_shuffle_scale_factor: that many patches in each direction become one image token.
    """

    model_type = "pixel_shuffle_siglip2"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 16
    image_size: int = 256
    num_patches: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    pixel_shuffle_scale_factor: int = 2
    initializer_range: float = 0.02


def drop_sections(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rotary settings without the sections of a multi-axis rotary."""
    return rope and {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}


@strict
class IsaacConfig(Qwen3Config):
    """Isaac: Qwen3's fields, the vision tower's, and how an image becomes patches.

    image_token_id: the token that stands for an image's features in a sequence (`<|image_pad|>`). The released file
        names none; its `vision_token` (`<image>`) is what people write, and is never tokenised.
    vision_min_num_patches, vision_max_num_patches: an image outside them is scaled.
    max_sequence_length: tokens that a sequence may have, image tokens included.

    The rotary base is read from `rope_parameters`, or from `rope_theta` beside a `rope_scaling` as in the released
    file. `mrope_section` and `mrope_interleaved` are dropped: Isaac's halves are always split 2:1:1, in blocks.
    """

    model_type = "isaac"
    sub_configs_defaults: ClassVar = {"vision_config": IsaacVisionConfig}

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    head_dim: int = 128
    max_position_embeddings: int = 40960
    default_theta = 1_000_000.0
    vision_config: Any = None
    image_token_id: int = IMAGE_PAD
    vision_token: str = "<image>"
    video_patch_size: int = 16
    vision_min_num_patches: int | None = 256
    vision_max_num_patches: int = 6144
    pixel_shuffle_scale: int = 2
    max_sequence_length: int = 16384
    adapted_towers = ("language", "projector")  # by `train`, where nothing is said
    vision_attn_implementation: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_parameters: dict[str, Any] | None = drop_sections(self.rope_parameters)
        kwargs["rope_scaling"] = drop_sections(kwargs.pop("rope_scaling", None))
        super().__post_init__(**kwargs)
        assert self.rope_parameters is not None, "Qwen3's are filled in"
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(f"rope_type {self.rope_parameters['rope_type']!r}: Isaac's rotary positions are unscaled")
        if "sliding_attention" in (self.layer_types or ()):
            raise ValueError("layer_types: Isaac has no sliding attention")
        if self.head_dim % 8:
            raise ValueError(f"head_dim {self.head_dim}: its half is split 2:1:1, so it must be a multiple of 8")
