"""Gradients expert by expert: the rows of `expert_norms.csv`, and whether every expert that has learnt is saved.

    backward ──▶ expert_values(): norms of A_e and B_e, ‖scale·B_e·A_e‖ ──▶ expert_rows() ──▶ expert_norms.csv
    step ──▶ LearntExperts.see(): the first step at which an expert learns ──▶ check_saved(): its B is in the file

An expert that no token of a step was routed to has a gradient of exactly 0. PEFT's layout of the pairs is
`core.experts.split_experts`'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rankwise.core.experts import split_experts
from rankwise.core.factors import squared_norms
from rankwise.core.site import layer_of
from rankwise.errors import VerificationError
from rankwise.files.adapter import LoraPair, read_adapter
from rankwise.models.adapt import ADAPTER, lora_layers
from rankwise.page.text import plural
from rankwise.train.expert_record import NAMED
from rankwise.train.sharded import whole

CHUNK = 2**26  # entries of experts' weights that are added to at a time
NEVER = 2**31 - 1


@dataclass(frozen=True, eq=False)
class ExpertPair:
    """The wrapper of one parameter of experts, with the path of its site."""

    path: str
    wrapper: Any

    @property
    def experts(self) -> int:
        return int(self.wrapper.num_experts)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A (E·r, n) and B (m, r·E), as PEFT has them."""
        return self.wrapper.lora_A[ADAPTER].weight, self.wrapper.lora_B[ADAPTER].weight


def expert_pairs(model: nn.Module) -> list[ExpertPair]:
    """The pairs of experts in a model, wrapped for several processes or not."""
    plain: Any = extract_model_from_parallel(model)
    return [
        ExpertPair(path, layer)
        for path, layer in lora_layers(plain).items()
        if isinstance(layer, ParamWrapper) and layer.num_experts > 1
    ]


@torch.no_grad()
def expert_values(pairs: Sequence[ExpertPair]) -> Tensor:
    """Of each pair: ‖∇‖ of A_e and B_e together, (E,); ‖scale·B_e·A_e‖, (E,); the share without effect.

    One float32 tensor on the gradients' device; NaN for norms of a pair that does not train at the moment. A collective
    call where parameters are in shards.
    """
    found: list[Tensor] = []
    for pair in pairs:
        flat = pair.factors
        a, b = split_experts(*halves([side.detach() for side in flat]), pair.experts)
        norms = torch.full((pair.experts,), math.nan, device=a.device)
        gradients = [side.grad for side in flat if side.grad is not None]
        if len(gradients) == 2:
            own = [part.square().sum((1, 2)) for part in split_experts(*halves(gradients), pair.experts)]
            norms = torch.stack(own).sum(0).sqrt()
        deltas = abs(float(pair.wrapper.scaling[ADAPTER])) * squared_norms(b, a).clamp(min=0).sqrt()
        found += [norms, deltas, without_effect(pair, b).reshape(1).to(norms.device)]
    return torch.cat(found) if found else torch.zeros(0)


