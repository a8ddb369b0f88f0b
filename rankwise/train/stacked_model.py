"""A frozen model that runs a stack of arms in one forward pass, through hooks on its linear layers.

    with running(model, stack) as together:
        losses = together.token_losses(stack, batch, Learnt.of(batch["labels"]))

Afterwards the model is what it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import nearest
from rankwise.errors import UsageError, VerificationError
from rankwise.models.sites import linear_shape
from rankwise.score.likelihood import Learnt, token_losses
from rankwise.train.stacked import Stack, StackedSite


@dataclass
class Together:
    """A model under the hooks of `running`, with the factors of the stack that runs: all arms or a part of them."""

    model: PreTrainedModel
    stack: Stack
    shape: tuple[int, int] = (0, 0)
    called: set[str] = field(default_factory=set)

    def token_losses(self, stack: Stack, batch: Mapping[str, Tensor], learnt: Learnt) -> Tensor:
        """Negative log-likelihood (K,) in nats, float32, of all rows of the arms of a stack."""
        ids = batch["input_ids"]
        self.stack, self.shape = stack, (ids.shape[0], ids.shape[1])
        mask = None if padded_right(batch["attention_mask"]) else batch["attention_mask"].to(self.model.device)
        inputs = {"input_ids": ids.to(self.model.device, non_blocking=True)}
        losses = token_losses(self.model, {**inputs, "attention_mask": mask, "use_cache": False}, learnt)
        self.check_called()
        return losses

    def add(self, number: int, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        site = self.stack.sites[number]
        if inputs[0].shape[:-1] != self.shape:
            raise UsageError(
                f"{site.path} gets its input as {tuple(inputs[0].shape)}, not as {self.shape} rows of tokens, so arms "
                "cannot be told apart there; leave this site out, or train the arms one after the other"
            )
        self.called.add(site.path)
        return site.added(inputs[0], outputs)

    def check_called(self) -> None:
        if len(self.called) < len(self.stack.sites):
            missed = next(site.path for site in self.stack.sites if site.path not in self.called)
            raise VerificationError(f"the model never calls {missed}, so its factors would have no effect")


def padded_right(mask: Tensor) -> bool:
    """Padding comes last in every row. A causal model then needs no mask: no learnt position sees what follows it."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


@contextmanager
def running(model: PreTrainedModel, stack: Stack) -> Iterator[Together]:
    """The model with the stack's factors at its sites: in eval mode, frozen; afterwards as it was, bit for bit.

    UsageError: a site that the model lacks, or whose matrix has another shape.
    """
    modules = {site.path: site_module(model, site) for site in stack.sites}
    together = Together(model, stack)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles: list[Any] = [
        modules[site.path].register_forward_hook(partial(together.add, number))
        for number, site in enumerate(stack.sites)
    ]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        yield together
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


def site_module(model: nn.Module, site: StackedSite) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    module = modules.get(site.path)
    shape = (site.b.shape[1], site.a.shape[2])
    if module is None or linear_shape(module) is None:
        linear = [path for path, other in modules.items() if linear_shape(other)]
        raise UsageError(f"the model has no linear layer {site.path}; near it: {', '.join(nearest(site.path, linear))}")
    if linear_shape(module) != shape:
        raise UsageError(f"{site.path} is {linear_shape(module)} in the model, and the factors are for {shape}")
    return module
