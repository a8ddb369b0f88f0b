"""rankwise train --estimate: peak memory, time, cost and the largest batch that fits, before anything is loaded.

    skeleton + plan ─ adapt ─▶ model of shapes ─ trace a few steps ─▶ Profile, Work ─▶ one table

Four ways are compared: as given, with checkpointed activations, on a 4-bit base, and both. Not counted: validation,
loading and saving; phases and frozen prefixes (everything that is adapted is taken to train all the time).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from rankwise.config import EstimateSection, TrainConfig
from rankwise.core.plan import RankPlan
from rankwise.data import Collator, PackedDataset, RenderedDataset, Sight
from rankwise.errors import UsageError
from rankwise.nets.adapt import LoraSettings, adapt
from rankwise.nets.load import kept_whole
from rankwise.score.likelihood import BESIDE
from rankwise.show.estimate import Column, EstimatePage, page
from rankwise.store.files import write_json
from rankwise.train.arguments import autocast, frozen_dtype
from rankwise.train.cards import Card, cards, this_machine
from rankwise.train.estimate import (
    CPU_ALLOWANCE,
    GPU_ALLOWANCE,
    QUANTIZED,
    Fixed,
    Length,
    Profile,
    Speed,
    Work,
    run_length,
    run_seconds,
    widths,
)
from rankwise.train.memory import FLOAT32, state_bytes
from rankwise.train.trace import as_on_gpu, empty, traced

# transformers renamed it within version 5.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
MOST_ROWS = 4096  # the largest batch that is looked for
ALLOWED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", None)


@dataclass(frozen=True)
class Way:
    """One way to run: the base's quantization, and whether activations are computed again instead of kept."""

    label: str
    flags: str
    quantization: str | None
    checkpointing: bool


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


@dataclass(frozen=True)
class Place:
    """Where it would run, and in which precision. autocast: None computes in float32."""

    cards: tuple[Card, ...]
    autocast: torch.dtype | None
    frozen: torch.dtype

    @property
    def card(self) -> Card:
        return self.cards[0]

    @property
    def multiple_of(self) -> int:
        return 1 if self.card.cpu else 8


def check_estimate(section: EstimateSection, config: TrainConfig) -> None:
    """UsageError for options that say nothing without --estimate, and for runs that it does not know."""
    if not section.estimate:
        given = [name for name, value in vars(section).items() if value not in (None, False)]
        if given:
            raise UsageError(f"--{given[0]} belongs to --estimate: add it, or leave --{given[0]} out")
        return
    if section.gpu is not None:
        cards(section.gpu)
    if section.usd_per_hour is not None and section.usd_per_hour < 0:
        raise UsageError(f"--usd_per_hour must be at least 0, got {section.usd_per_hour}")
    if section.utilisation is not None and not 0 < section.utilisation <= 1:
        raise UsageError(f"--utilisation is a share above 0 and up to 1, got {section.utilisation}")
    if config.training.get("deepspeed") or config.training.get("fsdp"):
        raise UsageError("--estimate is for one GPU that holds the whole model: leave --deepspeed and --fsdp out")
    if config.depth.use_depth:
        raise UsageError("--estimate does not know --use_depth: leave it out; the depth gate adds next to nothing")
    if config.model.attn_implementation not in ALLOWED:
        raise UsageError(f"--estimate knows sdpa, flash and eager attention, not {config.model.attn_implementation}")


