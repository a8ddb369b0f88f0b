"""The adapted model on the meta device, set up for one configuration after another, and the traces of each.

base (meta), plan ── Shapes ── set_up(way, place) ── traces of two and three rows ──▶ Traced(profile, work)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.data.dataset import Collator, PackedDataset, RenderedDataset
from rankwise.data.renderer_for import own_length, renderer_for
from rankwise.data.vision_inputs import Sight
from rankwise.evaluate.likelihood import BESIDE
from rankwise.models.adapt import adapt
from rankwise.models.load import quantized_linears
from rankwise.models.sites import fused_experts
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import EstimateSection, LoraSection
from rankwise.train.arguments import autocast, frozen_dtype
from rankwise.train.estimate.cost import CPU_ALLOWANCE, GPU_ALLOWANCE, QUANTIZED, Fixed, Profile, Work
from rankwise.train.estimate.gpus import FLOAT32, Card, cards, state_bytes, this_machine
from rankwise.train.estimate.trace import as_on_gpu, empty, trace_step
from rankwise.train.job import read_split, render_rows


@dataclass(frozen=True)
class Rows:
    """What is trained on: real rows with their lengths, or `limit` tokens a row where none were given."""

    rows: RenderedDataset | PackedDataset | None
    pad_id: int
    sight: Sight | None
    limit: int

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.rows.lengths) if self.rows is not None else (self.limit,)

    @property
    def narrow(self) -> int:
        """Position of a row of average length, or half the limit where there are no rows."""
        average = sum(self.lengths) / len(self.lengths)
        return min(range(len(self.lengths)), key=lambda index: abs(self.lengths[index] - average))

    def batch(self, count: int, multiple_of: int, *, wide: bool) -> dict[str, Any]:
        """`count` times the longest row, or one of average length, as the model takes it."""
        if self.rows is None:
            width = self.limit if wide else max(multiple_of, self.limit // 2)
            ids = torch.ones(count, -(-width // multiple_of) * multiple_of, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        position = self.lengths.index(max(self.lengths)) if wide else self.narrow
        collated = Collator(self.pad_id, multiple_of, self.sight)([self.rows[position]] * count)
        return {name: value for name, value in collated.items() if name not in BESIDE or name == "labels"}


def rows_of(config: TrainConfig, name: str, skeleton: PreTrainedModel) -> Rows:
    """The training rows as they would be, or rows of the greatest length where none are given."""
    if not config.data.data_path:
        return Rows(None, 0, None, config.data.max_seq_length or own_length(skeleton.config))
    renderer = renderer_for(config.data, config.model, name, skeleton.config)
    _, split = read_split(config, sees_images=renderer.sight is not None)
    rows = render_rows(split.train, renderer)
    chosen = PackedDataset(rows, renderer.limit) if config.packing else rows
    return Rows(chosen, renderer.tokenizer.pad_token_id or 0, renderer.sight, renderer.limit)


# transformers renamed it within version 5.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Way:
    """One configuration: the base's quantization, and whether activations are computed again instead of kept."""

    label: str
    flags: str
    quantization: str | None
    checkpointing: bool


@dataclass(frozen=True)
class Hardware:
    """The target device and the precision. autocast: None computes in float32."""

    cards: tuple[Card, ...]
    autocast: torch.dtype | None
    frozen: torch.dtype

    @property
    def card(self) -> Card:
        return self.cards[0]

    @property
    def multiple_of(self) -> int:
        return 1 if self.card.cpu else 8


def place_of(section: EstimateSection, config: TrainConfig, arguments: TrainingArguments) -> Hardware:
    """The GPUs given by name or memory size, or this machine; and the precision there."""
    if section.gpu is None:
        kind = mixed(arguments.bf16, arguments.fp16)
        return Hardware((this_machine(arguments.device, kind),), kind, frozen_dtype(config.model.dtype, arguments))
    found = tuple(sorted(cards(section.gpu), key=lambda card: -card.half))
    given = {name: value for name in ("bf16", "fp16") if (value := config.training.get(name)) is not None}
    if config.model.dtype == "auto" and not given:
        given["bf16"] = found[0].bf16
    chosen, _ = autocast(config.model.dtype, given, on_cpu=False)
    there: Any = SimpleNamespace(use_cpu=False, **({"bf16": False, "fp16": False} | chosen))
    return Hardware(found, mixed(there.bf16, there.fp16), frozen_dtype(config.model.dtype, there))


def mixed(bf16: bool, fp16: bool) -> torch.dtype | None:
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


