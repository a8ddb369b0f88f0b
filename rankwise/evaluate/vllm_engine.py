"""Generation and label scores by vLLM, where it is installed: the same prompts, as token ids.

Renderer ── prompt ids ──▶ vllm.LLM (+ LoRARequest) ──▶ ids ── Renderer ──▶ text
                     └── once a run: does the adapter act? (vllm_effect.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.core.experts import single_experts
from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.errors import UsageError, need
from rankwise.evaluate.generate import Generated, GenerationSettings, LabelScores
from rankwise.evaluate.likelihood import prompt_of, render_answers
from rankwise.evaluate.vllm_effect import AdapterEffect, Values, measure, rows_of
from rankwise.files.adapter import CONFIG_NAME, adapter_files
from rankwise.files.atomic import read_object
from rankwise.files.checkpoint import open_checkpoint
from rankwise.files.processes import announce

EXTRA = "vllm"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank
CHUNKS_IN_FLIGHT = 16  # vLLM fills its own batches; a chunk is what is recorded at once


def check_installed() -> None:
    """UsageError naming the extra where vLLM is missing."""
    need("vllm", extra=EXTRA)


@dataclass(frozen=True)
class VLLMGenerator:
    """A model that vLLM runs by its name or folder, with a plain LoRA adapter of one rank everywhere, or none.

    dtype: auto, float32, bfloat16 or float16. Prompts go in as token ids, so they are those of training. What vLLM
    cannot do (beam search through this interface, adapters with ranks by site, DoRA) is a UsageError that says so.
    That the adapter acts is proven before the first answer: VerificationError where it does not.
    """

    model: str
    renderer: Renderer
    decoding: GenerationSettings = GenerationSettings()
    adapter: Path | None = None
    dtype: str = "auto"
    _effects: list[AdapterEffect] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        refuse(self.decoding.num_beams, self.adapter)

    @property
    def settings(self) -> dict[str, Any]:
        return {"engine": "vllm", "dtype": self.dtype, **self.renderer.settings, **self.decoding.deciding}

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        """Texts as chunks of samples are done, longest prompts first."""
        self._prove(examples)
        prompts = [self.renderer.prompt_ids(example) for example in examples]
        for chunk in self._chunks(prompts, 1):
            outputs = self._run([prompts[position] for position in chunk], self._sampling(), self._request)
            for position, output in zip(chunk, outputs, strict=True):
                text = self.renderer.answer(list(output.outputs[0].token_ids))
                yield Generated(position, self.renderer.text(prompts[position]), text)

    def label_scores(self, examples: Sequence[Example], labels: Sequence[str]) -> Iterator[LabelScores]:
        """Log-likelihoods from vLLM's log-probabilities of a prompt that ends in the label."""
        self._prove(examples)
        rows = render_answers(self.renderer, examples, labels)
        for chunk in self._chunks([group[0].input_ids for group in rows], len(labels)):
            asked = [row for position in chunk for row in rows[position]]
            outputs = iter(self._run([row.input_ids for row in asked], self._scoring(), self._request))
            for position in chunk:
                start = len(prompt_of(rows[position][0]))
                values = {label: float(_log_probs(next(outputs), start).sum()) for label in labels}
                yield LabelScores(position, self.renderer.text(rows[position][0].input_ids[:start]), values)

    def _chunks(self, prompts: Sequence[Sequence[int]], each: int) -> Iterator[list[int]]:
        order = self.decoding.order(prompts)
        size = max(1, self.decoding.batch_size * CHUNKS_IN_FLIGHT // each)
        return (order[start : start + size] for start in range(0, len(order), size))

    @property
    def effect(self) -> AdapterEffect | None:
        """What the adapter does in vLLM; None without one, and before the first answer."""
        return self._effects[0] if self._effects else None

    def _prove(self, examples: Sequence[Example]) -> None:
        """Once: VerificationError where the adapter has no effect, or another one than in transformers."""
        if self.adapter is None or self._effects or not examples:
            return
        found = measure(self._scored, rows_of(self.renderer, examples), self.model, self.adapter)
        found.require(self.adapter)
        announce(found.words())
        self._effects.append(found)

    def _scored(self, rows: Sequence[Sequence[int]], adapted: bool) -> list[Values]:
        outputs = self._run(rows, self._scoring(), self._request if adapted else None)
        return [_log_probs(output, 1) for output in outputs]

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Any, request: Any) -> list[Any]:
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs: list[Any] = self._engine.generate(
            asked, sampling_params=parameters, use_tqdm=False, lora_request=request
        )
        return outputs

    def _scoring(self) -> Any:
        """0 log-probabilities beside that of each of the prompt's own ids, which vLLM always gives."""
        return self._parameters(temperature=0.0, max_tokens=1, prompt_logprobs=0)

    def _sampling(self) -> Any:
        sampled = self.decoding.do_sample
        return self._parameters(
            temperature=self.decoding.temperature if sampled else 0.0,
            top_p=self.decoding.top_p if sampled else 1.0,
            max_tokens=self.decoding.max_new_tokens,
            stop_token_ids=list(self.renderer.end_ids),
            seed=self.decoding.seed,
        )

    def _parameters(self, **given: Any) -> Any:
        return need("vllm", extra=EXTRA).SamplingParams(detokenize=False, **given)

    @cached_property
    def _engine(self) -> Any:
        """Loaded when first asked. Nothing of the model's own generation defaults enters."""
        lora: dict[str, Any] = {}
        if self.adapter:
            lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_rank(self.adapter)}
        return need("vllm", extra=EXTRA).LLM(
            model=self.model,
            dtype=self.dtype,
            seed=self.decoding.seed,
            max_model_len=self.renderer.limit + 1,  # a scored prompt is followed by one generated token
            generation_config="vllm",
            enable_prefix_caching=False,  # with it prompt_logprobs depend on earlier requests (vllm#42019)
            **lora,
        )

    @cached_property
    def _request(self) -> Any:
        if self.adapter is None:
            return None
        return need("vllm.lora.request", extra=EXTRA).LoRARequest("adapter", 1, str(self.adapter))


