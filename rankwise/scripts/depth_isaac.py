"""The documented name of Isaac's class: `from rankwise.scripts.depth_isaac import IsaacForConditionalGeneration`.

base = IsaacForConditionalGeneration.from_pretrained("./isaac_model")
model = PeftModel.from_pretrained(base, "./checkpoints/isaac-lora").merge_and_unload()
"""

from __future__ import annotations

import rankwise.models.isaac  # noqa: F401 - transformers learns the classes
from rankwise.models.isaac.configuration import IsaacConfig
from rankwise.models.isaac.modeling import IsaacForConditionalGeneration
from rankwise.models.isaac.processing import IsaacProcessor

__all__ = ["IsaacConfig", "IsaacForConditionalGeneration", "IsaacProcessor"]
