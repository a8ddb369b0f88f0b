"""Trace one training step of a model without weights: its memory, compute and memory traffic.

    empty(as_on_gpu(model), torch.bfloat16)            shapes without storage (torch's fake tensors)
    traced(model, batch, autocast=torch.bfloat16)  ─▶  Trace(held, logits, flops, moved)

Forward, loss and backward run through autograd as they would in training, so what is kept for the backward pass, what
checkpointing computes again and what a frozen prefix saves is counted, not modelled. Ids, masks and pixels are real
tensors; whatever meets a parameter becomes a fake one. On a GPU two kernels differ from the CPU's, which are what is
traced: dropout keeps a mask of one byte, and logits come out of mixed precision in float32; both are followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rankwise.errors import UsageError

MASKED = (torch.bool, torch.uint8)
# Of the experts that tokens are routed to; torch does not count it, and has it from 2.8 on.
GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)
FREE = (torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided)


def grouped_flops(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Of products (S, k) × (E, k, n), and of their backward: every row meets one expert."""
    return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]


RULES = {**flop_registry, GROUPED: grouped_flops}


@dataclass(frozen=True)
class Trace:
    """held, logits: (operations,) bytes after each operation, beside weights, optimizer state and what was there before
    the step; `logits` is the part of `held` whose last dimension is the vocabulary. flops: of matrix products and
    attention. moved: bytes that all other operations read and write."""

    held: Tensor
    logits: Tensor
    flops: float
    moved: float

    @property
    def operations(self) -> int:
        return len(self.held)

    @property
    def peak(self) -> int:
        return int(self.held.max())


def empty(model: nn.Module, frozen: torch.dtype, float32: frozenset[str] = frozenset()) -> nn.Module:
    """The model (on the meta device) with fake parameters in place: trained ones and those named in `float32` in
    float32, the others as `frozen`. Tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in made:
                    wide = parameter.requires_grad or f"{path}.{name}" in float32
                    dtype = torch.float32 if wide else frozen
                    made[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
                    )
                setattr(module, name, made[id(parameter)])
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta or isinstance(buffer, FakeTensor):
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def trace_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
    vocabulary: int = 0,
) -> Trace:
    """One forward and backward pass of an `empty` model.

    accumulates: gradients of earlier passes are held from the start (gradient accumulation).
    Raises UsageError where the model looks at values to decide what to compute.
    """
    parameters = list(model.parameters())
    if accumulates:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    counter = Counter(vocabulary)
    counter.know([*parameters, *model.buffers()])
    counter.see([dict(batch), [parameter.grad for parameter in parameters]])
    forward = convert_outputs_to_fp32(model.__call__) if autocast else model
    try:
        with counter:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                outputs = forward(**batch)
            loss = outputs.loss
            del outputs
            loss.backward()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UsageError(
            f"{type(model).__name__} has value-dependent computation ({error.func}), so nothing can be estimated "
            "without its weights; start training with --max_steps 2 and watch it"
        ) from error
    finally:
        for parameter in parameters:
            parameter.grad = None
    return Trace(torch.tensor(counter.held), torch.tensor(counter.logits), counter.flops, counter.moved)


class Counter(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.held: list[int] = []
        self.logits: list[int] = []
        self.flops = self.moved = 0.0
        self._sizes: dict[int, tuple[int, int]] = {}
        self._now = [0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question to a fake tensor, nothing that is computed
            return func(*args, **kwargs)
        args = whole_numbers(func, args)
        result = func(*args, **kwargs)
        self.see(result)
        self._count(func, args, kwargs, result)
        self.held.append(self._now[0])
        self.logits.append(self._now[1])
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            self.flops += rule(*args, **kwargs, out_val=result)
        elif not func.is_view and func.overloadpacket not in FREE:
            self.moved += sum(size(value) for value in tree_leaves((args, kwargs, result)))

    def know(self, tensors: list[Tensor]) -> None:
        """Register storages that exist anyway and are not counted."""
        self._sizes |= {key(tensor): (0, 0) for tensor in tensors}

    def see(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and key(tensor) not in self._sizes:
                storage = tensor.untyped_storage()
                is_logits = self.vocabulary > 0 and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
                self._sizes[key(tensor)] = storage.nbytes(), storage.nbytes() * is_logits
                self._add(self._sizes[key(tensor)], 1)
                weakref.finalize(storage, self._gone, key(tensor))

    def _gone(self, which: int) -> None:
        self._add(self._sizes.pop(which, (0, 0)), -1)

    def _add(self, sizes: tuple[int, int], sign: int) -> None:
        for index, count in enumerate(sizes):
            self._now[index] += sign * count


class GpuDropout(nn.Dropout):
    """Dropout as a GPU computes it: the mask that is kept has one byte an element."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, True)[0] if self.training and self.p else input


def as_on_gpu(model: nn.Module) -> nn.Module:
    """The model with dropout as on a GPU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, GpuDropout(child.p))
    return model


def whole_numbers(func: Any, args: Any) -> Any:
    """Real masks as indices: how many elements a mask picks is known, but not to an operation on fake tensors."""
    if func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return args
    indices: list[Tensor | None] = []
    for index in args[1]:
        is_mask = index is not None and index.dtype in MASKED and not isinstance(index, FakeTensor)
        indices += index.nonzero().unbind(1) if is_mask else [index]
    return (args[0], indices, *args[2:])


def key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
