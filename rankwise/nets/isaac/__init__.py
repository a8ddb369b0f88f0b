"""Isaac (Perceptron AI's Isaac 0.1), implemented here from its architecture: transformers has no such class.

    configuration ─▶ vision ─┐
                positions ───┴▶ modeling            image_processing ─▶ processing

Importing this package registers the classes with transformers' Auto classes, so a folder with the released files
loads by `AutoModelForImageTextToText` and `AutoProcessor` without code from elsewhere. No weights come with it.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from rankwise.nets.isaac.configuration import IsaacConfig, IsaacVisionConfig
from rankwise.nets.isaac.image_processing import IsaacImageProcessor
from rankwise.nets.isaac.modeling import IsaacForConditionalGeneration, IsaacModel
from rankwise.nets.isaac.processing import IsaacProcessor

__all__ = [
    "IsaacConfig",
    "IsaacForConditionalGeneration",
    "IsaacImageProcessor",
    "IsaacModel",
    "IsaacProcessor",
    "IsaacVisionConfig",
]

AutoConfig.register(IsaacConfig.model_type, IsaacConfig, exist_ok=True)
AutoConfig.register(IsaacVisionConfig.model_type, IsaacVisionConfig, exist_ok=True)
AutoModel.register(IsaacConfig, IsaacModel, exist_ok=True)
# The released config names AutoModelForCausalLM, transformers 5 the other.
AutoModelForCausalLM.register(IsaacConfig, IsaacForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(IsaacConfig, IsaacForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(IsaacConfig, image_processor_classes={"torchvision": IsaacImageProcessor}, exist_ok=True)
AutoProcessor.register(IsaacConfig, IsaacProcessor, exist_ok=True)
