"""The proof of a merge: the merged model's logits against those of base + adapter, by PEFT, in float32.

reference = reference_logits("org/base", adapter)       # base and base + adapter, then freed
agreement = compare(reference, merged_logits(folder, reference.batches))
agreement.require(torch.bfloat16)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from peft import PeftModel
from torch import Tensor

from rankwise.errors import UsageError, VerificationError
from rankwise.nets.load import load_model
from rankwise.ship.samples import TOKENS, Batch, image_batch, text_batch
from rankwise.ship.skeleton import quiet_ties
from rankwise.store.checkpoint import Checkpoint

NO_EFFECT = 1e-6  # relative: what float32 sums in another order differ by
# Relative error of the logits (rms) that rounding the merged weights may cause; a few times what was measured.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Reference:
    """Logits of the base and of base + adapter on the same inputs, float32."""

    batches: Sequence[Batch]
    base: Tensor
    adapted: Tensor


@dataclass(frozen=True)
class Agreement:
    """How the merged model differs from base + adapter, and how much the adapter does at all.

    `error` and `effect`: rms difference of the logits to base + adapter and of base + adapter to the base, both
    relative to the rms of base + adapter's. `same_top1`: share of positions with the same most likely token;
    `kl`: mean Kullback–Leibler divergence in nats of merged from adapted.
    """

    error: float
    effect: float
    max_difference: float
    same_top1: float
    kl: float

    @property
    def effect_lost(self) -> float:
        """Share of the adapter's effect that the difference amounts to."""
        return self.error / self.effect

    def require(self, dtype: torch.dtype) -> None:
        """VerificationError where the merged model is not base + adapter up to rounding to `dtype`."""
        require_effect(self.effect)
        tolerance = TOLERANCE[dtype]
        if not self.error <= tolerance:
            raise VerificationError(
                f"the merged model's logits differ from base + adapter's by {self.error:.2g} (relative rms), "
                f"more than the {tolerance:g} that {dtype} explains; nothing was written"
            )
        if self.error >= self.effect:
            raise VerificationError(
                f"rounding to {dtype} changes the logits by {self.error:.2g}, the adapter by {self.effect:.2g}: the "
                "adapter would be lost; write more digits with --dtype float32 (or float16)"
            )

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"effect_lost": self.effect_lost}


def require_effect(effect: float) -> None:
    if not effect > NO_EFFECT:
        raise VerificationError(
            f"the adapter changes the logits by {effect:.1g} (relative rms), which is nothing: is it the right one, "
            "and was it trained?"
        )


def require_memory(base: Checkpoint) -> None:
    """UsageError where the model in float32 is larger than the memory that is free."""
    needed = 4 * sum(torch.Size(base.shape(key)).numel() for key in base)
    free = get_max_memory()["cpu"]
    if needed > free:
        raise UsageError(
            f"the comparison of logits needs {needed / 2**30:.1f} GiB for {base.path} in float32, and "
            f"{free / 2**30:.1f} GiB are free; free some, or merge with --no_verify"
        )


def reference_logits(base: str, adapter: Path, *, pictures: bool = False) -> Reference:
    """Run the base, put the adapter on it, run it again. VerificationError where that changes nothing.

    pictures: look at images as well; an adapter of the vision tower or the projector shows only there.
    """
    model = load_model(base, torch.float32)
    batches = (text_batch(model), image_batch(model, base)) if pictures else (text_batch(model),)
    before = logits(model, batches)
    with quiet_ties():
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    reference = Reference(batches, before, logits(adapted, batches))
    require_effect(relative(reference.adapted - before, reference.adapted))
    return reference


def merged_logits(folder: Path, batches: Sequence[Batch]) -> Tensor:
    return logits(load_model(str(folder), torch.float32), batches)


@torch.inference_mode()
def logits(model: Any, batches: Sequence[Batch]) -> Tensor:
    """(positions, vocabulary): the model's first output (logits, or hidden states where it has no head) at the end of
    every row, where the ordinary tokens are."""
    outputs = [model(**batch) for batch in batches]
    found = [output.logits if "logits" in output else output[0] for output in outputs]
    return torch.cat([(one[:, -TOKENS:] if one.dim() > 2 else one).flatten(0, -2).float() for one in found])


def compare(reference: Reference, merged: Tensor) -> Agreement:
    adapted = reference.adapted
    log_adapted, log_merged = adapted.log_softmax(-1), merged.log_softmax(-1)
    return Agreement(
        error=relative(merged - adapted, adapted),
        effect=relative(adapted - reference.base, adapted),
        max_difference=float((merged - adapted).abs().max()),
        same_top1=float((merged.argmax(-1) == adapted.argmax(-1)).float().mean()),
        kl=max(0.0, float((log_adapted.exp() * (log_adapted - log_merged)).sum(-1).mean())),
    )


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())
