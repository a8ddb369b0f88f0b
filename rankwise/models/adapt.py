"""From a rank plan to a PEFT model whose every shape is the plan's: LoRA, and AdaLoRA's B·Λ·A.

    model = adapt(load_model(name, dtype), plan, LoraSection())

What PEFT built is compared with what was planned, site by site: it matches names by their ends.

    model = adapt_allocated(base, start, LoraSection(), allocation)      every site at the starting rank
    … train.adalora masks channels while it trains …
    pairs = plain_pairs(model, kept)                                     Λ within B, masked channels gone: plain LoRA

AdaLoRA (Zhang et al. 2023): of all rank channels of all sites training keeps the best. Λ is `lora_E`: one number per
rank channel, 0 at the start.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.experts import ExpertPlace, expert_places, split_experts
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.rank_budget import RankBudget
from rankwise.core.site import PEFT_PREFIX, Site
from rankwise.errors import UsageError, VerificationError
from rankwise.files.adapter import LoraPair
from rankwise.models.sites import expert_sites, fused_experts
from rankwise.models.targets import plan_fields
from rankwise.options.sections import LoraSection

ADAPTER = "default"
KEPT_AS_LOADED = ("gptq", "aqlm", "eetq", "torchao", "hqq")  # quantizations whose other weights PEFT does not widen
MOVES_BASE = ("pissa", "olora")
UNMATCHED = "The following (rank|alpha)_pattern keys did not match"  # PEFT's warning
SUFFIX = f".lora_E.{ADAPTER}"  # PEFT's rank pattern names a site by its Λ
SHARED_FIELDS = ("lora_alpha", "target_modules", "fan_in_fan_out", "lora_dropout", "modules_to_save", "task_type")


@dataclass(frozen=True)
class Allocation:
    """Starting rank, final rank and schedule of rank allocation.

    start, target: rank of every site at the beginning, and the mean over the sites at the end. budget: of all sites
    together, after each optimizer step. orthogonality: weight of PEFT's term that keeps A and B near orthonormal.
    """

    start: int
    target: int
    budget: RankBudget
    orthogonality: float = 0.5


def adapt(model: PreTrainedModel, plan: RankPlan, lora: LoraSection, full: Collection[str] = ()) -> PeftModel:
    """The model with LoRA pairs at the plan's sites and copies of the `full` modules, float32; the rest is frozen.

    Ranks, alpha and rsLoRA are the plan's. full: paths of modules of which a copy trains in full beside the adapter,
    and is saved with it. Random initial values come from torch's global generator: seed it before. Raises UsageError
    for initialisations that do not go with the plan or the model, VerificationError where PEFT built other shapes than
    planned, or copied other modules (it takes every module whose path ends like a given one).
    """
    check_init(model, plan, lora)
    adapted = wrap(model, lora_config(plan, lora, full), full)
    check_built(adapted, plan)
    return adapted


def adapt_allocated(
    model: Any, plan: RankPlan, lora: LoraSection, allocation: Allocation, full: Collection[str] = ()
) -> PeftModel:
    """The model with B·Λ·A at the plan's sites, all of them at the starting rank, which is the plan's.

    Random initial values come from torch's global generator. VerificationError where PEFT built other shapes.
    """
    adapted = wrap(model, adalora_config(lora_config(plan, lora, full), allocation), full)
    check_built(adapted, plan)
    return adapted


def lora_config(plan: RankPlan, lora: LoraSection, full: Collection[str] = ()) -> LoraConfig:
    """PEFT's config for the plan. Where nothing is said of dropout, it has what PEFT can: none for parameters."""
    check_savable(lora)
    fields = plan_fields(plan)
    return LoraConfig(
        **fields,
        lora_dropout=0.0 if lora.lora_dropout is None and fields["target_parameters"] else lora.dropout,
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init_lora_weights in ("default", "eva") else lora.init_lora_weights,
        modules_to_save=list(full) or None,
        task_type="CAUSAL_LM",
    )


def adalora_config(lora: LoraConfig, allocation: Allocation) -> AdaLoraConfig:
    """PEFT's config. Its alpha belongs to the starting rank, so that the scale of B·Λ·A is the plan's."""
    budget = allocation.budget
    return AdaLoraConfig(
        **{name: getattr(lora, name) for name in SHARED_FIELDS},
        init_r=allocation.start,
        target_r=allocation.target,
        tinit=budget.init_warmup,
        tfinal=budget.final_warmup,
        deltaT=budget.mask_interval,
        total_step=budget.total_steps,
        orth_reg_weight=0.0,  # `regularised` sets it for a training step; a validation loss is the task's alone
    )


def wrap(model: PreTrainedModel, config: PeftConfig, full: Iterable[str] = ()) -> PeftModel:
    """The model in PEFT's wrapping, a quantized one made ready to train; copies of the `full` modules are float32."""
    if getattr(model, "quantization_method", None):
        prepare_quantized(model)
        keep_trainable_layout(model)
    with quiet_peft():
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    check_copied(adapted, full)
    for module in full_copies(adapted).values():
        module.float()
    return adapted


