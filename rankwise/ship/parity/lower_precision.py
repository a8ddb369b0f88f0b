"""A transformers model that rounds where llama.cpp rounds: weights, and what goes into and comes out of linear layers.

    with rounding(model, q8_0, q8_0): model(…)       # what Q8_0 costs without llama.cpp
    afterwards the weights are what they were, bit for bit

llama.cpp multiplies a Q8_0 matrix with inputs that it rounds to Q8_0 too, sums in float32, and keeps the attention's
keys and values in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, LEVELS = 32, 127  # Q8_0: 32 neighbours share a scale, the largest of them is ±127
Rounding = Callable[[Tensor], Tensor]


def float16(values: Tensor) -> Tensor:
    return values.half().to(values.dtype)


def q8_0(values: Tensor) -> Tensor:
    """(…, n): rounded as ggml's Q8_0 does; to float16 where n is no whole number of blocks, as the converter does."""
    if values.dim() < 2 or values.shape[-1] % BLOCK:
        return float16(values)
    blocks = values.float().reshape(*values.shape[:-1], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / LEVELS
    steps = blocks * torch.where(scales > 0, 1 / scales, 0)
    whole = torch.trunc(steps + 0.5 * steps.sign())  # halves away from zero, as C rounds
    return (whole * scales.half().float()).reshape(values.shape).to(values.dtype)


@contextmanager
def rounding(model: nn.Module, weights: Rounding, inputs: Rounding) -> Iterator[None]:
    """Matrices rounded by `weights`, inputs of linear layers by `inputs`, their outputs to float16. Vectors (norms,
    biases) stay, as the converter keeps them in float32."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    before = [parameter.detach().clone() for parameter in matrices]
    hooks = []

    def round_inputs(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs(given[0]), *given[1:]

    def round_outputs(_: nn.Module, __: Any, found: Tensor) -> Tensor:
        return float16(found)

    own: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = own()
    try:
        with torch.no_grad():
            for parameter in matrices:
                parameter.copy_(weights(parameter.detach()))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(round_inputs))
                if module is not head:  # logits are read in float32
                    hooks.append(module.register_forward_hook(round_outputs))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for parameter, value in zip(matrices, before, strict=True):
                parameter.copy_(value)
