"""What answers of a broken ladder are: the adapter in transformers at other scales and in part of its sites, one of
which may explain them.

    Observed* ── Variants.explained ──▶ "they are the base's (mean KL 2e-07 against 0.41): its scale is 0, or …"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankwise.core.site import half_of
from rankwise.device.parity.cases import Case
from rankwise.device.parity.floor import Divergence, compare, joined
from rankwise.device.parity.reference import HFReference, Observed, forced
from rankwise.models.adapt import ADAPTER, lora_layers
from rankwise.models.sites import tower_of, tower_prefixes

Rescaling = Callable[[str, float], float]
"""Site and its own scale → the scale that it has in a variant."""
NEAR = 0.2  # a variant explains answers whose KL from it is at most this share of that from what was expected


@dataclass(frozen=True)
class Variant:
    """is_: what answers of it are, in words; because: where that comes from, and what to do; scale: of each site."""

    is_: str
    because: str
    scale: Rescaling


@contextmanager
def rescaled(model: Any, scale: Rescaling) -> Iterator[None]:
    """A PEFT model with other scales; afterwards as it was."""
    layers = lora_layers(model)
    before = {path: layer.scaling[ADAPTER] for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.scaling[ADAPTER] = scale(path, before[path])
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.scaling[ADAPTER] = before[path]


def off(_: str, __: float) -> float:
    return 0.0


def own(_: str, scale: float) -> float:
    return scale


@dataclass(frozen=True)
class Variants:
    """Of one adapter. reference: its model in transformers; name: of its file."""

    reference: HFReference
    name: str

    def explained(self, seen: Sequence[Observed], found: Divergence, expects: int | None) -> str:
        """Which variant the answers are nearest to. found: their divergence from what they should be; expects: 0 where
        that is this adapter, None where it is the base, else another adapter."""
        distances = {one: self.distance(seen, one) for one in self.variants(expects)}
        nearest = min(distances, key=lambda one: distances[one].mean)
        near = distances[nearest].mean
        if near > NEAR * found.mean:
            return (
                f"neither the base nor {self.name} at another scale or in half of its layers explains the answers; is "
                "the GGUF under it that of the adapter's base? At scale 0 it has to be the base"
            )
        return f"the answers are {nearest.is_} (mean KL {near:.2g} against {found.mean:.2g}): {nearest.because}"

    def distance(self, seen: Sequence[Observed], variant: Variant) -> Divergence:
        answers = [one.expected.answer for one in seen]
        found = zip(seen, self.along([one.case for one in seen], answers, variant.scale), strict=True)
        return joined([compare(log_probs, one.tops, one.case.id) for one, log_probs in found])

    def along(self, cases: Sequence[Case], answers: Sequence[Sequence[int]], scale: Rescaling) -> list[Tensor]:
        """(answer, vocabulary) for every case: log p of the adapter at other scales, along given answers."""
        renderer, model = self.reference.renderer, self.reference.model
        pairs = [(renderer.prompt(case.example), answer) for case, answer in zip(cases, answers, strict=True)]
        with rescaled(model, scale):
            return [forced(model, renderer, [prompt], [answer])[0] for prompt, answer in pairs]

    def variants(self, expects: int | None) -> list[Variant]:
        name = self.name
        on = Variant(
            f"those of {name} at scale 1",
            "it acts where another scale was asked for, so what is set does not reach the requests, or the GGUF has it "
            "merged in",
            own,
        )
        none = Variant(
            "the base's",
            f"{name} is loaded and not applied: its scale is 0 (GET /lora-adapters tells; --lora-scaled, POST "
            "/lora-adapters and `lora` of a request set it), or its sites are named otherwise than the GGUF's",
            off,
        )
        return [
            *([on] if expects != 0 else []),
            *([none] if expects is not None else []),
            Variant(
                f"those of {name} applied twice",
                "it is loaded twice, or the GGUF under it has it merged in",
                lambda _, scale: 2 * scale,
            ),
            Variant(f"those of {name} at half its scale", "its scale is 0.5", lambda _, scale: scale / 2),
            Variant(
                f"those of {name} with one scale for all sites",
                "the scales of its sites are lost: llama.cpp has one alpha for a file, and `rankwise export "
                "--adapter_gguf` folds the scales into B",
                self.one_alpha,
            ),
            *(self.half(words, second) for words, second in (("first", False), ("second", True))),
        ]

    def half(self, words: str, second: bool) -> Variant:
        model = self.reference.model
        towers = tower_prefixes(model.get_base_model())
        kept = half_of({path: tower_of(path, towers) for path in lora_layers(model)}, second=second)
        return Variant(
            f"those of the {words} half of {self.name}'s layers",
            "sites of the other half are missing from the file",
            lambda path, scale: scale if path in kept else 0.0,
        )

    def one_alpha(self, path: str, _: float) -> float:
        """alpha / r with the config's one alpha and the site's own rank, as llama.cpp's converter writes a LoRA."""
        alpha = self.reference.model.peft_config[ADAPTER].lora_alpha
        return float(alpha / lora_layers(self.reference.model)[path].r[ADAPTER])