def place_of(section: EstimateSection, config: TrainConfig, arguments: TrainingArguments) -> Place:
    """The card that was named, all of the size that was named, or this machine; and the precision there."""
    if section.gpu is None:
        kind = mixed(arguments.bf16, arguments.fp16)
        return Place((this_machine(arguments.device, kind),), kind, frozen_dtype(config.model.dtype, arguments))
    found = tuple(sorted(cards(section.gpu), key=lambda card: -card.half))
    given = {name: value for name in ("bf16", "fp16") if (value := config.training.get(name)) is not None}
    if config.model.dtype == "auto" and not given:
        given["bf16"] = found[0].bf16
    chosen, _ = autocast(config.model.dtype, given, on_cpu=False)
    there: Any = SimpleNamespace(use_cpu=False, **({"bf16": False, "fp16": False} | chosen))
    return Place(found, mixed(there.bf16, there.fp16), frozen_dtype(config.model.dtype, there))


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
    settings: LoraSettings
    attention: str | None

    def __post_init__(self) -> None:
        if self.attention == "eager":
            self.base.set_attn_implementation("eager")
        skip = kept_whole(self.base) or get_keys_to_not_convert(self.base)
        linear = {name: module for name, module in self.base.named_modules() if isinstance(module, nn.Linear)}
        self.quantized = {id(module) for name, module in linear.items() if should_convert_module(name, skip)}
        self.model = adapt(self.base, self.plan, replace(self.settings, init="default"))
        self.model.config.use_cache = False
        self.model.train()

    def set_up(self, way: Way, place: Place, arguments: TrainingArguments) -> None:
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
        """Parameters that a quantized base has in float32."""
        return frozenset(
            f"{path}.{name}"
            for path, module in self.model.named_modules()
            if id(module) not in self.quantized
            for name, _ in module.named_parameters(recurse=False)
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
        if way.quantization:
            allowance += self.unpacked()
        return Fixed(weights, FLOAT32 * trained, FLOAT32 * trained, state_bytes(optimizer) * trained, allowance)

    def unpacked(self) -> float:
        """The largest quantized matrix, which is unpacked to 16 bits for each product."""
        counts = [m.weight.numel() for m in self.model.modules() if id(m) in self.quantized]
        return 2.0 * max(counts, default=0)

    @property
    def counts(self) -> tuple[int, int]:
        """(trained, all) parameters."""
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class Measured:
    """What the traces of one way say."""

    profile: Profile
    work: Work


def measured(
    shapes: Shapes, way: Way, place: Place, rows: Rows, arguments: TrainingArguments, first: Measured | None = None
) -> Measured:
    """Of one way; `first`, another one, has shown what grows with the square of the width."""
    shapes.set_up(way, place, arguments)
    settings = {
        "autocast": place.autocast,
        "accumulates": arguments.gradient_accumulation_steps > 1,
        "vocabulary": shapes.base.config.get_text_config().vocab_size,
    }
    wide = [rows.batch(count, place.multiple_of, wide=True) for count in (2, 3)]
    two, three = (traced(shapes.model, batch, **settings) for batch in wide)
    width = wide[0]["input_ids"].shape[1]
    profile = Profile.of(shapes.fixed(way, place.card, str(arguments.optim)), two, three)
    if first is not None:
        return Measured(profile, first.work.like(two, three, width))
    narrow = rows.batch(2, place.multiple_of, wide=False)
    less = narrow["input_ids"].shape[1]
    average = two if less == width else traced(shapes.model, narrow, **settings)
    return Measured(profile, Work.of(two, three, width, average, less))


def column(way: Way, found: Measured, place: Place, rows: Rows, config: TrainConfig, arguments: Any) -> Column:
    """One column of the table: the batch as given where it fits, else the largest that does."""
    asked, most = arguments.per_device_train_batch_size, MOST_ROWS
    if rows.rows is not None:
        most = max(asked, min(most, len(rows.lengths)))
    largest = found.profile.largest(place.card.memory, most)
    batch = min(asked, largest) or asked
    length, seconds = duration_of(found.work, batch, place, rows, config, arguments, found.profile.fixed.trained)
    return Column(
        way.label,
        way.flags,
        found.profile.needs(asked),
        largest,
        most,
        batch,
        None if length is None else length.updates,
        seconds if largest else (),
        tuple(value / 3600 * config.estimate.usd_per_hour for value in seconds if largest)
        if config.estimate.usd_per_hour is not None
        else (),
    )


def duration_of(
    work: Work, batch: int, place: Place, rows: Rows, config: TrainConfig, arguments: Any, trained: float
) -> tuple[Length | None, tuple[float, ...]]:
    """Steps, and seconds on the fastest and the slowest card; none where how much there is to do is not known."""
    if rows.rows is None and arguments.max_steps <= 0:
        return None, ()
    count = len(rows.lengths) if rows.rows is not None else batch * arguments.gradient_accumulation_steps
    length = run_length(count, batch, arguments)
    epoch = widths(rows.lengths, batch, arguments, place.multiple_of) if rows.rows is not None else [rows.limit]
    speeds = [Speed.of(card, place.autocast, config.estimate.utilisation) for card in place.cards if card.bandwidth]
    times = sorted(
        run_seconds(work, speed, length, batch, epoch, count if rows.rows is not None else batch, round(trained / 4))
        for speed in speeds
    )
    return length, tuple(dict.fromkeys((times[0], times[-1]))) if times else ()


def estimate(
    config: TrainConfig,
    name: str,
    arguments: TrainingArguments,
    base: PreTrainedModel,
    plan: RankPlan,
    settings: LoraSettings,
    quantization: str | None,
    rows: Rows,
) -> EstimatePage:
    """Everything that is printed; `base` is on the meta device and becomes part of the adapted model."""
    place = place_of(config.estimate, config, arguments)
    shapes = Shapes(base, plan, settings, config.model.attn_implementation)
    checkpointing = bool(getattr(arguments, CHECKPOINTING))
    ways = ways_of(quantization, checkpointing)
    first = measured(shapes, ways[0], place, rows, arguments)
    others = [measured(shapes, way, place, rows, arguments, first) for way in ways[1:]]
    columns = [
        column(way, found, place, rows, config, arguments) for way, found in zip(ways, [first, *others], strict=True)
    ]
    trained, total = shapes.counts
    return EstimatePage(
        model=name,
        what=described(plan.ranks, settings.full),
        trained=trained,
        total=total,
        card=place.card.name if len(place.cards) == 1 else str(config.estimate.gpu),
        memory=place.card.memory,
        likely=tuple(card.name for card in place.cards) if config.estimate.gpu and len(place.cards) > 1 else (),
        precision=str(place.autocast or torch.float32).removeprefix("torch."),
        frozen=str(place.frozen).removeprefix("torch."),
        rows=len(rows.lengths) if rows.rows is not None else None,
        longest=max(rows.lengths),
        average=sum(rows.lengths) / len(rows.lengths),
        sees=rows.sight is not None,
        blind=rows.sight is None and hasattr(base.config, "vision_config"),
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        epochs=None if arguments.max_steps > 0 else arguments.num_train_epochs,
        measured=place.card.measured,
        columns=tuple(columns),
    )


def described(ranks: Mapping[str, int], full: Iterable[str]) -> str:
    values = sorted(ranks.values())
    span = f"{values[0]}" if values and values[0] == values[-1] else f"{values[0]} to {values[-1]}" if values else ""
    lora = f"LoRA of rank {span} at {len(values)} sites" if values else "no adapter"
    whole = ", ".join(full)
    return lora + (f", {whole} in full" if whole else "")


def show(found: EstimatePage, section: EstimateSection) -> None:
    print(page(found))
    if section.estimate_out:
        write_json(Path(section.estimate_out), found.record())
