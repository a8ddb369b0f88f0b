"""A trained model for use from Python: base, adapter, depth and processor together.

trained = rankwise.load("runs/isaac_depth/train")            # a run folder, an adapter, a checkpoint, or a model
inputs = trained.processor(text=[prompt], images=[picture], return_tensors="pt")
trained.model.generate(**inputs)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.depth.prepare import estimator_of, trained_with
from rankwise.data.depth.processor import with_depth_output
from rankwise.data.device import DeviceTarget, device_processor, read_target
from rankwise.data.input_record import InputRecord
from rankwise.data.recorded import recorded
from rankwise.files.checkpoint import resolve
from rankwise.models.adapters import load_adapter
from rankwise.models.depth.encoder import ESTIMATOR, attach_depth
from rankwise.models.depth.settings import DepthSettings
from rankwise.models.load import load_config, load_model, load_processor, load_tokenizer
from rankwise.models.sites import torch_dtype
from rankwise.options.sections import DepthUseSection
from rankwise.stages.engines import base_and_adapter, pick_device


@dataclass(frozen=True)
class Trained:
    """model: on its device, in evaluation mode; PEFT-wrapped where there is an adapter. processor: of images and text
    (with depth where the model takes it, as the runtime where it was trained for a device), or the tokenizer of a text
    model. target: that device; `target.resize` makes the pictures that the model was trained on. record: how training
    made prompts, where it says so; the tokenizer has its chat template."""

    model: Any
    processor: Any
    depth: DepthSettings | None = None
    target: DeviceTarget | None = None
    record: InputRecord | None = None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def load(
    path: str | Path,
    *,
    base_model: str | None = None,
    depth_checkpoint_path: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Trained:
    """Base + adapter + depth from an adapter's folder, a run folder, one of its checkpoints, or a (merged) model.

    A model that was trained with depth gets its encoder, its gate and its estimator, which `depth.json` names and
    whose fingerprint is checked. depth_checkpoint_path: that estimator in another place. base_model: the base where
    the adapter does not say it, or in another place.

    Raises DataError where a part is missing or is another one than in training: a model trained with depth does not
    run without its estimator.
    """
    base, adapter = base_and_adapter(str(path), base_model)
    settings = trained_with(base, adapter, DepthUseSection(depth_checkpoint_path=depth_checkpoint_path))
    estimator = estimator_of(settings) if settings else None
    place = pick_device(device)
    model: Any = load_model(base, torch_dtype(dtype, trained=False, device=place)).to(place)
    processor = load_processor(base) if hasattr(load_config(base), "vision_config") else load_tokenizer(base)
    target = (read_target(adapter) if adapter else None) or read_target(resolve(base))
    if target:
        processor = device_processor(processor, target)
    found = recorded([*([adapter] if adapter else []), resolve(base)])
    if found.record and found.record.chat_template:
        getattr(processor, "tokenizer", processor).chat_template = found.record.chat_template
    if settings:
        attach_depth(model, settings)
        processor = with_depth_output(processor, settings, estimator)
    if estimator:
        estimator.model.to(place)
        setattr(model, ESTIMATOR, estimator)
    if adapter:
        model = load_adapter(model, adapter)
    return Trained(model.to(place).eval(), processor, settings, target, found.record)
