"""Isaac (Perceptron AI's Isaac 0.1), implemented here from its architecture: transformers has no such class.

    configuration ─▶ vision ─▶ modeling ─▶ text        images, prompt ─▶ processing ─▶ patches, ids

Importing this package makes the classes known to transformers' Auto classes, so a folder with the released files loads
by `AutoModelForImageTextToText` and `AutoProcessor` without code from elsewhere; `models/load.py` imports it by name
where a folder holds an Isaac. No weights come with it.
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

from rankwise.models.isaac.configuration import IsaacConfig, IsaacVisionConfig
from rankwise.models.isaac.modeling import IsaacForConditionalGeneration, IsaacModel
from rankwise.models.isaac.processing import IsaacImageProcessor, IsaacProcessor

AutoConfig.register(IsaacConfig.model_type, IsaacConfig, exist_ok=True)
AutoConfig.register(IsaacVisionConfig.model_type, IsaacVisionConfig, exist_ok=True)
AutoModel.register(IsaacConfig, IsaacModel, exist_ok=True)
# The released config names AutoModelForCausalLM, transformers 5 the other.
AutoModelForCausalLM.register(IsaacConfig, IsaacForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(IsaacConfig, IsaacForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(IsaacConfig, image_processor_classes={"torchvision": IsaacImageProcessor}, exist_ok=True)
AutoProcessor.register(IsaacConfig, IsaacProcessor, exist_ok=True)