def halves(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A and B, whole and in float32."""
    a, b = whole([tensor.float() for tensor in tensors])
    return a, b


def without_effect(pair: ExpertPair, b: Tensor) -> Tensor:
    """Share of the entries of the adapted experts at which W + scale·B·A is W, in the parameter's precision: the
    forward pass does not see that change. Experts whose B is zero do not count.

    NaN where the parameter has float32, is in shards, or no expert is adapted yet. b: (E, m, r).
    """
    weight = pair.wrapper.get_param()
    if isinstance(weight, DTensor) or weight.element_size() >= 4:
        return torch.tensor(math.nan)
    left, right, scale = pair.wrapper.get_delta_factors(ADAPTER)
    acts, same = b.flatten(1).any(1), []
    size = max(1, CHUNK // weight[0].numel())
    for chunk in range(0, len(weight), size):
        some = slice(chunk, chunk + size)
        changed = torch.baddbmm(weight[some], left[some], right[some], alpha=scale)
        same.append((changed == weight[some]).float().mean((1, 2)))
    return (torch.cat(same) * acts).sum() / acts.sum()


def expert_rows(
    pairs: Sequence[ExpertPair], values: Sequence[float], loss_scale: float, step: int
) -> Iterator[list[Any]]:
    """Rows of the table from the numbers of `expert_values`; none of a pair that does not train at this step."""
    at = 0
    for pair in pairs:
        end = at + 2 * pair.experts + 1
        norms, deltas, share = values[at : at + pair.experts], values[at + pair.experts : end - 1], values[end - 1]
        at = end
        if all(map(math.isnan, norms)):
            continue
        finite = all(map(math.isfinite, norms))
        routed = sum(norm > 0 for norm in norms) if finite else None
        lists = (one_cell(norm / loss_scale for norm in norms) if finite else None, one_cell(deltas))
        effect = None if math.isnan(share) else f"{share:.6g}"
        yield [step, pair.path, layer_of(pair.path), pair.experts, routed, effect, *lists]


def one_cell(numbers: Iterable[float]) -> str:
    """`0.0123 0 0.00456`: one cell for all experts of a parameter."""
    return " ".join(f"{number:.4g}" for number in numbers)


# --- whether every expert that has learnt is saved ------------------------------------------------------------------


class LearntExperts(TrainerCallback):
    """The first step at which each expert's B has had a gradient, at a learning rate above 0."""

    def __init__(self) -> None:
        self.pairs: list[ExpertPair] = []
        self.first: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Whatever a resumed run brings along has learnt before."""
        self.pairs = expert_pairs(model) if hasattr(extract_model_from_parallel(model), "peft_config") else []
        self.first = {
            pair.path: torch.where(nonzero_experts(pair.factors[1], pair.experts), 1, NEVER) for pair in self.pairs
        }

    def see(self, step: int, optimizer: Any) -> None:
        """Call it when a step (from 1) is about to be taken. Nothing waits for the device."""
        if self.pairs and max(group["lr"] for group in optimizer.param_groups) > 0:
            for pair in self.pairs:
                if (gradient := pair.factors[1].grad) is not None:
                    now = torch.where(nonzero_experts(gradient, pair.experts), step, NEVER)
                    self.first[pair.path] = torch.minimum(self.first[pair.path], now)

    def learnt(self, step: int) -> dict[str, list[int]]:
        """Site → its experts that have learnt by the end of this step. A collective call where parameters are in
        shards."""
        found = {}
        for pair in self.pairs:
            first = self.first[pair.path].clone()
            if isinstance(shard := pair.factors[1], DTensor):
                for dimension in range(shard.device_mesh.ndim):
                    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=shard.device_mesh.get_group(dimension))
            found[pair.path] = (first <= step).nonzero().flatten().tolist()
        return found


@torch.no_grad()
def nonzero_experts(b: Tensor, experts: int) -> Tensor:
    """(E,): whether anything of each expert's part of B (m, r·E), or of what this process has of it, is not zero."""
    mine = b.to_local() if isinstance(b, DTensor) else b
    return mine.reshape(len(mine), -1, experts).ne(0).any(0).any(0)


def check_saved(folder: Path, learnt: Mapping[str, Sequence[int]]) -> None:
    """VerificationError where the adapter in this folder lacks what an expert has learnt: its pair, or its B.

    Shards that are written without being gathered leave an adapter of the right names that is empty, or zero for most
    experts; nothing that reads it would notice.
    """
    if not learnt:
        return
    pairs = read_adapter(folder).pairs
    for path, experts in learnt.items():
        lost = [expert for expert in experts if path not in pairs or not zero_at_start(pairs[path], expert).any()]
        if lost:
            raise VerificationError(
                f"{folder}: {plural(len(lost), 'expert')} of {path} ({', '.join(map(str, lost[:NAMED]))}"
                f"{' …' * (len(lost) > NAMED)}) have learnt, and their B is zero or missing in the saved adapter, as "
                "where shards are written without being gathered; the last checkpoint holds the trained weights"
            )


def zero_at_start(pair: LoraPair, expert: int) -> Tensor:
    """What PEFT starts with zeros, of one expert: B, or where it takes in for out the site's A."""
    return pair.lora_A[expert] if pair.swapped else pair.lora_B[expert]
