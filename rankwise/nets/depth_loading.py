"""Depth for a model class that loads it by keywords, as the depth-aware Isaac's guide does.

base = IsaacForConditionalGeneration.from_pretrained(folder, use_depth=True, depth_checkpoint_path="….pth")
model = PeftModel.from_pretrained(base, adapter)       # finds a gate to put its own into
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.nets.depth import ESTIMATOR, attach_depth
from rankwise.nets.depth_estimator import load_estimator
from rankwise.nets.depth_settings import DepthSettings, read_depth


class LoadsWithDepth:
    """To stand before PreTrainedModel among a class's bases."""

    @classmethod
    def from_pretrained(
        cls,
        name: Any,
        *args: Any,
        use_depth: bool = False,
        depth_checkpoint_path: str | None = None,
        depth_alpha: float | None = None,
        depth_input_size: int | None = None,
        depth_gate: str | None = None,
        depth_layout: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As PreTrainedModel.from_pretrained; with `use_depth` the model has a depth encoder and its gate.

        What is not given is as in the folder's depth.json (a merged model's), else as in DepthSettings. With
        depth_checkpoint_path the frozen estimator stands at `model.depth_model`: no part of the model's parameters,
        its state dict or what is saved. Raises UsageError for depth options without `use_depth`.
        """
        given: dict[str, Any] = {
            "estimator": depth_checkpoint_path,
            "alpha": depth_alpha,
            "input_size": depth_input_size,
            "gate": depth_gate,
            "layout": depth_layout,
        }
        chosen = {option: value for option, value in given.items() if value is not None}
        if chosen and not use_depth:
            raise UsageError(f"the depth option {next(iter(chosen))} acts with use_depth=True only")
        loaded = super().from_pretrained(name, *args, **kwargs)  # type: ignore[misc]
        if use_depth:
            recorded = read_depth(name) if Path(str(name)).is_dir() else None
            attach(loaded[0] if isinstance(loaded, tuple) else loaded, replace(recorded or DepthSettings(), **chosen))
        return loaded


def attach(model: Any, settings: DepthSettings) -> None:
    """The encoder, and the estimator where one is named, on the model's device."""
    if settings.estimator:
        estimator = load_estimator(settings.estimator, settings.input_size)
        estimator.model.to(model.device)
        settings = replace(settings, estimator_hash=estimator.fingerprint)
        setattr(model, ESTIMATOR, estimator)
    attach_depth(model, settings)
