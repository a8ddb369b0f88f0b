"""Gradient norms of every site, measured at the accumulation boundary before clipping, written row by row.

    backward ──▶ values(): norms on the device ──▶ one copy to the host with loss and guard ──▶ record(): three tables

`values` queues a few kernels and never waits: one kernel for all gradients that are alike, r × r Gram matrices for
‖BA‖; the Trainer fetches its result together with the loss. Sharded parameters (FSDP2's DTensor) give the norms of the
whole, in every process; then each call is a collective one.

Whose a parameter is: layers and PEFT's own wrappers are asked what they hold; a path is parsed by `core.site` alone.

    base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight   →   model.layers.3.mlp.up_proj, part A
    base_model.model.lm_head.modules_to_save.default.weight             →   lm_head, part rest
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.core.experts import split_experts
from rankwise.core.factors import squared_norms
from rankwise.core.site import PEFT_PREFIX, describe
from rankwise.errors import UsageError
from rankwise.files.atomic import write_json
from rankwise.models.adapt import lora_layers, site_path
from rankwise.models.sites import tower_of, tower_prefixes
from rankwise.train.expert_norms import ExpertPair, expert_pairs, expert_rows, expert_values
from rankwise.train.expert_record import EXPERT_NORMS, expert_table
from rankwise.train.gradient_table import (
    COLUMNS,
    GRADIENT_SUMMARY,
    GROUP_COLUMNS,
    GROUP_OF,
    GROUPS,
    LAYERS,
    NORMS,
    PER_LAYER,
    Row,
    SiteNorm,
    StepTable,
    cells,
    group_row,
    kept,
    layer_columns,
    layer_row,
    root_sum,
    rounded,
    summary,
)
from rankwise.train.sharded import across_shards, numbers_by, sharding, whole

GRADIENT_FILES = (NORMS, GROUPS, LAYERS, GRADIENT_SUMMARY, EXPERT_NORMS)
A, B, REST = "a", "b", "rest"
WRAPPERS = (LoraLayer, AuxiliaryTrainingWrapper)
ABSENT = -1.0  # in place of the norm of a gradient that is not there: a norm is never negative, and may be NaN


class GradientNorms(TrainerCallback):
    """Measures the norms of a training run and keeps its tables.

    Args:
        output_dir: the run folder.
        every: measure at each optimizer step whose number (from 1) this divides, and write all of it. None: measure at
            every step, and write site by site what `gradient_table.kept` names (24 kB a step with 210 sites).
        phase_at: name of the phase of an optimizer step (from 1, as in the tables).

    A step that the loss scaler skips, its gradients not being finite, keeps its rows, with blank norms. Where experts
    are adapted, `expert_norms.csv` has a row for each of their parameters, at the steps of the table site by site.
    """

    def __init__(
        self, output_dir: Path, every: int | None = None, phase_at: Callable[[int], str] | None = None
    ) -> None:
        if every is not None and every < 1:
            raise UsageError(f"--log_frequency {every}: the interval in steps must be at least 1")
        self.every = every
        self.phase_at = phase_at or (lambda _: "")
        self.output_dir = output_dir
        self.model = TrainedModel()
        self.norms = StepTable(output_dir / NORMS, COLUMNS)
        self.groups = StepTable(output_dir / GROUPS, GROUP_COLUMNS)
        self.layers = StepTable(output_dir / LAYERS, ("step",))
        self.pairs: list[ExpertPair] = []
        self.experts = expert_table(output_dir)
        self.latest: Row = {}  # norms by group of the last step measured

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Find the trainable parameters, and truncate the tables to the step that training resumes from."""
        self.model = trained_model(model)
        self.layers = StepTable(self.layers.path, layer_columns(self.model.places))
        self.pairs = expert_pairs(model)
        if state.is_world_process_zero:
            for table in (self.norms, self.groups, self.layers, *([self.experts] if self.pairs else [])):
                table.cut(state.global_step)

    def wanted(self, step: int) -> bool:
        """Whether the norms of this optimizer step (from 1) are measured."""
        return self.every is None or step % self.every == 0

    def detailed(self, step: int) -> bool:
        """Whether a measured step is written site by site, and expert by expert."""
        return self.every is not None or kept(step)

    def values(self, step: int) -> Tensor:
        """Norms of all trainable parameters' gradients (ABSENT where there is none), then ‖B·A‖ of all LoRA sites, then
        where the step is detailed `expert_values`.

        A float32 tensor of one dimension on the gradients' device. With FSDP2 it is a collective call, and every
        process gets the norms of the whole gradient.
        """
        gradients = parameter_norms([one.parameter for one in self.model.parameters])
        parts = [delta_norms(self.model.pairs), *([expert_values(self.pairs)] if self.detailed(step) else [])]
        return torch.cat([gradients, *(part.to(gradients.device, non_blocking=True) for part in parts)])

    def record(self, step: int, norms: Sequence[float], loss_scale: float, max_grad_norm: float | None) -> None:
        """Append the measurement of a step to the three tables.

        Args:
            norms: the numbers of `values`.
            loss_scale: of the gradient scaler, 1 without one: gradients are written without it.
            max_grad_norm: what the Trainer clips to (None, 0: it does not).
        """
        count = len(self.model.parameters) + len(self.model.pairs)
        rows = site_norms(self.model, norms[:count], loss_scale, step, self.phase_at(step))
        if rows:
            if self.detailed(step):
                self.norms.extend(cells(row) for row in rows)
                if self.pairs:
                    self.experts.extend(expert_rows(self.pairs, norms[count:], loss_scale, step))
            self.latest = group_row(rows, max_grad_norm)
            self.groups.append(self.latest)
            self.layers.append(layer_row(rows))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_json(self.output_dir / GRADIENT_SUMMARY, summary(self.groups.read()))

    on_train_end = on_save


