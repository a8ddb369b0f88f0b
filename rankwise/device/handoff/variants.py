"""What might answer in place of the tuned model, made of it: log p of each at given places.

Weights are base + share·(tuned − base), parameter by parameter, so an adapter and a merged model of any trainer are one
thing: base is share 0, a lost half of the layers share 0 there, an adapter at another scale that scale. Prompts are
those of another template, with another BOS, or cut. Rounded weights are the noise that is allowed, and a fault from
two bits on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.site import describe, half_of, is_expert
from rankwise.data.render import Rendered
from rankwise.data.vision_inputs import IGNORED, Sight
from rankwise.device.handoff.verdict import BASE, COARSE, PART, SOUND, TUNED, Hypothesis
from rankwise.device.parity.known_good import float16, in_q8_0, rounding
from rankwise.errors import DataError
from rankwise.evaluate.likelihood import append_ids, forced_log_probs
from rankwise.models.sites import tower_of, tower_prefixes

Share = Callable[[str], float]
GROUP = 32  # neighbouring weights that share a scale


@dataclass(frozen=True)
class Asked:
    """A prompt, the answer that is forced behind it, and after how many of its tokens the next one is asked for."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    places: tuple[int, ...]
    images: tuple[str, ...] = ()

    @property
    def row(self) -> Rendered:
        """As far as it is needed."""
        prompt = Rendered([*self.prompt], [IGNORED] * len(self.prompt), images=self.images)
        return append_ids(prompt, self.answer[: max(self.places)])

    @property
    def behind(self) -> list[int]:
        """The places in the row that the asked tokens stand behind."""
        return [len(self.prompt) - 1 + place for place in self.places]


def log_probs(model: Any, sight: Sight | None, asked: Sequence[Asked]) -> list[Tensor]:
    """(places, vocabulary) float32 of each; one row at a time, and only these places reach the output head."""
    return [forced_log_probs(model, sight, [one.row], [one.behind])[0] for one in asked]


@dataclass(frozen=True, eq=False)
class Tuning:
    """The tuned model, and what the base has where tuning changed it. scales: that its adapter may be put on with by
    mistake, each with words."""

    model: Any
    base: Mapping[str, Tensor]
    scales: Mapping[float, str]

    @classmethod
    def of(cls, model: nn.Module, base: nn.Module, scales: Mapping[float, str], where: str) -> Tuning:
        """DataError where the models have other parameters, or the same values throughout."""
        own, changed = dict(base.named_parameters()), {}
        for name, tuned in model.named_parameters():
            if name not in own or own[name].shape[1:] != tuned.shape[1:]:
                raise DataError(f"{where}: the base has no {name} of this size; is it the base of this model?")
            before = rows_of(own[name].detach(), tuned.detach())
            if not torch.equal(before, tuned):
                changed[name] = before.clone()
        if not changed:
            raise DataError(
                f"{where}: equals its base in every weight, so nothing can tell them apart: was the adapter merged, "
                "and saved after training?"
            )
        return cls(model, changed, scales)

    @contextmanager
    def weighted(self, share: Share) -> Iterator[None]:
        """The model with base + share·(tuned − base)."""
        parameters = dict(self.model.named_parameters())
        touched = {name: parameters[name] for name in self.base if share(name) != 1}
        before = {name: one.detach().clone() for name, one in touched.items()}
        with torch.no_grad():
            for name, one in touched.items():
                base = self.base[name].to(one.device)
                one.copy_(base if share(name) == 0 else base + share(name) * (one - base))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, one in touched.items():
                    one.copy_(before[name])

    def variants(self) -> Iterator[tuple[Hypothesis, Share]]:
        """The base, and parts of the tuning: those that leave some of it in and some of it out."""
        yield Hypothesis("base", BASE, "the base model"), lambda _: 0.0
        for name, words, kept in self._parts():
            inside = {one for one in self.base if kept(one)}
            if inside and inside != set(self.base):
                yield Hypothesis(name, PART, words), lambda one, inside=inside: float(one in inside)  # type: ignore[misc]
        for scale, words in self.scales.items():
            yield Hypothesis(f"scale {scale:.3g}", PART, words), lambda _, scale=scale: scale  # type: ignore[misc]

    def _parts(self) -> Iterator[tuple[str, str, Callable[[str], bool]]]:
        towers, sites = tower_prefixes(self.model), {name: _site(name) for name in self.base}
        tower = {name: tower_of(name.rpartition(".")[0], towers) for name in self.base}
        only = "the tuning of {} alone, the rest the base's"
        for words, second in (("first half", False), ("second half", True)):
            yield words, only.format(f"the {words} of the layers"), half_of(tower, second=second).__contains__
        for kind in dict.fromkeys(tower.values()):
            yield f"{kind} side", only.format(f"the {kind} side"), lambda name, kind=kind: tower[name] == kind  # type: ignore[misc]
        for kind, words in (("attention", "the attention"), ("mlp", "the MLPs")):
            yield kind, only.format(words), lambda name, kind=kind: sites[name].kind == kind  # type: ignore[misc]
        yield "experts", only.format("the experts"), is_expert
        yield "no experts", only.format("all but the experts"), lambda name: not is_expert(name)


