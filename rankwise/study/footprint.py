"""Memory of the short runs of `advise`: what does not fit is refused before anything is trained, batches are cut.

needs = footprint(skeleton, sites, rank, dtype, rows, settings)
refuse_too_large(needs, free, device)                       # UsageError: the base, or a single run, does not fit
at_most(needs, free, arms=16)                               # (runs in a batch, runs in one forward pass)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rankwise.core.site import Site
from rankwise.data.vision_inputs import IGNORED
from rankwise.errors import UsageError
from rankwise.files.processes import gathered, process_index
from rankwise.page.text import memory
from rankwise.train.estimate.gpus import memory_available

FLOAT32 = 4
STATES = 4  # a factor, its gradient and two moments
# Bytes that a layer keeps of a token for each hidden dimension in 16 bits, and copies of the logits in float32. Without
# pairs it is 34 (Korthikanti et al. 2022, eq. 2); with pairs at all matrices of SmolLM2-135M it was 60, of stories260K
# 40 (benchmarks/footprint.py): the larger one, since what does not fit ends the process.
KEPT, LOGITS = 60, 3
SHARE = 0.8  # of what is free: allocators and libraries need some


@dataclass(frozen=True)
class Footprint:
    """Bytes: the frozen base; factors, gradients and AdamW's moments of one run of the largest rank; activations of one
    run's widest batch, which are an estimate: W + s·B·A of all adapted experts included, which each forward makes and
    keeps, and of the largest parameter of experts its gradient, through which those of A and B go."""

    base: int
    arm: int
    activations: int

    @property
    def run(self) -> int:
        return self.arm + self.activations


def footprint(
    skeleton: PreTrainedModel,
    sites: Collection[Site],
    rank: int,
    dtype: torch.dtype,
    lengths: Sequence[int],
    learnt: int,
    batch_size: int,
) -> Footprint:
    """lengths: tokens of the training rows. learnt: tokens of a row whose logits are computed, at most."""
    text = skeleton.config.get_text_config()
    wide = dtype.itemsize
    tokens = batch_size * max(lengths)
    kept = KEPT * wide // 2 * tokens * text.hidden_size * text.num_hidden_layers
    logits = LOGITS * FLOAT32 * batch_size * learnt * text.vocab_size
    parameters = sum(site.parameters(min(rank, site.largest_rank)) for site in sites)
    base = sum(parameter.numel() for parameter in skeleton.parameters()) * wide
    experts = [site.size for site in sites if site.experts]
    changed = (sum(experts) + max(experts, default=0)) * wide
    return Footprint(base, STATES * FLOAT32 * parameters, kept + logits + changed)


def most_learnt(labels: Sequence[Sequence[int]]) -> int:
    return max(sum(label != IGNORED for label in row) for row in labels)


def free_memory(device: torch.device) -> int:
    """Free bytes for each process, measured by all at once: before any has loaded what the others do not see."""
    rank, count = process_index()
    free = min(gathered({rank: memory_available(device)}).values())
    return free // count if device.type == "cpu" else free


def refuse_too_large(needs: Footprint, free: int, where: str) -> None:
    """UsageError with sizes where the base, or the base with one run, is above what is free."""
    if needs.base > free:
        raise UsageError(
            f"the base does not fit: its weights take {memory(needs.base)}, and {memory(free)} are free on {where}; "
            "give --dtype bfloat16, or a machine with more memory"
        )
    if needs.base + needs.run > free:
        raise UsageError(
            f"not even one short run fits: weights {memory(needs.base)}, adapter with optimizer {memory(needs.arm)}, "
            f"activations about {memory(needs.activations)} (of the longest rows), and {memory(free)} are free on "
            f"{where}; lower --batch_size, --max_seq_length or --ranks"
        )


def at_most(needs: Footprint, free: int, arms: int, passes: int) -> tuple[int, int]:
    """Runs in a batch, and of these in one forward pass, of as many as asked for: what fits beside the loaded base."""
    usable = SHARE * free
    at_once = max(1, min(passes, int(usable / 2 / max(1, needs.activations))))
    fitting = int((usable - at_once * needs.activations) / max(1, needs.arm))
    return max(1, min(arms, fitting)), at_once
