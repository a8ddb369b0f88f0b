"""The proof of an extraction: base + adapter, as PEFT loads it, is the tuned model but for what is said to be left out.

    expected   the tuned model's own weights; factored sites as base + B·A, tensors that are left out as in the base
    proof = prove(both, adapter, expected, sees=False)
    proof.require()                                     # exit 6 where the logits differ

Whatever neither the adapter nor the list of what it leaves out knows of (a module that PEFT does not find, an embedding
taken for a matrix, another config) is a difference. One layer is in memory at a time, as in `layered.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankwise.errors import VerificationError
from rankwise.models.load import weightless_model
from rankwise.models.vocabulary import embedding_paths, resize, row_count
from rankwise.nets.both import Both, MadeWeights, Makers
from rankwise.ship.merging.layered import layered_adapted, require_all_came, streamed
from rankwise.ship.merging.samples import Batch, image_batch, text_batch
from rankwise.ship.merging.verify import NO_EFFECT, TOLERANCE, logits, relative

LOST = 0.1  # of the adapter's effect: a difference of rounding is far below it, an adapter half loaded far above


@dataclass(frozen=True)
class Proof:
    """Relative rms differences of logits. `error`: base + adapter to what it is said to be; `effect`: that to the base;
    `distance`: base + adapter to the tuned model, as a share of the base's distance to it."""

    error: float
    effect: float
    distance: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def require(self) -> None:
        if not self.error <= max(NO_EFFECT, min(TOLERANCE[torch.float32], LOST * self.effect)):
            raise VerificationError(
                "base + adapter, loaded by PEFT, is not the tuned model but for what is left out: its logits differ by "
                f"{self.error:.2g} (relative rms), and the adapter's effect is {self.effect:.2g}. Something differs "
                "that is neither in the adapter nor among what it leaves out: compare the two config.json. Nothing was "
                "written (--no_verify skips this)"
            )


def prove(both: Both, adapter: Path, expected: Makers, sees: bool) -> Proof:
    """Compare on random tokens, and on pictures where `sees`. expected: the weights that base + adapter should have.

    UsageError for a model that cannot be run layer by layer.
    """
    base = MadeWeights(both.base)
    plain = streamed(weightless_model(both.folder), base)
    batches = [text_batch(plain)]
    if sees:
        batches.append(image_batch(plain, both.folder))
    before = logits(plain, batches)
    require_all_came(before, plain)
    adapted = layered_adapted(both.folder, adapter, base)
    added = range(row_count(plain), row_count(adapted.get_base_model()))
    if added:
        batches.append(text_batch(adapted.get_base_model(), added))
    after = logits(adapted, batches)
    wanted, whole = (made_logits(both.tuned_folder, makers, batches) for makers in (expected, both.tuned))
    places, columns = len(before), min(each.shape[1] for each in (before, after, wanted, whole))
    old, change = before[:, :columns], relative(whole[:places, :columns] - before[:, :columns], before[:, :columns])
    both_have = min(after.shape[1], wanted.shape[1])
    return Proof(
        error=relative(after[:, :both_have] - wanted[:, :both_have], wanted[:, :both_have]),
        effect=relative(wanted[:places, :columns] - old, old),
        distance=relative(after[:places, :columns] - whole[:places, :columns], old) / change if change else 0.0,
    )


def made_logits(structure: str, makers: Makers, batches: list[Batch]) -> Tensor:
    """Logits of these weights in this structure, whose embeddings get as many rows as they have."""
    model, weights = weightless_model(structure), MadeWeights(makers)
    rows = len(weights[f"{embedding_paths(model)[0]}.weight"])
    if rows != row_count(model):
        resize(model, rows)
    return logits(streamed(model, weights), batches)