def _site(name: str) -> Any:
    """The site of a parameter; its shape does not count."""
    return describe(name.rpartition(".")[0], (1, 1))


def rows_of(base: Tensor, tuned: Tensor) -> Tensor:
    """The base's matrix with as many rows as the tuned one: rows that only that has (new tokens) are taken from it."""
    return base[: len(tuned)] if len(base) >= len(tuned) else torch.cat([base, tuned[len(base) :]])


def wrong_scales(adapter: Mapping[str, Any]) -> dict[float, str]:
    """Factors that an adapter's scale may be off by, of its config ({} for a merged model): half, twice; and where all
    its sites share one, without it."""
    found = {0.5: "the adapter at half its scale", 2.0: "the adapter at twice its scale"}
    rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
    if rank and alpha and not (adapter.get("rank_pattern") or adapter.get("alpha_pattern")):
        scale = alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
        found.setdefault(1 / scale, f"the adapter at scale 1 instead of {scale:.3g} (alpha left out)")
        if adapter.get("use_rslora"):
            found.setdefault(1 / math.sqrt(rank), "the adapter at alpha/r instead of alpha/√r (rsLoRA left out)")
    found.pop(1.0, None)
    return found


# --- rounded weights -------------------------------------------------------------------------------------------------


def bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)


def in_bits(values: Tensor, bits: int) -> Tensor:
    """Rounded to nearest in groups of GROUP neighbours with one scale each; vectors and odd widths stay."""
    if values.dim() < 2 or values.shape[-1] % GROUP:
        return values
    blocks = values.reshape(*values.shape[:-1], -1, GROUP)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) / (2 ** (bits - 1) - 1)
    rounded: Tensor = ((blocks / scale).round() * scale).reshape(values.shape)
    return rounded


def as_is(values: Tensor) -> Tensor:
    return values


WAYS: Mapping[Hypothesis, Callable[[Any], Any]] = {
    Hypothesis("tuned", TUNED, "the tuned model"): nullcontext,
    Hypothesis("float16", SOUND, "weights and activations in float16"): partial(
        rounding, weights=float16, inputs=float16
    ),
    Hypothesis("bfloat16", SOUND, "weights and activations in bfloat16"): partial(
        rounding, weights=bfloat16, inputs=bfloat16
    ),
    Hypothesis("8 bits", SOUND, "weights and activations in 8 bits"): in_q8_0,
    Hypothesis("4 bits", COARSE, "weights of 4 bits", 4): partial(
        rounding, weights=partial(in_bits, bits=4), inputs=as_is
    ),
    Hypothesis("2 bits", COARSE, "weights of 2 bits", 2): partial(
        rounding, weights=partial(in_bits, bits=2), inputs=as_is
    ),
}