def refuse(num_beams: int, adapter: Path | None) -> None:
    """UsageError for what vLLM cannot do, installed or not."""
    if num_beams > 1:
        raise UsageError("--num_beams needs --engine transformers; vLLM only samples or decodes greedily")
    if adapter:
        max_rank(adapter)


def _log_probs(output: Any, start: int) -> Values:
    """log p of the prompt's ids from `start` on, which is at least 1."""
    ids = output.prompt_token_ids
    return np.array([output.prompt_logprobs[place][ids[place]].logprob for place in range(start, len(ids))])


def max_rank(adapter: Path) -> int:
    """The smallest rank limit of vLLM that takes the adapter; UsageError for adapters that it would read wrong."""
    config: Mapping[str, Any] = read_object(adapter / CONFIG_NAME)
    if config.get("target_parameters"):
        raise UsageError(
            f"{adapter} adapts parameters by name (experts), and vLLM does not read those as PEFT writes them "
            "(vllm#41754); merge it with `rankwise merge`, or take --engine transformers"
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UsageError(
            f"{adapter} has ranks or scales per site, which vLLM does not read; write the uniform form, which changes "
            f"nothing else, with: rankwise compress {adapter} --uniform --energy 1"
        )
    refused = [name for name in ("use_dora", "modules_to_save") if config.get(name)]
    if config.get("peft_type") != "LORA" or refused or config.get("bias", "none") != "none":
        what = ", ".join(refused) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UsageError(f"{adapter}: vLLM takes plain LoRA only, this is {what}; merge it with `rankwise merge`")
    found = [rank for rank in RANKS if rank >= int(config["r"])]
    if not found:
        raise UsageError(f"{adapter} has rank {config['r']}, vLLM takes {RANKS[-1]} at most; compress or merge it")
    if single := single_experts(open_checkpoint(adapter_files(adapter)[0])):
        raise UsageError(
            f"{adapter} adapts single experts ({single[0]} …), for which vLLM's effect cannot be compared here; "
            "merge it with `rankwise merge`, or take --engine transformers"
        )
    return found[0]
