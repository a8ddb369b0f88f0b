"""Find where a model needs rank, train exactly that, prove it, ship it.

    delta = rankwise.subtract(base, tuned)                  # weights of one matrix
    spectrum = rankwise.measure(delta, up_to=128, question=lambda s: s.rank_for(0.9))
    plan = rankwise.read_plan("configs/lora_rank_config.json")
    rankwise.run_command("train", model_name="org/base", data_path="train.jsonl", plan="configs/lora_rank_config.json")

These are the public names; each is imported when it is first used, so `import rankwise` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "core.site": ("Site",),
    "core.spectrum": ("Spectrum",),
    "core.measure": ("Delta", "measure", "subtract"),
    "core.factors": ("Factors", "truncate"),
    "features.approximation": ("normalised",),
    "core.allocate": ("Rule", "by_budget", "by_threshold"),
    "core.plan": ("PlannedSite", "RankPlan"),
    "files.checkpoint": ("open_checkpoint", "resolve"),
    "files.adapter": ("LoraAdapter", "read_adapter", "write_adapter"),
    "files.plan": ("read_plan", "write_plan"),
    "models.load": ("load_model", "load_tokenizer"),
    "models.sites": ("model_sites",),
    "models.adapt": ("adapt",),
    "data.example": ("Example",),
    "data.render": ("Renderer",),
    "features.cache": ("open_cache",),
    "features.nets.base": ("FactorizerSettings",),
    "features.trained": ("load_factorizer",),
    "data.device": ("DeviceTarget", "resize_for_device"),
    "evaluate.predictions": ("EvaluationResult",),
    "evaluate.tasks": ("evaluate",),
    "device.llama.runtime": ("LlamaServer", "RemoteServer"),
    "device.parity.ladder": ("climb",),
    "data.depth.prepare": ("depth_processor",),
    "evaluate.engines": ("Trained", "load"),
    "pipeline.preflight": ("run_command",),
    "demo.command": ("tiny_example",),
    "errors": (
        "DataError",
        "DivergedError",
        "Interrupted",
        "RankwiseError",
        "ServiceError",
        "UsageError",
        "VerificationError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
