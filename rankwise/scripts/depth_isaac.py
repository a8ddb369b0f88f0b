"""The documented name of Isaac's class: `from rankwise.scripts.depth_isaac import IsaacForConditionalGeneration`.

base = IsaacForConditionalGeneration.from_pretrained("./isaac_model")
model = PeftModel.from_pretrained(base, "./checkpoints/isaac-lora").merge_and_unload()
"""

from __future__ import annotations

from rankwise.nets.isaac import IsaacConfig, IsaacForConditionalGeneration, IsaacProcessor

__all__ = ["IsaacConfig", "IsaacForConditionalGeneration", "IsaacProcessor"]
