"""The sites of a model, and where each one's weight lies in a checkpoint.

A site is named by its module path in the loaded model. Files use other names (Qwen2.5-VL saves `model.layers.0…`
for the module `model.language_model.layers.0…`), so the table from path to key comes from transformers' own
conversion map: a plan made from raw keys would match nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Split,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from rankwise.core.site import ROUTER, Site, describe, is_expert
from rankwise.errors import UsageError
from rankwise.files.checkpoint import Weight
from rankwise.models.expert_files import Converted, ExpertFiles, converted_experts, stored_experts

DEPTH_MODULES = frozenset(["depth_model", "depth_preproc"])


@dataclass(frozen=True)
class WeightTable:
    """Module parameter → place in the files, and the parameters whose files transformers rewrites on loading
    (fused experts and the like), which no view of one file can give. experts: of the parameters (E, a, b), however they
    are stored, the files of each expert."""

    weights: dict[str, Weight]
    rewritten: tuple[str, ...]
    experts: dict[str, ExpertFiles] = field(default_factory=dict)


def model_sites(model: PreTrainedModel, routers: bool = False) -> dict[str, Site]:
    """Path → site of every linear weight and every parameter of experts that LoRA can target, in module order; the
    output head is not one. `routers`: what chooses the experts, too.

    Experts that stand below one another in one matrix (DBRX) are no sites: `flat_experts`.
    """
    towers = tower_prefixes(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    listed, routing, unread = names_paths(model), router_paths(model), past_modules(model)
    sites = {}
    for path, module in model.named_modules():
        tower = tower_of(path, towers)
        if path in routing:
            if routers and (shape := router_shape(module)) is not None:
                sites[path] = describe(path, shape, tower, peft="parameter", kind=ROUTER)
            continue
        shape = None if path in unread else linear_shape(module)
        if shape is not None and module is not head:
            peft = ("parameter" if path.rpartition(".")[2] in EXPERT_NAMES else "path") if listed else "pattern"
            site = describe(path, shape, tower, isinstance(module, Conv1D), peft=peft)
            if site.kind != "head":
                sites[path] = site
        sites |= {site.path: site for site in expert_sites(path, module, tower)}
    return sites


# PEFT takes these names of a module, in models of the conversions below, for the experts themselves.
EXPERT_NAMES = frozenset(["gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"])
RENAMED = frozenset(["mixtral", "qwen2_moe"])


def names_paths(model: PreTrainedModel) -> bool:
    """Whether PEFT's config has to name the model's matrices one by one: with a regex PEFT finds experts' names in it,
    in models with experts and in those of a family that has them."""
    family = model.config.model_type
    return {family, _MODEL_TO_CONVERSION_PATTERN.get(family)} & RENAMED != set() or bool(fused_experts(model))


HOLDS_EXPERTS = re.compile(r"Experts$")  # classes: MixtralExperts, JetMoeParallelExperts, InklingSharedExperts
ROUTES = re.compile(r"Router|TopKGating")
ROUTER_NAMES = frozenset(["gate", "router", "shared_expert_gate"])
MATRICES = (nn.Linear, nn.Embedding, Conv1D, _ConvNd)  # modules with one matrix, whatever its dimensions


def expert_parameters(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters that hold the matrices of several experts, (E, …) with E ≥ 2."""
    if not (HOLDS_EXPERTS.search(type(module).__name__) or is_expert(path)) or isinstance(module, MATRICES):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: one for name, one in own if one.dim() == 3 and one.shape[0] > 1}


def expert_sites(path: str, module: nn.Module, tower: str = "language") -> list[Site]:
    """The sites of the experts in a module's own parameters; shape: (out, in) of one expert."""
    swapped = stored_in_out(module)
    transposed = swapped or bool(getattr(module, "is_transposed", False))
    return [
        describe(
            f"{path}.{name}",
            tuple(one.shape[:0:-1] if transposed else one.shape[1:]),
            tower,
            transposed,
            experts=one.shape[0],
            peft="parameter",
            swapped=swapped,
            order=order,
        )
        for order, (name, one) in enumerate(expert_parameters(path, module).items())
    ]


def stored_in_out(module: nn.Module) -> bool:
    """Whether experts are stored (E, in, out) in a module that does not say so with `is_transposed`, as Llama 4's are.

    The first parameter reads the stream (width H) into (gate and up of) the inner width, the last writes it: stored so
    they are (E, H, 2I) and (E, I, H), else (E, 2I, H) and (E, H, I).
    """
    if hasattr(module, "is_transposed"):
        return False
    stacks = list(expert_parameters("", module).values())
    if len(stacks) < 2:
        return False
    first, last = stacks[0].shape, stacks[-1].shape
    return first[1] == last[2] and first[2] != last[1]


