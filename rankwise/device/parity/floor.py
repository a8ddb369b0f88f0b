"""How far apart ways of running the model are that are all right: what no comparison can go below.

    reference (float32, one row at a time) ── against ──▶ the other attention kernel · rows padded together
                                                          float16 throughout · bfloat16 throughout
                                                          Q8_0 in every linear layer

A runtime is held to `k` times the largest of those that its file's form explains (`EXPLAINS`). A q8_0 file cannot be
closer than the same rounding in transformers is; an f16 file has no such excuse, so a fault of the conversion shows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.device.parity.cases import Case
from rankwise.device.parity.divergence import Divergence, compare, joined, top_of
from rankwise.device.parity.embedder import apart, embedded
from rankwise.device.parity.reference import HFReference, forced
from rankwise.device.parity.rung import WEAK
from rankwise.errors import need

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


BATCH = 4  # rows padded together
K = 10.0  # in KL: about 3 in logits. Sound exports of the demos' models come out at 0.6 to 3 floors
FALSE_ALARMS = 0.005  # of sound files, where a floor rests on so few places that chance alone exceeds k
FEWEST = 2.0  # places; on one alone chance has no bound worth the name
TOP = 64  # tokens whose log-probabilities are compared at each place
# What arithmetic alone explains: float32 logits that were summed in another order and written as decimals.
LEAST_KL, LEAST_MARGIN, LEAST_DISTANCE = 1e-7, 2e-3, 1e-4
EXPLAINS = {
    "f32": ("attention", "padded", "float16"),  # llama.cpp computes in half precision here and there, whatever the file
    "f16": ("attention", "padded", "float16"),
    "bf16": ("attention", "padded", "bfloat16"),
    "q8_0": ("attention", "padded", "float16", "q8_0"),
}
Outputs = list[Tensor]


@dataclass(frozen=True)
class Thresholds:
    """What a runtime is held to. kl_*: nats. margin: nats; where the reference is less sure than this, another
    likeliest token is a tie. agreement: least top-1 agreement, as asked for. k: how many floors they are.
    embeddings: relative distance of a picture's embeddings."""

    kl_mean: float
    kl_p99: float
    kl_max: float
    margin: float
    agreement: float | None = None
    k: float = K
    embeddings: float = math.inf

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @property
    def note(self) -> str:
        """How many floors the limits are. Above K only large faults exceed them."""
        return f"k = {self.k:.3g}" if self.k <= K else f"{WEAK}: k = {self.k:.3g}"


@dataclass(frozen=True)
class Floor:
    """Divergence of every known-good path from the reference, by its name; and the largest relative distance of its
    embeddings of pictures."""

    paths: Mapping[str, Divergence]
    embeddings: Mapping[str, float] = field(default_factory=dict)

    def thresholds(self, form: str, k: float = K, agreement: float | None = None) -> Thresholds:
        """Those for a file form (`f16`, `q8_0` …): k times the largest floor that the form explains, and never less
        than arithmetic explains. Margins scale like the root: KL is quadratic in the logits' difference.

        Where the floor rests on few places, k is what chance explains (`chance`): a handful of items shows only large
        faults.
        """
        names = EXPLAINS.get(form.lower(), tuple(self.paths))
        known = [self.paths[name] for name in names if name in self.paths]
        k = max(k, chance(max(known, key=lambda one: one.mean).effective)) if known else k
        return Thresholds(
            kl_mean=max(LEAST_KL, k * max((one.mean for one in known), default=0.0)),
            kl_p99=max(LEAST_KL, k * max((one.p99 for one in known), default=0.0)),
            kl_max=max(LEAST_KL, k * max((one.max for one in known), default=0.0)),
            margin=max(LEAST_MARGIN, math.sqrt(k) * max((one.margin_difference for one in known), default=0.0)),
            agreement=agreement,
            k=k,
            embeddings=max(
                LEAST_DISTANCE, math.sqrt(k) * max((self.embeddings.get(name, 0.0) for name in names), default=0.0)
            ),
        )

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "kl_mean": one.mean,
                "kl_p99": one.p99,
                "kl_max": one.max,
                "margin": one.margin_difference,
                "top1_agreement": one.agreement,
                "embeddings": self.embeddings.get(name, 0.0),
            }
            for name, one in self.paths.items()
        }


def chance(places: float) -> float:
    """By how much one mean KL exceeds another of the same size in FALSE_ALARMS of all cases, each resting on so many
    places: a KL is a square of noise, so the ratio of two means is F-distributed."""
    places = max(places, FEWEST)
    return float(need("scipy.stats", extra="eval").f.isf(FALSE_ALARMS, places, places))


def measure_floor(
    reference: HFReference, cases: Sequence[Case], top: int = TOP, names: Sequence[str] | None = None
) -> Floor:
    """Run the known-good paths over the same prompts and answers as the reference.

    top: tokens compared at each place, as many as of the runtime. names: of the paths; all by default. The model is
    afterwards as it was.
    """
    exact = [reference.expected(case) for case in cases]
    found: dict[str, Divergence] = {}
    distances: dict[str, float] = {}
    for name, path in PATHS.items():
        if names is not None and name not in names:
            continue
        with path.enter(reference.model) as model:
            if model is None:
                continue
            parts = zip(cases, exact, run(reference, model, cases, path.batch), strict=True)
            found[name] = joined([compare(e.log_probs, top_of(o, top), case.id) for case, e, o in parts])
            distances[name] = farthest(reference, model, cases)
    return Floor(found, distances)


def farthest(reference: HFReference, model: Any, cases: Sequence[Case]) -> float:
    """Largest relative distance of the embeddings of any case's pictures; 0 where the reference keeps none."""
    found = [0.0]
    for case in cases:
        expected = reference.expected(case).embeddings
        if expected is not None:
            rows = embedded(model, reference.renderer, reference.renderer.prompt(case.example))
            assert rows is not None
            found.append(apart(rows, expected))
    return max(found)


@dataclass(frozen=True)
class KnownGood:
    """A known-good way of running a model. enter: the model on that way, None for families that do not have it; batch:
    rows that are run together."""

    enter: Callable[[Any], AbstractContextManager[Any]]
    batch: int = 1


@contextmanager
def other_attention(model: Any) -> Iterator[Any]:
    """eager where the model runs another kernel, sdpa where it runs eager."""
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
    with rounding(model, q8_0, q8_0):
        yield model


def cast(model: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext(copy.deepcopy(model).to(dtype))


PATHS: Mapping[str, KnownGood] = {
    "attention": KnownGood(other_attention),
    "padded": KnownGood(nullcontext, BATCH),
    "float16": KnownGood(partial(cast, dtype=torch.float16)),
    "q8_0": KnownGood(in_q8_0),
    "bfloat16": KnownGood(partial(cast, dtype=torch.bfloat16)),
}


def run(reference: HFReference, model: Any, cases: Sequence[Case], batch: int) -> Outputs:
    """log p along the reference's answers, `batch` rows at a time."""
    prompts = [reference.renderer.prompt(case.example) for case in cases]
    answers = [reference.expected(case).answer for case in cases]
    found: Outputs = []
    for start in range(0, len(cases), batch):
        part = slice(start, start + batch)
        found += forced(model, reference.renderer, prompts[part], answers[part])
    return found
