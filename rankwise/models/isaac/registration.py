"""Makes Isaac's classes known to transformers. `models/load.py` imports this where a folder holds an Isaac."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from rankwise.models.isaac.configuration import IsaacConfig, IsaacVisionConfig
from rankwise.models.isaac.image_processing import IsaacImageProcessor
from rankwise.models.isaac.modeling import IsaacForConditionalGeneration, IsaacModel
from rankwise.models.isaac.processing import IsaacProcessor

AutoConfig.register(IsaacConfig.model_type, IsaacConfig, exist_ok=True)
AutoConfig.register(IsaacVisionConfig.model_type, IsaacVisionConfig, exist_ok=True)
AutoModel.register(IsaacConfig, IsaacModel, exist_ok=True)
# The released config names AutoModelForCausalLM, transformers 5 the other.
AutoModelForCausalLM.register(IsaacConfig, IsaacForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(IsaacConfig, IsaacForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(IsaacConfig, image_processor_classes={"torchvision": IsaacImageProcessor}, exist_ok=True)
AutoProcessor.register(IsaacConfig, IsaacProcessor, exist_ok=True)
