"""The training objective of a network that predicts factors, as a module for the Trainer.

    features (B, T, D) ── network ──▶ A·B ──▶ MSE + λ_B·mean(B²) + λ_ortho·orthogonality (+ MSE of the refinement)

The terms are added up apart, on the device, and read once an epoch. A channel that the rank allocator has masked is in
no term: neither its row of B nor its column of A is held to anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from rankwise.errors import DivergedError
from rankwise.features.dataset import collate
from rankwise.features.measures import explained_energy, mse, relative_error
from rankwise.features.nets.base import Factorization, Factorizer
from rankwise.files.processes import process_index
from rankwise.options.features import FactorTrainConfig
from rankwise.train.rows import summed

TERMS = ("loss", "mse", "b", "ortho", "activation_ortho", "refined")
MEASURES = ("mse", "relative_error", "explained_energy", "refined_mse")
ROW = "row"  # a batch's key for its places in the cache; the Trainer carries it through an evaluation as labels


class FactorObjective(nn.Module):
    """A network with its loss. In training `forward` returns {"loss"}; in evaluation also "measures" (B, k).

    options: `lambda_ortho` is the weight of the orthogonality of the network's own layers where it has that (AdaLoRA),
    else of A's columns; `activation_orth_regu_A` that of A's columns beside the layers.

    A batch's `row` may have matrices that do not count: those below 0, with which a process fills up its last batch.
    In several processes the loss is this one's share of the mean over all matrices of the step.

    sums: of TERMS over the matrices since `restart`, weighted by batch; float64, where the network is. counted: how
    many matrices they are over. In several processes both are added up.
    """

    def __init__(self, net: Factorizer, options: FactorTrainConfig) -> None:
        super().__init__()
        self.net = net
        self.options = options
        self.holds_layers = type(net).orthogonality is not Factorizer.orthogonality
        self.restart()

    def restart(self, sums: Sequence[float] = (0.0,) * len(TERMS), counted: float = 0.0) -> None:
        device = next(self.net.parameters()).device
        self.sums, self.counted = (torch.tensor(each, dtype=torch.float64, device=device) for each in (sums, counted))

    def forward(self, features: Tensor, row: Tensor | None = None) -> dict[str, Tensor]:
        """features: normalised (B, T, D). Errors are computed in float32 under autocast too."""
        found = self.net(features)
        with torch.autocast(features.device.type, enabled=False):
            if not self.training:
                measures = measured(features, found)
                return {"loss": measures[:, 0].mean(), "measures": measures}
            counts = features.new_ones(len(features)) if row is None else (row >= 0).to(features)
            each = summed(counts.sum()) / process_index()[1]  # matrices of this step, for each process
            terms = self.terms(features, found, counts / each)
            self.sums = self.sums.to(terms.device) + terms.detach().double() * each
            self.counted = self.counted.to(terms.device) + each
            return {"loss": terms[0]}

    def terms(self, features: Tensor, found: Factorization, shares: Tensor) -> Tensor:
        """TERMS of a batch, unweighted but for the first, which is what is minimised. shares: of the matrices (B,)."""
        mask, nothing = self.net.rank_mask, features.new_zeros(())
        error = mse(features, product(found)) @ shares
        size = mean_square(found.factors.right.float(), mask) @ shares
        columns = column_orthogonality(found.activation.float(), mask) @ shares
        ortho, apart = (self.net.orthogonality(), columns) if self.holds_layers else (columns, nothing)
        refined = nothing if found.refined is None else mse(features, found.refined.float()) @ shares
        options = self.options
        loss = error + options.lambda_B * size + options.lambda_ortho * ortho
        loss = loss + options.activation_orth_regu_A * apart + refined
        return torch.stack([loss, error, size, ortho, apart, refined])

    @property
    def logged(self) -> tuple[str, ...]:
        """The terms that this network has: those that a row of the history names."""
        more = ("activation_ortho",) if self.holds_layers else ()
        return (*TERMS[:4], *more, *(("refined",) if self.net.settings.refine else ()))


def product(found: Factorization) -> Tensor:
    """A·B (B, T, D) in float32, whatever precision the factors came in."""
    return found.factors.left.float() @ found.factors.right.float()


def mean_square(right: Tensor, mask: Tensor | None) -> Tensor:
    """mean(B²) over the channels of each matrix (B, r, D) that act: (B,)."""
    if mask is None:
        return right.square().mean((-2, -1))
    acting = mask.to(right)
    return (right.square().mean(-1) * acting).sum(-1) / acting.sum()


def column_orthogonality(activation: Tensor, mask: Tensor | None) -> Tensor:
    """‖AᵀA/T − I‖_F² / r² of each matrix (B, T, r): (B,); of the channels that act, over all r² entries."""
    rank = activation.shape[-1]
    difference = activation.mT @ activation / activation.shape[-2] - torch.eye(rank, device=activation.device)
    if mask is not None:
        acting = mask.to(difference)
        difference = difference * acting[:, None] * acting
    return difference.square().sum((-2, -1)) / rank**2


def measured(features: Tensor, found: Factorization) -> Tensor:
    """MEASURES of each matrix (B, 3), or (B, 4) where the network refines."""
    approximation = product(found)
    relative = relative_error(features, approximation)
    columns = [mse(features, approximation), relative, explained_energy(relative)]
    if found.refined is not None:
        columns.append(mse(features, found.refined.float()))
    return torch.stack(columns, dim=1)


def with_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The collator: features, their places for the guard, and the same for the evaluation."""
    batch = collate(rows)
    return batch | {ROW: batch["sample_index"].clone()}


@dataclass(frozen=True)
class ValidationMeans:
    """The Trainer's `compute_metrics`: means of MEASURES over the validation matrices, each counted once; the loss is
    the first of them.

    names: of all matrices of the cache, by place. Raises DivergedError, naming the matrices, where one is not finite.
    """

    names: Sequence[str]

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        values = np.atleast_2d(np.asarray(evaluated.predictions, dtype=np.float64))
        refuse_not_finite(values, [self.names[place] for place in evaluated.label_ids], "validation")
        means = values.mean(0).tolist()
        return {"loss": means[0], **dict(zip(MEASURES, means, strict=False))}


def refuse_not_finite(values: np.ndarray[Any, Any], names: Sequence[str], part: str) -> None:
    """DivergedError naming the matrices (rows of `values`) on which a network's measure is NaN or infinite."""
    bad = [name for name, row in zip(names, values, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise DivergedError(
            f"the network's error on {len(bad)} of {len(names)} {part} matrices is not finite: {', '.join(bad[:8])}; "
            "lower --lr"
        )