def ways_of(quantization: str | None, checkpointing: bool) -> list[Way]:
    """As given, and what could be added to it."""
    found = [Way("as given", "", quantization, checkpointing)]
    if not checkpointing:
        found.append(Way("+ checkpointing", "--gradient_checkpointing", quantization, True))
    if quantization is None:
        found.append(Way("+ 4-bit", "--load_in_4bit", "4bit", checkpointing))
    if quantization is None and not checkpointing:
        found.append(Way("+ both", "--gradient_checkpointing --load_in_4bit", "4bit", True))
    return found


@dataclass
class Shapes:
    """The adapted model without weights, set up for one way after another."""

    base: PreTrainedModel
    plan: RankPlan
    lora: LoraSection
    full: Collection[str]
    attention: str | None

    def __post_init__(self) -> None:
        if self.attention == "eager":
            self.base.set_attn_implementation("eager")
        self.quantized = {id(self.base.get_submodule(path)) for path in quantized_linears(self.base)}
        held = (name.rpartition(".") for name in fused_experts(self.base))
        self.experts = {(id(self.base.get_submodule(path)), name) for path, _, name in held}
        self.model = adapt(self.base, self.plan, replace(self.lora, init_lora_weights="default"), self.full)
        self.model.config.use_cache = False
        self.model.train()

    def set_up(self, way: Way, place: Hardware, arguments: TrainingArguments) -> None:
        if not place.card.cpu:
            as_on_gpu(self.model)
        compute = place.autocast or torch.float32
        wide = self.unquantized() if way.quantization else frozenset()
        empty(self.model, compute if way.quantization else place.frozen, wide)
        self.set_checkpointing(way.checkpointing, dict(getattr(arguments, CHECKPOINTING + "_kwargs") or {}))

    def set_checkpointing(self, on: bool, settings: dict[str, Any]) -> None:
        """As training does it, which passes through no frozen prefix (`train.trainer.FrozenPrefix`)."""
        if on:
            how = {name: settings.pop(name) for name in ("every_n_layers", "offload") if name in settings}
            getattr(self.model, f"{CHECKPOINTING}_enable")({"use_reentrant": False} | settings, **how)
        else:
            getattr(self.model, f"{CHECKPOINTING}_disable")()
        self.base.disable_input_require_grads()

    def unquantized(self) -> frozenset[str]:
        """Parameters that a quantized base has in float32: what is neither quantized nor fused experts."""
        return frozenset(
            f"{path}.{name}"
            for path, module in self.model.named_modules()
            if id(module) not in self.quantized
            for name, _ in module.named_parameters(recurse=False)
            if (id(module), name) not in self.experts
        )

    def fixed(self, way: Way, card: Card, optimizer: str) -> Fixed:
        seen: set[int] = set()
        weights = trained = 0.0
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                count = parameter.numel()
                small = way.quantization is not None and id(module) in self.quantized and parameter.dim() == 2
                trained += count * parameter.requires_grad
                each = QUANTIZED[way.quantization] if small and way.quantization else parameter.element_size()
                weights += 0 if parameter.requires_grad else count * each
        allowance = CPU_ALLOWANCE if card.cpu else GPU_ALLOWANCE
        if way.quantization:  # the largest quantized matrix is unpacked to 16 bits for each product
            sizes = [module.weight.numel() for module in self.model.modules() if id(module) in self.quantized]
            allowance += 2.0 * max(sizes, default=0)
        return Fixed(weights, FLOAT32 * trained, FLOAT32 * trained, state_bytes(optimizer) * trained, allowance)

    @property
    def counts(self) -> tuple[int, int]:
        """(trained, all) parameters."""
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class Traced:
    """Results of the traces of one configuration."""

    profile: Profile
    work: Work


def measure_way(
    shapes: Shapes, way: Way, place: Hardware, rows: Rows, arguments: TrainingArguments, first: Traced | None = None
) -> Traced:
    """Of one way; `first`, another one, has shown what grows with the square of the width."""
    shapes.set_up(way, place, arguments)
    settings = {
        "autocast": place.autocast,
        "accumulates": arguments.gradient_accumulation_steps > 1,
        "vocabulary": shapes.base.config.get_text_config().vocab_size,
    }
    wide = [rows.batch(count, place.multiple_of, wide=True) for count in (2, 3)]
    two, three = (trace_step(shapes.model, batch, **settings) for batch in wide)
    width = wide[0]["input_ids"].shape[1]
    profile = Profile.of(shapes.fixed(way, place.card, str(arguments.optim)), two, three)
    if first is not None:
        return Traced(profile, first.work.like(two, three, width))
    narrow = rows.batch(2, place.multiple_of, wide=False)
    less = narrow["input_ids"].shape[1]
    average = two if less == width else trace_step(shapes.model, narrow, **settings)
    return Traced(profile, Work.of(two, three, width, average, less))
