"""Ways of running one model that are all right: another kernel, rows padded together, few bits as in a GGUF.

with in_q8_0(model): model(**batch)      # weights and inputs rounded to Q8_0 meanwhile
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.models.sites import expert_parameters, model_sites, router_paths

BATCH = 4  # rows padded together


@contextmanager
def other_attention(model: Any) -> Iterator[Any]:
    """eager where the model runs another kernel, sdpa where it runs eager; None for families that have no other."""
    before = model.config._attn_implementation
    other = "sdpa" if before == "eager" else "eager"
    if other == "sdpa" and not model._supports_sdpa:
        yield None
        return
    model.set_attn_implementation(other)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@contextmanager
def in_q8_0(model: Any) -> Iterator[Any]:
    """As llama.cpp: inputs of a Q8_0 matrix are rounded to Q8_0 too, sums are float32, what comes out is float16."""
    with rounding(model, q8_0, q8_0):
        yield model


def cast(model: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext(copy.deepcopy(model).to(dtype))


PATHS: Mapping[str, tuple[Callable[[Any], AbstractContextManager[Any]], int]] = {  # with rows that are run together
    "attention": (other_attention, 1),
    "padded": (nullcontext, BATCH),
    "float16": (partial(cast, dtype=torch.float16), 1),
    "q8_0": (in_q8_0, 1),
    "bfloat16": (partial(cast, dtype=torch.bfloat16), 1),
}

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
    """Matrices rounded by `weights` along their inputs; inputs of linear layers and of what holds experts by `inputs`;
    outputs of linear layers to float16. As in a GGUF, vectors (norms, biases, those of experts too) and routers stay.

    What lies between the two matrices of an expert is not rounded unless the second is a module of its own: no hook
    sees the inner inputs of fused experts, so this is closer to float32 than llama.cpp is.
    """
    routers, turned = router_paths(model), turned_parameters(model)
    modules = [(path, module) for path, module in model.named_modules() if path not in routers]
    matrices = {
        name: one
        for name, one in model.named_parameters()
        if one.dim() > 1 and name.rpartition(".")[0] not in routers and not name.endswith("bias")
    }
    before = {name: one.detach().clone() for name, one in matrices.items()}
    hooks = []

    def round_inputs(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs(given[0]), *given[1:]

    def round_outputs(_: nn.Module, __: Any, found: Tensor) -> Tensor:
        return float16(found)

    own: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = own()
    try:
        with torch.no_grad():
            for name, one in matrices.items():
                value = one.detach()
                one.copy_(weights(value.mT).mT if name in turned else weights(value))
        for path, module in modules:
            linear = isinstance(module, (nn.Linear, Conv1D))
            if linear or expert_parameters(path, module):
                hooks.append(module.register_forward_pre_hook(round_inputs))
            if linear and module is not head:  # logits are read in float32
                hooks.append(module.register_forward_hook(round_outputs))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, one in matrices.items():
                one.copy_(before[name])


def turned_parameters(model: Any) -> frozenset[str]:
    """Names of the parameters that are stored (in, out)."""
    return frozenset(site.weight for site in model_sites(model).values() if site.transposed)