def site_norms(model: TrainedModel, norms: Sequence[float], loss_scale: float, step: int, phase: str) -> list[SiteNorm]:
    """The rows of one step, from the numbers of `GradientNorms.values`; places without a gradient have none."""
    gradients, deltas = norms[: len(model.parameters)], norms[len(model.parameters) :]
    parts: dict[int, dict[str, list[float]]] = {}
    counts: dict[int, int] = {}
    for one, norm in zip(model.parameters, gradients, strict=True):
        if norm != ABSENT:
            parts.setdefault(one.place, {}).setdefault(one.part, []).append(norm / loss_scale)
            counts[one.place] = counts.get(one.place, 0) + one.parameter.numel()
    delta = {pair.place: rounded(norm) for pair, norm in zip(model.pairs, deltas, strict=True)}
    finite = all(math.isfinite(norm) for norm in gradients)
    rows = []
    for number, place in enumerate(model.places):
        if number in parts:
            total, a, b, share = part_norms(parts[number], counts[number]) if finite else (None,) * 4
            at = (step, place.path, place.tower, place.kind, place.layer)
            rows.append(SiteNorm(*at, total, a, b, share, delta.get(number), phase))
    return rows


Norms = tuple[float | None, float | None, float | None, float | None]


def part_norms(parts: Mapping[str, Sequence[float]], count: int) -> Norms:
    """norm, norm_a, norm_b, norm_per_sqrt_parameter of a site, as `SiteNorm` has them."""
    norm = root_sum(value for values in parts.values() for value in values)
    a, b = (rounded(root_sum(parts[part])) if part in parts else None for part in (A, B))
    return rounded(norm), a, b, rounded(norm / math.sqrt(count))