STATE_SPACE = re.compile(r"Mamba\w*Mixer$")
NO_OUT_PROJ = frozenset(["falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"])  # refused by PEFT, by type


def past_modules(model: PreTrainedModel) -> frozenset[str]:
    """Linear modules whose weight a state-space mixer reads past the module, and so past any adapter: the step width's
    (`dt_proj`); by its fused kernels `out_proj`, where PEFT refuses it."""
    refused = model.config.model_type in NO_OUT_PROJ
    mixers = [path for path, module in model.named_modules() if STATE_SPACE.search(type(module).__name__)]
    outs = [path for path, _ in model.named_modules() if refused and path.rpartition(".")[2] == "out_proj"]
    return frozenset([*(f"{path}.dt_proj" for path in mixers), *outs])


def router_paths(model: nn.Module) -> frozenset[str]:
    """Paths of what chooses the experts: routers of any class with all that is in them, and a shared expert's gate."""
    modules = dict(model.named_modules())
    holders = {path for path, module in modules.items() if HOLDS_EXPERTS.search(type(module).__name__)}
    blocks = {path.rpartition(".")[0] for path in holders}
    tops = [
        path
        for path, module in modules.items()
        if ROUTES.search(type(module).__name__)
        or (path.rpartition(".")[2] in ROUTER_NAMES and path.rpartition(".")[0] in blocks)
    ]
    return frozenset(path for path in modules if any(path == top or path.startswith(f"{top}.") for top in tops))


def router_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a router's own matrix; None for what is no matrix."""
    weight = getattr(module, "weight", None)
    return (weight.shape[0], weight.shape[1]) if isinstance(weight, nn.Parameter) and weight.dim() == 2 else None


def flat_experts(model: nn.Module) -> list[str]:
    """Parameters that hold all experts of a layer below one another in one matrix (DBRX): PEFT has no pair for each."""
    routing = router_paths(model)
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if is_expert(path) and not isinstance(module, MATRICES) and path not in routing
        for name, one in module.named_parameters(recurse=False)
        if one.dim() == 2 and not name.endswith("bias")
    ]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module of any of the kinds PEFT adapts; None for everything else."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # inside nn.MultiheadAttention, which reads the weight past any adapter
    if isinstance(module, nn.Linear):  # bitsandbytes' quantized ones are too
        return module.out_features, module.in_features
    return None


def tower_prefixes(model: PreTrainedModel) -> dict[str, str]:
    """Module prefix → tower, by which part of the config each sub-model was built from. Empty: one tower, language.

    A model class that declares `towers` (prefix → tower) knows better.
    """
    declared = getattr(model, "towers", None)
    if isinstance(declared, Mapping):
        return dict(declared)
    parts = {
        type(part): "language" if name == "text_config" else "vision"
        for name in model.config.sub_configs
        if (name == "text_config" or "vision" in name)
        and (part := getattr(model.config, name, None)) is not None
        and part is not model.config
    }
    if "vision" not in parts.values():
        return {}
    return {
        path: parts[type(module.config)]
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) in parts
    }


def tower_of(path: str, towers: Mapping[str, str]) -> str:
    """The tower of a module path: that of the longest prefix. What stands between the towers, a vision tower's own
    merger included, projects; what a depth encoder has added to the model is the depth tower."""
    parts = path.split(".")
    if not DEPTH_MODULES.isdisjoint(parts):
        return "depth"
    if not towers:
        return "language"
    owners = [prefix for prefix in towers if path == prefix or path.startswith(prefix + ".")]
    owner = max(owners, key=len, default=None)
    if owner is None:
        return "language" if path == "lm_head" else "projector"
    inside = path.removeprefix(owner).split(".")
    return "projector" if towers[owner] == "vision" and any("merger" in part for part in inside) else towers[owner]


def fused_experts(model: nn.Module) -> list[str]:
    """The parameters that hold a layer's experts, by name."""
    return [f"{path}.{name}" for path, module in model.named_modules() for name in expert_parameters(path, module)]