def prepare_quantized(model: PreTrainedModel) -> None:
    """Freeze a quantized model, with all that is not quantized in float32, as PEFT's `prepare_model_for_kbit_training`
    has it, but for fused experts: they are most of such a model, and twice their size is no quantized base."""
    method = str(getattr(model.quantization_method, "value", model.quantization_method))
    kept = set(fused_experts(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        half = parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit"
        if half and name not in kept and method not in KEPT_AS_LOADED:
            parameter.data = parameter.data.float()


def keep_trainable_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, as it does at the first evaluation on a CPU with
    AVX512-BF16: what is packed has no gradient, and training would silently go on wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_savable(lora: LoraSection) -> None:
    """Refuse initialisations after which no plain adapter can be saved."""
    init = lora.init_lora_weights
    if init == "loftq":
        raise UsageError(
            "--init_lora_weights loftq replaces the base by a quantized one that the adapter then depends on: that "
            "cannot be saved as plain LoRA; train on a quantized base with --load_in_4bit instead"
        )
    if init in MOVES_BASE and (lora.use_dora or lora.lora_bias != "none"):
        raise UsageError(
            f"--init_lora_weights {init} changes the base; with --use_dora or --lora_bias it cannot be saved as one "
            "plain adapter"
        )


def check_init(model: PreTrainedModel, plan: RankPlan, lora: LoraSection) -> None:
    init = lora.init_lora_weights
    if init in MOVES_BASE and getattr(model, "quantization_method", None):
        raise UsageError(f"--init_lora_weights {init} changes base weights, and this base is quantized; leave it out")
    odd = [path for path, rank in plan.ranks.items() if rank % 2]
    if init == "orthogonal" and odd:
        raise UsageError(f"--init_lora_weights orthogonal needs even ranks; {odd[0]} has {plan.ranks[odd[0]]}")


def check_copied(model: PeftModel, full: Iterable[str]) -> None:
    """Check that exactly these modules are trained in full."""
    copied, wanted = set(full_copies(model)), set(full)
    if copied != wanted:
        raise VerificationError(
            f"modules to train in full: {', '.join(sorted(wanted)) or 'nothing'}; PEFT copied "
            f"{', '.join(sorted(copied)) or 'nothing'}"
        )


def check_built(model: PeftModel, plan: RankPlan) -> None:
    """Check that exactly the planned sites are adapted, each with A (r, n) and B (m, r), one per expert."""
    built = built_shapes(model)
    wanted = {}
    for path, site in plan.adapted.items():
        m, n, rank, experts = *site.shape, plan.ranks[path], (site.experts,) if site.experts else ()
        wanted[path] = ((*experts, rank, n), (*experts, m, rank))
    wrong = [path for path in {**wanted, **built} if built.get(path) != wanted.get(path)]
    if wrong:
        shown = "; ".join(f"{path}: planned {wanted.get(path)}, built {built.get(path)}" for path in wrong[:3])
        raise VerificationError(f"PEFT built {len(wrong)} sites otherwise than planned: {shown}")


def built_shapes(model: PeftModel) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Path → shapes of (A, B) as PEFT made them."""
    return {
        path: (tuple(a.shape), tuple(b.shape))
        for path, layer in lora_layers(model).items()
        for a, b in [factor_weights(path, layer)]
    }


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that PEFT causes in transformers ≥ 5.20 by asking for an attribute's old name, and without
    the one for patterns of parameters, which it looks for among modules (`check_built` compares the ranks)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings(
            "ignore", message="The following .*_pattern keys did not match", category=RuntimeWarning
        )
        yield


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Path of the site (in the base model) → adapted layer, in module order. The wrappers of several parameters of one
    module are nested; each is its own site's layer."""
    found = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return {site_path(name, layer): layer for name, layer in found.items()}


def site_path(name: str, layer: LoraLayer) -> str:
    """The site of an adapted layer of this name: the module, or the parameter of experts that a wrapper adapts."""
    if not isinstance(layer, ParamWrapper):
        return name
    module = name.removesuffix(".base_layer" * (name.count(".base_layer")))
    return module if layer.num_experts == 1 else f"{module}.{layer.parameter_name}"


def layer_site(path: str, layer: LoraLayer) -> Site | None:
    """The site of a layer that adapts experts; None for every other layer."""
    if not isinstance(layer, ParamWrapper) or layer.num_experts == 1:
        return None
    base = layer.get_base_layer()
    return next(site for site in expert_sites(path.rpartition(".")[0], base) if site.path == path)


def model_places(model: PeftModel) -> dict[str, ExpertPlace]:
    """Key in the saved adapter → what the pair under it adapts, of all experts."""
    sites = {path: layer_site(path, layer) for path, layer in lora_layers(model).items()}
    return expert_places({path: site for path, site in sites.items() if site})


def adalora_layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    """Path (in the base model) → layer."""
    return {path: layer for path, layer in lora_layers(model).items() if isinstance(layer, AdaLoraLayer)}


def factor_weights(path: str, layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r) of an adapted layer, of experts (E, r, n) and (E, m, r): views of what trains. An
    embedding's lie under other names, AdaLoRA's are no modules."""
    if ADAPTER in layer.lora_embedding_A:
        return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if isinstance(a, Tensor):
        return a, b
    site = layer_site(path, layer)
    return split_experts(a.weight, b.weight, site.experts, site.swapped) if site else (a.weight, b.weight)


def lora_pairs(model: PeftModel) -> dict[str, LoraPair]:
    """Path → a copy of the pair (float32, on the CPU) with its scale."""
    pairs = {}
    for path, layer in lora_layers(model).items():
        a, b = (half.detach().float().cpu().clone() for half in factor_weights(path, layer))
        site = layer_site(path, layer)
        pairs[path] = LoraPair(
            a,
            b,
            float(layer.scaling[ADAPTER]),
            bool(layer.fan_in_fan_out),
            peft=named_by(model, layer),
            swapped=bool(site and site.swapped),
            order=site.order if site else 0,
        )
    return pairs


def named_by(model: PeftModel, layer: LoraLayer) -> str:
    """How PEFT's config names a layer's site (`core.site.PEFT_NAMES`)."""
    if isinstance(layer, ParamWrapper):
        return "parameter"
    return "pattern" if isinstance(model.peft_config[ADAPTER].target_modules, str) else "path"


def site_parameters(model: PeftModel) -> dict[str, list[nn.Parameter]]:
    """Path → what trains at that site: A, B, DoRA's magnitudes, a bias that trains with them; of a wrapper that holds
    another one its own pair alone."""
    return {
        path: [parameter for parameter in own_parameters(layer) if parameter.requires_grad]
        for path, layer in lora_layers(model).items()
    }


def own_parameters(layer: LoraLayer) -> Iterable[nn.Parameter]:
    if isinstance(layer, ParamWrapper):
        return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return list(layer.parameters())


def full_copies(model: PeftModel) -> dict[str, nn.Module]:
    """Path (in the base model) → the copy that trains, of every module that is trained in full."""
    return {
        name.removeprefix(PEFT_PREFIX): module.modules_to_save[ADAPTER]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def full_parameters(model: PeftModel) -> dict[str, list[nn.Parameter]]:
    """Path → parameters of its own, of every module inside the copies: the places of `towers.full_sites`."""
    return {
        f"{path}.{name}".rstrip("."): own
        for path, copy in full_copies(model).items()
        for name, module in copy.named_modules()
        if (own := list(module.parameters(recurse=False)))
    }


def trainable_parameters(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit ones counted as what they hold."""
    if not isinstance(model, PeftModel):
        return int(model.num_parameters(only_trainable=True)), int(model.num_parameters())
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)


def print_trainable_parameters(model: PeftModel) -> None:
    """One line: trainable parameters, all parameters, and the share."""
    trainable, total = trainable_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


@contextmanager
def regularize(model: PeftModel, weight: float) -> Iterator[None]:
    """Within it, the model's own loss holds the orthogonality term with this weight; outside with none."""
    config = model.peft_config[ADAPTER]
    config.orth_reg_weight = weight
    try:
        yield
    finally:
        config.orth_reg_weight = 0.0


def site_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj.lora_E.default` → the site's path."""
    return name.removesuffix(SUFFIX)


def plain_pairs(model: PeftModel, kept: Mapping[str, Tensor], scale: float) -> dict[str, LoraPair]:
    """Path → pair whose scale·B·A is the trained site's delta: Λ within B, channels that are not kept left out.

    kept: path → mask (r,) of the channels that act. Sites that keep none have no pair. PEFT divides by the starting
    rank + 1e-5; that goes into B as well. VerificationError where a channel outside the mask still acts.
    """
    pairs = {}
    for path, layer in adalora_layers(model).items():
        mask = kept[path].cpu()
        a, e, b = (part[ADAPTER].detach().float().cpu() for part in (layer.lora_A, layer.lora_E, layer.lora_B))
        if bool(e[~mask].any()):
            raise VerificationError(f"{path}: a masked rank channel is not zero, so removing it would change the model")
        if bool(mask.any()):
            own = float(layer.scaling[ADAPTER]) / (float(layer.ranknum[ADAPTER]) + 1e-5)
            transposed = getattr(layer, "fan_in_fan_out", False)  # layers on quantized bases do not have it
            b = b[:, mask] * (e[mask, 0] * (own / scale))
            pairs[path] = LoraPair(a[mask], b, scale, bool(transposed), peft=named_by(model, layer))
    return pairs


def allocated_plan(start: RankPlan, kept: Mapping[str, Tensor]) -> RankPlan:
    """The ranks that came out, sites without one included, at the scale of the plan that training started from."""
    rows = tuple(PlannedSite(row.site, int(kept[row.site.path].sum()), method="adalora") for row in start.sites)
    return replace(start, sites=rows, description="ranks that AdaLoRA allocated while it trained")