def measure_gradient_norms(model: nn.Module, loss_scale: float = 1.0) -> dict[str, Any]:
    """Norms of the gradients that a model has at the moment; to be called after any backward.

    Returns:
        attention_norm, mlp_norm, embed_norm, lm_head_norm, total_norm (None for a group without gradients) and
        layer_data: layer → {"attention": norm, "mlp": norm} of the language model.
    """
    trained = trained_model(model)
    gradients = parameter_norms([one.parameter for one in trained.parameters]).tolist()
    deltas = [0.0] * len(trained.pairs)
    rows = site_norms(trained, [*gradients, *deltas], loss_scale, step=0, phase="")
    groups, layers = (group_row(rows, None), layer_row(rows)) if rows else ({}, {})
    by_layer: dict[int, dict[str, float]] = {}
    for column, norm in layers.items():
        first, *rest = column.split("_")
        if first == "layer" and rest[-1] in PER_LAYER:  # a tower beside the language model begins with its own name
            by_layer.setdefault(int(rest[0]), {})[rest[-1]] = norm
    return {name: groups.get(name) for name in (*GROUP_OF.values(), "total_norm")} | {"layer_data": by_layer}


@dataclass(frozen=True)
class TrainedModule:
    """A module with something to train: a site, an embedding, a norm. `kind` and `layer` as in `core.site`."""

    path: str
    tower: str
    kind: str
    layer: int | None


@dataclass(frozen=True, eq=False)
class TrainedParameter:
    """One trainable parameter: number of its place, and its part there (A or B of a LoRA pair, or the rest)."""

    place: int
    part: str
    parameter: nn.Parameter


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors of a place: A (r, n), B (m, r), and the factor of B·A; of experts A (E·r, n), B (m, r·E)."""

    place: int
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    experts: int = 1


@dataclass(frozen=True)
class TrainedModel:
    """All trainable parameters, in module order."""

    places: tuple[TrainedModule, ...] = ()
    parameters: tuple[TrainedParameter, ...] = ()
    pairs: tuple[Pair, ...] = ()


def trained_model(model: nn.Module) -> TrainedModel:
    """The trainable parameters of a model (wrapped for several processes or not, with or without adapters).

    The adapters of LoRA layers count even where they are frozen at the moment, because a phase may thaw them.
    """
    model = extract_model_from_parallel(model)
    towers = prefixes(model)
    pairs = {path: pair for path, layer in lora_layers(model).items() if (pair := factors(layer))}
    parts = {id(pair[i]): part for pair in pairs.values() for i, part in ((0, A), (1, B))}
    paths: dict[str, int] = {}
    found = []
    for owner, parameter in owners(model):
        if parameter.requires_grad or id(parameter) in parts:
            number = paths.setdefault(owner, len(paths))
            found.append(TrainedParameter(number, parts.get(id(parameter), REST), parameter))
    # norms and biases have no shape of a matrix; where they lie is all we ask
    sites = [describe(path, (1, 1), tower_of(path, towers)) for path in paths]
    return TrainedModel(
        places=tuple(TrainedModule(site.path, site.tower, site.kind, site.layer) for site in sites),
        parameters=tuple(found),
        pairs=tuple(Pair(paths[path], *pair) for path, pair in pairs.items() if path in paths),
    )


def prefixes(model: Any) -> dict[str, str]:
    """Module prefix → tower, of the base model where this one has adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tower_prefixes(base) if isinstance(base, PreTrainedModel) else {}


