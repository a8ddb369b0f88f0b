"""Proof that vLLM applies an adapter: it may load one without an error and answer as the base does.

    a few prompts with their answers ── vLLM: with the LoRA, again one by one, without it ──▶ log p of each token
    effect      with − without            against repetition    with − again
    agreement   vLLM − transformers       with the adapter, against the same without it; of a small base

What vLLM's own issues name as causes is in CAUSES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.data.example import Example
from rankwise.data.render import Rendered, Renderer
from rankwise.data.vision_inputs import IGNORED
from rankwise.errors import VerificationError
from rankwise.evaluate.likelihood import answer_ids, forced_log_probs
from rankwise.files.checkpoint import base_files, resolve
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model

PROMPTS = 4
LEAST = 5e-3  # nats, root mean square: an adapter that acts less does not show in any answer
NOISES = 3.0  # an effect is more than so many times what a repetition, or another engine, makes of the same model
PART = 0.1  # of the effect, by which both engines may differ beyond noise
SMALL = 2 * 2**30  # bytes of a base's weights that transformers runs beside vLLM, in float32 on the CPU
CAUSES = (
    "vLLM loads adapters that it then does not apply, without an error: tensor names with another prefix than its "
    "modules have (vllm#34186), a text model inside a wrapper (vllm#48019), architectures such as Gemma 4 (vllm#41754)"
)
INSTEAD = "merge it (`rankwise merge {adapter} -o merged`) and evaluate that with vLLM, or use --engine transformers"
Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class AdapterEffect:
    """Root mean squares over tokens, in nats of log p.

    effect: with and without the adapter, in vLLM; repeated: with it, twice. Of transformers, where the base is small:
    expected: its own effect; apart, apart_base: vLLM and transformers with and without the adapter; share: of the
    expected effect that vLLM has (regression through 0).
    """

    prompts: int
    tokens: int
    effect: float
    repeated: float
    expected: float | None = None
    apart: float | None = None
    apart_base: float | None = None
    share: float | None = None

    @property
    def noise(self) -> float:
        return max(NOISES * self.repeated, LEAST)

    @property
    def weak(self) -> bool:
        """The adapter does too little on these prompts, by transformers, to show in vLLM."""
        return self.expected is not None and self.expected <= self.noise

    @property
    def blind(self) -> bool:
        """The engines differ so much on the base that the adapter's effect cannot be compared."""
        return self.expected is not None and self.expected <= NOISES * (self.apart_base or 0.0)

    def require(self, adapter: Path) -> None:
        """VerificationError where vLLM answers as the base, or applies the adapter in part or otherwise."""
        instead = INSTEAD.format(adapter=adapter)
        if self.effect <= self.noise and not self.weak:
            expected = f" ({self.expected:.2g} in transformers)" if self.expected is not None else ""
            raise VerificationError(
                f"{adapter}: has no effect in vLLM: the log-probabilities of {self.tokens} tokens with it and without "
                f"it differ by {self.effect:.2g} nats{expected}, not more than repetition ({self.repeated:.2g}; limit "
                f"{self.noise:.2g}): what would be scored is the base. {CAUSES}; {instead}"
            )
        if self.expected is None or self.apart is None or self.weak or self.blind:
            return
        limit = max(NOISES * (self.apart_base or 0.0), PART * self.expected, LEAST)
        if self.apart > limit:
            raise VerificationError(
                f"{adapter}: vLLM applies {self.share:.0%} of its effect: its log-probabilities differ from those of "
                f"transformers by {self.apart:.2g} nats with the adapter (limit {limit:.2g}) and by "
                f"{self.apart_base:.2g} without it. Are some of its sites not applied, or its scale lost? {CAUSES}; "
                f"{instead}"
            )

    def words(self) -> str:
        """One line."""
        line = f"the adapter acts in vLLM: {self.effect:.2g} nats per token (repetition {self.repeated:.2g}"
        if self.weak:
            return (
                "warning: the adapter changes so little on these prompts that whether vLLM applies it cannot be told "
                f"({self.expected:.2g} nats per token in transformers; limit {self.noise:.2g})"
            )
        if self.expected is None:
            return f"{line}); not compared with transformers: the base has more than {SMALL / 2**30:g} GiB"
        if self.blind:
            return (
                f"{line}); vLLM and transformers differ by {self.apart_base:.2g} without it, so how much of it acts "
                "cannot be told"
            )
        return f"{line}; {self.share:.0%} of its effect in transformers)"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Asked = Callable[[Sequence[Sequence[int]], bool], list[Values]]
"""Rows of ids, whether with the adapter → log p of each id but the first, by row."""


def measure(ask: Asked, rows: Sequence[Sequence[int]], base: str, adapter: Path) -> AdapterEffect:
    """Measure an adapter's effect. ask: vLLM's log-probabilities; base: compared in transformers where it is small."""
    on, off = (np.concatenate(ask(rows, adapted)) for adapted in (True, False))
    again = np.concatenate([values for row in rows for values in ask([row], True)])
    found = AdapterEffect(len(rows), len(on), rms(on - off), rms(on - again))
    if sum(file.stat().st_size for file in base_files(resolve(base))) > SMALL:
        return found
    own, own_base = in_transformers(rows, base, adapter)
    change = own - own_base
    share = float((on - off) @ change / (change @ change)) if change.any() else 0.0
    return AdapterEffect(
        *(found.prompts, found.tokens, found.effect, found.repeated),
        *(rms(change), rms(on - own), rms(off - own_base), share),
    )


def rows_of(renderer: Renderer, examples: Sequence[Example]) -> list[list[int]]:
    """A few prompts with the answers of their data, as ids."""
    rows = [[*renderer.prompt_ids(one), *answer_ids(renderer, one, one.answer)] for one in examples[:PROMPTS]]
    return [row[: renderer.limit] for row in rows]


def in_transformers(rows: Sequence[Sequence[int]], base: str, adapter: Path) -> tuple[Values, Values]:
    """log p of each id but the first of every row, by base + adapter and by the base, in float32 on the CPU."""
    model: Any = load_adapter(load_model(base, torch.float32).eval(), adapter)
    adapted = np.concatenate([log_probs(model, row) for row in rows])
    with model.disable_adapter():
        return adapted, np.concatenate([log_probs(model, row) for row in rows])


def log_probs(model: Any, row: Sequence[int]) -> Values:
    steps = forced_log_probs(model, None, [Rendered([*row], [IGNORED, *row[1:]])])[0]
    values: Values = steps.gather(-1, torch.tensor(row)[1:, None])[:, 0].double().numpy()
    return values


def rms(values: Values) -> float:
    return float(np.sqrt((values**2).mean()))