def weight_table(model: PreTrainedModel, keys: list[str]) -> WeightTable:
    """Where each parameter of the (meta) model lies among a checkpoint's keys, by transformers' own rules."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    state = dict(model.state_dict(keep_vars=True))
    weights: dict[str, Weight] = {}
    rewritten: list[str] = []
    converted: list[Converted] = []
    for key in sorted(keys, key=dot_natural_key):
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if source is None:
            weights[name] = Weight(key)
            continue
        converter = next(item for item in converters if source in item.source_patterns)
        parts = blocks(converter, name)
        if parts is None:
            rewritten.append(name)
            converted.append(Converted(key, apply_renamings(key, renamings), source, name, converter))
        sizes = tuple(state[part].shape[0] for part in parts or [] if part in state)
        sizes = sizes if len(set(sizes)) > 1 and len(sizes) == len(parts or []) else ()
        for index, part in enumerate(parts or []):
            weights[part] = Weight(key, (index, len(parts or [])), sizes)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    plain = {name: weight.key for name, weight in weights.items() if weight.part == (0, 1)}
    experts = [*stored_experts(plain, shapes), *converted_experts(converted, shapes)]
    return WeightTable(weights, tuple(dict.fromkeys(rewritten)), {files.parameter: files for files in experts})


def blocks(converter: WeightConverter, first: str) -> list[str] | None:
    """The targets of a converter that only splits one tensor into row blocks; None for any other."""
    operations = converter.operations
    if len(operations) != 1 or type(operations[0]) not in (Chunk, Split) or operations[0].dim != 0:
        return None
    lead = converter.target_patterns[0]
    return [first.replace(lead, target) for target in converter.target_patterns]


# PEFT calls what it wraps, and these have no forward; inside a sub-model transformers looks for modules by class.
NOT_WRAPPED = (PreTrainedModel, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class FullModules:
    """Modules that make up towers, as few as can be, each wholly of one of them; and parameters in none of them."""

    paths: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()


def tower_parameters(model: PreTrainedModel, towers: Collection[str]) -> dict[str, nn.Parameter]:
    """Every parameter of these towers (embeddings, norms and biases included), by name."""
    prefixes = tower_prefixes(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if tower_of(name.rpartition(".")[0], prefixes) in towers
    }


def towers_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The towers that a model has, in module order."""
    prefixes = tower_prefixes(model)
    return tuple(dict.fromkeys(tower_of(name.rpartition(".")[0], prefixes) for name, _ in model.named_parameters()))


def check_towers(model: PreTrainedModel, towers: Collection[str]) -> None:
    """UsageError for a tower that the model does not have."""
    there = towers_of(model)
    for tower in towers:
        if tower not in there:
            raise UsageError(f"{type(model).__name__} has no {tower} tower; it has: {', '.join(there)}")


def full_modules(model: PreTrainedModel, towers: Collection[str]) -> FullModules:
    """What PEFT's `modules_to_save` has to name for these towers to train in full."""
    names = {tower: tuple(tower_parameters(model, [tower])) for tower in towers}
    found = [path for wanted in names.values() for path in cover(model, "", frozenset(wanted))]
    inside = tuple(f"{path}." for path in found)
    loose = (name for wanted in names.values() for name in wanted if not name.startswith(inside))
    return FullModules(tuple(found), tuple(loose))


def cover(
    module: nn.Module, path: str, wanted: Collection[str], never: tuple[type[nn.Module], ...] = NOT_WRAPPED
) -> Iterator[str]:
    """Paths of the outermost modules that hold wanted parameters only, those of the types `never` left out."""
    names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
    if not any(name in wanted for name in names):
        return
    if all(name in wanted for name in names) and not isinstance(module, never):
        yield path
        return
    for name, child in module.named_children():
        yield from cover(child, f"{path}.{name}".lstrip("."), wanted, never)


def full_sites(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, Site]:
    """The modules with parameters of their own below these paths: what a schedule of phases can freeze and thaw.

    Their shape is that of a matrix only where they are one; a norm or a convolution counts as (1, 1).
    """
    prefixes = tower_prefixes(model)
    found = {}
    for path in paths:
        for name, module in model.get_submodule(path).named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                place = f"{path}.{name}".rstrip(".")
                found[place] = describe(place, linear_shape(module) or (1, 1), tower_of(place, prefixes))
    return found


def outside_language(model: PreTrainedModel) -> list[str]:
    """The outermost modules that hold nothing of the language tower: a quantized base keeps them as they are."""
    others = [tower for tower in towers_of(model) if tower != "language"]
    return list(cover(model, "", set(tower_parameters(model, others)), ()))