def parameter_towers(model: nn.Module) -> dict[int, str]:
    """id of a parameter → tower, for all parameters of a model as in `trained_model`."""
    model = extract_model_from_parallel(model)
    towers = prefixes(model)
    return {id(parameter): tower_of(path, towers) for path, parameter in owners(model)}


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(path of the module in the base model, parameter) of every parameter, shared ones once."""
    seen: set[int] = set()
    around: list[tuple[str, nn.Module]] = []  # the wrappers that a module lies in; only those of parameters are nested
    for name, module in model.named_modules():
        while around and not name.startswith(around[-1][0] + "."):
            around.pop()
        if isinstance(module, ParamWrapper) or (not around and isinstance(module, WRAPPERS)):
            around.append((name, module))
        path = (within(around[-1][0], name, around[-1][1]) if around else name).removeprefix(PEFT_PREFIX)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, parameter


def within(holder: str, name: str, wrapper: nn.Module) -> str:
    """The base model's path of a module inside a wrapper: the wrapper's own, but for what `modules_to_save` copies."""
    if isinstance(wrapper, ParamWrapper):
        return site_path(holder, wrapper)
    inner = name.removeprefix(holder).removeprefix(".").split(".")
    copied = inner[2:] if isinstance(wrapper, ModulesToSaveWrapper) and inner[0] == "modules_to_save" else []
    return ".".join([holder, *copied])


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float, int] | None:
    """(A, B, scale, experts) of a layer's active adapter; None where it has none, or where B·A is not its delta
    (AdaLoRA puts a diagonal between them)."""
    adapter = next(iter(layer.active_adapters), None)
    for first, second in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
        if adapter in first:
            a, b = (getattr(container[adapter], "weight", container[adapter]) for container in (first, second))
            experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
            plain = "lora_E" not in layer.adapter_layer_names and layer.r[adapter] * experts == a.shape[0]
            return (a, b, float(layer.scaling[adapter]), experts) if plain else None
    return None


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """‖gradient‖₂ over all parameters that have one, as a scalar tensor: nothing is copied to the host.

    With FSDP2 the norm is that of the whole gradient (a collective call, so every process must make it).
    """
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def parameter_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """‖∇‖₂ of each parameter, (P,) float32; ABSENT where there is no gradient.

    Half-precision gradients are summed in float32. Shards of one gradient (DTensor) are summed over their processes.
    """
    there = [(i, one.grad) for i, one in enumerate(parameters) if one.grad is not None]
    device = there[0][1].device if there else torch.device("cpu")
    norms = [torch.full((), ABSENT, device=device)] * len(parameters)
    for (shards, *_), numbers in numbers_by((sharding(one), one.device, one.dtype) for _, one in there).items():
        gradients = [one.to_local() if isinstance(one, DTensor) else one for one in (there[k][1] for k in numbers)]
        found = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        if shards is not None:
            found = across_shards(torch.stack(found), *shards).unbind()
        for k, norm in zip(numbers, found, strict=True):
            norms[there[k][0]] = norm.to(device, non_blocking=True)
    return torch.stack(norms) if norms else torch.zeros(0)


@torch.no_grad()
def delta_norms(pairs: Sequence[Pair]) -> Tensor:
    """‖scale·B·A‖_F of each pair, (S,) float32, without forming B·A (`core.factors.squared_norms`). Of experts the root
    of their sum of squares.

    The factors of a convolution are flattened. Exactly 0 where A or B is; else to about 1e-7·‖A‖²‖B‖² in the square.
    """
    if not pairs:
        return torch.zeros(0)
    sides = whole([side.detach().flatten(1).float() for pair in pairs for side in (pair.a, pair.b)])
    factors = [
        split_experts(a, b, pair.experts) for a, b, pair in zip(sides[::2], sides[1::2], pairs, strict=True)
    ]  # (E, r, n), (E, m, r)
    device = factors[0][0].device
    squares = [torch.zeros((), device=device)] * len(pairs)
    for (place, *_), numbers in numbers_by((a.device, a.shape, b.shape) for a, b in factors).items():
        products = one_by_one if place.type == "cpu" else stacked
        for i, square in zip(numbers, products([factors[i] for i in numbers]), strict=True):
            squares[i] = square.to(device, non_blocking=True)
    scales = torch.tensor([abs(pair.scale) for pair in pairs]).to(device, non_blocking=True)
    return scales * torch.stack(squares).clamp(min=0).sqrt()


def one_by_one(factors: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """‖BA‖² of each (A, B), matrices or stacks of them."""
    return [squared_norms(b, a).sum() for a, b in factors]


def stacked(factors: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """The same of pairs alike in shape; it spares a GPU hundreds of launches, where a CPU would only copy."""
    a, b = (torch.stack(side) for side in zip(*factors, strict=True))
    return squared_norms(b, a).reshape(len(a), -1).sum(1).unbind()
